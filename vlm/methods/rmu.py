"""RMU: turn hidden states on the forget set towards a random direction, keep those on retain."""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.rng import generator
from mmforget.types import Batch, Training, full
from mmforget.vlm.adapter import PLACES
from mmforget.vlm.methods.base import adapter_of
from mmforget.vlm.models import VLM

AUTO = "auto"
DEPTH = 7 / 32  # where the published layer of a 32-layer decoder lies
BELOW = 2  # trained layers below the one that is steered
TRAINED = "down_proj"


@dataclass(frozen=True)
class RMUConfig(Training):
    """Defaults of WMDP for Zephyr-7B, the length of the target but for (see `c_relative`)."""

    epochs: int = option(10, "passes over the forget set", low=0)
    max_steps: int | None = option(150, "stop after this many optimiser steps", low=0)
    lr: float = option(5e-5, "learning rate", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    weight_decay: float = option(0.01, "weight decay (decoupled for adamw)", low=0)
    batch_size: int = option(4, "examples in an effective batch", low=1)
    scope: str = option(
        AUTO, "`auto`: down-projections of the steered layer and the two below; any scope else"
    )
    layer: int | None = option(
        None, "decoder layer whose output is steered, from 0; null: 7/32 of the depth", low=0
    )
    c: float = option(5.0, "length of the target (5 as Adaptive RMU, arXiv 2408.06223)", low=0)
    c_relative: bool = option(
        True,
        "c counts in mean lengths of the original's states on forget; false: as it is (WMDP 6.5)",
    )
    alpha: float = option(1200.0, "weight of the retain term", low=0)
    forget_places: str = option("answer", "tokens whose states are steered", choices=PLACES)
    retain_places: str = option("answer", "tokens whose states are kept", choices=PLACES)
    reference: bool = option(
        False, "as open-unlearning's code: mean sum of errors times mean of 1/tokens"
    )


class RMU(LossMethod[RMUConfig]):
    """Minimise MSE(h(x_f), c·u) + α·MSE(h(x_r), h_original(x_r)), h the output of a decoder layer.

    u is a random direction of positive entries, drawn once (WMDP, section 4). The squared error is
    a mean over the hidden size and over an example's tokens of a kind, then over examples. The
    published code averages over all positions, padding too; `reference` is open-unlearning's form,
    which divides by the wrong example's tokens and depends on how a batch is split. States of image
    tokens are much longer than those of text: hence the relative length.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"vlm"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "down-projections of three decoder layers, or weights in `scope`"
    holds: ClassVar[str] = "a copy of the trained weights"
    citation: ClassVar[str] = "Li et al., The WMDP Benchmark, ICML 2024, arXiv 2403.03218"
    config_type: ClassVar[type] = RMUConfig

    @property
    def training(self) -> Training:
        """The config, its scope one that every decoder has until `setup` narrows it."""
        if self.config.scope == AUTO:
            return replace(self.config, scope="language")
        return self.config

    def setup(self, ctx: Context) -> None:
        """Choose layer and weights, keep the original, draw the target.

        Raises:
            ConfigError: There is no such layer, or it has no down-projection.
        """
        config, model = self.config, ctx.model
        assert isinstance(model, VLM)
        count = len(model.layers)
        self.layer = round(DEPTH * count) if config.layer is None else config.layer
        if self.layer >= count:
            raise ConfigError(
                f"method.layer={self.layer}: the decoder has layers 0 to {count - 1}; null takes "
                f"one at 7/32 of the depth"
            )
        if config.scope == AUTO:
            ctx.scope(down_projections(model, self.layer))
        self.original = ctx.frozen_copy()
        width = model.base.config.get_text_config().hidden_size
        drawn = torch.rand(width, generator=generator(ctx.seed, "rmu"))
        length = config.c * (self._length(ctx) if config.c_relative else 1.0)
        self.target = length * control_vector(drawn).to(ctx.engine.device)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`.

        Raises:
            ConfigError: No weight in scope acts on the layer, or an example lacks such tokens.
        """
        config, terms = self.config, {}
        if forget is not None:
            states = self._states(ctx, forget)
            at = self._places(forget, config.forget_places)
            terms["forget"] = self._distance(ctx, states, self.target, at, forget)
        if retain is not None:
            with torch.no_grad():
                kept = self._states(ctx, retain, self.original)
            states = self._states(ctx, retain)
            at = self._places(retain, config.retain_places)
            terms["retain"] = config.alpha * self._distance(ctx, states, kept, at, retain)
        return terms

    def _states(self, ctx: Context, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Return the layer's output, [B, T, D]."""
        with ctx.engine.autocast():
            found = adapter_of(ctx).hidden(ctx.actual(model), batch.data, self.layer)
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ConfigError(
                f"method.scope={self.config.scope} holds no weight that acts on layer "
                f"{self.layer}, whose output RMU steers: auto takes those of the layers up to it"
            )
        return full(found)

    def _places(self, batch: Batch, kind: str) -> Tensor:
        """Return where an example's tokens of a kind stand, bool [B, T]."""
        at: Tensor = batch.data.places(kind)
        empty = (~at.any(1)).tolist()
        if any(empty):
            name = batch.ids[empty.index(True)]
            raise ConfigError(
                f"{batch.split} example {name!r} has no tokens of the kind {kind!r}: choose "
                f"another for method.{batch.split}_places ({', '.join(PLACES)})"
            )
        return at

    def _distance(
        self, ctx: Context, states: Tensor, target: Tensor, at: Tensor, batch: Batch
    ) -> Tensor:
        """Return the mean squared distance over the places, scalar."""
        errors = ((states - target).square().mean(-1) * at).sum(1)
        counts = at.sum(1)
        if self.config.reference:
            return ctx.once(errors.mean() * (1 / counts).mean(), batch)
        return ctx.mean(errors / counts, batch)

    @torch.no_grad()
    def _length(self, ctx: Context) -> float:
        """Return the mean length of the model's states on the forget set, over tokens."""
        sums = torch.zeros(2, dtype=torch.float64, device=ctx.engine.device)
        for batch in ctx.batches("forget", self.config.batch_size):
            at = self._places(batch, self.config.forget_places)
            lengths = self._states(ctx, batch).norm(dim=-1) * at
            sums += batch.weight * torch.stack([lengths.sum().double(), at.sum().double()])
        ctx.engine.reduce_sum([sums])
        total, count = sums.tolist()
        return float(total / count)


def control_vector(drawn: Tensor) -> Tensor:
    """Return the direction of numbers drawn from [0, 1), [D]: all its entries are positive."""
    direction: Tensor = drawn / drawn.norm()
    return direction


def down_projections(model: VLM, layer: int) -> str:
    """Return a regex of the down-projections of a decoder layer and the two below it.

    Raises:
        ConfigError: The family names them otherwise.
    """
    chosen = {
        id(parameter)
        for module in model.layers[max(0, layer - BELOW) : layer + 1]
        for name, parameter in module.named_parameters()
        if TRAINED in name
    }
    names = [re.escape(name) for name, p in model.named_parameters() if id(p) in chosen]
    if not names:
        raise ConfigError(
            f"layers {max(0, layer - BELOW)} to {layer} of {type(model.decoder).__name__} have no "
            f"{TRAINED}: name the weights to train, such as method.scope=language"
        )
    return f"^({'|'.join(names)})$"
