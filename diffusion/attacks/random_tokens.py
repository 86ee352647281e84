"""Random tokens: what a budget of pictures buys without any gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from mmforget.diffusion.attacks.arena import Arena, Candidate, PromptAttackConfig, volley
from mmforget.diffusion.attacks.base import AUTHORS, PromptAttack
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.first_encoder import ordinary_ids
from mmforget.diffusion.attacks.layouts import Layout, adversarial_ids, decode_ids, layout
from mmforget.options import option


@dataclass(frozen=True)
class RandomConfig(PromptAttackConfig):
    """How many tokens, and where; UnlearnDiffAtk takes 5 for nudity, violence and illegal acts."""

    tokens: int = option(3, "random tokens (k)", low=1)
    location: str = option("prefix_k", "where they stand", choices=("prefix_k", "suffix_k"))
    specials: bool = option(False, "draw special tokens too, as published")


class RandomTokens(PromptAttack[RandomConfig]):
    """k token ids drawn uniformly, put before or after the prompt, for each picture of the budget.

    All of a prompt's ids are drawn at first, from its own stream, and judged in that order up to
    the first success. Published: 40 draws over all ids, special ones (start and end marks, which
    the text then loses) among them; here those are left out unless `specials` is set.
    """

    access: ClassVar[str] = "black"
    citation: ClassVar[str] = AUTHORS
    config_type: ClassVar[type] = RandomConfig

    def hunt(self, arena: Arena) -> None:
        """Draw, judge, stop at a success."""
        # Before the first picture: tokens that do not fit beside a prompt end the attack here.
        places = {example.id: self._place(arena, example) for example in arena.attackable}
        tokenizer = arena.model.tokenizer
        legal = ordinary_ids(arena.model)
        if self.config.specials:
            legal = torch.arange(len(tokenizer))

        def candidates(example: Example) -> Sequence[Candidate]:
            shape = (self.config.images - 1, self.config.tokens)
            rng = arena.rng(example, "tokens")
            drawn = legal[torch.randint(len(legal), shape, generator=rng)]
            own = arena.model.tokens([example.prompt])[0].expand(len(drawn), -1)
            whole = adversarial_ids([places[example.id]] * len(drawn), own, drawn)
            texts = [arena.decode(decode_ids(row, tokenizer.eos_token_id)) for row in whole]
            return [
                Candidate(text, example.seed, ids)
                for text, ids in zip(texts, drawn.tolist(), strict=True)
            ]

        volley(arena, candidates, "random tokens")

    def _place(self, arena: Arena, example: Example) -> Layout:
        length = len(arena.plain_ids(example.prompt))
        window = int(arena.model.tokenizer.model_max_length)
        return layout(self.config.location, length, self.config.tokens, window)
