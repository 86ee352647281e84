"""UNDIAL: distil the original with the logit of every true token lowered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass
from mmforget.vlm.adapter import answer_logits
from mmforget.vlm.chat import IGNORED
from mmforget.vlm.methods.base import (
    LoraTraining,
    adapter_of,
    cross_entropy,
    shifted_labels,
)


@dataclass(frozen=True)
class UNDIALConfig(LoraTraining):
    """Defaults of Dong et al.: strength 10, 10 epochs, learning rate 1e-4; adapters of rank 8."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-4, "learning rate", low=0)
    batch_size: int = option(32, "examples in an effective batch", low=1)
    beta: float = option(10.0, "how much the true token's logit is lowered", low=0)
    forget_weight: float = option(1.0, "weight of the distillation", low=0)
    retain_weight: float = option(0.0, "weight of the loss on retain; 0 leaves it out", low=0)
    reference: bool = option(
        False,
        "as open-unlearning's code: average over all positions, where those that predict no answer "
        "have entry V - 100 lowered (needs logits of all positions)",
    )


class UNDIAL(LossMethod[UNDIALConfig]):
    """Minimise the mean over answer tokens of CE(softmax(z_original - β·onehot(true)), p_θ).

    What the original knows of all other tokens is kept. `reference` is what the published code
    computes: no mask, and the label -100 of prompt, image and padding indexes the vocabulary from
    its end. It depends on how long a batch is padded.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})  # retain if it has a weight
    modalities = frozenset({"vlm"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "the original model"
    citation: ClassVar[str] = "Dong et al., UNDIAL, NAACL 2025, arXiv 2402.10052"
    config_type: ClassVar[type] = UNDIALConfig

    def __init__(self, config: UNDIALConfig) -> None:
        super().__init__(config)
        if not config.retain_weight:
            self.reads = frozenset({"forget"})

    def setup(self, ctx: Context) -> None:
        """Keep the teacher.

        Raises:
            ConfigError: `reference` without logits of all positions.
        """
        if self.config.reference and not adapter_of(ctx).everywhere:
            raise ConfigError(
                "method.reference=true averages over prompt, image and padding, and this model "
                "computes logits of answers alone: let the adapter keep them everywhere, or set "
                "method.reference=false"
            )
        self.teacher = ctx.frozen_copy()

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set, with retain beside it if that has a weight."""
        partner = "retain" if self.config.retain_weight else None
        return (Pass("joint", anchor="forget", partner=partner),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, terms = self.config, {}
        if forget is not None:
            terms["forget"] = config.forget_weight * self._distil(ctx, forget)
        if retain is not None and config.retain_weight > 0:
            hold = ctx.unit_mean(ctx.forward(retain).loss, retain)
            terms["retain"] = config.retain_weight * hold
        return terms

    def _distil(self, ctx: Context, forget: Batch) -> Tensor:
        data = forget.data
        teacher, student = ctx.forward(forget, self.teacher), ctx.forward(forget)
        if self.config.reference:
            before, now = teacher.pred[:, :-1], student.pred[:, :-1]  # the last predicts nothing
            labels = shifted_labels(data, now.shape[1])
            ids = torch.where(labels == IGNORED, now.shape[-1] + IGNORED, labels)
            return ctx.mean(self._towards(before, ids, now).mean(1), forget)
        before, now = answer_logits(teacher, data), answer_logits(student, data)
        losses = self._towards(before, data.targets.clamp_min(0), now)
        return ctx.unit_mean((losses * (data.targets != IGNORED)).sum(1), forget)

    def _towards(self, before: Tensor, ids: Tensor, now: Tensor) -> Tensor:
        lowered = before.scatter_add(
            -1, ids[..., None], before.new_full((*ids.shape, 1), -self.config.beta)
        )
        return cross_entropy(lowered.softmax(-1), now)
