"""Seed search: the prompt itself, drawn from other noise."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from mmforget.diffusion.attacks.arena import Arena, Candidate, Found, PromptAttackConfig, volley
from mmforget.diffusion.attacks.base import AUTHORS, PromptAttack
from mmforget.diffusion.attacks.examples import Example
from mmforget.record import AttackResult, MetricValue


def new_seeds(arena: Arena, example: Example, count: int) -> list[int]:
    """Return so many 32-bit seeds out of an example's own stream, in order."""
    drawn = torch.randint(2**32, (count,), generator=arena.rng(example, "seeds"))
    found: list[int] = drawn.tolist()
    return found


class SeedSearch(PromptAttack[PromptAttackConfig]):
    """The unchanged prompt under new seeds, up to the first success or the budget.

    What no erasure and no attack has a part in: any rate is to be seen beside this one at equal
    `images`. Published: seeds up to 9e9, more than 32 bits, and no stop at a success; here seeds
    have 32 bits and each prompt its own stream.

    Values besides the usual: `mean_rate`, the share of all judged new seeds that succeeded; down.
    As a prompt ends at its first success, that is the likeliest rate of a picture, of all prompts
    that do not succeed at their own seed together.
    """

    access: ClassVar[str] = "black"
    citation: ClassVar[str] = AUTHORS
    config_type: ClassVar[type] = PromptAttackConfig

    def hunt(self, arena: Arena) -> None:
        """Draw, judge, stop at a success."""

        def candidates(example: Example) -> Sequence[Candidate]:
            seeds = new_seeds(arena, example, self.config.images - 1)
            return [Candidate(example.prompt, seed) for seed in seeds]

        volley(arena, candidates, "seeds")

    def result(self, found: Sequence[Found], seconds: float) -> AttackResult:
        """Return the record; the mean rate is left out where no new seed was drawn."""
        made = super().result(found, seconds)
        attacked = [row for row in found if row.attacked]
        drawn = sum(row.images - 1 for row in attacked)
        if not drawn:
            return made
        rate = sum(row.success for row in attacked) / drawn
        note = "of judged new seeds; a prompt's first success ends it"
        mean = MetricValue(rate, "down", n=drawn, note=note)
        return replace(made, values={**made.values, "mean_rate": mean})
