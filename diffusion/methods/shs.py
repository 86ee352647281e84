"""ScissorHands: re-draw the weights that the forget set depends on, then repair the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion.methods.salun import ImageTraining, Relabelling
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.rng import generator
from mmforget.types import Batch

STD = 0.02  # of re-drawn weights


@dataclass(frozen=True)
class ScissorHandsConfig(ImageTraining):
    """Defaults of UnlearnCanvas: 1 % of the denoiser, re-drawn in cross-attention only."""

    scope: str = option("all", "parameters to repair: a scope's name, or a regex")
    sparsity: float = option(
        0.99, "share of the denoiser's weights, ranked together, that stays", low=0, high=1
    )
    prune_scope: str = option("xattn", "weights that are re-drawn, if they rank above the rest")
    prune_batches: int = option(1, "batches of forget whose |gradient| is the saliency", low=1)
    alpha: float = option(0.1, "weight of the loss on forget", low=0)
    project: bool = option(
        False, "turn gradients that would undo the pruning (GEM), in `prune_scope`"
    )
    project_every: int = option(10, "steps from one projection to the next", low=1)
    margin: float = option(0.5, "least multiple of the memory that a projection adds", low=0)
    eps: float = option(1e-3, "added to the memory's squared norm", low=0)


class ScissorHands(Relabelling[ScissorHandsConfig]):
    """Re-draw what is most salient to D_f, then minimise L(D_r) + α·‖e(c_f) - sg e(c_anchor)‖².

    Saliency is |w|·Σ|∇L(D_f)| (SNIP); what ranks above `sparsity` of the denoiser and lies in
    `prune_scope` is drawn anew: weights from a normal of deviation 0.02, biases zero. With
    `project`, a gradient g with ⟨g, m⟩ < 0, m = -∇L(D_f) of the pruned model, becomes g + v·m,
    along which L(D_f) does not fall; every entry goes back to the weight it came from (the
    published write-back tests a name left over from another loop).
    """

    trains: ClassVar[str] = "the most salient weights in `prune_scope`, then those in `scope`"
    holds: ClassVar[str] = "one gradient while pruning; with `project`, one of `prune_scope`"
    citation: ClassVar[str] = (
        "Wu & Harandi, Scissorhands: Scrub Data Influence via Connection Sensitivity in Networks, "
        "ECCV 2024, arXiv 2401.06187"
    )
    config_type: ClassVar[type] = ScissorHandsConfig

    def setup(self, ctx: Context) -> None:
        """Prune, and measure what projections must not work against.

        Raises:
            ConfigError: `project` without trained weights in `prune_scope`.
        """
        super().setup(ctx)
        config = self.config
        pruned = ctx.adapter.parameters(ctx.model, config.prune_scope)
        self.prune(ctx, pruned)
        self.memory: dict[str, Tensor] = {}
        if config.project:
            weights = {n: w for n, w in pruned.items() if n in ctx.trainable}
            if not weights:
                raise ConfigError(
                    f"project=true: no weight of prune_scope={config.prune_scope} is in "
                    f"scope={config.scope}, so there is no gradient to project"
                )
            batch = next(ctx.batches("forget", config.batch_size))
            value = -ctx.unit_mean(ctx.forward(batch).loss, batch)
            found = ctx.gradients(value, list(weights.values()))
            self.memory = dict(zip(weights, found, strict=True))

    def prune(self, ctx: Context, pruned: dict[str, nn.Parameter]) -> None:
        """Re-draw the salient entries of some weights in place; their ranks are the denoiser's."""
        config = self.config
        ranked = ctx.adapter.parameters(ctx.model, "all")
        weights = list({id(w): w for w in (*ranked.values(), *pruned.values())}.values())
        before = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        sums = [torch.zeros_like(weight) for weight in weights]
        shuffle = not config.reference
        batches = ctx.batches("forget", config.batch_size, shuffle=shuffle)
        for batch in islice(batches, config.prune_batches):
            value = ctx.unit_mean(ctx.forward(batch).loss, batch)
            torch._foreach_add_(sums, torch._foreach_abs(ctx.gradients(value, weights)))
        for weight, trained in zip(weights, before, strict=True):
            weight.requires_grad_(trained)
        masks, _ = snip(weights, sums, config.sparsity)
        of = {id(weight): mask for weight, mask in zip(weights, masks, strict=True)}
        for name, weight in pruned.items():
            redraw(name, weight, of[id(weight)], ctx.seed)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        terms = {}
        if forget is not None and self.config.alpha > 0:
            terms["forget"] = self.config.alpha * self.surrogate(ctx, forget)
        if retain is not None:
            terms["retain"] = self.preserve(ctx, retain)
        return terms

    @torch.no_grad()
    def after_backward(self, ctx: Context) -> None:
        """Project the gradient, every few steps."""
        if not self.memory or ctx.step % self.config.project_every != 0:
            return
        held = [(w.grad, self.memory[n]) for n, w in ctx.trainable.items() if n in self.memory]
        pairs = [(grad, part) for grad, part in held if grad is not None]
        if not pairs:
            return
        scaler = ctx.engine.accelerator.scaler  # of fp16: gradients are still multiplied by it
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradient = torch.cat([grad.reshape(-1) for grad, _ in pairs]) / scale
        memory = torch.cat([part.reshape(-1) for _, part in pairs])
        made, added = project(gradient, memory, self.config.margin, self.config.eps)
        if added is None:
            return
        parts = torch.split(made, [grad.numel() for grad, _ in pairs])
        for (grad, _), part in zip(pairs, parts, strict=True):
            grad.copy_(part.view_as(grad) * scale)


@torch.no_grad()
def snip(
    weights: Sequence[Tensor], slopes: Sequence[Tensor], sparsity: float
) -> tuple[list[Tensor], float]:
    """Return boolean masks of what is re-drawn, and the saliency above which that is.

    Args:
        weights: All that is ranked, of any shape.
        slopes: Summed |gradients| in their shapes.
        sparsity: The floor(sparsity·P)-th smallest of all P saliencies is the threshold; only
            larger ones are chosen.
    """
    saliency = [(w * s).abs() for w, s in zip(weights, slopes, strict=True)]
    flat = torch.cat([part.reshape(-1) for part in saliency])
    rank = int(sparsity * flat.numel())
    threshold = flat.kthvalue(rank).values.item() if rank > 0 else -1.0
    return [part > threshold for part in saliency], threshold


@torch.no_grad()
def redraw(name: str, weight: Tensor, mask: Tensor, seed: int) -> None:
    """Draw the masked entries of a weight anew, in place; those of a bias become zero."""
    fresh = torch.zeros(weight.shape)
    if not name.endswith("bias"):
        nn.init.trunc_normal_(fresh, std=STD, generator=generator(seed, "shs", name))
    weight.copy_(torch.where(mask, fresh.to(weight), weight))


def project(
    gradient: Tensor, memory: Tensor, margin: float, eps: float
) -> tuple[Tensor, float | None]:
    """Return the gradient [P] and the multiple v of the memory [P] that was added to it, if any.

    With ⟨g, m⟩ < 0 it is g + v·m, v = max(-⟨g, m⟩/(‖m‖² + eps), margin): GEM's quadratic programme
    with one memory, solved in its dual (Lopez-Paz & Ranzato, NeurIPS 2017).
    """
    dot = float(gradient.double() @ memory.double())
    if dot >= 0.0:
        return gradient, None
    added = max(-dot / (float(memory.double().square().sum()) + eps), margin)
    return gradient + added * memory, added
