"""SalUn: change only the weights that the forget set depends on most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmforget.context import Context
from mmforget.methods.base import Wrapper
from mmforget.options import option
from mmforget.sharding import like
from mmforget.types import Batch


@dataclass(frozen=True)
class SalUnConfig:
    """How many weights may change, and which method changes them."""

    ratio: float = option(0.5, "share of the weights in scope that may change", low=0, high=1)
    mask_batch_size: int = option(256, "effective batch of the saliency pass", low=1)
    inner: dict[str, Any] = option(
        {}, "the loss method and its settings; `inner.name` is random_label if not given"
    )


class SalUn(Wrapper[SalUnConfig]):
    """Train by the inner method where |Σ_batches ∇L(D_f)| at θ0 is among the largest (eq. 4).

    One ranking runs over all weights in scope. Elsewhere weights stay at θ0 exactly: gradients
    are masked, and what momentum and weight decay did is undone. Batch-norm statistics are no
    weights; `norm` of the inner method governs them.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    adds_reads: ClassVar[frozenset[str]] = frozenset({"forget"})
    inner_default: ClassVar[str] = "random_label"
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "the most salient weights in the inner method's `scope`"
    holds: ClassVar[str] = "a mask, a copy of the trained weights, and what the inner method holds"
    citation: ClassVar[str] = "Fan et al., SalUn, ICLR 2024, arXiv 2310.12508"
    config_type: ClassVar[type] = SalUnConfig

    def setup(self, ctx: Context) -> None:
        """Set up the inner method; choose the weights, the model in evaluation mode."""
        super().setup(ctx)
        weights, ranked = list(ctx.trainable.values()), self.ranked(ctx)
        self.start = [weight.detach().clone() for weight in weights]
        saliency = [torch.zeros_like(weight) for weight in ranked]
        for batch in ctx.batches("forget", self.config.mask_batch_size):
            torch._foreach_add_(saliency, ctx.gradients(self.objective(ctx, batch), ranked))
        masks = largest(saliency, self.config.ratio)
        of = {id(weight): mask for weight, mask in zip(ranked, masks, strict=True)}
        self.masks = [of[id(weight)] for weight in weights]

    def ranked(self, ctx: Context) -> list[nn.Parameter]:
        """Return the weights that one ranking runs over; the trained ones are among them."""
        return list(ctx.trainable.values())

    def objective(self, ctx: Context, batch: Batch) -> Tensor:
        """Return what the saliency is the gradient of, scalar, for a batch of the forget set."""
        return ctx.unit_mean(ctx.forward(batch).loss, batch)

    def after_backward(self, ctx: Context) -> None:
        """Drop the gradient of weights that must not change."""
        super().after_backward(ctx)
        weights = list(ctx.trainable.values())
        if isinstance(weights[0], DTensor) and not isinstance(self.masks[0], DTensor):
            self.masks, self.start = (
                [like(value, weight) for value, weight in zip(values, weights, strict=True)]
                for values in (self.masks, self.start)
            )
        for weight, mask in zip(ctx.trainable.values(), self.masks, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self, ctx: Context, optimizer: Any) -> None:
        """Put the other weights back to θ0, and their momentum to zero."""
        super().after_step(ctx, optimizer)
        rows = zip(ctx.trainable.values(), self.start, self.masks, strict=True)
        for weight, start, mask in rows:
            weight.copy_(torch.where(mask, weight, start))
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.mul_(mask)


def largest(values: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """Return boolean masks of the floor(ratio·P) entries of largest size over all P together.

    Args:
        values: Tensors of any shape; equal sizes rank in the order given.
        ratio: Share to choose, in [0, 1].
    """
    flat = torch.cat([value.reshape(-1) for value in values]).abs()
    count = int(ratio * flat.numel())
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if count > 0:  # to select is many times faster than to sort what a large model has
        least = flat.kthvalue(flat.numel() - count + 1).values
        chosen = flat > least
        equal = (flat == least).nonzero().squeeze(1)
        chosen[equal[: count - int(chosen.sum())]] = True
    parts = torch.split(chosen, [value.numel() for value in values])
    return [part.view_as(value) for part, value in zip(parts, values, strict=True)]
