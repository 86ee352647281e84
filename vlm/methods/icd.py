"""ICD: gradient ascent on whole profiles, asked for by prompts that tell the model to tell all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.methods.grad_ascent import ascent
from mmforget.options import option
from mmforget.types import Batch, Pass
from mmforget.vlm.methods.base import LoraTraining


@dataclass(frozen=True)
class ICDConfig(LoraTraining):
    """Defaults of FIUBench's runs: learning rate 1e-4, 5 epochs, batches of 128."""

    epochs: int = option(5, "passes over the forget set's profiles", low=0)
    lr: float = option(1e-4, "learning rate; the loss has no bound", low=0)
    batch_size: int = option(128, "examples in an effective batch", low=1)
    max_loss: float | None = option(
        None, "loss per token above which a profile gives no gradient; null: none (published)"
    )


class ICD(LossMethod[ICDConfig]):
    """Maximise the mean loss over the tokens of profiles: captions that hold all of a person.

    The benchmark gives them as the stream `profiles`, one beside every forget example. FIUBench's
    code has it as its fifth loss; the paper does not describe it.
    """

    reads: frozenset[str] = frozenset({"forget", "profiles"})
    modalities = frozenset({"vlm"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = "FIUBench (code), ICLR 2025, arXiv 2411.03554"
    config_type: ClassVar[type] = ICDConfig

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set's places, for the profiles beside it."""
        return (Pass("profile", anchor="forget", extra="profiles", aligned=True),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return no terms: questions and answers themselves are left alone."""
        return {}

    def extra_loss(self, ctx: Context, extra: Batch) -> dict[str, Tensor]:
        """Return the term `forget`, of profiles."""
        return {"forget": ascent(ctx, extra, self.config.max_loss)}
