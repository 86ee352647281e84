"""Gradients of single examples, a chunk of them at a time."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmforget.context import Context
from mmforget.types import Adapter, Batch, Outputs
from mmforget.vision.adapter import Faces

logger = logging.getLogger(__name__)

Values = Callable[[Outputs, Faces], Tensor]

HELD = 2**27  # numbers of per-example gradients held at once: 512 MiB in float32


def bound(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the model as a function of images with these weights in place of its own."""
    return cast(nn.Module, partial(functional_call, model, dict(weights)))


class SquaredGradients:
    """Sums, over the examples of a batch, squared gradients of their values.

    Gradients of a chunk of examples come from one vectorised pass. A model that `torch.func`
    refuses is walked one example at a time, which is said once.

    Args:
        ctx: Its model is in evaluation mode; computed in full precision, for squares underflow.
        weights: Parameters by name.
        values: Turns the outputs of B examples, and the examples, into values [B, K].
    """

    def __init__(self, ctx: Context, weights: Mapping[str, Tensor], values: Values) -> None:
        self.adapter: Adapter = ctx.adapter
        self.model = ctx.model
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.values = values
        self.vectorised = True

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return Σ_b Σ_k (∂ values[b, k] / ∂w)² over the examples held here, by name."""
        data: Faces = batch.data
        with torch.no_grad():
            kinds = self._values(self.weights, _rows(data, slice(0, 1))).shape[1]
        size = sum(weight.numel() for weight in self.weights.values()) * kinds
        chunk = max(1, HELD // size)
        sums = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for start in range(0, len(data.image), chunk):
            for name, jacobian in self._jacobians(_rows(data, slice(start, start + chunk))).items():
                sums[name] += jacobian.square_().sum(dim=(0, 1))
        return sums

    def _jacobians(self, data: Faces) -> dict[str, Tensor]:
        """Return ∂ values / ∂w, [b, K, *w.shape] by name."""
        if self.vectorised:
            try:
                return self._at_once(data)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.vectorised = False
                logger.warning(
                    "torch.func cannot vectorise %s (%s): gradients are taken one example at a "
                    "time, which is slower and gives the same numbers",
                    type(self.model).__name__,
                    str(error).splitlines()[0],
                )
        rows = [self._single(_rows(data, slice(b, b + 1))) for b in range(len(data.image))]
        return {name: torch.stack([row[name] for row in rows]) for name in self.weights}

    def _at_once(self, data: Faces) -> dict[str, Tensor]:
        def values(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return self._values(weights, Faces(image[None], label[None]))[0]

        jacobian: Callable[..., Any] = vmap(jacrev(values), in_dims=(None, 0, 0))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for vmap
            return cast(dict[str, Tensor], jacobian(self.weights, data.image, data.label))

    def _single(self, data: Faces) -> dict[str, Tensor]:
        leaves = {name: w.detach().requires_grad_() for name, w in self.weights.items()}
        wanted = list(leaves.values())
        rows = [
            torch.autograd.grad(value, wanted, retain_graph=True, materialize_grads=True)
            for value in self._values(leaves, data)[0]
        ]
        return dict(zip(leaves, map(torch.stack, zip(*rows, strict=True)), strict=True))

    def _values(self, weights: Mapping[str, Tensor], data: Faces) -> Tensor:
        return self.values(self.adapter.forward(bound(self.model, weights), data), data)


def _rows(data: Faces, rows: slice) -> Faces:
    return Faces(data.image[rows], data.label[rows])
