"""Prompt decoupling (SafeEraser): unlearning that spares a harmful text beside a harmless image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.methods.base import Part, Wrapper, add_terms
from mmforget.options import option
from mmforget.types import Batch, Pass

STREAM = "decouple"
# SafeEraser's training: two processes of one example, accumulated 16 times.
RECIPE: Mapping[str, Any] = MappingProxyType(
    {
        "optimizer": "adamw",
        "lr": 1e-4,
        "epochs": 10,
        "batch_size": 32,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "clip_norm": 1.0,
        "scope": "lora",
    }
)


@dataclass(frozen=True)
class PromptDecoupleConfig:
    """How much the third term weighs, and what is decoupled."""

    weight: float = option(1.0, "weight of the loss on decoupled examples", low=0)
    aligned: bool = option(
        False,
        "take the counterpart of each forget example; the published code draws one at random",
    )
    inner: dict[str, Any] = option(
        {}, "the loss method and its settings; SafeEraser's where none are given"
    )


@dataclass(frozen=True)
class HalfConfig(PromptDecoupleConfig):
    """A weight of one half, as published beside gradient ascent."""

    weight: float = option(0.5, "weight of the loss on decoupled examples", low=0)


class PromptDecouple(Wrapper[PromptDecoupleConfig]):
    """Minimise an inner method's loss + w·L(D_pd): the same harmful texts on harmless images.

    These are answered normally, so that refusal or ruin binds to the pair of text and image and not
    to the text alone. The benchmark gives them as the stream `decouple`; a batch of them, as large
    as the forget batch, stands beside each forget batch.
    """

    reads: frozenset[str] = frozenset({"forget", "retain", STREAM})
    adds_reads: ClassVar[frozenset[str]] = frozenset({STREAM})
    modalities = frozenset({"vlm"})
    inner_default: ClassVar[str] = "idk"
    inner_settings: ClassVar[Mapping[str, Any]] = RECIPE
    intent: ClassVar[str] = "suppression"
    trains: ClassVar[str] = "weights in the inner method's `scope`"
    holds: ClassVar[str] = "what the inner method holds"
    citation: ClassVar[str] = "SafeEraser, Findings of ACL 2025, arXiv 2502.12520"
    config_type: ClassVar[type] = PromptDecoupleConfig

    def __init__(self, config: PromptDecoupleConfig) -> None:
        section = dict(config.inner)
        if section.get("name", self.inner_default) == self.inner_default:
            section = {**self.inner_settings, **section}
        super().__init__(replace(config, inner=section))

    def setup(self, ctx: Context) -> None:
        """Set up the inner method.

        Raises:
            ConfigError: Counterparts are asked for, and there is not one for each forget example.
        """
        super().setup(ctx)
        found, wanted = len(ctx.split(STREAM)), len(ctx.split("forget"))
        if self.config.aligned and found != wanted:
            raise ConfigError(
                f"method.aligned=true: {found} decoupled examples are no counterparts of {wanted} "
                f"forget examples. method.aligned=false draws them at random"
            )

    def passes(self, epoch: int) -> Sequence[Pass]:
        """Return the inner method's passes, with decoupled examples beside those over forget.

        Raises:
            ConfigError: None of them reads forget, or one cannot have a third batch beside it.
        """
        found = [self._beside(run) for run in self.inner.passes(epoch)]
        if not any(run.extra == STREAM for run in found):
            raise ConfigError(
                f"{type(self.inner).__name__} reads no forget set, which decoupled examples stand "
                f"beside: take an inner method that does, such as grad_ascent"
            )
        return found

    def _beside(self, run: Pass) -> Pass:
        inner = type(self.inner).__name__
        if run.anchor == "union" or run.extra is not None:
            held = "both splits in one order" if run.extra is None else f"a batch of {run.extra}"
            raise ConfigError(
                f"{inner} walks {held} in its pass {run.name!r}, and has no place for decoupled "
                f"examples: take an inner method that walks forget beside retain, such as grad_diff"
            )
        if "forget" not in (run.anchor, run.partner):
            return run
        if self.config.aligned and run.anchor != "forget":
            raise ConfigError(
                f"method.aligned=true needs an inner method that walks the forget set, and {inner} "
                f"walks {run.anchor}: set method.aligned=false"
            )
        return run._replace(extra=STREAM, aligned=self.config.aligned)

    def extra_loss(self, ctx: Context, extra: Batch) -> dict[str, Tensor]:
        """Return the term `decouple`."""
        loss = ctx.unit_mean(ctx.forward(extra).loss, extra)
        return {STREAM: self.config.weight * loss}

    def backward(self, ctx: Context, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Accumulate the inner method's gradient, in its own way, and that of the third term."""
        inner = [part._replace(extra=None) for part in parts]
        kept = [part for part in inner if part.forget is not None or part.retain is not None]
        logged = self.inner.backward(ctx, kept)
        for part in parts:
            if part.extra is not None:
                terms = self.extra_loss(ctx, part.extra)
                ctx.engine.accelerator.backward(torch.stack(list(terms.values())).sum())
                add_terms(logged, terms)
        return logged


class GAPD(PromptDecouple):
    """Gradient ascent with prompt decoupling: -L(D_f) + 0.5·L(D_pd)."""

    inner_default: ClassVar[str] = "grad_ascent"
    intent: ClassVar[str] = "removal"
    config_type: ClassVar[type] = HalfConfig
    reads: frozenset[str] = frozenset({"forget", STREAM})


class GDPD(PromptDecouple):
    """Gradient difference with prompt decoupling: -L(D_f) + 0.5·L(D_r) + 0.5·L(D_pd)."""

    inner_default: ClassVar[str] = "grad_diff"
    inner_settings: ClassVar[Mapping[str, Any]] = MappingProxyType({**RECIPE, "retain_weight": 0.5})
    intent: ClassVar[str] = "removal"
    config_type: ClassVar[type] = HalfConfig


class KLPD(PromptDecouple):
    """KL minimisation with prompt decoupling: -L(D_f) + KL(D_r) + L(D_pd)."""

    inner_default: ClassVar[str] = "kl_retain"
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "the original model"


class IDKPD(PromptDecouple):
    """Refusals with prompt decoupling (PO+PD): L(refusals, D_r) + L(D_pd)."""
