"""Bad teacher: imitate the original on the retain set and a random network on the forget set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.rng import derive
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class BadTeacherConfig(Training):
    """Defaults of the reference: Adam, one epoch, 30 % of the retain set."""

    epochs: int = option(1, "passes over forget and the share of retain", low=0)
    lr: float = option(1e-4, "learning rate", low=0)
    optimizer: str = option("adam", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(256, "examples in an effective batch", low=1)
    retain_fraction: float = option(0.3, "share of the retain set used", low=0, high=1)
    temperature: float = option(1.0, "temperature of all distributions", low=1e-3)
    reference: bool = option(
        False, "divide the KL by the number of classes as well, as the published code does"
    )


class BadTeacher(LossMethod[BadTeacherConfig]):
    """Minimise KL(teacher ‖ model) over batches mixed of forget and retain (eq. 3).

    The competent teacher is the original model, the incompetent one a freshly initialised network
    that stays the same for the run. The KL is a mean over units and has no factor T².
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a frozen copy of the original model and a random network"
    citation: ClassVar[str] = "Chundawat et al., Can Bad Teaching Induce Forgetting?, AAAI 2023"
    config_type: ClassVar[type] = BadTeacherConfig

    def setup(self, ctx: Context) -> None:
        """Keep the original model and make the incompetent teacher."""
        self.competent = ctx.frozen_copy()
        fresh = ctx.fresh_model(derive(ctx.seed, "incompetent"))
        self.incompetent = fresh.eval().requires_grad_(False)

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over forget and a fixed share of retain, shuffled together."""
        return (Pass("union", anchor="union", fraction=self.config.retain_fraction),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        terms = {}
        if forget is not None:
            terms["forget"] = self._imitate(ctx, self.incompetent, forget)
        if retain is not None:
            terms["retain"] = self._imitate(ctx, self.competent, retain)
        return terms

    def _imitate(self, ctx: Context, teacher: nn.Module, batch: Batch) -> Tensor:
        temperature = self.config.temperature
        student, target = ctx.forward(batch), ctx.forward(batch, teacher)
        divergence = ctx.adapter.divergence(student, target, temperature) / temperature**2
        if self.config.reference:
            divergence = divergence / student.pred.shape[-1]
        return ctx.unit_mean(divergence, batch)
