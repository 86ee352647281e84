"""MMA-Diffusion, text modality: other words with the prompt's pooled embedding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_lowercase
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mmforget.diffusion.attacks import coordinate
from mmforget.diffusion.attacks.arena import Arena, Candidate, PromptAttackConfig, volley
from mmforget.diffusion.attacks.base import PromptAttack
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.first_encoder import (
    last_states,
    ordinary_ids,
    pooled,
    require_room,
    windows,
)
from mmforget.diffusion.attacks.seed_search import new_seeds
from mmforget.errors import ConfigError, DataError
from mmforget.options import option
from mmforget.types import full


@dataclass(frozen=True)
class MMAConfig(PromptAttackConfig):
    """Published: 20 tokens, 1000 steps (more than 500 advised), 256, 512, 10 restarts."""

    tokens: int = option(20, "adversarial tokens, in place of the prompt", low=1)
    steps: int = option(500, "coordinate steps of a restart", low=0)
    topk: int = option(256, "ids that each position may take in a step", low=1)
    candidates: int = option(512, "texts tried in a step, one token changed in each", low=1)
    restarts: int = option(10, "searches from other letters; each gives a text", low=1)
    blocked: list[str] = option(
        [],
        "words that texts must not hold, nor any of their tokens: what a filter looks for, or "
        "the concept's name; empty: any word may be used",
    )


class Best(NamedTuple):
    """The best text of a restart.

    Attributes:
        loss: 1 - cosine with the prompt's pooled embedding, in [0, 2].
        text: The text.
        ids: Its token ids.
        history: Loss of the letters, and of the text that each step took on.
    """

    loss: float
    text: str
    ids: list[int]
    history: list[float]


class PooledSearch:
    """Greedy coordinate search of texts by their pooled embedding.

    Args:
        arena: Model and prompts.
        config: Tokens, steps, blocked words.

    Raises:
        ConfigError: Tokens do not fit the window, or too few ids are left to choose from.
        DataError: The tokenizer has no letters.
    """

    def __init__(self, arena: Arena, config: MMAConfig) -> None:
        require_room(arena.model, config.tokens, "tokens")
        self.arena, self.config, self.model = arena, config, arena.model
        words = len(self.model.tokenizer)
        table = next(iter(arena.tables.values()))
        self.table = full(table[:words])
        self.words = [word.strip().lower() for word in config.blocked if word.strip()]
        self.banned = self._banned()
        open_to = words - len(self.banned)
        if config.topk > open_to:
            raise ConfigError(
                f"topk={config.topk}: {words} ids, {len(self.banned)} of them special or blocked, "
                f"leave {open_to}; lower topk"
            )
        alphabet = [arena.plain_ids(letter) for letter in ascii_lowercase]
        self.letters = [ids[0] for ids in alphabet if len(ids) == 1 and ids[0] not in self.banned]
        if not self.letters:
            raise DataError(
                "no single letter is a token of this tokenizer that is not blocked, and the search "
                "starts from letters"
            )

    def search(self, example: Example) -> list[Best]:
        """Return the best text of each restart, the least loss first; equal texts once."""
        found: dict[str, Best] = {}
        target = self._pooled(self.model.tokens([example.prompt]))
        for restart in range(self.config.restarts):
            best = self._restart(target, self.arena.rng(example, "restart", restart))
            found.setdefault(best.text, best)
        return sorted(found.values(), key=lambda best: best.loss)

    def _restart(self, target: Tensor, rng: torch.Generator) -> Best:
        count = self.config.tokens
        drawn = torch.randint(len(self.letters), (count,), generator=rng)
        control = torch.tensor(self.letters)[drawn]
        loss = float(self._loss(control[None], target)[0])
        text, ids, history = self.arena.decode(control.tolist()), control.tolist(), [loss]
        least, closed = loss, sorted(self.banned)
        for _ in range(self.config.steps):
            grad = coordinate.control_rows(self._gradient(control, target), count)
            topk = coordinate.blocked_topk(grad @ self.table.T, closed, self.config.topk)
            tries = coordinate.candidates(control, topk.cpu(), self.config.candidates, rng)
            # A text can be read as other tokens than it was made of: those count, and are scored.
            texts = dict(self._admitted(tries))
            if not texts:
                continue  # other draws from the same ids may do
            rows = torch.tensor(list(texts))
            losses = self._loss(rows, target)
            place = int(losses.argmin())
            control, loss = rows[place], float(losses[place])
            history.append(loss)
            if loss < least:
                least, ids = loss, control.tolist()
                text = texts[tuple(ids)]
        return Best(least, text, ids, history)

    def _admitted(self, tries: Tensor) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield (ids, text) of tries whose text is as many tokens again, none of them blocked."""
        texts = list(dict.fromkeys(self.arena.decode(ids) for ids in tries.tolist()))
        read = self.model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for text, ids in zip(texts, read, strict=True):
            clean = self.banned.isdisjoint(ids) and not any(w in text.lower() for w in self.words)
            if clean and len(ids) == self.config.tokens:
                yield tuple(ids), text

    def _loss(self, ids: Tensor, target: Tensor) -> Tensor:
        return coordinate.cosine_loss(self._pooled(windows(self.model, ids)), target)

    def _pooled(self, sequences: Tensor) -> Tensor:
        return pooled(self.model, last_states(self.model, sequences), sequences)

    def _gradient(self, control: Tensor, target: Tensor) -> Tensor:
        """Return the loss's gradient at a sequence's token embeddings, [T, D]."""
        sequence = windows(self.model, control[None])
        own = next(iter(self.arena.tables.values()))
        rows = own[sequence.to(own.device)].detach().requires_grad_(True)
        states = last_states(self.model, sequence, rows)
        with torch.enable_grad():
            loss = coordinate.cosine_loss(pooled(self.model, states, sequence), target)
            (grad,) = torch.autograd.grad(loss.sum(), rows)
        return full(grad[0])

    def _banned(self) -> set[int]:
        """Return special ids, the tokens of blocked words, and tokens that hold one."""
        ordinary = ordinary_ids(self.model).tolist()
        found = set(range(len(self.table))) - set(ordinary)
        for word in self.words:
            found.update(self.arena.plain_ids(word))
        if self.words:
            pieces = [(i, self.arena.decode([i]).lower()) for i in ordinary]
            found.update(i for i, piece in pieces if any(word in piece for word in self.words))
        return found


class MMA(PromptAttack[MMAConfig]):
    """Tokens x minimise 1 - cos(pool(x), pool(p)) by greedy coordinate gradient (section 3.2).

    pool is the last hidden state at the end mark, behind the final norm, of the FIRST text encoder
    of the attacked model (SDXL, SD3 and FLUX have others, which read the text found). x starts as
    random letters and replaces the prompt. Each step takes the gradient by the one-hot rows,
    divided by its norm at each position, lets every position take the ids of the steepest descent
    that are not blocked, tries some such changes at random and goes on from the best of them, worse
    than before or not; the best ever is kept. Texts that the tokenizer reads as another number of
    tokens, or that hold a blocked word, are thrown away; equal ones are scored once.

    The best text of each restart is judged at the prompt's seed, the least loss first, then all of
    them at further seeds, as the budget of pictures allows. Steps count gradients of the text
    encoder; the image model is not needed for them. Blocked are no words unless `blocked` names
    some: published is a list of sexual ones, which fits no other concept.

    Departures: the published code proposes for each token what the gradient of the token before it
    says (its row 0 is the start mark's); here each has its own. Candidates thrown
    away are not made up for by copies of the last valid one.
    """

    access: ClassVar[str] = "white"
    citation: ClassVar[str] = (
        "Yang et al., MMA-Diffusion: MultiModal Attack on Diffusion Models, CVPR 2024, arXiv "
        "2311.17516"
    )
    config_type: ClassVar[type] = MMAConfig

    def most_steps(self) -> int:
        """Return the steps of all restarts."""
        return self.config.steps * self.config.restarts

    def hunt(self, arena: Arena) -> None:
        """Search texts for each prompt; judge them at several seeds."""
        search = PooledSearch(arena, self.config)

        def candidates(example: Example) -> Sequence[Candidate]:
            texts = search.search(example)
            rounds = -(-(self.config.images - 1) // len(texts))
            seeds = [example.seed, *new_seeds(arena, example, rounds - 1)]
            return [Candidate(best.text, seed, best.ids) for seed, best in product(seeds, texts)]

        volley(arena, candidates, "MMA", steps=self.most_steps())
