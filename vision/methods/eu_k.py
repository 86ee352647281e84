"""EU-k: forget the last k blocks exactly, by training them anew on the retain set."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmforget.context import Context
from mmforget.options import option
from mmforget.vision.methods.last_blocks import LastBlocks, LastBlocksConfig


@dataclass(frozen=True)
class EUkConfig(LastBlocksConfig):
    """The published runs train for as many epochs as the original; give the same here."""

    epochs: int = option(10, "passes over the retain set; published: those of the original", low=0)
    lr: float = option(1e-2, "learning rate; published: that of the original", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)
    norm: str = option(
        "train",
        "batch-norm statistics of the new blocks: a fresh block has none worth freezing",
        choices=("frozen", "train"),
    )


class EUk(LastBlocks):
    """Exact unlearning of the last k blocks: initialise them afresh, then train them on D_r.

    Weights and batch-norm statistics of these blocks come from a newly built model, so nothing in
    them has seen D_f. The published notebook keeps the old head and the old statistics;
    `reference` keeps the head.
    """

    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "the last `k` blocks"
    holds: ClassVar[str] = "a freshly initialised model, during set-up"
    citation: ClassVar[str] = (
        "Goel et al., Towards Adversarial Evaluations for Inexact Machine Unlearning, "
        "arXiv 2201.06640"
    )
    config_type: ClassVar[type] = EUkConfig

    @torch.no_grad()
    def setup(self, ctx: Context) -> None:
        """Put the last blocks back to an initial state."""
        super().setup(ctx)
        fresh = ctx.fresh_model(ctx.seed).state_dict()
        for name, value in ctx.model.state_dict().items():
            if self.covers(name):
                value.copy_(fresh[name])
