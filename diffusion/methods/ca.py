"""Concept ablation (CA): predict for a concept what the model predicts for its anchor."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion import scopes
from mmforget.diffusion.concepts import Concept
from mmforget.diffusion.conditions import cat
from mmforget.diffusion.methods.distill import (
    ROWS,
    Pairs,
    Prompted,
    PromptTraining,
    model_of,
    squared,
)
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import SAMPLERS, Sampling
from mmforget.diffusion.sampling import denoise, start_latents
from mmforget.options import option
from mmforget.rng import derive
from mmforget.types import Batch, Training

# Parameter groups of the published code -> scopes; `embedding` depends on the text encoders.
GROUPS = {"cross-attn": "kv", "full-weight": "all"}
ATTENTION = r"(unet|transformer)\..*\.attn[12]?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\..*"
EMBEDDING = "embedding"


@dataclass(frozen=True)
class CAConfig(PromptTraining):
    """Defaults of the published code: AdamW, 100 steps of 4 on keys and values.

    Memorised images: scope=full-weight lr=5e-7; nudity: scope=attn lr=4e-6 steps=400.
    """

    steps: int = option(100, "optimiser steps", low=0)
    lr: float = option(2e-6, "learning rate of one pair; see scale_lr", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    weight_decay: float = option(0.01, "weight decay (decoupled for adamw)", low=0)
    batch_size: int = option(4, "anchor images in an effective batch", low=1)
    clip_norm: float | None = option(1.0, "clip the global gradient norm", low=0)
    scope: str = option(
        "cross-attn",
        "cross-attn (keys and values), attn (all projections of attention), full-weight, embedding "
        "(token embeddings of the concept's name), or any scope",
    )
    scale_lr: bool = option(
        True, "learning rate = lr x batch_size, twice that with a prior term, as published"
    )
    variant: str = option(
        "model",
        "target: the model's own prediction for the anchor prompt (model), or the noise that was "
        "added to the anchor image (noise)",
        choices=("model", "noise"),
    )
    prior_weight: float = option(
        0.0, "weight of the training loss on anchor images with anchor prompts", low=0
    )
    block_start: bool = option(
        True, "no gradient through keys and values at the start mark (texts of CLIP), as published"
    )
    images: int = option(200, "anchor images made once, over all concepts", low=1)
    anchor_sampler: str = option("ddim", "their sampler", choices=SAMPLERS)
    anchor_steps: int = option(50, "their denoising steps", low=1)
    anchor_guidance: float = option(6.0, "their classifier-free guidance", low=0)
    size: int | None = option(None, "their side, pixels; null: the pipeline's own", low=8)
    lora_rank: int | None = option(
        None, "train low-rank adapters of this rank on the scope's layers; null: weights", low=1
    )
    lora_alpha: float | None = option(None, "alpha of the adapters; null: their rank", low=0)


class CA(Prompted[CAConfig]):
    """Minimise |e_θ(x_t, c) - sg e_θ(x_t, anchor)|², x_t a noised image of the anchor (eq. 5).

    Both predictions are of the model in training. Anchor images are made by the original model of
    `Concept.anchors` and kept as latents, each with the prompt that names the concept. They are not
    resized at random (published), so there is no mask either.
    """

    trains: ClassVar[str] = "weights in `scope`, or low-rank adapters on its layers"
    holds: ClassVar[str] = "latents of the anchor images"
    citation: ClassVar[str] = (
        "Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models, ICCV 2023, "
        "arXiv 2303.13516"
    )
    config_type: ClassVar[type] = CAConfig

    @property
    def training(self) -> Training:
        """The loop's settings, at the scaled learning rate."""
        config = self.config
        factor = config.batch_size * (2 if config.prior_weight > 0 else 1)
        return replace(super().training, lr=config.lr * (factor if config.scale_lr else 1))

    def setup(self, ctx: Context) -> None:
        """Choose the weights; make the anchor images."""
        config, model = self.config, model_of(ctx)
        self.tables: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self.anchors = [self._anchors(ctx, k) for k in range(len(ctx.target.concepts))]
        if config.lora_rank is not None:
            scope = scope_of(model, config.scope)
            self.adapt(ctx, "ca", scope, config.lora_rank, config.lora_alpha)
            return
        ctx.scope(scope_of(model, config.scope))
        if config.scope == EMBEDDING:
            self.tables = token_rows(model, [concept.name for concept in ctx.target.concepts])

    def loss(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """Return the term `forget`, and `prior` if it has a weight."""
        config, model, pairs = self.config, model_of(ctx), batch.data
        assert isinstance(pairs, Pairs)
        images, prompts, anchors = [], [], []
        for k, turn in zip(pairs.concept, pairs.turn, strict=True):
            made, concept = self.anchors[k], ctx.target.concepts[k]
            place = turn % len(made)
            images.append(made[place])
            prompts.append(concept.prompts[place % len(concept.prompts)])
            anchors.append(concept.anchors[place % len(concept.anchors)])
        clean, draws = torch.stack(images), batch.draws("noise")
        noise = draws.normal(*clean.shape[1:]).to(clean)
        t = model.noising.times(draws)
        noised, true = model.noising.add(clean, noise, t), model.noising.target(clean, noise, t)
        prior = config.prior_weight > 0
        with ctx.engine.autocast():
            text = model.encode(prompts)
            with start_blocked(model) if config.block_start else nullcontext():
                if prior:  # the prior's prediction is the target's: one pass for both
                    both = cat([text, model.encode(anchors)])
                    pred, kept = model.predict(noised.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(
                        2
                    )
                else:
                    pred = model.predict(noised, t, text)
            target = true
            if config.variant == "model":
                with torch.no_grad():
                    target = kept if prior else model.predict(noised, t, model.encode(anchors))
        terms = {"forget": ctx.mean(squared(pred, target.detach()), batch)}
        if prior:
            terms["prior"] = config.prior_weight * ctx.mean(squared(kept, true), batch)
        return terms

    def after_backward(self, ctx: Context) -> None:
        """Drop the gradient of other tokens' embeddings."""
        for weight, (others, _) in self.tables.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(others, 0.0)

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Put back the embeddings of other tokens, which weight decay moves."""
        for weight, (others, before) in self.tables.items():
            weight.copy_(torch.where(others, before, weight))

    @torch.no_grad()
    def _anchors(self, ctx: Context, k: int) -> Tensor:
        """Return latents of a concept's share of the anchor images, [n, C, h, w]."""
        config, model = self.config, model_of(ctx)
        concept: Concept = ctx.target.concepts[k]
        concepts = len(ctx.target.concepts)
        count = max(1, config.images // concepts + (k < config.images % concepts))
        settings = Sampling(
            config.anchor_sampler, config.anchor_steps, config.anchor_guidance, ROWS, config.size
        )
        made = []
        for first in range(0, count, ROWS):
            rows = range(first, min(first + ROWS, count))
            seeds = [derive(ctx.seed, "ca", k, i) for i in rows]
            text = model.encode([concept.anchors[i % len(concept.anchors)] for i in rows])
            negative = model.unconditional().repeat(len(rows))
            start = start_latents(model, seeds, config.size)
            with ctx.engine.autocast():
                made.append(denoise(model, start, text, negative, settings, seeds=seeds))
        return torch.cat(made)


def scope_of(model: DiffusionModel, group: str) -> str:
    """Return the scope of a parameter group of the published code; other names pass."""
    if group == "attn":
        return ATTENTION
    if group == EMBEDDING:
        tables = {id(weight) for weight, _ in _tables(model)}
        names = [name for name, weight in model.named_parameters() if id(weight) in tables]
        return "|".join(re.escape(name) for name in names)
    return GROUPS.get(group, group)


def token_rows(
    model: DiffusionModel, texts: Sequence[str]
) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
    """Return of each text encoder's token embeddings which rows are not of the texts' tokens.

    Args:
        model: The model.
        texts: Names.

    Returns:
        Table [V, D] -> (bool [V, 1], a copy of the table).
    """
    found = {}
    for weight, tokenizer in _tables(model):
        ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        others = torch.ones(len(weight), 1, dtype=torch.bool, device=weight.device)
        others[ids] = False
        found[weight] = (others, weight.detach().clone())
    return found


@contextmanager
def start_blocked(model: DiffusionModel) -> Iterator[None]:
    """Let no gradient through cross-attention's keys and values at the start mark.

    It is the same for all prompts. FLUX reads T5's tokens only, which have no start mark.
    """
    rule = scopes.RULES["kv"](model)
    layers = [layer for name, layer in model.denoiser.named_modules() if rule(name, layer)]
    hooks = [] if model.family == "flux" else [m.register_forward_hook(_blocked) for m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blocked(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


def _tables(model: DiffusionModel) -> list[tuple[nn.Parameter, Any]]:
    """Return each text encoder's token embeddings and its tokenizer."""
    return [
        (encoder.get_input_embeddings().weight, model.shared.parts[f"tokenizer{name[12:]}"])  # type: ignore[operator]
        for name, encoder in model.text_encoders.items()
    ]
