"""Fisher forgetting: noise where the retain set does not need precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from mmforget.context import Context
from mmforget.options import option
from mmforget.rng import generator
from mmforget.types import Outputs, UnlearningMethod
from mmforget.vision.adapter import Faces
from mmforget.vision.methods.per_example import SquaredGradients

CEILING = 1e3  # of 1/F: keeps weights without information from being erased
HEAD_CEILING = 1e2
LARGEST_STD = 1e-3  # of the simple form
MAGNIFIED = 10.0  # factor on the noise of the head, and in the full form of vectors


@dataclass(frozen=True)
class FisherConfig:
    """Defaults of the SSD and SalUn repositories; the result depends on `alpha` strongly."""

    alpha: float = option(1e-6, "amount of noise (published: 1e-9 to 1e-6)", low=0)
    form: str = option(
        "full",
        "`full`: expectation over the model's own labels; `simple`: true labels",
        choices=("full", "simple"),
    )
    reference: bool = option(
        False, "full form: square the gradient of a batch's mean, as the published code"
    )
    batch_size: int = option(32, "examples in a batch; with `reference` part of the result", low=1)
    scope: str = option("all", "parameters to disturb: all, head, last_k:N, or a regex")


class FisherForgetting(UnlearningMethod[FisherConfig]):
    """θ ← θ + σ·N(0, 1), with σ small where the Fisher information F of the retain set is large.

    Full form (Golatkar et al.): F = E_x Σ_y p_y(x)·(∂ log p_y(x))², σ² = α·min(1/(F + 1e-8), 1e3),
    the bound 1e2 in the head, averaged over the inputs of a neuron, and ten times that for the
    head and for vectors (batch norm, biases). For attributes y runs over both values of each.
    Published code takes ∂ of a batch's mean instead of each example's; `reference` does so.

    Simple form (Foster et al.): F = E_x (∂ log p_y(x))² at the true label,
    σ = min(√(α/F), 1e-3), ten times that in the head. (Published code tests the last dimension,
    which only the head's bias passes.)

    Batch-norm statistics stay.
    """

    reads: frozenset[str] = frozenset({"retain"})
    modalities = frozenset({"vision"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "the Fisher information of every weight, and gradients of some examples"
    citation: ClassVar[str] = "Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020"
    config_type: ClassVar[type] = FisherConfig

    def run(self, ctx: Context) -> nn.Module:
        """Measure the information and add the noise."""
        ctx.model.eval()
        weights = ctx.scope(self.config.scope)
        top = ctx.adapter.parameters(ctx.model, "head")
        information = measure(ctx, weights, self.config)
        with torch.no_grad():
            for name, weight in weights.items():
                spread = deviation(information[name], self.config, name in top)
                noise = torch.randn(weight.shape, generator=generator(ctx.seed, "fisher", name))
                weight.add_(spread * noise.to(weight))
        return ctx.model


def measure(ctx: Context, weights: Mapping[str, Tensor], config: FisherConfig) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information on the retain set, by name."""
    if config.form == "full" and config.reference:
        return _of_batch_means(ctx, weights, config.batch_size)
    squares = SquaredGradients(ctx, weights, _weighted if config.form == "full" else _losses)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in ctx.batches("retain", config.batch_size):
        for name, part in squares(batch).items():
            sums[name] += batch.weight * part
    ctx.engine.reduce_sum(list(sums.values()))
    return {name: total / len(ctx.split("retain")) for name, total in sums.items()}


def variance(information: Tensor, alpha: float, is_head: bool) -> Tensor:
    """Return the variance of the noise of the full form.

    Args:
        information: Fisher information of one parameter.
        alpha: Amount of noise.
        is_head: Whether the parameter belongs to the head.
    """
    found = alpha * (1 / (information + 1e-8)).clamp(max=HEAD_CEILING if is_head else CEILING)
    if found.dim() > 1:
        found = found.mean(dim=1, keepdim=True).expand_as(found)
    return found * MAGNIFIED if is_head or found.dim() == 1 else found


def deviation(information: Tensor, config: FisherConfig, is_head: bool) -> Tensor:
    """Return the standard deviation of the noise of one parameter."""
    if config.form == "full":
        return variance(information, config.alpha, is_head).sqrt()
    # Adding the smallest number keeps 0/0 out: no noise is asked for at alpha = 0.
    tiny = torch.finfo(information.dtype).tiny
    found = (config.alpha / (information + tiny)).sqrt().clamp(max=LARGEST_STD)
    return found * MAGNIFIED if is_head else found


def _of_batch_means(
    ctx: Context, weights: Mapping[str, Tensor], batch_size: int
) -> dict[str, Tensor]:
    """Return the published estimate: E_batch Σ_y p̄_y·(∂ mean log p_y)², p̄ a batch's mean."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    batches = 0
    for batch in ctx.batches("retain", batch_size):
        log_p = _log_probabilities(ctx.forward(batch), batch.data)
        for outcome in log_p.unbind(dim=1):
            found = torch.autograd.grad(
                ctx.mean(outcome, batch),
                list(weights.values()),
                retain_graph=True,
                materialize_grads=True,
            )
            numbers = [*found, ctx.mean(outcome.detach().exp(), batch)]
            ctx.engine.reduce_sum(numbers)
            for total, gradient in zip(sums.values(), numbers[:-1], strict=True):
                total += numbers[-1] * gradient.square()
        batches += 1
    return {name: total / batches for name, total in sums.items()}


def _losses(outputs: Outputs, data: Faces) -> Tensor:
    return outputs.loss[:, None]


def _weighted(outputs: Outputs, data: Faces) -> Tensor:
    """Return √p·log p of every outcome, √p held: its squared gradient is p·(∂ log p)²."""
    log_p = _log_probabilities(outputs, data)
    return (log_p.detach() / 2).exp() * log_p


def _log_probabilities(outputs: Outputs, data: Faces) -> Tensor:
    """Return log p of every class [B, C], or of both values of every attribute [B, 2A]."""
    if data.label.is_floating_point():
        return torch.cat([logsigmoid(outputs.pred), logsigmoid(-outputs.pred)], dim=1)
    return log_softmax(outputs.pred, dim=1)
