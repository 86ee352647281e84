"""CF-k: fine-tune the last k blocks on the retain set."""

from dataclasses import dataclass
from typing import ClassVar

from mmforget.options import option
from mmforget.vision.methods.last_blocks import LastBlocks, LastBlocksConfig


@dataclass(frozen=True)
class CFkConfig(LastBlocksConfig):
    """Defaults of the SCRUB repository, with the three blocks of MU*AC."""

    epochs: int = option(10, "passes over the retain set", low=0)
    lr: float = option(1e-2, "learning rate", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)


class CFk(LastBlocks):
    """Catastrophic forgetting of the last k blocks: train them on D_r from θ0, nothing else."""

    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "the last `k` blocks"
    citation: ClassVar[str] = (
        "Goel et al., Towards Adversarial Evaluations for Inexact Machine Unlearning, "
        "arXiv 2201.06640"
    )
    config_type: ClassVar[type] = CFkConfig
