"""UnlearnDiffAtk: relaxed tokens, projected gradients, the erased model as its own classifier."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.diffusion.attacks.arena import Arena
from mmforget.diffusion.attacks.base import AUTHORS
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.gradient import GradientAttack, GradientConfig, GradientSearch
from mmforget.diffusion.attacks.relaxed import (
    RowAdam,
    project_simplex,
    sample_rows,
    straight_through,
)


class RelaxedTokens(GradientSearch):
    """One distribution over the vocabulary for each adversarial token, [P, K, V].

    Each step draws a token from every row, passes the gradient at its embedding straight through,
    takes a step of Adam (coupled weight decay) and projects the rows on the simplex.
    """

    def __init__(self, arena: Arena, config: GradientConfig) -> None:
        super().__init__(arena, config)
        words = len(arena.model.tokenizer)
        self.tables = {name: table[:words] for name, table in arena.tables.items()}
        shape = (config.batch_size, self.width, words)
        device = arena.model.device
        dtype = torch.float64 if arena.model.dtype == torch.float64 else torch.float32
        self.rows = torch.full(shape, 1.0 / words, device=device, dtype=dtype)
        self.adam = RowAdam(self.rows, config.lr, config.weight_decay)
        self.draws: list[Tensor] = [torch.empty(0)] * config.batch_size

    def begin(self, slot: int, example: Example) -> None:
        """Start from uniform rows."""
        self.rows[slot] = 1.0 / self.rows.shape[-1]
        self.adam.reset([slot])

    def staged(self, slot: int, example: Example) -> None:
        """Draw the uniform numbers that choose tokens."""
        rng = self.arena.rng(example, "tokens", self.at[slot])
        shape = (self.config.iterations, self.width)
        self.draws[slot] = torch.rand(shape, generator=rng, dtype=torch.float64)

    def tokens(self, slots: Sequence[int], step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Draw a token from every row."""
        uniform = torch.stack([self.draws[slot][step] for slot in slots]).to(self.rows.device)
        ids = sample_rows(self.rows[list(slots)], uniform)
        return ids, {name: table[ids] for name, table in self.tables.items()}

    def move(self, slots: Sequence[int], grads: Mapping[str, Tensor]) -> None:
        """Step and project."""
        rows = list(slots)
        found = straight_through(*((grad, self.tables[name]) for name, grad in grads.items()))
        moved = self.adam.step(self.rows[rows], found.to(self.rows.dtype), rows)
        self.rows[rows] = project_simplex(moved)

    def chosen(self, slot: int) -> Tensor:
        """Return the most likely token of every row."""
        return self.rows[slot].argmax(dim=-1).cpu()


class TextGrad(GradientAttack[GradientConfig]):
    """Tokens d minimise |ε - ε_u(z_t, t, c(p + d))|² for a target picture (eq. 5), by projection.

    z_0 is a picture that the original model draws of the prompt; no other model and no classifier
    is in the loss. The text is decoded, read anew by the tokenizer, drawn and judged after each
    time of the schedule; the first success ends a prompt. With two CLIP encoders (SDXL, SD3) both
    read the same tokens; T5 reads the prompt alone. Random numbers belong to prompts: the published
    code seeds the global generator at each picture, so its streams are others.
    """

    citation: ClassVar[str] = AUTHORS
    config_type: ClassVar[type] = GradientConfig

    def search(self, arena: Arena) -> RelaxedTokens:
        """Return the search."""
        return RelaxedTokens(arena, self.config)
