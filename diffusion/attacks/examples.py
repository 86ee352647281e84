"""Prompts to attack, out of prompt files, and the concepts that UnlearnDiffAtk publishes them for.

The order of a file means nothing here: examples are named by `id`, and results of two runs are
joined by it. A run that dropped long prompts and one that did not disagree about every index.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mmforget.diffusion.prompts import read_prompts
from mmforget.errors import ConfigError, DataError
from mmforget.rng import derive

MARKS = 2  # a sequence begins and ends with one
SEEDS = (-(2**63), 2**64)  # what torch generators take, the second excluded


@dataclass(frozen=True)
class Example:
    """One prompt to attack.

    Attributes:
        id: Its case number, as text; its row where the file has none. Unique in a file.
        prompt: The text.
        seed: Seed of the noise its image is drawn from.
        guidance: Classifier-free guidance to draw it with; None: the file says nothing.
        row: Record of the file, from 0.
        label: Class, artist, profession or brand that it shows; None: the file says nothing.
    """

    id: str
    prompt: str
    seed: int
    guidance: float | None
    row: int
    label: str | None


@dataclass(frozen=True)
class ConceptPreset:
    """How UnlearnDiffAtk attacks one concept; see its `configs`.

    Attributes:
        judge: "nudenet", "q16", "imagenette" (ResNet-50) or "artist" (129 classes).
        label: What that judge must see: a preset of NudeNet's classes, "harmful", an object, or a
            class of the artists.
        tokens: k, adversarial tokens, put before the prompt.
        iterations: Gradient steps at each of 50 time steps.
    """

    judge: Literal["nudenet", "q16", "imagenette", "artist"]
    label: str
    tokens: int
    iterations: int = 40


CONCEPTS: Mapping[str, ConceptPreset] = {
    "nudity": ConceptPreset("nudenet", "exposed", 5),
    "violence": ConceptPreset("q16", "harmful", 5),
    "illegal": ConceptPreset("q16", "harmful", 5),
    "vangogh": ConceptPreset("artist", "vincent-van-gogh", 3),
    "church": ConceptPreset("imagenette", "church", 3),
    "tench": ConceptPreset("imagenette", "tench", 3),
    "parachute": ConceptPreset("imagenette", "parachute", 3),
    "garbage_truck": ConceptPreset("imagenette", "garbage_truck", 3),
}


def read_examples(path: Path, limit: int | None = None, seed: int = 0) -> list[Example]:
    """Read the prompts of a .csv or .txt file; see `prompts.read_prompts`.

    Args:
        path: The file.
        limit: Only the first so many records.
        seed: From which the seeds of records without one are derived, each by its id.

    Raises:
        ConfigError: The limit is below 1.
        DataError: The file cannot be read, a seed is too large for a generator, or a row without a
            case number has the number of another's case.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: at least 1 prompt is needed; leave it out to take all")
    made: dict[str, Example] = {}
    for row in read_prompts(path)[:limit]:
        name = str(row.row if row.case is None else row.case)
        if row.seed is not None and not SEEDS[0] <= row.seed < SEEDS[1]:
            raise DataError(
                f"{path} line {row.line}: the seed {row.seed} is outside {SEEDS[0]} to "
                f"{SEEDS[1] - 1}, what torch generators take"
            )
        if name in made:
            raise DataError(
                f"{path} line {row.line}: its id {name} is that of another prompt. Give all "
                f"records a case number, or none"
            )
        made[name] = Example(
            id=name,
            prompt=row.prompt,
            seed=derive(seed, "attacked prompt", name) if row.seed is None else row.seed,
            guidance=row.guidance,
            row=row.row,
            label=row.concept,
        )
    return list(made.values())


def split_by_length(
    examples: Sequence[Example], count: Callable[[str], int], limit: int = 60
) -> tuple[list[Example], list[Example]]:
    """Return the examples that leave room for adversarial tokens, and those that do not.

    UnlearnDiffAtk drops the latter, but its rates are shares of both: 142 for nudity, of which 118
    are attacked. Report both numbers.

    Args:
        examples: All.
        count: Tokens of a text, without start and end marks.
        limit: Greatest length with the two marks.

    Raises:
        ConfigError: The limit leaves no room for a token.
    """
    room = _room(limit)
    fits = [count(example.prompt) <= room for example in examples]
    kept = [example for example, fit in zip(examples, fits, strict=True) if fit]
    return kept, [example for example, fit in zip(examples, fits, strict=True) if not fit]


def cut_to_length(
    examples: Sequence[Example],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    limit: int = 60,
) -> list[Example]:
    """Return all examples, long prompts cut at the end to the limit; short ones are left as is.

    The alternative to dropping: every prompt of the file is attacked. A cut prompt is another one,
    so its image without an attack must be drawn anew.

    Args:
        examples: All.
        encode: Token ids of a text, without start and end marks.
        decode: The text of token ids.
        limit: Greatest length with the two marks.

    Raises:
        ConfigError: The limit leaves no room for a token.
    """
    room = _room(limit)
    made = []
    for example in examples:
        ids, text = encode(example.prompt), example.prompt
        # Decoded text can be more tokens than it was decoded from: a word cut in its middle.
        keep = min(len(ids), room)
        while keep < len(ids) and len(encode(text)) > room:
            text = decode(ids[:keep])
            keep -= 1
        made.append(example if text == example.prompt else replace(example, prompt=text))
    return made


def _room(limit: int) -> int:
    if limit <= MARKS:
        raise ConfigError(
            f"limit={limit}: the start and end marks take {MARKS} places; give at least {MARKS + 1}"
        )
    return limit - MARKS
