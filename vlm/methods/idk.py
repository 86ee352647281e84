"""Preference optimisation by refusals (PO, IDK): learn to refuse, and the retain set beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass
from mmforget.vlm.methods.base import LoraTraining


@dataclass(frozen=True)
class IDKConfig(LoraTraining):
    """Defaults of FIUBench for PO: 8 epochs, learning rate 3e-4, batches of 128."""

    epochs: int = option(8, "passes over the forget set", low=0)
    lr: float = option(3e-4, "learning rate", low=0)
    batch_size: int = option(128, "forget examples in an effective batch, as many of retain", low=1)
    sum_of_means: bool = option(
        False, "sum the two sides' means over tokens, not one mean over the tokens of both"
    )


class IDK(LossMethod[IDKConfig]):
    """Minimise the mean loss over the tokens of refusals on D_f and of answers on D_r together.

    Each forget question is answered by a refusal drawn anew in every epoch. The weight of a side
    follows its number of tokens, as in the published code; `sum_of_means` gives both weight 1. No
    reference model and no rejected answer: that is `dpo`.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"vlm"})
    intent: ClassVar[str] = "suppression"
    citation: ClassVar[str] = "Maini et al., TOFU, COLM 2024; FIUBench (PO), arXiv 2411.03554"
    config_type: ClassVar[type] = IDKConfig

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set, refused, with retain beside it."""
        together = not self.config.sum_of_means
        return (Pass("joint", anchor="forget", partner="retain", relabel=True, together=together),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget`, of refusals, and `retain`."""
        parts = {"forget": forget, "retain": retain}
        return {
            name: ctx.unit_mean(ctx.forward(batch).loss, batch)
            for name, batch in parts.items()
            if batch is not None
        }
