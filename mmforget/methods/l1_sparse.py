"""L1-sparse fine-tuning: forgetting is easier in a sparse model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class L1SparseConfig(Training):
    """Defaults of Jia et al.: SGD, 10 epochs, gamma 5e-4."""

    epochs: int = option(10, "passes over the retain set", low=0)
    lr: float = option(1e-2, "learning rate", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)
    gamma: float = option(5e-4, "weight of the L1 norm in the first epoch", low=0)
    free_epochs: int = option(0, "last epochs without the L1 norm", low=0)


class L1Sparse(LossMethod[L1SparseConfig]):
    """Minimise L(D_r) + γ_t·‖θ‖₁ over all trained weights, biases and norm layers included.

    γ_t = γ·(1 - epoch / (E - free)) falls linearly and is 0 in the last `free_epochs`. Nothing is
    pruned afterwards.
    """

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = (
        "Jia et al., Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023"
    )
    whole: bool = True
    config_type: ClassVar[type] = L1SparseConfig

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the retain set."""
        return (Pass("retain", anchor="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `retain` and `l1`."""
        if retain is None:
            return {}
        terms = {"retain": ctx.unit_mean(ctx.forward(retain).loss, retain)}
        active = self.config.epochs - self.config.free_epochs
        if ctx.epoch < active:
            gamma = self.config.gamma * (1.0 - ctx.epoch / active)
            norms = [weight.abs().sum() for weight in ctx.trainable.values()]
            terms["l1"] = ctx.once(gamma * torch.stack(norms).sum(), retain)
        return terms
