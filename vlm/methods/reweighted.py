"""Gradient ascent with weights on tokens by how likely they are: WGA and SatImp."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch
from mmforget.vlm.adapter import answer_logits, token_losses
from mmforget.vlm.methods.base import LoraTraining


@dataclass(frozen=True)
class WGAConfig(LoraTraining):
    """Defaults of open-unlearning: beta 1, both weights 1, 5 epochs, batches of 16."""

    epochs: int = option(5, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate (published for all weights; adapters bear more)", low=0)
    batch_size: int = option(16, "examples in an effective batch", low=1)
    beta: float = option(1.0, "exponent of a token's probability; 0 is gradient ascent", low=0)
    forget_weight: float = option(1.0, "weight of the ascent on forget", low=0)
    retain_weight: float = option(1.0, "weight of the loss on retain; 0 leaves it out", low=0)


class WGA(LossMethod[WGAConfig]):
    """Minimise the mean over tokens of p^β·log p on D_f, p^β held constant, and the loss on D_r.

    Tokens that are forgotten already weigh less, so that the ascent ends by itself.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"vlm"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = (
        "Wang et al., Rethinking LLM Unlearning Objectives, ICLR 2025, arXiv 2502.19301"
    )
    config_type: ClassVar[type] = WGAConfig

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, terms = self.config, {}
        if forget is not None:
            rise = reweighted_ascent(ctx, forget, lambda p: p**config.beta)
            terms["forget"] = config.forget_weight * rise
        if retain is not None and config.retain_weight > 0:
            hold = ctx.unit_mean(ctx.forward(retain).loss, retain)
            terms["retain"] = config.retain_weight * hold
        return terms


@dataclass(frozen=True)
class SatImpConfig(LoraTraining):
    """Defaults of SatImp's README in open-unlearning; its YAML has the two weights swapped."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate (published for all weights; adapters bear more)", low=0)
    batch_size: int = option(32, "examples in an effective batch", low=1)
    beta1: float = option(5.0, "exponent of p: what is forgotten already weighs less", low=0)
    beta2: float = option(1.0, "exponent of 1 - p: what is sure, as syntax, weighs less", low=0)
    forget_weight: float = option(1.0, "weight of the ascent on forget (YAML: 0.1)", low=0)
    retain_weight: float = option(0.1, "weight of the loss on retain (YAML: 1); 0: none", low=0)


class SatImp(LossMethod[SatImpConfig]):
    """Minimise the mean over tokens of w·log p on D_f, w = p^β1·(1-p)^β2, and the loss on D_r.

    w is held constant. It joins saturation (p^β1) and importance ((1-p)^β2).
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"vlm"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = (
        "Yang et al., Exploring Criteria of Loss Reweighting, ICML 2025, arXiv 2505.11953"
    )
    config_type: ClassVar[type] = SatImpConfig

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, terms = self.config, {}
        if forget is not None:
            rise = reweighted_ascent(
                ctx, forget, lambda p: p**config.beta1 * (1 - p) ** config.beta2
            )
            terms["forget"] = config.forget_weight * rise
        if retain is not None and config.retain_weight > 0:
            hold = ctx.unit_mean(ctx.forward(retain).loss, retain)
            terms["retain"] = config.retain_weight * hold
        return terms


def reweighted_ascent(ctx: Context, forget: Batch, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """Return minus the mean over tokens of their loss times a constant weight, scalar.

    Args:
        ctx: The run.
        forget: What to forget.
        weigh: Returns the weights for probabilities of true tokens, [B, A], in [0, 1].
    """
    logits = answer_logits(ctx.forward(forget), forget.data)
    losses = token_losses(logits, forget.data.targets)
    weights = weigh((-losses.detach()).exp().clamp(max=1.0))
    return -ctx.unit_mean((weights * losses).sum(1), forget)
