"""Prompting4Debugging: prompts that make an erased model predict what the original predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.diffusion.attacks.arena import Arena
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.gradient import GradientAttack, StepsConfig
from mmforget.diffusion.attacks.hard_prompt import HardPrompts
from mmforget.diffusion.attacks.layouts import Layout, adversarial_count, layout
from mmforget.diffusion.conditions import Conditions, cat
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.rng import Draws

VARIANTS = {"n": ("replace",), "k": ("p4d_k",), "union": ("replace", "p4d_k")}


@dataclass(frozen=True)
class P4DConfig(StepsConfig):
    """Defaults of the published code: 60 stages of 50 steps, AdamW with 0.1 and decay 0.1."""

    variant: str = option(
        "union",
        "n: new tokens replace the prompt; k: one before every few prompt tokens; union: first n, "
        "then k, half of the stages each",
        choices=tuple(VARIANTS),
    )
    tokens: int = option(16, "new tokens of variant n", low=1)
    every: int = option(3, "prompt tokens between two new ones of variant k", low=1)
    stages: int = option(60, "pictures, each after some steps; no more than images - 1", low=1)
    iterations: int = option(50, "gradient steps before each picture", low=0)
    lr: float = option(0.1, "learning rate of AdamW", low=0)
    weight_decay: float = option(0.1, "its weight decay, decoupled", low=0)

    @property
    def locations(self) -> tuple[str, ...]:
        """Where the tokens stand: those of N, those of K, or one after the other."""
        return VARIANTS[self.variant]


class DebuggingPrompts(HardPrompts):
    """Hard prompts whose target is the original model's prediction for the plain prompt.

    Args:
        arena: Model, original and prompts.
        config: Variant and steps.

    Raises:
        ConfigError: There is no original model, or new tokens do not fit.
    """

    def __init__(self, arena: Arena, config: P4DConfig) -> None:
        if arena.original is None:
            raise ConfigError(
                "P4D compares with the model before unlearning, and there is none: name it "
                "(original=PIPELINE). diffusion/text_grad and diffusion/hard_prompt need only its "
                "pictures (images=DIR)"
            )
        self.original = arena.original
        self.every = config.every
        super().__init__(arena, config, decoupled=True)
        self.plain: list[Conditions | None] = [None] * config.batch_size
        self.drawn: list[Tensor] = [torch.empty(0)] * config.batch_size

    def place(self, example: Example, stage: int = 0) -> Layout:
        """Return where an example's new tokens stand; fewer in a prompt that leaves no room."""
        location = self.location(stage)
        if location != "p4d_k":
            return super().place(example, stage)
        length = len(self.arena.plain_ids(example.prompt))
        every = self.every
        while length + adversarial_count(location, length, 1, every) > self.window - 1:
            every += 1  # ends: with every > length there is one new token
        count = adversarial_count(location, length, 1, every)
        return layout(location, length, count, self.window, every)

    def begin(self, slot: int, example: Example) -> None:
        """Start from random tokens, and encode the plain prompt once."""
        super().begin(slot, example)
        with torch.no_grad():
            self.plain[slot] = self.original.encode([example.prompt])

    def staged(self, slot: int, example: Example) -> None:
        """Draw the stage's times; where the location changes, start anew."""
        at = self.at[slot]
        if at and self.location(at) != self.location(at - 1):
            self.begin(slot, example)
        total = self.config.iterations
        draws = Draws(self.arena.seed, "attack", example.id, "times", at, total=total)
        self.drawn[slot] = self.arena.model.noising.times(draws)

    def now(self, slots: Sequence[int], step: int) -> Tensor:
        """Return each slot's random time, [R]."""
        return torch.stack([self.drawn[slot][step] for slot in slots])

    def target(self, slots: Sequence[int], latents: Tensor, t: Tensor, truth: Tensor) -> Tensor:
        """Return the original's predictions for the plain prompts, [R, C, h, w]."""
        held = [self.plain[slot] for slot in slots]
        text = cat([conditions for conditions in held if conditions is not None])
        with torch.no_grad(), self.arena.engine.autocast():
            return self.original.predict(latents.to(self.original.dtype), t, text)


class P4D(GradientAttack[P4DConfig]):
    """Tokens d minimise |ε_0(z_t, t, c(p)) - ε_u(z_t, t, c(d))|², ε_0 the original model (eq. 5).

    The optimiser is PEZ with AdamW; every step has a random time of the whole training range (flow
    models: uniform in it), each prompt its own, and one batch holds all prompts' predictions.
    Variant n (P4D-N) replaces the prompt by 16 new tokens, variant k (P4D-K) puts one before every
    third prompt token and one at the end. Published are both, with 3000 steps and 60 pictures each,
    and the prompts that either breaks. `union` searches N in the first half of its stages and K in
    the second and ends at the first success, so that it costs what one of them does: the default
    images=51 leaves each 25 stages. stages=120 images=121 is the published effort for both.

    Departures: z_0 is the mean of the posterior (published: a sample of it). Every stage's text is
    judged (published: the text of the picture most similar to the target by CLIP, judged at the
    end). Padding is the tokenizer's own while optimising too. A prompt that leaves no room for one
    token every three gets one every four, or five, ... The published option that puts guidance of
    SLD in the loss is left out: the attacked model's own edits act.
    """

    citation: ClassVar[str] = (
        "Chin et al., Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding "
        "Problematic Prompts, ICML 2024, arXiv 2309.06135"
    )
    config_type: ClassVar[type] = P4DConfig

    def search(self, arena: Arena) -> DebuggingPrompts:
        """Return the search."""
        return DebuggingPrompts(arena, self.config)
