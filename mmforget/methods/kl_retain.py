"""KL minimisation: ascent on the forget set, closeness to the original model on the retain set."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.methods.grad_ascent import ascent
from mmforget.options import option
from mmforget.types import Batch, Training


@dataclass(frozen=True)
class KLRetainConfig(Training):
    """Defaults of Maini et al. (TOFU): AdamW, both weights 1."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(32, "examples in an effective batch", low=1)
    forget_weight: float = option(1.0, "weight of the ascent on forget", low=0)
    retain_weight: float = option(1.0, "weight of the KL term on retain", low=0)
    max_loss: float | None = option(
        None, "loss per unit above which a forget example gives no gradient; null: none (published)"
    )
    reference: bool = option(
        False, "average the KL over all positions, prompt and padding too, as open-unlearning does"
    )


class KLRetain(LossMethod[KLRetainConfig]):
    """Minimise -w_f·L(D_f) + w_r·KL(original ‖ model) on D_r."""

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a frozen copy of the original model"
    citation: ClassVar[str] = "Maini et al., TOFU, COLM 2024, arXiv 2401.06121"
    config_type: ClassVar[type] = KLRetainConfig

    def setup(self, ctx: Context) -> None:
        """Keep the original model."""
        self.original = ctx.frozen_copy()

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, terms = self.config, {}
        if forget is not None:
            terms["forget"] = config.forget_weight * ascent(ctx, forget, config.max_loss)
        if retain is not None:
            kl = divergence_from(ctx, self.original, retain, config.reference)
            terms["retain"] = config.retain_weight * kl
        return terms


def divergence_from(ctx: Context, teacher: nn.Module, batch: Batch, everywhere: bool) -> Tensor:
    """Return the mean over units of KL(teacher ‖ model), scalar.

    Args:
        ctx: The run.
        teacher: A frozen model.
        batch: Where to compare the two.
        everywhere: Ignore the mask: average over all B·T positions (the last ones of which a
            causal model predicts nothing included), as open-unlearning does. No effect where
            predictions have no mask.
    """
    student, target = ctx.forward(batch), ctx.forward(batch, teacher)
    if everywhere and student.mask is not None:
        positions = student.mask[0].numel()
        student, target = student._replace(mask=None), target._replace(mask=None)
        return ctx.mean(ctx.adapter.divergence(student, target), batch) / positions
    return ctx.unit_mean(ctx.adapter.divergence(student, target), batch)
