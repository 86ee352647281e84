"""Ring-A-Bell: token ids whose text embedding is a prompt's, moved along a concept's direction.

Tsai et al., Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?, ICLR 2024.
Only the text encoder is asked; the image model is never run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmforget.errors import ConfigError, DataError
from mmforget.types import full


def concept_vector(with_concept: Tensor, without: Tensor) -> Tensor:
    """Return the mean difference of text embeddings with and without a concept (section 3.1).

    Args:
        with_concept: Last hidden states of N prompts that name the concept, [N, T, D].
        without: Those of the same prompts without it, in the same order, [N, T, D].

    Returns:
        [T, D], float32 or wider.

    Raises:
        DataError: The shapes do not pair up, or there are no prompts.
    """
    if with_concept.ndim != 3 or with_concept.shape != without.shape or not len(without):
        raise DataError(
            f"embeddings with the concept {list(with_concept.shape)} and without it "
            f"{list(without.shape)}: two of the same shape [N, T, D] are needed, N at least 1"
        )
    return (full(with_concept) - full(without)).mean(dim=0)


def moved(prompt: Tensor, concept: Tensor, eta: float) -> Tensor:
    """Return the embedding that is searched for, E(p) + η·c, [T, D].

    Args:
        prompt: Last hidden state of the prompt, [T, D] or [1, T, D].
        concept: c, see `concept_vector`, [T, D].
        eta: η; published: 3 for nudity, 5 or 5.5 for violence.
    """
    return full(prompt).reshape(concept.shape) + eta * full(concept)


def fitness(population: Tensor, target: Tensor, chunk: int = 64) -> Tensor:
    """Return the sum of squared differences over all positions and channels; less is fitter.

    Args:
        population: Last hidden states of B individuals, [B, T, D], of any precision.
        target: See `moved`, [T, D].
        chunk: Individuals compared at a time; bounds memory, does not change results.

    Returns:
        [B], float32 or wider.

    Raises:
        DataError: The individuals are of another shape than the target.
    """
    if population.shape[1:] != target.shape:
        raise DataError(
            f"individuals {list(population.shape)} do not fit the target {list(target.shape)}: "
            f"encode both with the same encoder and length"
        )
    wanted = full(target)
    found = wanted.new_empty(len(population))
    for first in range(0, len(population), chunk):
        rows = slice(first, first + chunk)
        found[rows] = (full(population[rows]) - wanted).square().sum(dim=(1, 2))
    return found


def crossover(a: Tensor, b: Tensor, point: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the two children of a one-point crossover: a's head with b's tail, and the reverse.

    Args:
        a: Ids, [L] or [M, L].
        b: Ids of the same shape.
        point: Ids of the head, from 0 to L; one for all, or one a row, [M].
    """
    at = torch.as_tensor(point, device=a.device)
    head = torch.arange(a.shape[-1], device=a.device) < at.unsqueeze(-1)
    return torch.where(head, a, b), torch.where(head, b, a)


class Generation(NamedTuple):
    """A population after one step.

    Attributes:
        ids: Survivors first, best first; then children and mutants, [B, L].
        scores: Known scores, [B]; NaN where there is none.
        fresh: Which rows need scoring, bool [B].
    """

    ids: Tensor
    scores: Tensor
    fresh: Tensor


def evolve(
    ids: Tensor,
    scores: Tensor,
    vocabulary: tuple[int, int],
    rng: torch.Generator,
    *,
    survivors: int | None = None,
    mate: float = 0.5,
    mutate: float = 0.25,
    reference: bool = False,
) -> Generation:
    """Return the next generation.

    The best survive. Each of them mates by chance with a random survivor: two children by a
    one-point crossover join the population. Then each individual mutates by chance: one random id
    at a random place.

    A survivor's mutant joins the population beside it, so the best score never rises and survivors
    keep their scores. The published notebook (`reference`) writes the mutation into the survivor,
    so that the best can be lost, and scores all again.

    Args:
        ids: Population, int64 [B, L].
        scores: Its fitness, less is fitter; NaN is the worst, [B].
        vocabulary: Ids that mutations may draw, (low, high), high excluded.
        rng: Where chance comes from.
        survivors: How many survive; None: half.
        mate: Chance of a survivor to mate, in [0, 1].
        mutate: Chance of an individual to mutate, in [0, 1].
        reference: See above.

    Raises:
        ConfigError: The range of ids is empty, or there are fewer individuals than survivors, or
            no survivors.
    """
    low, high = _checked(vocabulary)
    count = len(ids) // 2 if survivors is None else survivors
    if not 1 <= count <= len(ids):
        raise ConfigError(
            f"{count} survivors of {len(ids)} individuals: at least 1, and no more than there are"
        )
    device, length = ids.device, ids.shape[1]

    def chance(rows: int, share: float) -> Tensor:
        return (torch.rand(rows, generator=rng, device=rng.device) < share).to(device)

    def whole(start: int, stop: int, rows: int) -> Tensor:
        drawn = torch.randint(start, stop, (rows,), generator=rng, device=rng.device)
        return drawn.to(device)

    order = scores.argsort(stable=True)[:count].to(device)
    best, known = ids[order], scores[order.to(scores.device)]
    mates = chance(count, mate)
    # A point inside leaves both children a part of both parents; one id has no inside.
    points = whole(1, max(length, 2), count)
    pairs = crossover(best, best[whole(0, count, count)], points)
    children = torch.stack(pairs, dim=1)[mates].flatten(0, 1)
    everyone = torch.cat([best, children])
    changes = chance(len(everyone), mutate)
    mutants = everyone.clone()
    mutants[torch.arange(len(everyone), device=device), whole(0, length, len(everyone))] = whole(
        low, high, len(everyone)
    )
    made = torch.where(changes.unsqueeze(1), mutants, everyone)
    fresh = torch.ones(len(made), dtype=torch.bool, device=device)
    if not reference:
        made = torch.cat([best, made[count:], mutants[:count][changes[:count]]])
        fresh = torch.arange(len(made), device=device) >= count
    told = scores.new_full((len(made),), torch.nan)
    if not reference:
        told[:count] = known
    return Generation(made, told, fresh)


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
        ids: The best individual, int64 [L].
        score: Its fitness.
        history: Best fitness of the first population and of each generation, [generations + 1].
    """

    ids: Tensor
    score: float
    history: list[float]


def search(
    score: Callable[[Tensor], Tensor],
    length: int,
    population: int,
    generations: int,
    vocabulary: tuple[int, int],
    rng: torch.Generator,
    *,
    mate: float = 0.5,
    mutate: float = 0.25,
    reference: bool = False,
) -> Found:
    """Search ids of the least fitness; every sequence of ids is scored at most once.

    Published: 200 individuals, 3000 generations, ids 1 to 49405, 16 of them for nudity, 38 or 75
    for violence.

    Args:
        score: Fitness [B] of ids int64 [B, L].
        length: L, ids of an individual.
        population: Individuals at first; half as many survive each generation.
        generations: Steps.
        vocabulary: Ids that may be drawn, (low, high), high excluded.
        rng: Where chance comes from.
        mate: See `evolve`.
        mutate: See `evolve`.
        reference: See `evolve`; the best of the last generation is returned, which then may be
            worse than an earlier one.

    Raises:
        ConfigError: The range of ids is empty, or there are fewer than 1 id, 2 individuals or 0
            generations.
        DataError: `score` does not give one score for each row.
    """
    low, high = _checked(vocabulary)
    if length < 1 or population < 2 or generations < 0:
        raise ConfigError(
            f"length={length}, population={population}, generations={generations}: at least 1 id, "
            f"2 individuals and 0 generations are needed"
        )
    # Bytes, as hundreds of thousands of long individuals are remembered.
    memo: dict[bytes, float] = {}

    def scored(ids: Tensor) -> Tensor:
        keys = [row.tobytes() for row in ids.to("cpu", torch.int32).numpy()]
        rows = {key: place for place, key in enumerate(keys) if key not in memo}
        if rows:
            found = score(ids[list(rows.values())])
            if found.shape != (len(rows),):
                raise DataError(
                    f"scores {list(found.shape)} of {len(rows)} individuals: one each is needed"
                )
            memo.update(zip(rows, found.tolist(), strict=True))
        return torch.tensor([memo[key] for key in keys], dtype=torch.float64)

    first = torch.randint(low, high, (population, length), generator=rng, device=rng.device)
    ids, scores = first, scored(first)
    history = [float(scores.nan_to_num(torch.inf).min())]
    for _ in range(generations):
        ids, scores, fresh = evolve(
            ids,
            scores,
            vocabulary,
            rng,
            survivors=population // 2,
            mate=mate,
            mutate=mutate,
            reference=reference,
        )
        scores[fresh.cpu()] = scored(ids[fresh])
        history.append(float(scores.nan_to_num(torch.inf).min()))
    best = int(scores.nan_to_num(torch.inf).argmin())
    return Found(ids[best], history[-1], history)


def _checked(vocabulary: tuple[int, int]) -> tuple[int, int]:
    low, high = vocabulary
    if not 0 <= low < high:
        raise ConfigError(f"ids from {low} to below {high}: give 0 <= low < high")
    return low, high
