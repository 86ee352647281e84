"""Influence unlearning (IU, WoodFisher): one Newton-like step away from the forget set."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmforget.context import Context
from mmforget.options import option
from mmforget.types import Batch, UnlearningMethod
from mmforget.vision.methods.per_example import bound

RESIDUAL = 1e-6  # relative, at which conjugate gradients stop

Weights = dict[str, Tensor]  # by parameter name


@dataclass(frozen=True)
class InfluenceConfig:
    """Defaults of the SalUn repository."""

    alpha: float = option(0.2, "length of the step (published: 1 to 20; users report below 1)")
    samples: int = option(1000, "N: retain examples behind the inverse Fisher information", low=1)
    reference: bool = option(False, "use the published recursion in place of the true inverse")
    iterations: int = option(20, "conjugate-gradient iterations of the true inverse", low=1)
    batch_size: int = option(64, "examples computed at a time; does not change the result", low=1)
    scope: str = option("all", "parameters to change: all, head, last_k:N, or a regex")


class InfluenceUnlearning(UnlearningMethod[InfluenceConfig]):
    """θ ← θ + α·F⁻¹v, v = n_f/(n_f + n_r)·(mean ∇L(D_f) - mean ∇L(D_r)), F = I + 1/N Σ s sᵀ.

    The s are gradients of N + 2 single retain examples in stored order. F⁻¹v is found by conjugate
    gradients on products with F, so no matrix and no gradient of a single example is ever held.

    The published code runs a recursion instead: k ← v, o ← s₁, and for each further s: t = o·s,
    k ← k - k·s/(N + t)·o, o ← o - t/(N + t)·o. As o only ever shrinks, it stays a multiple of s₁:
    k is v changed along s₁ alone, which is no inverse. `reference` gives it; it needs just the
    numbers v·s and s₁·s of each example, which are derivatives of losses along v and s₁.

    Evaluation mode throughout; batch-norm statistics stay.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"vision"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "five vectors as long as the weights"
    citation: ClassVar[str] = (
        "Izzo et al., AISTATS 2021; WoodFisher: Singh & Alistarh, NeurIPS 2020; as in Jia et al., "
        "Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023"
    )
    config_type: ClassVar[type] = InfluenceConfig

    def run(self, ctx: Context) -> nn.Module:
        """Find the step and take it."""
        config = self.config
        ctx.model.eval()
        weights = ctx.scope(config.scope)
        n_f, n_r = len(ctx.split("forget")), len(ctx.split("retain"))
        forget = mean_gradient(ctx, weights, "forget", config.batch_size)
        retain = mean_gradient(ctx, weights, "retain", config.batch_size)
        v = {name: (forget[name] - retain[name]) * (n_f / (n_f + n_r)) for name in weights}
        solve = recursion if config.reference else inverse
        step = solve(ctx, v, config)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(step[name], alpha=config.alpha)
        return ctx.model


def mean_gradient(
    ctx: Context, weights: Mapping[str, Tensor], split: str, batch_size: int
) -> Weights:
    """Return the gradient of the mean loss over a whole split, by name."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    size = len(ctx.split(split))
    for batch in ctx.batches(split, batch_size):
        value = ctx.mean(ctx.forward(batch).loss, batch)
        gradients = ctx.gradients(value, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.add_(gradient, alpha=batch.total / size)
    return sums


def inverse(ctx: Context, v: Weights, config: InfluenceConfig) -> Weights:
    """Return (I + 1/N Σ s sᵀ)⁻¹ v by conjugate gradients."""
    found = {name: torch.zeros_like(part) for name, part in v.items()}
    residual = {name: part.clone() for name, part in v.items()}
    direction = {name: part.clone() for name, part in v.items()}
    size = start = _dot(residual, residual)
    for _ in range(config.iterations):
        if size <= RESIDUAL**2 * start:
            break
        product = _fisher_product(ctx, direction, config)
        length = size / _dot(direction, product)
        for name in v:
            found[name].add_(direction[name], alpha=length)
            residual[name].sub_(product[name], alpha=length)
        size, last = _dot(residual, residual), size
        for name in v:
            direction[name].mul_(size / last).add_(residual[name])
    return found


def recursion(ctx: Context, v: Weights, config: InfluenceConfig) -> Weights:
    """Return the k of the published recursion, with o written as c·s₁ and k as v - b·s₁."""
    first = _first_gradient(ctx, v)
    pairs: list[tuple[float, float]] = []  # (v·s, s₁·s) of each example
    for batch, rows, wanted in _samples(ctx, config):
        numbers = torch.zeros(batch.total, 2, dtype=torch.float64, device=ctx.engine.device)
        both = torch.stack([derivatives(ctx, batch, way) for way in (v, first)], dim=1)
        numbers[rows.start : rows.stop] = both * batch.weight
        ctx.engine.reduce_sum([numbers])
        pairs += [(row[0], row[1]) for row in numbers[:wanted].tolist()]
    b, c = 0.0, 1.0
    for v_s, first_s in pairs[1:]:
        t = c * first_s
        b += (v_s - b * first_s) / (config.samples + t) * c
        c -= t / (config.samples + t) * c
    return {name: v[name] - b * first[name] for name in v}


def derivatives(ctx: Context, batch: Batch, direction: Weights) -> Tensor:
    """Return the derivative of each example's loss along a direction of the weights, [B]."""
    weights, losses = _losses(ctx, batch, direction)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
        found: Tensor = jvp(losses, (weights,), (direction,))[1]
    return found.detach()


def _fisher_product(ctx: Context, direction: Weights, config: InfluenceConfig) -> Weights:
    """Return direction + 1/N Σ s·(sᵀ direction)."""
    sums = {name: torch.zeros_like(part) for name, part in direction.items()}
    for batch, rows, wanted in _samples(ctx, config):
        along = derivatives(ctx, batch, direction)
        along[max(0, wanted - rows.start) :] = 0
        weights, losses = _losses(ctx, batch, direction)
        (parts,) = vjp(losses, weights)[1](along * batch.weight)
        for name, total in sums.items():
            total += parts[name].detach()
    ctx.engine.reduce_sum(list(sums.values()))
    return {name: direction[name] + total / config.samples for name, total in sums.items()}


def _losses(
    ctx: Context, batch: Batch, like: Weights
) -> tuple[Weights, Callable[[Weights], Tensor]]:
    """Return the weights named in `like`, and the losses [B] as a function of them."""
    own = dict(ctx.model.named_parameters())

    def losses(weights: Weights) -> Tensor:
        return ctx.adapter.forward(bound(ctx.model, weights), batch.data).loss

    return {name: own[name].detach() for name in like}, losses


def _samples(ctx: Context, config: InfluenceConfig) -> Iterator[tuple[Batch, range, int]]:
    """Yield the first N + 2 retain examples in batches.

    Yields:
        A batch, the rows of it that are held here, and how many of its rows are wanted.
    """
    left = config.samples + 2
    for batch in ctx.batches("retain", config.batch_size):
        ((rows, _),) = ctx.engine.cuts(batch.total, 1)
        yield batch, rows, min(left, batch.total)
        left -= batch.total
        if left <= 0:
            return


def _first_gradient(ctx: Context, like: Weights) -> Weights:
    batch = next(ctx.batches("retain", 1))
    weights = [ctx.trainable[name] for name in like]
    gradients = ctx.gradients(ctx.mean(ctx.forward(batch).loss, batch), weights)
    return dict(zip(like, gradients, strict=True))


def _dot(one: Weights, other: Weights) -> float:
    return float(torch.stack([(one[name] * other[name]).sum() for name in one]).sum())
