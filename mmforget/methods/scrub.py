"""SCRUB: disobey the original model on the forget set, obey it on the retain set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class ScrubConfig(Training):
    """Defaults of Kurmanji et al. for their small-scale runs."""

    epochs: int = option(10, "epochs, each ending with a pass over the retain set", low=0)
    lr: float = option(5e-4, "learning rate", low=0)
    optimizer: str = option("adam", "optimiser", choices=("sgd", "adam", "adamw"))
    weight_decay: float = option(0.1, "weight decay", low=0)
    schedule: str = option(
        "step", "learning-rate schedule", choices=("constant", "cosine", "linear", "step")
    )
    milestones: list[int] = option([5, 8, 9], "epochs at which the step schedule decays")
    max_epochs: int = option(3, "first epochs that begin with a pass over forget (msteps)", low=0)
    forget_batch_size: int = option(64, "effective batch of the forget pass: the main knob", low=1)
    retain_batch_size: int = option(32, "effective batch of the retain pass", low=1)
    gamma: float = option(1.0, "weight of the loss on retain", low=0)
    alpha: float = option(0.5, "weight of the KL term on retain", low=0)
    temperature: float = option(2.0, "temperature of teacher and student", low=1e-3)
    rewind: bool = option(
        False, "SCRUB+R: return the epoch whose forget loss is closest to the last loss on val"
    )


class Scrub(LossMethod[ScrubConfig]):
    """Max steps minimise -KL(original ‖ model) on D_f, min steps γ·L + α·KL on D_r (eq. 3).

    KL is a mean over units times T². SCRUB+R compares mean losses, which every modality records,
    where the paper compares classification errors; it needs a val split that resembles D_f.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a frozen copy of the original model; with `rewind`, weights per epoch"
    citation: ClassVar[str] = "Kurmanji et al., Unbounded Machine Unlearning, NeurIPS 2023"
    config_type: ClassVar[type] = ScrubConfig

    def __init__(self, config: ScrubConfig) -> None:
        super().__init__(config)
        if config.rewind:
            self.reads = self.reads | {"val"}
            self.whole = True

    def setup(self, ctx: Context) -> None:
        """Keep the original model."""
        self.original = ctx.frozen_copy()
        # Of every epoch so far: mean loss on forget, and the trained weights and buffers.
        self.epochs: list[dict[str, Any]] = []

    def passes(self, epoch: int) -> Sequence[Pass]:
        """A forget pass in the first epochs, then a retain pass: the last step is a min step."""
        low = Pass("min", anchor="retain", batch_size=self.config.retain_batch_size)
        if epoch >= self.config.max_epochs:
            return (low,)
        return (Pass("max", anchor="forget", batch_size=self.config.forget_batch_size), low)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return `forget` (max step), `retain` and `retain_kl` (min step)."""
        terms, temperature = {}, self.config.temperature
        if forget is not None:
            student, teacher = ctx.forward(forget), ctx.forward(forget, self.original)
            kl = ctx.adapter.divergence(student, teacher, temperature)
            terms["forget"] = -ctx.unit_mean(kl, forget)
        if retain is not None:
            student, teacher = ctx.forward(retain), ctx.forward(retain, self.original)
            kl = ctx.adapter.divergence(student, teacher, temperature)
            terms["retain"] = self.config.gamma * ctx.unit_mean(student.loss, retain)
            terms["retain_kl"] = self.config.alpha * ctx.unit_mean(kl, retain)
        return terms

    def after_epoch(self, ctx: Context) -> None:
        """Keep the epoch, in case it is the one to rewind to."""
        if self.config.rewind:
            weights = [value.detach().cpu().clone() for value in _changing(ctx)]
            self.epochs.append({"loss": _mean_loss(ctx, "forget"), "weights": weights})

    @torch.no_grad()
    def finish(self, ctx: Context) -> nn.Module:
        """Return the last model, or the one whose forget loss is closest to the last val loss."""
        if self.epochs:
            target = _mean_loss(ctx, "val")
            best = min(self.epochs, key=lambda epoch: abs(epoch["loss"] - target))
            for value, kept in zip(_changing(ctx), best["weights"], strict=True):
                value.copy_(kept)
        return ctx.model

    def state(self) -> dict[str, Any]:
        """Return the kept epochs."""
        return {"epochs": self.epochs}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the kept epochs back."""
        self.epochs = state["epochs"]


def _changing(ctx: Context) -> list[Tensor]:
    return [*ctx.trainable.values(), *ctx.model.buffers()]


def _mean_loss(ctx: Context, split: str) -> float:
    return float(ctx.evaluate(split)["loss"].mean())
