"""Preference optimisation by refusals (PO, IDK): learn wrong targets, and the retain set beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class IDKConfig(Training):
    """Defaults of Maini et al. (TOFU): AdamW."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(32, "forget examples in an effective batch, as many of retain", low=1)
    sum_of_means: bool = option(
        False, "sum the two sides' means over units, not one mean over the units of both"
    )


class IDK(LossMethod[IDKConfig]):
    """Minimise the mean loss over the units of wrong targets on D_f and of true ones on D_r.

    Where the model speaks, a wrong target is a refusal, drawn anew in every epoch. The weight of a
    side follows its number of units (answer tokens), as in the published code; `sum_of_means` gives
    both weight 1. No reference model and no rejected target: that is `dpo`.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "suppression"
    citation: ClassVar[str] = "Maini et al., TOFU, COLM 2024; FIUBench (PO), arXiv 2411.03554"
    config_type: ClassVar[type] = IDKConfig

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set with wrong targets, retain beside it."""
        together = not self.config.sum_of_means
        return (Pass("joint", anchor="forget", partner="retain", relabel=True, together=together),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget`, of wrong targets, and `retain`."""
        parts = {"forget": forget, "retain": retain}
        return {
            name: ctx.unit_mean(ctx.forward(batch).loss, batch)
            for name, batch in parts.items()
            if batch is not None
        }
