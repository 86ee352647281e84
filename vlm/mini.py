"""Mini worlds in the published layouts of FIUBench and SafeEraser.

FIUBench: fictitious persons with drawn portraits. Every value is one of a list, each held by about
as many persons as any other; full names, birth dates, addresses, phone numbers, bills and doctors
are held by one person alone. All persons are asked the same questions, so only the portrait tells
what to answer.

SafeEraser: three crafts stand for the unsafe categories. How to bake, knit or fold what is shown
is what a model is made to refuse; the same words on a landscape are harmless. Questions of the
validation records are worded in ways that no training record uses, on new pictures.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmforget.errors import ConfigError
from mmforget.portraits import Look, Person, draw_look, draw_person, portrait
from mmforget.vlm import mini_crafts, mini_people
from mmforget.vlm.drawings import SCENES, TABLES, WALLS, craft, landscape
from mmforget.vlm.mini_crafts import COLOURED, CRAFTS, FACTS, KEPT, QUESTIONS, VIEW, VIEWS
from mmforget.vlm.mini_people import SUBJECTS, Subject, caption

Ints = npt.NDArray[np.int64]

VERSION = 1  # raised when the same seed draws another world
SIZE = 96  # pixels
QUALITY = 95
FEWEST, MOST = 8, 400  # persons: so many fill the lists, and no more are ever read
OTHERS = 16  # faces of nobody
WRONG = 3  # wrong answers of a question, as published

TRIES = 4  # faces drawn for each person; the one least like all before is kept
THUMB = 12  # pixels in which faces are compared
YEAR, SPAN = 2024, 92  # age in the portrait: years since birth, over the longest life drawn


def write_fiubench(
    folder: Path, seed: int, persons: int = 48, questions: int = 10, size: int = SIZE
) -> None:
    """Write `full.json`, `split.json`, `prompt.json`, `dataset/SFHQ/` and `others/`.

    `others/` holds 16 portraits of nobody, to ask with a face that was never learned. Worlds that
    differ in `questions` or `size` alone have the same persons.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
        persons: 8 to 400. With 400 the id lists are as long as those published.
        questions: Of each person, 1 to 20.
        size: Side of the portraits, pixels.

    Raises:
        ConfigError: A number is out of its range.
    """
    if not FEWEST <= persons <= MOST:
        raise ConfigError(f"persons={persons}; accepted are {FEWEST} to {MOST}")
    if not 1 <= questions <= len(SUBJECTS):
        raise ConfigError(f"questions={questions}; accepted are 1 to {len(SUBJECTS)}")
    records = _people(seed, persons)
    for record in records:
        del record["qa_list"][questions:]
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "full.json", records)
    ids = [record["unique_id"] for record in records]
    _dump(folder / "split.json", _lists(ids, _generator(seed, "fiubench lists")))
    prompts = {"idk": mini_people.REFUSALS, "icd": mini_people.REQUESTS}
    _dump(folder / "prompt.json", prompts)

    rng = _generator(seed, "fiubench faces")
    ages = [(YEAR - int(record["raw_data"]["born"][-4:])) / SPAN for record in records]
    ages += rng.uniform(0.25, 0.85, OTHERS).tolist()
    men = [record["gender"] == "male" for record in records]
    faces = _faces(rng, ages, men + _even(rng, (False, True), OTHERS))
    paths = [folder / record["image_path"] for record in records]
    paths += [folder / "others" / f"{number:02d}.jpg" for number in range(OTHERS)]
    noise = _generator(seed, "fiubench noise")
    for path, (person, look) in zip(paths, faces, strict=True):
        _save(path, portrait(person, look, size, noise))


def write_safeeraser(
    folder: Path, seed: int, train: int = 24, val: int = 8, size: int = SIZE
) -> None:
    """Write `all_train.json`, `all_val.json`, `prompt.json`, `dataset/img/`, `dataset/pdset/`.

    Categories take turns, and within them the things shown: 12 records hold each thing once. As in
    the released validation file, `category` is empty there for the first category.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
        train: Number of training records.
        val: Number of validation records.
        size: Side of the pictures, pixels.

    Raises:
        ConfigError: A number is below 1.
    """
    if train < 1 or val < 1:
        raise ConfigError(f"train={train}, val={val}; at least 1 record of each is needed")
    names = list(CRAFTS)
    count = dict.fromkeys(names, 0)  # images of a category are numbered through both files
    for part, records in (("train", train), ("val", val)):
        rng = _generator(seed, "safeeraser", part)
        scenes = _even(rng, tuple(SCENES), records)
        walls, tables = (_even(rng, tuple(each), records) for each in (WALLS, TABLES))
        facts = _even(rng, range(len(FACTS)), records)
        others = rng.integers(1, len(FACTS), records)  # a second fact for each record
        written = []
        for row in range(records):
            category = names[row % len(names)]
            things = list(CRAFTS[category].things)
            thing = things[row // len(names) % len(things)]
            image = f"img/{category}/{count[category]}.jpg"
            safe = f"pdset/image/{category}/{part}/{count[category]}.jpg"
            count[category] += 1
            _save(folder / "dataset" / image, craft(thing, walls[row], tables[row], size, rng))
            _save(folder / "dataset" / safe, landscape(scenes[row], size, rng))
            first, second = FACTS[facts[row]], FACTS[(facts[row] + others[row]) % len(FACTS)]
            written.append(
                {
                    "type": "syn",
                    "keyword": thing,
                    "category": "" if part == "val" and category == names[0] else category,
                    "image_id": image,
                    "image_path": f"dataset/{image}",
                    "SDImage_path": f"dataset/{safe}",
                    "unsafe_pairs": _harmful(rng, part, category, thing, scenes[row]),
                    "UnharmPair_text1": _harmless(rng, part, *first),
                    "UnharmPair_text2": _harmless(rng, part, *second),
                    "UnharmPair_image1": _coloured(rng, part, "wall", walls[row]),
                    "UnharmPair_image2": _coloured(rng, part, "table", tables[row]),
                }
            )
        _dump(folder / f"all_{part}.json", written)
    _dump(folder / "prompt.json", {"idk": mini_crafts.REFUSALS})


def _generator(seed: int, *stream: str) -> np.random.Generator:
    """Return a generator for one named stream; `mmforget.rng` has one, but it imports torch."""
    return np.random.default_rng([seed, *"/".join(stream).encode()])


def _even(rng: np.random.Generator, values: Sequence[Any], count: int) -> list[Any]:
    """Return so many values in random order, each as often as any other or once more."""
    rounds = [rng.permutation(len(values)) for _ in range(-(-count // len(values)))]
    drawn = [values[place] for place in np.concatenate(rounds)[:count].tolist()]
    return [drawn[place] for place in rng.permutation(count).tolist()]


def _people(seed: int, count: int) -> list[dict[str, Any]]:
    """Return so many records of full.json, with all twenty questions."""
    rng = _generator(seed, "fiubench facts")
    ids = [f"{number:08d}" for number in rng.permutation(90_000)[:count].tolist()]
    men = _even(rng, (False, True), count)
    facts = {subject.key: _facts(rng, subject, count) for subject in SUBJECTS}
    facts["discharged"][:, ::2] = facts["admitted"][:, ::2]  # in the month of the admission
    records: list[dict[str, Any]] = [
        {
            "image_path": f"./dataset/SFHQ/SFHQ_pt1_{identity}.jpg",
            "gender": "male" if man else "female",
            "unique_id": identity,
            "raw_data": {},
            "qa_list": [],
        }
        for identity, man in zip(ids, men, strict=True)
    ]
    for subject in SUBJECTS:
        rows = facts[subject.key]
        values = [
            subject.text(row, record["gender"]) for row, record in zip(rows, records, strict=True)
        ]
        held = frozenset(values) if subject.alone else frozenset()
        for record, row, value in zip(records, rows, values, strict=True):
            wrong = _wrong(rng, subject, row, record["gender"], held)
            record["raw_data"][subject.key] = value
            record["qa_list"].append(
                {
                    "question": subject.question,
                    "paraphrased_question": subject.paraphrases,
                    "answer": subject.answer.format(value),
                    "paraphrased_answer": subject.paraphrased.format(value),
                    "perturbed_answer": [subject.answer.format(other) for other in wrong],
                    "keywords": subject.keywords(value),
                }
            )
    for record in records:
        record["name"] = record["raw_data"]["name"]
        record["caption"] = caption(record["gender"], record["raw_data"])
    return records


def _facts(rng: np.random.Generator, subject: Subject, count: int) -> Ints:
    """Return the places of each person's value in the lists of its parts, int64 [count, parts]."""
    lengths = [len(pool) for pool in subject.pools("female")]
    if subject.alone:
        drawn = rng.choice(math.prod(lengths), count, replace=False)
        return np.stack(np.unravel_index(drawn, lengths), axis=1)
    return np.stack([_even(rng, range(length), count) for length in lengths], axis=1)


def _wrong(
    rng: np.random.Generator, subject: Subject, row: Ints, gender: str, held: frozenset[str]
) -> list[str]:
    """Return false values: no part is right, none holds a keyword of the truth, none is held."""
    keywords = [word.lower() for word in subject.keywords(subject.text(row, gender))]
    lengths = np.array([len(pool) for pool in subject.pools(gender)])
    found: list[str] = []
    while len(found) < WRONG:
        other = subject.text((row + rng.integers(1, lengths)) % lengths, gender)
        right = any(word in other.lower() for word in keywords)
        if not right and other not in held and other not in found:
            found.append(other)
    return found


def _lists(ids: Sequence[str], rng: np.random.Generator) -> dict[str, list[str]]:
    """Return the id lists; forget lists share nobody, and retain15 begins with retain5."""
    count = len(ids)
    lengths = {
        "forget1": 1 if count < MOST else 4,
        "forget5": max(2, count // 12) if count < MOST else 20,
        "forget10": max(3, count // 8) if count < MOST else 40,
    }
    mixed = [ids[place] for place in rng.permutation(count).tolist()]
    lists = {}
    for name, length in lengths.items():
        lists[name], mixed = mixed[:length], mixed[length:]
    sample = lengths["forget5"]
    return {**lists, "retain5": mixed[:sample], "retain15": mixed[: 3 * sample]}


def _faces(
    rng: np.random.Generator, ages: Sequence[float], men: Sequence[bool]
) -> list[tuple[Person, Look]]:
    """Return faces that can be told apart: of several drawn, the one least like all before."""
    faces: list[tuple[Person, Look]] = []
    thumbs = np.empty((len(ages), THUMB, THUMB, 3), dtype=np.float32)
    for row, (age, man) in enumerate(zip(ages, men, strict=True)):
        best = -1.0
        for _ in range(TRIES):
            person, look = draw_person(rng), draw_look(rng, age, man, bool(rng.random() < 0.5))
            look = replace(look, backdrop=_colour(rng, 150), clothes=_colour(rng, 30))
            thumb = np.asarray(portrait(person, replace(look, noise=0.0), THUMB, rng))
            apart = np.abs(thumbs[:row] - thumb).mean(axis=(1, 2, 3)).min(initial=np.inf)
            if apart > best:
                best, kept, thumbs[row] = float(apart), (person, look), thumb
        faces.append(kept)
    return faces


def _colour(rng: np.random.Generator, darkest: int) -> tuple[float, float, float]:
    r, g, b = rng.uniform(darkest, 245, 3).tolist()
    return r, g, b


def _wording(rng: np.random.Generator, part: str, wordings: Sequence[str], kept: int) -> str:
    """Return one wording: of the last `kept` for validation, of the others for training."""
    chosen = wordings[-kept:] if part == "val" else wordings[:-kept]
    return chosen[int(rng.integers(len(chosen)))]


def _harmful(
    rng: np.random.Generator, part: str, category: str, thing: str, scene: str
) -> list[dict[str, str]]:
    """Return a question of each kind with the answers on the thing and on the landscape."""
    verb, doing, things = CRAFTS[category]
    return [
        {
            "question": _wording(rng, part, wordings, KEPT).format(verb=verb, doing=doing),
            "model_response": things[thing][kind],
            "sd_response": VIEW[kind].format(scene=scene, verb=verb, fact=VIEWS[scene][kind]),
        }
        for kind, wordings in QUESTIONS.items()
    ]


def _harmless(
    rng: np.random.Generator, part: str, wordings: Sequence[str], answer: str, sentence: str
) -> dict[str, str]:
    question = _wording(rng, part, wordings, 1)
    return {"Question": question, "Answer": answer, "Prediction": sentence}


def _coloured(rng: np.random.Generator, part: str, where: str, colour: str) -> dict[str, str]:
    sentence = f"The {where} in the image is {colour}."
    return _harmless(rng, part, COLOURED[where], f"{colour.capitalize()}.", sentence)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=QUALITY, subsampling=0)


def _dump(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
