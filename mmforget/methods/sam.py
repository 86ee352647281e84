"""Sharpness-aware unlearning: forget in a way that a small change of weights does not undo."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import Part, Wrapper, add_terms
from mmforget.options import option


@dataclass(frozen=True)
class SAMConfig:
    """How far to look, and which method's forget terms are made robust."""

    rho: float = option(0.01, "radius of the perturbation, in the norm over all weights", low=0)
    inner: dict[str, Any] = option(
        {}, "the loss method and its settings; `inner.name` is npo if not given"
    )


class SAM(Wrapper[SAMConfig]):
    """Step along ∇F(θ + ρ·g/‖g‖) + ∇R(θ), where F are the forget terms and g = ∇F(θ).

    All other terms of the inner method are R. A step evaluates the forget terms twice and the
    rest once; with batch-norm statistics in training mode the forget batch counts twice in them.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    inner_default: ClassVar[str] = "npo"
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "weights in the inner method's `scope`"
    holds: ClassVar[str] = "two copies of the trained weights, and what the inner method holds"
    citation: ClassVar[str] = (
        "Fan et al., Towards LLM Unlearning Resilient to Relearning, ICML 2025"
    )
    whole: bool = True
    config_type: ClassVar[type] = SAMConfig

    def backward(self, ctx: Context, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Accumulate both gradients; returns the terms as they are at θ."""
        weights, accelerator = list(ctx.trainable.values()), ctx.engine.accelerator
        logged: dict[str, Tensor] = {}
        rise = [torch.zeros_like(weight) for weight in weights]
        for whole in parts:
            for part in whole.sides():
                terms = self.inner.terms(ctx, part)
                push, rest = _split(terms)
                if push is not None:
                    torch._foreach_add_(rise, ctx.gradients(push, weights))
                if rest is not None:
                    accelerator.backward(rest)
                add_terms(logged, terms)
        start = [weight.detach().clone() for weight in weights]
        norm = torch.stack(torch._foreach_norm(rise)).norm().clamp_min(1e-12)
        with torch.no_grad():
            for weight, slope in zip(weights, rise, strict=True):
                weight.add_(slope * (self.config.rho / norm))
        for whole in parts:
            for part in (Part(forget=whole.forget), Part(extra=whole.extra)):
                push = _split(self.inner.terms(ctx, part))[0] if any(part) else None
                if push is not None:
                    accelerator.backward(push)
        with torch.no_grad():  # adding and subtracting would not give the same bits back
            for weight, kept in zip(weights, start, strict=True):
                weight.copy_(kept)
        return logged


def _split(terms: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return the sum of the forget terms and the sum of the others, None where there are none."""
    push = [value for name, value in terms.items() if name.startswith("forget")]
    rest = [value for name, value in terms.items() if not name.startswith("forget")]
    return (torch.stack(push).sum() if push else None, torch.stack(rest).sum() if rest else None)
