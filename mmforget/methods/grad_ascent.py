"""Gradient ascent on the forget set (NegGrad)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class GradAscentConfig(Training):
    """Defaults of Fan et al. (arXiv 2310.12508) for gradient ascent."""

    epochs: int = option(5, "passes over the forget set", low=0)
    lr: float = option(1e-4, "learning rate; the loss has no bound, so small", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)
    max_loss: float | None = option(
        None, "loss per unit above which an example gives no gradient; null: none (published)"
    )


class GradAscent(LossMethod[GradAscentConfig]):
    """Maximise the mean loss on the forget set; nothing holds the rest in place."""

    reads: frozenset[str] = frozenset({"forget"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = "Thudi et al., Unrolling SGD, EuroS&P 2022, arXiv 2109.13398"
    config_type: ClassVar[type] = GradAscentConfig

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set."""
        return (Pass("forget", anchor="forget"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the negative mean loss over units of the forget batch."""
        return {} if forget is None else {"forget": ascent(ctx, forget, self.config.max_loss)}


def ascent(ctx: Context, forget: Batch, max_loss: float | None) -> Tensor:
    """Return minus the mean loss over units, scalar; constant for examples above `max_loss`.

    Args:
        ctx: The run.
        forget: What to forget.
        max_loss: Ceiling of an example's mean loss over its own units; None: none.
    """
    loss = ctx.forward(forget).loss
    if max_loss is not None:
        loss = loss.minimum(forget.units * max_loss)
    return -ctx.unit_mean(loss, forget)
