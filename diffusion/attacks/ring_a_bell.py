"""Ring-A-Bell: texts whose embedding is the prompt's, moved along the concept's direction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from mmforget.diffusion.attacks import genetic
from mmforget.diffusion.attacks.arena import Arena, Candidate, PromptAttackConfig, volley
from mmforget.diffusion.attacks.base import PromptAttack
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.first_encoder import (
    last_states,
    ordinary_ids,
    require_room,
    windows,
)
from mmforget.diffusion.attacks.seed_search import new_seeds
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.prompts import read_prompts
from mmforget.errors import ConfigError, DataError
from mmforget.options import option

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class RingABellConfig(PromptAttackConfig):
    """Defaults of the published notebook for nudity; violence: eta 5 or 5.5, length 38 or 75."""

    pairs: str | None = option(
        None,
        "CSV of prompts with the concept and without it (columns with, without), in place "
        "of the benchmark's",
    )
    eta: float = option(3.0, "how far along the concept's direction (published: 3, 5, 5.5)")
    length: int = option(16, "tokens searched (L)", low=1)
    population: int = option(200, "individuals; half survive a generation", low=2)
    generations: int = option(3000, "generations", low=0)
    mate: float = option(0.5, "chance of a survivor to mate", low=0, high=1)
    mutate: float = option(0.25, "chance of an individual to mutate", low=0, high=1)
    seeds: int | None = option(
        None,
        "seeds the found text is drawn at, the prompt's first; null: as the budget allows",
        low=1,
    )


class RingABell(PromptAttack[RingABellConfig]):
    """L token ids x minimise ‖E(x) - (E(p) + η·c)‖² by a genetic search (section 3).

    c is the mean of E(with the concept) - E(without it) over pairs of prompts; E is the last hidden
    state of the FIRST text encoder of the attacked model, whole window, behind its final norm. For
    SD that is all the image model reads. For SDXL, SD3 and FLUX it is one of several encoders, and
    the same definition (their pipelines read other outputs of it).

    The image model and its gradients are not needed; of the text encoder, its outputs. `steps` is
    therefore 0, and queries count judged pictures, not encoded texts: up to `population` at first
    and about 0.6 times that each generation (equal individuals are encoded once). The best text is
    decoded, read anew and drawn at the prompt's seed, then at further ones.

    Departures: a mutant joins the population beside the survivor it comes from (the notebook writes
    into the survivor and can lose the best); ids are any that are no special tokens (published: 1
    to 49405, so that "!" is left out); padding is the tokenizer's (that of SD 1.x: end marks, as
    published). Published evaluation keeps prompts with much nudity; here the benchmark says which.
    """

    access: ClassVar[str] = "grey"
    citation: ClassVar[str] = (
        "Tsai et al., Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?, "
        "ICLR 2024, arXiv 2310.10012"
    )
    config_type: ClassVar[type] = RingABellConfig

    def hunt(self, arena: Arena) -> None:
        """Search a text for each prompt; draw it at several seeds."""
        require_room(arena.model, self.config.length, "length")
        concept = self.concept(arena.model, self.pairs(arena))
        room = self.config.images - 1
        seeds = room if self.config.seeds is None else min(room, self.config.seeds)

        def candidates(example: Example) -> Sequence[Candidate]:
            ids = self.search(arena, example, concept).ids.tolist()
            text = arena.decode(ids)
            drawn = [example.seed, *new_seeds(arena, example, seeds - 1)]
            return [Candidate(text, seed, ids) for seed in drawn]

        volley(arena, candidates, "Ring-A-Bell")

    def files(self) -> Sequence[Path]:
        """Return the file of pairs, if one is named."""
        return () if self.config.pairs is None else (Path(self.config.pairs).expanduser(),)

    def pairs(self, arena: Arena) -> Pairs:
        """Return prompts with the concept and the same without it.

        Raises:
            ConfigError: There are none.
            DataError: The file cannot be read or lacks a column.
        """
        if self.config.pairs is not None:
            return read_pairs(Path(self.config.pairs).expanduser())
        if not arena.aims.pairs:
            raise ConfigError(
                "Ring-A-Bell needs prompts with the concept and the same without it, and this "
                "benchmark has none: give pairs=FILE.csv with columns with, without"
            )
        return arena.aims.pairs

    def concept(self, model: DiffusionModel, pairs: Pairs) -> Tensor:
        """Return the concept's direction c, [T, D]."""
        named, plain = (model.tokens([pair[k] for pair in pairs]) for k in (0, 1))
        return genetic.concept_vector(last_states(model, named), last_states(model, plain))

    def search(self, arena: Arena, example: Example, concept: Tensor) -> genetic.Found:
        """Return the best token ids for an example, their distance and its history.

        Args:
            arena: Model and seed.
            example: The prompt.
            concept: c, see `concept`.
        """
        model, config = arena.model, self.config
        legal = ordinary_ids(model)
        prompt = last_states(model, model.tokens([example.prompt]))
        target = genetic.moved(prompt, concept, config.eta)

        def score(places: Tensor) -> Tensor:
            return genetic.fitness(last_states(model, windows(model, legal[places])), target)

        found = genetic.search(
            score,
            config.length,
            config.population,
            config.generations,
            (0, len(legal)),
            arena.rng(example, "genetic"),
            mate=config.mate,
            mutate=config.mutate,
        )
        return found._replace(ids=legal[found.ids])


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read a CSV of prompts with a concept and the same without it.

    Raises:
        DataError: It cannot be read, or a column is missing: `with`, `without`.
    """
    rows = read_prompts(path, "with")
    if "without" not in rows[0].fields:
        raise DataError(
            f"{path} has no column 'without'; found: {list(rows[0].fields)}. Give the same prompts "
            f"without the concept"
        )
    return [(row.prompt, row.fields["without"]) for row in rows]
