"""Negative preference optimisation (NPO)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.methods.kl_retain import divergence_from
from mmforget.options import option
from mmforget.types import Batch, Training

ENTRIES = ("raw", "vocabulary")  # ratios that compare predictions entry by entry


@dataclass(frozen=True)
class NPOConfig(Training):
    """Defaults of Zhang et al.: AdamW, 10 epochs, beta 0.1."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(32, "examples in an effective batch", low=1)
    beta: float = option(0.1, "inverse temperature; towards 0 it becomes gradient ascent", low=1e-6)
    forget_weight: float = option(1.0, "weight of the forget term", low=0)
    retain_weight: float = option(1.0, "weight of the retain term; 0 leaves it out", low=0)
    retain: str = option(
        "nll", "retain term: the loss, or KL from the original model", choices=("nll", "kl")
    )
    ratio: str = option(
        "sequence",
        "what is compared with the original: an example's summed loss (paper), its mean over "
        "units, a micro-batch's mean loss (Unlearn-Smooth's and MLLMU-Bench's code), raw "
        "predictions (MUSE's code), their log softmax, entry by entry (CLEAR's code)",
        choices=("sequence", "mean", "batch", "raw", "vocabulary"),
    )
    reference: bool = option(
        False, "average the KL over all positions, prompt and padding too, as open-unlearning does"
    )


class NPO(LossMethod[NPOConfig]):
    """Minimise -(2/β)·mean log σ(β·(L_θ - L_original)) on D_f, and a retain term (eq. 3).

    L is an example's loss summed over its units: -log p of the whole answer. Where it is only a
    bound on -log p (diffusion), β needs a value of its own. `ratio=batch`, `ratio=raw` and
    `ratio=vocabulary` are what published code bases compute instead. They depend on how a batch is
    split; the last two because they average over all entries of predictions, padding among them.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "the original's losses on forget; where these are drawn, the original"
    citation: ClassVar[str] = "Zhang et al., Negative Preference Optimization, arXiv 2404.05868"
    config_type: ClassVar[type] = NPOConfig

    def setup(self, ctx: Context) -> None:
        """Keep what the original makes of the forget set, and itself where that will not do."""
        config = self.config
        self.before = None if config.ratio in ENTRIES else ctx.start_losses("forget")
        holds = config.retain == "kl" and config.retain_weight > 0
        self.original = ctx.frozen_copy() if holds or self.before is None else None

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, terms = self.config, {}
        if forget is not None:
            terms["forget"] = config.forget_weight * self._push(ctx, forget)
        if retain is not None and config.retain_weight > 0:
            if config.retain == "kl":
                assert self.original is not None
                hold = divergence_from(ctx, self.original, retain, config.reference)
            else:
                hold = ctx.unit_mean(ctx.forward(retain).loss, retain)
            terms["retain"] = config.retain_weight * hold
        return terms

    def _push(self, ctx: Context, forget: Batch) -> Tensor:
        config = self.config
        student = ctx.forward(forget)
        if config.ratio in ENTRIES:
            assert self.original is not None
            before, now = ctx.forward(forget, self.original).pred, student.pred
            if config.ratio == "vocabulary":
                before, now = F.log_softmax(before, dim=-1), F.log_softmax(now, dim=-1)
            gain = (before - now).flatten(1)
        else:
            loss = student.loss
            gain = loss - loss_before(ctx, forget, loss, self.before, self.original)
        if config.ratio == "mean":
            gain = gain / forget.units
        elif config.ratio == "batch":
            gain = gain.sum() / forget.units.sum()
        push = -2.0 / config.beta * F.logsigmoid(config.beta * gain)
        if config.ratio == "batch":
            return ctx.once(push, forget)
        return ctx.mean(push.mean(1) if push.dim() > 1 else push, forget)


def loss_before(
    ctx: Context,
    batch: Batch,
    like: Tensor,
    kept: Mapping[str, float] | None,
    original: nn.Module | None,
) -> Tensor:
    """Return the losses of a batch under the original model, [B].

    Args:
        ctx: The run.
        batch: Examples, with their own targets.
        like: Losses whose type and device are taken.
        kept: What `Context.start_losses` returned.
        original: The original; asked where nothing could be kept.
    """
    if kept is not None:
        return like.new_tensor([kept[i] for i in batch.ids])
    assert original is not None
    return ctx.forward(batch, original).loss
