"""Raise each forget example's loss to a margin and no further; keep the loss on retain low."""

from dataclasses import dataclass

from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.registry import METHODS
from mmforget.types import Training


@dataclass(frozen=True)
class MarginConfig(Training):
    margin: float = option(2.0, "loss per unit from which an example counts as forgotten", low=0)


@METHODS.register("margin")
class Margin(LossMethod[MarginConfig]):
    """Minimise mean max(0, m - L) on D_f and mean L on D_r, L the loss per unit."""

    reads = frozenset({"forget", "retain"})
    intent, citation, config_type = "removal", "docs/add_a_method.md", MarginConfig

    def loss(self, ctx, forget, retain):
        terms = {"retain": ctx.unit_mean(ctx.forward(retain).loss, retain)} if retain else {}
        if forget:
            missing = self.config.margin * forget.units - ctx.forward(forget).loss
            terms["forget"] = ctx.unit_mean(missing.clamp_min(0), forget)
        return terms
