"""Forget-Me-Not: steer cross-attention away from the concept's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.diffusion.attention import layers, recorded
from mmforget.diffusion.attention_losses import joint_norm
from mmforget.diffusion.concepts import Erasure
from mmforget.diffusion.methods.inversion import (
    InversionConfig,
    initial,
    invert,
    occurrences,
    owners,
    phrase,
)
from mmforget.diffusion.methods.inversion import encode as encode_learned
from mmforget.diffusion.models import DiffusionModel
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class ForgetMeNotConfig(Training):
    """Defaults of UnlearnCanvas: 100 steps on single images; the original makes 35 at 2e-6."""

    epochs: int = option(100, "passes over the forget set, if `max_steps` allows", low=0)
    max_steps: int | None = option(100, "stop after this many optimiser steps", low=0)
    lr: float = option(2e-5, "learning rate", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    weight_decay: float = option(0.01, "weight decay (decoupled for adamw)", low=0)
    clip_norm: float | None = option(1.0, "clip the global gradient norm", low=0)
    batch_size: int = option(1, "images in an effective batch", low=1)
    scope: str = option(
        "auto", "parameters to train; auto: xattn if all concepts are styles, all otherwise"
    )
    use_pooler: bool = option(True, "steer the end-of-text and padding tokens too")
    invert: bool = option(True, "first learn the concept's token embeddings on the forget images")
    inversion: InversionConfig = option(InversionConfig(), "how they are learned")


class ForgetMeNot(LossMethod[ForgetMeNotConfig]):
    """Minimise the norm of the cross-attention that an image pays to its concept's tokens (eq. 2).

    One Frobenius norm runs over all layers, heads, pixels and chosen tokens of a noised image of
    the forget set, seen with its concept's short text; a batch has the mean of its images' norms.
    The tokens are those of the concept's name, however many, wherever they occur. No retain term
    holds the rest in place: a few steps too many destroy the model.
    """

    reads: frozenset[str] = frozenset({"forget"})
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "suppression"
    holds: ClassVar[str] = "attention maps of all cross-attention layers; with `invert`, embeddings"
    citation: ClassVar[str] = "Zhang et al., Forget-Me-Not, CVPR Workshops 2024, arXiv 2303.17591"
    config_type: ClassVar[type] = ForgetMeNotConfig

    @property
    def training(self) -> Training:
        """The optimisation; `auto` is narrowed in `setup`, once concepts are known."""
        auto = self.config.scope == "auto"
        return replace(self.config, scope="all") if auto else self.config

    def setup(self, ctx: Context) -> None:
        """Learn embeddings, encode the concepts' texts, find their tokens.

        Raises:
            ConfigError: The denoiser is no cross-attention UNet.
        """
        model, target, config = ctx.model, ctx.target, self.config
        assert isinstance(model, DiffusionModel)
        assert isinstance(target, Erasure)
        layers(model)
        concepts, images = target.concepts, ctx.split("forget")
        texts = [concept.text for concept in concepts]
        if config.invert:
            state = None if self.resume is None else self.resume / "inversion"
            learned = invert(ctx, concepts, images, config.inversion, state)
            self.text = encode_learned(model, texts, learned).detach()
        else:
            self.text = model.encode(texts).detach()
        scope = self.training.scope
        if config.scope == "auto" and all(concept.kind == "style" for concept in concepts):
            scope = "xattn"
        ctx.scope(scope)
        self.owners = owners(images, concepts)
        names = initial(model, [phrase(model, c) for c in concepts]).ids["text_encoder"]
        found = [occurrences(self.text.ids[k : k + 1], name)[0] for k, name in enumerate(names)]
        self.tokens = torch.cat(found)
        if config.use_pooler:
            self.tokens = self.tokens | after_text(self.text.ids, model.tokenizer.eos_token_id)

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set."""
        return (Pass("forget", anchor="forget"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean norm of the images."""
        if forget is None:
            return {}
        model, data = ctx.model, forget.data
        assert isinstance(model, DiffusionModel)
        which = [self.owners[i] for i in forget.ids]
        with recorded(model) as maps, ctx.engine.autocast():
            model.predict(data.latents, data.t, self.text.rows(which))
        norms = joint_norm(maps.probs.values(), self.tokens[which])
        return {"forget": ctx.mean(norms, forget)}


def after_text(ids: Tensor, end: int) -> Tensor:
    """Return which tokens are the end of the text or padding after it, bool [B, T].

    Args:
        ids: Token ids, int64 [B, T].
        end: Id of the end-of-text token.
    """
    return (ids == end).cumsum(dim=1) > 0
