"""Direct preference optimisation (DPO): a wrong target (a refusal) is preferred to the true one."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.methods.npo import loss_before
from mmforget.options import option
from mmforget.types import Batch, Training


@dataclass(frozen=True)
class DPOConfig(Training):
    """Defaults of open-unlearning for TOFU: beta 0.1, 10 epochs, batches of 32."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(32, "examples in an effective batch", low=1)
    beta: float = option(0.1, "inverse temperature", low=1e-6)
    standard: bool = option(
        False, "leave out the factor 2/beta, as Rafailov et al.; open-unlearning has it"
    )
    forget_weight: float = option(1.0, "weight of the preference term", low=0)
    retain_weight: float = option(1.0, "weight of the loss on retain; 0 leaves it out", low=0)


class DPO(LossMethod[DPOConfig]):
    """Minimise -(2/β)·mean log σ(β·(r(wrong) - r(true))) on D_f, and the loss on D_r.

    r = log p_θ - log p_original of a target, summed over its units. The wrong target (a refusal,
    another class) is drawn for each example anew in every step.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "suppression"
    holds: ClassVar[str] = "the original, and its losses on forget where these are not drawn"
    citation: ClassVar[str] = (
        "Rafailov et al., Direct Preference Optimization, NeurIPS 2023; TOFU, arXiv 2401.06121"
    )
    config_type: ClassVar[type] = DPOConfig

    def setup(self, ctx: Context) -> None:
        """Keep the original, and what it makes of the true targets."""
        self.original = ctx.frozen_copy()
        self.before = ctx.start_losses("forget")

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, terms = self.config, {}
        if forget is not None:
            terms["forget"] = config.forget_weight * self._prefer(ctx, forget)
        if retain is not None and config.retain_weight > 0:
            hold = ctx.unit_mean(ctx.forward(retain).loss, retain)
            terms["retain"] = config.retain_weight * hold
        return terms

    def _prefer(self, ctx: Context, forget: Batch) -> Tensor:
        config = self.config
        wrong = ctx.adapter.relabel(forget.data, forget.draws("relabel"))
        chosen = replace(forget, data=wrong, units=ctx.adapter.units(wrong))
        gain = ctx.forward(chosen, self.original).loss - ctx.forward(chosen).loss
        rejected = ctx.forward(forget).loss
        before = loss_before(ctx, forget, rejected, self.before, self.original)
        push = -F.logsigmoid(config.beta * (gain + rejected - before))
        return ctx.mean(push if config.standard else 2.0 / config.beta * push, forget)
