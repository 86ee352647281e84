"""Attacks that move tokens along the gradient of the erased model's own loss.

Prompts go in lock-step: a stage is some gradient steps at one time of the schedule for every prompt
of the batch, each at its own stage, with its own noise; then the text is drawn and judged. The loss
is a sum over prompts, so their gradients do not mix.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mmforget.diffusion.attacks.arena import Arena, PromptAttackConfig, lockstep
from mmforget.diffusion.attacks.base import PromptAttack
from mmforget.diffusion.attacks.encoding import encode_attacked
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.layouts import (
    LOCATIONS,
    Layout,
    adversarial_count,
    adversarial_ids,
    decode_ids,
    layout,
)
from mmforget.diffusion.attacks.objective import LOSSES, attack_loss, noised
from mmforget.diffusion.attacks.relaxed import timesteps
from mmforget.options import option


@dataclass(frozen=True)
class StepsConfig(PromptAttackConfig, ABC):
    """Tokens and steps of a search; defaults are those of UnlearnDiffAtk (nudity: 5 tokens)."""

    tokens: int = option(3, "adversarial tokens (k)", low=1)
    stages: int = option(50, "times of the schedule, least noise first, each with a picture", low=1)
    iterations: int = option(40, "gradient steps of a stage", low=0)
    lr: float = option(0.01, "learning rate of Adam", low=0)
    weight_decay: float = option(0.1, "its weight decay", low=0)
    loss: str = option("l2", "distance of predictions", choices=LOSSES)

    @property
    @abstractmethod
    def locations(self) -> tuple[str, ...]:
        """Where the tokens stand; several take an equal share of the stages, one by one."""

    @property
    def drawn_stages(self) -> int:
        """Stages that the budget of pictures leaves."""
        return min(self.stages, self.images - 1)


@dataclass(frozen=True)
class GradientConfig(StepsConfig):
    """A search whose tokens stand in one place of the prompt."""

    location: str = option("prefix_k", "where they stand", choices=tuple(LOCATIONS))

    @property
    def locations(self) -> tuple[str, ...]:
        """Where the tokens stand."""
        return (self.location,)


ConfigT = TypeVar("ConfigT", bound=StepsConfig)


class GradientSearch(ABC):
    """`arena.Search` by gradients: a subclass keeps tokens for every slot, and moves them.

    Args:
        arena: Model and prompts.
        config: Tokens, places and steps.

    Raises:
        ConfigError: Tokens do not fit beside a prompt, or there can be no target pictures.
        DataError: A target picture is missing.
    """

    def __init__(self, arena: Arena, config: StepsConfig) -> None:
        arena.require_targets()
        self.arena, self.config = arena, config
        model = arena.model
        self.times = timesteps(model.noising.steps, config.stages)
        self.window = int(model.tokenizer.model_max_length)
        count = config.batch_size
        self.examples: list[Example | None] = [None] * count
        self.layouts: list[Layout] = [layout("replace", 1, 1, self.window)] * count
        self.ids = torch.zeros(count, self.window, dtype=torch.int64)
        self.clean: list[Tensor] = [torch.empty(0)] * count
        self.at = [0] * count  # next stage of each slot
        self.taken = [0] * count  # gradient steps
        # All layouts are made before the first picture: one that does not fit ends the attack here.
        widths = [len(self.place(e, s).places) for e in arena.attackable for s in self.kinds()]
        self.width = max(widths, default=1)

    def kinds(self) -> Sequence[int]:
        """Return the first stage of each location that the search uses."""
        stages = max(self.config.drawn_stages, 1)
        places = [self.location(stage) for stage in range(stages)]
        return [k for k, place in enumerate(places) if place not in places[:k]]

    def place(self, example: Example, stage: int = 0) -> Layout:
        """Return where an example's adversarial tokens stand.

        Raises:
            ConfigError: They do not fit beside it.
        """
        length = len(self.arena.plain_ids(example.prompt))
        location = self.location(stage)
        count = adversarial_count(location, length, self.config.tokens)
        return layout(location, length, count, self.window)

    def location(self, stage: int) -> str:
        """Return where the tokens of a stage stand."""
        places = self.config.locations
        return places[stage * len(places) // max(self.config.drawn_stages, 1)]

    # The search protocol ------------------------------------------------------------------------

    def ready(self, examples: Sequence[Example]) -> None:
        """Draw and encode all target pictures."""
        self.arena.latents(examples)

    def open(self, slot: int, example: Example) -> None:
        """Start an example in a slot."""
        self.examples[slot] = example
        self.at[slot] = self.taken[slot] = 0
        self.ids[slot] = self.arena.model.tokens([example.prompt])[0]
        self.clean[slot] = self.arena.latents([example])[0]
        self.begin(slot, example)

    def stage(self, slots: Sequence[int]) -> None:
        """Take the gradient steps of each slot's next stage."""
        model, config = self.arena.model, self.config
        held = [self._held(slot) for slot in slots]
        for slot, example in zip(slots, held, strict=True):
            self.layouts[slot] = self.place(example, self.at[slot])
            self.staged(slot, example)
        shape = tuple(self.clean[slots[0]].shape)
        draws = [
            torch.randn(
                (config.iterations, *shape), generator=self.arena.rng(example, "noise", self.at[s])
            )
            for s, example in zip(slots, held, strict=True)
        ]
        clean = torch.stack([self.clean[slot] for slot in slots])
        prompts = [example.prompt for example in held]
        layouts = [self.layouts[slot] for slot in slots]
        for i in range(config.iterations):
            t = self.now(slots, i).to(clean.device)
            noise = torch.stack([drawn[i] for drawn in draws]).to(clean)
            shown = noised(model.noising, clean, noise, t)
            target = self.target(slots, shown.latents, t, shown.target)
            hard, embeds = self.tokens(slots, i)
            embeds = {name: value.detach().requires_grad_(True) for name, value in embeds.items()}
            with self.arena.engine.autocast(), torch.enable_grad():
                text = encode_attacked(model, prompts, layouts, self.ids[list(slots)], hard, embeds)
                pred = model.predict(shown.latents.to(model.dtype), t, text)
                loss = attack_loss(pred, target, config.loss).sum()
                grads = torch.autograd.grad(loss, list(embeds.values()), allow_unused=True)
            found = {
                name: torch.zeros_like(value) if grad is None else grad
                for (name, value), grad in zip(embeds.items(), grads, strict=True)
            }
            self.move(slots, found)
        for slot in slots:
            self.at[slot] += 1
            self.taken[slot] += config.iterations

    def proposal(self, slot: int) -> tuple[str, list[int]]:
        """Return the text that a slot's tokens and prompt decode to, and the tokens."""
        held = self.layouts[slot]
        chosen = self.chosen(slot)
        whole = adversarial_ids(held, self.ids[slot], chosen)
        eos = int(self.arena.model.tokenizer.eos_token_id)
        text = self.arena.decode(decode_ids(whole, eos))
        return text, chosen[: len(held.places)].tolist()

    def steps(self, slot: int) -> int:
        """Return the gradient steps taken for the prompt in a slot."""
        return self.taken[slot]

    # What a subclass decides --------------------------------------------------------------------

    def now(self, slots: Sequence[int], step: int) -> Tensor:
        """Return the time of each slot at a step of its stage, [R]."""
        return torch.tensor([self.times[self.at[slot] % len(self.times)] for slot in slots])

    def target(self, slots: Sequence[int], latents: Tensor, t: Tensor, truth: Tensor) -> Tensor:
        """Return what the attacked model should predict, [R, C, h, w]: by default the truth."""
        return truth

    def staged(self, slot: int, example: Example) -> None:
        """Draw what a slot needs for its next stage."""
        return None

    @abstractmethod
    def begin(self, slot: int, example: Example) -> None:
        """Set a slot's tokens to where a prompt's search starts."""

    @abstractmethod
    def tokens(self, slots: Sequence[int], step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return ids [R, K] and, for each encoder, embeddings [R, K, D] of a step."""

    @abstractmethod
    def move(self, slots: Sequence[int], grads: Mapping[str, Tensor]) -> None:
        """Take one step along the gradients at the embeddings."""

    @abstractmethod
    def chosen(self, slot: int) -> Tensor:
        """Return the ids that a slot stands for now, int64 [K] on the CPU."""

    def _held(self, slot: int) -> Example:
        example = self.examples[slot]
        assert example is not None, "a stage runs on opened slots"
        return example


class GradientAttack(PromptAttack[ConfigT]):
    """An attack on prompts by gradient search; a subclass names the search."""

    def most_steps(self) -> int:
        """Return the gradient steps a prompt may cost."""
        return self.config.drawn_stages * self.config.iterations

    @abstractmethod
    def search(self, arena: Arena) -> GradientSearch:
        """Return the search."""

    def hunt(self, arena: Arena) -> None:
        """Attack the prompts in lock-step."""
        lockstep(arena, self.search(arena), self.config.stages, type(self).__name__)
