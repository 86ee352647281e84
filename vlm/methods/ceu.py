"""CE-U: learn what the model would say if it did not know the true token."""

import math
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
from mmforget.vlm.methods.base import LoraTraining, cross_entropy


@dataclass(frozen=True)
class CEUConfig(LoraTraining):
    """Defaults of open-unlearning, but for `skip`: 10 epochs, batches of 32."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate (published for all weights; adapters bear more)", low=0)
    batch_size: int = option(32, "examples in an effective batch", low=1)
    skip: int = option(
        0, "first tokens of every answer left alone (published: 1, all of an answer yes)", low=0
    )


class CEU(LossMethod[CEUConfig]):
    """Minimise the mean over answer tokens of CE(softmax(z, z_true = -∞), p_θ) on D_f.

    z are the model's own logits, held constant, so the gradient vanishes where the true token is
    improbable. No retain set and no reference model.
    """

    reads: frozenset[str] = frozenset({"forget"})
    modalities = frozenset({"vlm"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = "CE-U: Cross Entropy Unlearning, arXiv 2503.01224"
    config_type: ClassVar[type] = CEUConfig

    def setup(self, ctx: Context) -> None:
        """Check that something is left of every answer.

        Raises:
            ConfigError: An answer has no more tokens than are skipped.
        """
        skip = self.config.skip
        if not skip:
            return
        short = [
            item
            for batch in ctx.batches("forget", self.config.batch_size)
            for item, units in zip(batch.ids, batch.units.tolist(), strict=True)
            if units <= skip
        ]
        if short:
            raise ConfigError(
                f"method.skip={skip} leaves nothing of {len(short)} answers, such as that of "
                f"{short[0]!r}: lower it, 0 skips none"
            )

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set."""
        return (Pass("forget", anchor="forget"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the term `forget`."""
        if forget is None:
            return {}
        targets, skip = forget.data.targets, self.config.skip
        logits = answer_logits(ctx.forward(forget), forget.data)
        true = targets.clamp_min(0)[..., None]
        unknowing = logits.detach().scatter(-1, true, -math.inf).softmax(-1)
        place = torch.arange(targets.shape[1], device=targets.device)
        counts = (targets != IGNORED) & (place >= skip)
        losses = (cross_entropy(unknowing, logits) * counts).sum(1)
        left = forget.total_units - skip * forget.total  # every answer is longer than `skip`
        return {"forget": losses.sum() * (forget.weight / left)}
