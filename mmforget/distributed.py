"""Batch-norm statistics over all processes, on any backend (torch's own needs a GPU).

Training with batch statistics on two processes must equal training on one: each layer's mean and
variance are taken over the whole effective batch. Micro-batches of gradient accumulation still
have statistics of their own; that is what `norm: frozen` (the default while unlearning) avoids.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmforget.engine import Engine
from mmforget.types import full


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: d(sum)/d(part) is 1 on every process."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        total = grad.clone()
        dist.all_reduce(total)
        return total


@contextmanager
def synchronised_norm(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Take batch-norm statistics over all processes while the block runs (one: no change)."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if engine.world == 1 or not layers:
        yield
        return
    for layer in layers:
        # A bound method, so that a copy of the model made meanwhile uses the copy's own weights.
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own forward shows again


def _forward(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    if not layer.training:
        return type(layer).forward(layer, x)
    dims = [d for d in range(x.dim()) if d != 1]
    wide = full(x)
    # The sum and the sum of squared deviations from this process's mean, merged over processes
    # (Chan et al. 1979): squares about zero would lose digits.
    count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
    local_mean = wide.mean(dims)
    sums = _SumOverProcesses.apply(torch.cat([local_mean * count, count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    shift = (local_mean - mean) ** 2 * count
    spread = (wide - _wide(local_mean, x)).pow(2).sum(dims) + shift
    var = _SumOverProcesses.apply(spread) / total
    if layer.track_running_stats and layer.running_mean is not None:
        assert layer.running_var is not None and layer.num_batches_tracked is not None
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            rate = layer.momentum
            if rate is None:
                rate = 1.0 / float(layer.num_batches_tracked)
            layer.running_mean.lerp_(mean.detach(), rate)
            layer.running_var.lerp_(var.detach() * total / (total - 1), rate)
    normed = (wide - _wide(mean, x)) * _wide((var + layer.eps).rsqrt(), x)
    if layer.affine:
        normed = normed * _wide(layer.weight, x) + _wide(layer.bias, x)
    return normed.to(x.dtype)


def _wide(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))
