"""Selective synaptic dampening: shrink the weights that matter more to forget than to the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.options import option
from mmforget.types import UnlearningMethod


@dataclass(frozen=True)
class SSDConfig:
    """Defaults of Foster et al. for ResNet-18; `alpha` needs tuning for every model."""

    alpha: float = option(10.0, "a weight is chosen where I_f > alpha·I_D; small collapses", low=0)
    dampening: float = option(1.0, "lambda: chosen weights shrink to lambda·I_D/I_f", low=0)
    importance: str = option(
        "ssd", "`ssd`: squared gradient of the loss; `lfssd`: label-free", choices=("ssd", "lfssd")
    )
    importance_batch_size: int = option(
        64, "examples in the mean whose gradient is squared: part of the definition", low=1
    )
    scope: str = option("all", "parameters to look at: all, head, last_k:N, or a regex")


class SSD(UnlearningMethod[SSDConfig]):
    """Where I_f > α·I_D: θ ← θ·min(λ·I_D/I_f, 1) (eq. 5 and 6); no training.

    I is the mean over batches of the squared gradient of a batch's mean loss (label-free: of the
    size of the gradient of its mean ‖f(x)‖²), I_f over the forget set and I_D over all training
    data, forget included, in evaluation mode and stored order. Batch-norm statistics stay.
    """

    reads: frozenset[str] = frozenset({"forget", "train"})
    modalities = frozenset({"vision"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "two importances for every weight"
    citation: ClassVar[str] = (
        "Foster et al., Fast Machine Unlearning without Retraining through Selective Synaptic "
        "Dampening, AAAI 2024; label-free: Foster et al., arXiv 2402.19308"
    )
    config_type: ClassVar[type] = SSDConfig

    def run(self, ctx: Context) -> nn.Module:
        """Measure both importances and dampen."""
        ctx.model.eval()
        weights = list(ctx.scope(self.config.scope).values())
        size, kind = self.config.importance_batch_size, self.config.importance
        forget = importances(ctx, "forget", weights, size, kind)
        full = importances(ctx, "train", weights, size, kind)
        dampen(weights, forget, full, self.config.alpha, self.config.dampening)
        return ctx.model


def importances(
    ctx: Context, split: str, weights: Sequence[Tensor], batch_size: int, kind: str
) -> list[Tensor]:
    """Return each weight's importance to a split, in the shapes of `weights`.

    Args:
        ctx: Its model is in evaluation mode.
        split: Walked once in stored order.
        weights: Parameters of the model.
        batch_size: Effective batch.
        kind: "ssd" or "lfssd".
    """
    sums = [torch.zeros_like(weight) for weight in weights]
    batches = 0
    for batch in ctx.batches(split, batch_size):
        outputs = ctx.forward(batch)
        labelled = kind == "ssd"
        values = outputs.loss if labelled else outputs.pred.square().sum(dim=1)
        gradients = ctx.gradients(ctx.mean(values, batch), weights)
        torch._foreach_add_(
            sums, torch._foreach_pow(gradients, 2) if labelled else torch._foreach_abs(gradients)
        )
        batches += 1
    torch._foreach_div_(sums, batches)
    return sums


@torch.no_grad()
def dampen(
    weights: Sequence[Tensor],
    forget: Sequence[Tensor],
    full: Sequence[Tensor],
    alpha: float,
    dampening: float,
) -> None:
    """Shrink weights in place where `forget` > alpha·`full`, to dampening·full/forget of them.

    Args:
        weights: Changed in place.
        forget: Importance to the forget set, in their shapes.
        full: Importance to all training data.
        alpha: Selection weight; infinite chooses none.
        dampening: Bound of what is left; a weight never grows.
    """
    for weight, i_f, i_d in zip(weights, forget, full, strict=True):
        factor = (dampening * i_d / i_f).clamp(max=1.0)
        weight.copy_(torch.where(i_f > alpha * i_d, weight * factor, weight))
