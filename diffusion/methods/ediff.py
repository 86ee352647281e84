"""EraseDiff: preserve what stays, while the loss on what is forgotten must go on falling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.diffusion.methods.salun import ImageTraining, Relabelling
from mmforget.errors import ConfigError
from mmforget.methods.base import Part, add_terms
from mmforget.options import option
from mmforget.types import Batch, Pass


@dataclass(frozen=True)
class EraseDiffConfig(ImageTraining):
    """Defaults of UnlearnCanvas, but for the multiplier, which is the paper's."""

    epochs: int = option(5, "passes over the forget set", low=0)
    lr: float = option(5e-5, "learning rate", low=0)
    weight: float | None = option(
        None, "lambda; null: at every step what the constraint needs (published code: 0.1)", low=0
    )
    eta: float = option(
        0.1, "how fast the forget loss must fall, if lambda is not given: at eta·‖∇L_f‖²", low=0
    )
    inner_passes: int = option(
        2, "K: forget-only passes before each outer pass; for `reference` only", low=1
    )
    reference: bool = option(
        False, "UnlearnCanvas's loader and loop: K inner passes, with the same optimiser"
    )


class EraseDiff(Relabelling[EraseDiffConfig]):
    """Minimise L(D_r) subject to L_f ≤ min L_f, by first-order steps on the value function.

    L_f is the distance from the model's own anchor prediction. The step direction is the nearest to
    ∇L_r that lowers q = L_f - min L_f at the rate η·‖∇q‖²: ∇L_r + λ·∇q with
    λ = max(0, η - ⟨∇L_r, ∇q⟩/‖∇q‖²) (the dynamic barrier of Liu et al., BOME, NeurIPS 2022, on
    which the method is built). No gradient passes through the inner minimum, so ∇q = ∇L_f: what
    K inner steps would find as the minimum changes no step, and none are made.

    The published code finds it all the same, and by default sets λ to a constant: its loss
    L_r + λ·(L_f - q) then has the gradient of L_r + λ·L_f. With `reference=true` its K inner passes
    are run. They act through Adam's moments alone, which the outer pass inherits; weights go back
    to the epoch's start before each of the K outer passes, so that only the last one counts.
    """

    trains: ClassVar[str] = "weights in `scope`"
    holds: ClassVar[str] = "two gradients; with `reference`, a copy of the trained weights"
    citation: ClassVar[str] = (
        "Wu et al., Erasing Undesirable Influence in Diffusion Models, CVPR 2025, arXiv 2401.05779"
    )
    config_type: ClassVar[type] = EraseDiffConfig

    def setup(self, ctx: Context) -> None:
        """Begin before any inner pass.

        Raises:
            ConfigError: `reference` without a `weight`.
        """
        super().setup(ctx)
        if self.config.reference and self.config.weight is None:
            raise ConfigError(
                "reference=true: the published loop has a fixed lambda; set weight=0.1"
            )
        self.start: list[Tensor] = []
        self.phase = ""

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over forget with retain beside it; with `reference`, K inner and outer ones."""
        if not self.config.reference:
            return super().passes(epoch)
        found: list[Pass] = []
        for k in range(self.config.inner_passes):
            found += [Pass(f"inner {k}", anchor="forget")] * self.repeats
            found += [Pass(f"outer {k}", anchor="forget", partner="retain")] * self.repeats
        return found

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain` for a fixed lambda.

        Raises:
            ConfigError: Lambda depends on both gradients, so there is no loss.
        """
        if self.config.weight is None:
            raise ConfigError(
                "diffusion/ediff chooses lambda by both gradients, so it has no loss that a "
                "wrapper could take apart; set inner.weight, such as 0.1"
            )
        inner = ctx.phase.startswith("inner")
        factor = 1.0 if inner else self.config.weight
        return self._terms(ctx, forget, retain, factor)

    def backward(self, ctx: Context, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Accumulate ∇L_r + λ·∇L_f; the log holds L_r and λ·L_f."""
        if self.config.reference:
            self._rewind(ctx)
        if self.config.weight is not None:
            return super().backward(ctx, parts)
        weights = list(ctx.trainable.values())
        slopes = {name: [torch.zeros_like(w) for w in weights] for name in ("forget", "retain")}
        logged: dict[str, Tensor] = {}
        for whole in parts:  # one graph at a time
            for forget, retain in ((whole.forget, None), (None, whole.retain)):
                terms = self._terms(ctx, forget, retain, 1.0)
                for name, value in terms.items():
                    torch._foreach_add_(slopes[name], ctx.gradients(value, weights))
                add_terms(logged, terms)
        factor = multiplier(slopes["retain"], slopes["forget"], self.config.eta)
        torch._foreach_mul_(slopes["forget"], factor)
        torch._foreach_add_(slopes["retain"], slopes["forget"])
        # Both are summed over processes already; as a loss, so that fp16 scales it like any other.
        products = [(w * s).sum() for w, s in zip(weights, slopes["retain"], strict=True)]
        ctx.engine.accelerator.backward(torch.stack(products).sum() / ctx.engine.world)
        return {name: v * factor if name == "forget" else v for name, v in logged.items()}

    def state(self) -> dict[str, Any]:
        """Return the weights at the epoch's start, and the pass that runs."""
        return {"start": self.start, "phase": self.phase}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take both back."""
        self.start, self.phase = state["start"], state["phase"]

    def _terms(
        self, ctx: Context, forget: Batch | None, retain: Batch | None, factor: float
    ) -> dict[str, Tensor]:
        terms = {}
        if forget is not None:
            terms["forget"] = factor * self.surrogate(ctx, forget)
        if retain is not None:
            terms["retain"] = self.preserve(ctx, retain)
        return terms

    @torch.no_grad()
    def _rewind(self, ctx: Context) -> None:
        """Keep the weights when an epoch begins, and put them back when an outer pass does."""
        if ctx.phase == self.phase:
            return
        weights = ctx.trainable.values()
        if ctx.phase == "inner 0":
            self.start = [weight.detach().clone() for weight in weights]
        elif ctx.phase.startswith("outer"):
            for weight, kept in zip(weights, self.start, strict=True):
                weight.copy_(kept)
        self.phase = ctx.phase


def multiplier(keep: Sequence[Tensor], erase: Sequence[Tensor], eta: float) -> Tensor:
    """Return λ = max(0, η - ⟨keep, erase⟩/‖erase‖²), scalar; 0 where `erase` is zero.

    Args:
        keep: ∇L_r, one tensor a weight.
        erase: ∇L_f, likewise.
        eta: η.
    """
    dot = torch.stack([(k * e).sum() for k, e in zip(keep, erase, strict=True)]).sum()
    square = torch.stack([e.square().sum() for e in erase]).sum()
    found = (eta - dot / square).clamp_min(0.0)
    return torch.where(square > 0, found, torch.zeros_like(found))
