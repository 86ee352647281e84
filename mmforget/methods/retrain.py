"""Retraining from scratch without the forget set: exact unlearning, the gold standard."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmforget.context import Context
from mmforget.options import option
from mmforget.types import UnlearningMethod


@dataclass(frozen=True)
class RetrainConfig:
    """Which retrained model to return."""

    seed: int | None = option(
        None, "training seed; null returns the run's own reference, which is trained once"
    )


class Retrain(UnlearningMethod[RetrainConfig]):
    """Return a fresh model trained on the retain set by the benchmark's own recipe.

    Another seed than the reference's shows how far two retrained models are apart: no method can
    be asked to come closer.
    """

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "reference"
    trains: ClassVar[str] = "all weights, from a fresh initialisation"
    citation: ClassVar[str] = (
        "Bourtoule et al., Machine Unlearning, IEEE S&P 2021, arXiv 1912.03817"
    )
    config_type: ClassVar[type] = RetrainConfig

    def run(self, ctx: Context) -> nn.Module:
        """Return the retrained model."""
        return ctx.retrain(self.config.seed)
