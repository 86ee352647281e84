"""Task arithmetic: learn the forget set even better, then go the other way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class TaskVectorConfig(Training):
    """Fine-tuning on the forget set, and how far to go the other way."""

    epochs: int = option(5, "passes over the forget set", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    strength: float = option(1.0, "multiple of the task vector that is subtracted", low=0)


class TaskVector(LossMethod[TaskVectorConfig]):
    """Return θ0 - s·(θ_f - θ0), θ_f fine-tuned on the forget set; buffers stay θ0's."""

    reads: frozenset[str] = frozenset({"forget"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a copy of the trained weights"
    citation: ClassVar[str] = "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023"
    config_type: ClassVar[type] = TaskVectorConfig

    def setup(self, ctx: Context) -> None:
        """Keep the original weights and buffers."""
        self.start = [weight.detach().clone() for weight in ctx.trainable.values()]
        self.buffers = [buffer.clone() for buffer in ctx.model.buffers()]

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set."""
        return (Pass("forget", anchor="forget"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean loss over units of the forget batch."""
        if forget is None:
            return {}
        return {"forget": ctx.unit_mean(ctx.forward(forget).loss, forget)}

    @torch.no_grad()
    def finish(self, ctx: Context) -> nn.Module:
        """Subtract the task vector from the original weights."""
        for weight, start in zip(ctx.trainable.values(), self.start, strict=True):
            weight.copy_(start - self.config.strength * (weight - start))
        for buffer, start in zip(ctx.model.buffers(), self.buffers, strict=True):
            buffer.copy_(start)
        return ctx.model
