"""Gradient difference: ascent on the forget set, descent on the retain set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.methods.grad_ascent import ascent
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class GradDiffConfig(Training):
    """Defaults of Maini et al. (TOFU): both weights 1."""

    epochs: int = option(2, "passes over the anchor split", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    forget_weight: float = option(1.0, "weight of the ascent on forget; 1 - beta of NegGrad+")
    retain_weight: float = option(1.0, "weight of the descent on retain; beta of NegGrad+")
    pull: float = option(0.0, "weight of the squared distance to the original weights", low=0)
    anchor: str = option(
        "forget",
        "split walked through once an epoch, the other beside it, cycled (MU*AC: retain)",
        choices=("forget", "retain"),
    )
    max_loss: float | None = option(
        None, "loss per unit above which a forget example gives no gradient; null: none (published)"
    )


class GradDiff(LossMethod[GradDiffConfig]):
    """Minimise w_r·L(D_r) - w_f·L(D_f) + λ·‖θ - θ0‖², each L a mean over units.

    Weights 1 and 1 give GradDiff and "Advanced NegGrad"; w_r = β, w_f = 1 - β give NegGrad+
    (Kurmanji et al., arXiv 2302.09880).
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a copy of the trained weights if `pull` > 0"
    citation: ClassVar[str] = "Liu et al., Continual Learning and Private Unlearning, CoLLAs 2022"
    config_type: ClassVar[type] = GradDiffConfig

    def __init__(self, config: GradDiffConfig) -> None:
        super().__init__(config)
        self.whole = config.pull > 0

    def setup(self, ctx: Context) -> None:
        """Keep the original weights, if they pull."""
        kept = ctx.trainable.values() if self.config.pull > 0 else ()
        self.start = [weight.detach().clone() for weight in kept]

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the anchor, with the other split beside it."""
        other = "retain" if self.config.anchor == "forget" else "forget"
        return (Pass("joint", anchor=self.config.anchor, partner=other),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget`, `retain` and `pull`."""
        config, terms = self.config, {}
        if forget is not None:
            terms["forget"] = config.forget_weight * ascent(ctx, forget, config.max_loss)
        if retain is not None:
            value = ctx.unit_mean(ctx.forward(retain).loss, retain)
            terms["retain"] = config.retain_weight * value
        anchor = forget if config.anchor == "forget" else retain
        if self.start and anchor is not None:  # every part of a step holds some of the anchor
            pairs = zip(ctx.trainable.values(), self.start, strict=True)
            squares = [(weight - start).square().sum() for weight, start in pairs]
            terms["pull"] = ctx.once(config.pull * torch.stack(squares).sum(), anchor)
        return terms
