"""Hard prompts (PEZ) against an erased model: points among token embeddings, read as tokens."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.diffusion.attacks.arena import Arena
from mmforget.diffusion.attacks.base import AUTHORS
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.gradient import (
    GradientAttack,
    GradientConfig,
    GradientSearch,
    StepsConfig,
)
from mmforget.diffusion.attacks.relaxed import RowAdam, Vocabulary, nearest_tokens
from mmforget.types import full

PEZ = (
    "Wen et al., Hard Prompts Made Easy: Gradient-Based Discrete Optimization for Prompt Tuning "
    "and Discovery, NeurIPS 2023, arXiv 2302.03668"
)


class HardPrompts(GradientSearch):
    """One point in the first encoder's embedding space for each adversarial token, [P, K, D].

    Each step takes the gradient at the tokens nearest to the points (largest cosine) and applies it
    to the points.

    Args:
        arena: Model and prompts.
        config: Tokens, places and steps.
        decoupled: Whether weight decay is AdamW's; otherwise it is added to the gradient.
    """

    def __init__(self, arena: Arena, config: StepsConfig, decoupled: bool = False) -> None:
        super().__init__(arena, config)
        self.encoder, table = next(iter(arena.tables.items()))
        self.vocabulary = Vocabulary(table[: len(arena.model.tokenizer)])
        start = full(self.vocabulary.table[:1, None])
        self.points = start.repeat(config.batch_size, self.width, 1)
        self.adam = RowAdam(self.points, config.lr, config.weight_decay, decoupled=decoupled)

    def begin(self, slot: int, example: Example) -> None:
        """Start from the embeddings of random tokens."""
        rng = self.arena.rng(example, "start", self.at[slot])
        ids = torch.randint(len(self.vocabulary.table), (self.width,), generator=rng)
        table = self.vocabulary.table
        self.points[slot] = full(table[ids.to(table.device)])
        self.adam.reset([slot])

    def tokens(self, slots: Sequence[int], step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the tokens nearest to the points."""
        ids = nearest_tokens(self.points[list(slots)], self.vocabulary)
        return ids, {self.encoder: self.vocabulary.table[ids]}

    def move(self, slots: Sequence[int], grads: Mapping[str, Tensor]) -> None:
        """Step the points along the gradient at their tokens."""
        rows = list(slots)
        self.points[rows] = self.adam.step(self.points[rows], grads[self.encoder], rows)

    def chosen(self, slot: int) -> Tensor:
        """Return the tokens nearest to a slot's points."""
        return nearest_tokens(self.points[slot], self.vocabulary).cpu()


class HardPrompt(GradientAttack[GradientConfig]):
    """Points e minimise |ε - ε_u(z_t, t, c(p + Π(e)))|², Π(e) the tokens nearest to them by cosine.

    The loss and its target pictures are those of `diffusion/text_grad`, the optimiser is PEZ: the
    gradient at Π(e) moves e, by Adam with weight decay in the gradient, from the embeddings of
    random tokens. Π(e) is decoded, read anew, drawn and judged after each time of the schedule.

    Published for one CLIP encoder. With several (SDXL, SD3) the points lie in the first one's
    table; the others read Π(e) by their own tables, and their gradients are not used, as they are
    on other embeddings. T5 reads the prompt alone. Random numbers belong to prompts.
    """

    citation: ClassVar[str] = f"{PEZ}; as an attack on erased models: {AUTHORS}"
    config_type: ClassVar[type] = GradientConfig

    def search(self, arena: Arena) -> HardPrompts:
        """Return the search."""
        return HardPrompts(arena, self.config)
