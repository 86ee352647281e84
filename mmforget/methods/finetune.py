"""Fine-tuning on the retain set: forgetting by neglect."""

from dataclasses import dataclass
from typing import ClassVar

from mmforget.options import option
from mmforget.training import Supervised
from mmforget.types import Training


@dataclass(frozen=True)
class FinetuneConfig(Training):
    """Defaults of Jia et al.: SGD, 10 epochs."""

    epochs: int = option(10, "passes over the retain set", low=0)
    lr: float = option(1e-2, "learning rate; too small a one leaves the model as it was", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)


class Finetune(Supervised):
    """Minimise the mean loss on the retain set, from the original weights.

    With `scope=head` or a regex for the last blocks it is CF-k (Goel et al., arXiv 2201.06640).
    """

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = "Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020"
    config_type: ClassVar[type] = FinetuneConfig
