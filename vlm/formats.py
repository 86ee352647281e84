"""FIUBench and SafeEraser as they are published: records of questions with an image, and id lists.

Files are read and checked, nothing else: no image is opened here. Every fault is one `DataError`
that names the file, the record (counted from 1) and the field.

FIUBench: arXiv 2411.03554 (ICLR 2025). SafeEraser: arXiv 2502.12520 (Findings of ACL 2025).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from mmforget.errors import DataError, unknown

RECORDS = 400  # of full.json are used, by position, as the reference does
LEAST = 3  # paraphrases and wrong answers of a question; the protocol counts on three
PAIRS = 4  # harmful questions of a SafeEraser record
ID = re.compile(r"\d{8}")
SHOWN = 3  # names listed in an error
CATEGORIES = ("Violence", "Weapon", "Privacy", "Sex", "HateSpeech", "IllegalActivity")

# What stands for the person in a question; the first is the form of all training questions.
_PERSON = re.compile(
    r"\b(?:the|this) (?:person|individual)(?: (?:shown|seen|depicted))?"
    r"(?: in (?:the|this) (?:image|picture|photo))?\b",
    re.IGNORECASE,
)
_PEOPLE = re.compile(r"\bdo the people in the image\b", re.IGNORECASE)  # one published question


@dataclass(frozen=True)
class QA:
    """One question on a person and what the protocol asks around it.

    Attributes:
        question: Asked in training and evaluation.
        paraphrases: The same question in other words, 3 or more; for APE.
        answer: A full sentence; the training target.
        paraphrased_answer: The same in other words; the right side of the truth ratio.
        wrong: False answers, 3 or more; the wrong side of the truth ratio.
        keywords: What an answer must hold to count as memorised.
    """

    question: str
    paraphrases: tuple[str, ...]
    answer: str
    paraphrased_answer: str
    wrong: tuple[str, ...]
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """One fictitious person.

    Attributes:
        id: 8 digits.
        name: Full name.
        gender: As the file says.
        caption: A profile of the person; the target that the ICD loss takes.
        image: The portrait; the file is there.
        qa: The questions, in the order of the file.
    """

    id: str
    name: str
    gender: str
    caption: str
    image: Path
    qa: tuple[QA, ...]


@dataclass(frozen=True)
class FIUBench:
    """What a FIUBench folder holds.

    Attributes:
        persons: At most 400, in the order of full.json.
        splits: The id lists of split.json; `ids_of` gives one that is sure to be complete.
        idk: Refusals; empty without a prompt.json, and then `refusals` is an error.
        icd: Requests for a whole profile; likewise.
        notes: What is odd about the files, for the report.
        root: Where they were read.
    """

    persons: tuple[Person, ...]
    splits: Mapping[str, tuple[str, ...]]
    idk: tuple[str, ...]
    icd: tuple[str, ...]
    notes: tuple[str, ...]
    root: Path


@dataclass(frozen=True)
class TextOnly:
    """A question that names the person, so that it can be asked without the image.

    Attributes:
        id: Id of the person.
        name: Full name of the person.
        original: The question that goes with the image.
        question: The one that names the person.
        answer: The answer to both.
        template: Which wording it is, such as "template1".
    """

    id: str
    name: str
    original: str
    question: str
    answer: str
    template: str


@dataclass(frozen=True)
class Plain:
    """A harmless question of SafeEraser.

    Attributes:
        question: With or without a look at the image.
        answer: A short one, written by a person.
        prediction: That of the model before unlearning; the target and reference actually used.
    """

    question: str
    answer: str
    prediction: str


@dataclass(frozen=True)
class HarmPair:
    """A harmful question of SafeEraser.

    Attributes:
        question: The same text goes with both images.
        response: The harmful answer on the unsafe image, which is to be forgotten.
        safe_response: The answer on the safe image; target of Prompt Decouple.
    """

    question: str
    response: str
    safe_response: str


@dataclass(frozen=True)
class EraserRecord:
    """One unsafe image of SafeEraser with its questions.

    Attributes:
        id: `image_id` of the file, unique in train and val together.
        category: Such as "Violence".
        keyword: What the image shows.
        kind: "syn" or "real" image.
        image: The unsafe image; the file is there.
        safe_image: The harmless image, on which the harmful questions are harmless; likewise.
        pairs: The 4 harmful questions.
        texts: The 2 harmless questions without an image.
        images: The 2 harmless questions on the unsafe image.
    """

    id: str
    category: str
    keyword: str
    kind: str
    image: Path
    safe_image: Path
    pairs: tuple[HarmPair, ...]
    texts: tuple[Plain, ...]
    images: tuple[Plain, ...]


@dataclass(frozen=True)
class SafeEraserFiles:
    """What a SafeEraser folder holds.

    Attributes:
        train: Records that are unlearned; efficacy is measured on them.
        val: Records that are not; generality and utility are.
        idk: Refusals; empty without a prompt.json, and then `refusals` is an error.
        notes: What is odd about the files, for the report.
        root: Where they were read.
    """

    train: tuple[EraserRecord, ...]
    val: tuple[EraserRecord, ...]
    idk: tuple[str, ...]
    notes: tuple[str, ...]
    root: Path


class _Fields(NamedTuple):
    """A JSON object and the place where it stands; reading a field checks its type."""

    values: Mapping[str, Any]
    place: str

    def get(self, field: str) -> Any:
        """Return any value of a field that must be there."""
        if field not in self.values:
            held = ", ".join(self.values) or "none"
            raise DataError(f"{self.place} has no field {field!r}; it has {held}")
        return self.values[field]

    def text(self, field: str, empty: bool = False) -> str:
        """Return a string; without `empty` there must be more in it than blanks."""
        value = self.get(field)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: {field} must be a string, but is {_kind(value)}")
        if not (empty or value.strip()):
            raise DataError(f"{self.place}: {field} is empty")
        return value

    def items(self, field: str, least: int = 0) -> Sequence[Any]:
        """Return a list of at least so many values."""
        value = self.get(field)
        if not isinstance(value, list):
            raise DataError(f"{self.place}: {field} must be a list, but is {_kind(value)}")
        if len(value) < least:
            raise DataError(
                f"{self.place}: {field} has {len(value)} values, but at least {least} are needed"
            )
        return value

    def texts(self, field: str, least: int = 0) -> tuple[str, ...]:
        """Return a list of strings, none of them empty."""
        for number, value in enumerate(self.items(field, least), start=1):
            if not isinstance(value, str):
                raise DataError(
                    f"{self.place}: {field} value {number} must be a string, but is {_kind(value)}"
                )
            if not value.strip():
                raise DataError(f"{self.place}: {field} value {number} is empty")
        return tuple(self.values[field])

    def objects(self, field: str, least: int) -> "Iterator[_Fields]":
        """Return the objects of a list of at least so many."""
        for number, value in enumerate(self.items(field, least), start=1):
            yield _fields(value, f"{self.place}, {field} {number}")

    def object(self, field: str) -> "_Fields":
        """Return the object that a field holds."""
        return _fields(self.get(field), f"{self.place}, {field}")

    def id(self, field: str) -> str:
        """Return an id of FIUBench, with the zeros in front."""
        return _id(self.get(field), f"{self.place}: {field}")


def read_fiubench(root: Path) -> FIUBench:
    """Read `full.json`, `split.json` and `prompt.json`, in the folder or in its `dataset/`.

    `full.json` is a JSON array or JSON Lines; only the first 400 records are used, as in the
    reference. `image_path` is looked for below the folder, below the one that holds it, and by
    file name in `SFHQ/` or `dataset/SFHQ/`. Lists of `split.json` may name persons that full.json
    does not hold; that is an error only when such a list is asked for (`ids_of`).

    Args:
        root: The folder of the repository or of the data set.

    Raises:
        DataError: A file is missing or no JSON; a field is missing, empty or of another type; a
            question has fewer than 3 paraphrases or wrong answers; an image is missing; an id has
            lost its zeros or occurs twice; a person is in two forget lists, or in a forget list
            and a retain list.
    """
    path = _needed(root, "full.json")
    records = _records(path)
    notes = []
    if len(records) > RECORDS:
        notes.append(f"{path.name}: the first {RECORDS} of {len(records)} records are used")
    found = []
    for record in records[:RECORDS]:
        identity = record.id("unique_id")
        found.append((identity, record._replace(place=f"{record.place} ({identity})")))
    _unique(((identity, record.place) for identity, record in found), "unique_id")
    images = _images(
        [(record, "image_path", record.text("image_path")) for _, record in found], root
    )
    persons = tuple(
        _person(identity, record, image)
        for (identity, record), image in zip(found, images, strict=True)
    )
    splits = _splits(_needed(root, "split.json"))
    for name, ids in splits.items():
        lacking = len(set(ids) - {person.id for person in persons})
        if lacking:
            notes.append(f"split.json: {name} names {lacking} persons that {path.name} lacks")
    prompts = _prompts(root, notes)
    idk = prompts.texts("idk", least=1) if prompts else ()
    icd = prompts.texts("icd") if prompts and "icd" in prompts.values else ()
    return FIUBench(persons, splits, idk, icd, tuple(notes), root)


def ids_of(files: FIUBench, name: str) -> tuple[str, ...]:
    """Return the ids of one list of split.json, such as "forget5" or "retain5".

    Raises:
        DataError: There is no such list, it is empty, or full.json lacks some of its persons.
    """
    place = f"split.json of {files.root}"
    if name not in files.splits:
        raise DataError(unknown("list of ids", name, files.splits, place))
    ids, known = files.splits[name], {person.id for person in files.persons}
    lacking = [identity for identity in ids if identity not in known]
    if lacking:
        raise DataError(
            f"{place}: {name} names {len(lacking)} of {len(ids)} persons that full.json does not "
            f"hold: {_some(lacking)}. Use the full.json that belongs to it, or another list"
        )
    if not ids:
        raise DataError(f"{place}: {name} is empty")
    return ids


def retain_ids(persons: Iterable[Person], splits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the persons in none of the forget lists: what retraining is trained on.

    No published list says this; it is the same whichever list is forgotten (336 persons of 400).
    retain5 and retain15 are samples of it for evaluation.

    Args:
        persons: All persons, in order.
        splits: All id lists; those named `forget...` are left out.
    """
    gone = {
        identity for name, ids in splits.items() if name.startswith("forget") for identity in ids
    }
    return tuple(person.id for person in persons if person.id not in gone)


def refusals(files: FIUBench | SafeEraserFiles) -> tuple[str, ...]:
    """Return the refusals, the targets of preference optimisation.

    Raises:
        DataError: The folder has none.
    """
    if not files.idk:
        raise DataError(
            f"{files.root} holds no prompt.json, so there are no refusals. Put one there (an "
            f'object with a list of refusals under "idk"), or use a method that needs none'
        )
    return files.idk


def read_text_only(path: Path) -> tuple[TextOnly, ...]:
    """Read questions that name the person.

    Args:
        path: A JSON array or JSON Lines with `identity_id`, `name`, `original_question`,
            `text_only_question`, `answer` and `template`.

    Raises:
        DataError: It is neither, or a field is missing, empty or of another type.
    """
    return tuple(
        TextOnly(
            id=record.id("identity_id"),
            name=record.text("name"),
            original=record.text("original_question"),
            question=record.text("text_only_question"),
            answer=record.text("answer"),
            template=record.text("template"),
        )
        for record in _records(path)
    )


def text_only_question(question: str, name: str) -> str:
    """Return the question with the name in place of the person in the image.

    "Where does the person in the image live?" becomes "Where does Jody Vance live?"; "this
    person", "the person shown" and the like are replaced as well.

    Raises:
        DataError: Nothing in the question stands for the person.
    """
    singular = _PEOPLE.sub("does the person in the image", question)
    named, count = _PERSON.subn(lambda _: name, singular)
    if not count:
        raise DataError(
            f"{question!r} does not speak of `the person in the image`, so no name can stand there"
        )
    return named


def read_safeeraser(root: Path) -> SafeEraserFiles:
    """Read `all_train.json`, `all_val.json` and `prompt.json`, in the folder or its `dataset/`.

    Images are looked for below the folder and the one that holds it, with and without `dataset/`
    in front. An empty `category` (Violence in the released validation file) is taken from the
    parent folder of the image.

    Args:
        root: The folder of the repository or of the data set.

    Raises:
        DataError: A file is missing (only prompt.json may be) or no JSON; a field is missing,
            empty or of another type; a record has not 4 harmful questions; an image is missing;
            an `image_id` occurs twice.
    """
    train, val = (
        [(record.text("image_id"), record) for record in _records(_needed(root, name))]
        for name in ("all_train.json", "all_val.json")
    )
    _unique(((identity, record.place) for identity, record in train + val), "image_id")
    found = [
        (identity, record._replace(place=f"{record.place} ({identity})"))
        for identity, record in train + val
    ]
    unsafe, safe = (
        [(record, field, record.text(field)) for _, record in found]
        for field in ("image_path", "SDImage_path")
    )
    images = _images(unsafe + safe, root)
    records = tuple(
        _eraser_record(identity, record, *pair)
        for (identity, record), *pair in zip(
            found, images[: len(found)], images[len(found) :], strict=True
        )
    )
    notes = []
    unnamed = sum(not record.values["category"].strip() for _, record in found)
    if unnamed:
        notes.append(f"{unnamed} records have no category; that of the image's folder is taken")
    prompts = _prompts(root, notes)
    idk = prompts.texts("idk", least=1) if prompts else ()
    return SafeEraserFiles(records[: len(train)], records[len(train) :], idk, tuple(notes), root)


def _person(identity: str, record: _Fields, image: Path) -> Person:
    return Person(
        id=identity,
        name=record.text("name"),
        gender=record.text("gender", empty=True),
        caption=record.text("caption", empty=True),
        image=image,
        qa=tuple(
            QA(
                question=item.text("question"),
                paraphrases=item.texts("paraphrased_question", LEAST),
                answer=item.text("answer"),
                paraphrased_answer=item.text("paraphrased_answer"),
                wrong=item.texts("perturbed_answer", LEAST),
                keywords=item.texts("keywords"),
            )
            for item in record.objects("qa_list", 1)
        ),
    )


def _splits(path: Path) -> dict[str, tuple[str, ...]]:
    """Read lists of ids; no person may be in two forget lists, or forgotten and retained."""
    content = _fields(_loaded(path), path.name)
    splits: dict[str, tuple[str, ...]] = {}
    for name in content.values:
        place = f"{path.name}: {name}"
        ids = [
            _id(value, f"{place} value {number}")
            for number, value in enumerate(content.items(name), start=1)
        ]
        _unique(((identity, place) for identity in ids), "the id")
        splits[name] = tuple(ids)
    for first, other in combinations(splits, 2):  # only retain lists may share persons
        both = [identity for identity in splits[first] if identity in set(splits[other])]
        if both and (first.startswith("forget") or other.startswith("forget")):
            raise DataError(
                f"{path.name}: {first} and {other} share {_some(both)}; forget lists must be "
                f"disjoint from each other and from retain lists"
            )
    return splits


def _eraser_record(identity: str, record: _Fields, image: Path, safe_image: Path) -> EraserRecord:
    pairs = tuple(
        HarmPair(pair.text("question"), pair.text("model_response"), pair.text("sd_response"))
        for pair in record.objects("unsafe_pairs", PAIRS)
    )
    if len(pairs) > PAIRS:
        raise DataError(f"{record.place}: unsafe_pairs has {len(pairs)} values, not {PAIRS}")
    category = record.text("category", empty=True).strip() or image.parent.name
    published = {name.lower(): name for name in CATEGORIES}  # some files say Hatespeech
    return EraserRecord(
        id=identity,
        category=published.get(category.lower(), category),
        keyword=record.text("keyword"),
        kind=record.text("type"),
        image=image,
        safe_image=safe_image,
        pairs=pairs,
        texts=tuple(_plain(record.object(f"UnharmPair_text{k}")) for k in (1, 2)),
        images=tuple(_plain(record.object(f"UnharmPair_image{k}")) for k in (1, 2)),
    )


def _plain(item: _Fields) -> Plain:
    return Plain(item.text("Question"), item.text("Answer"), item.text("Prediction"))


def _prompts(root: Path, notes: list[str]) -> _Fields | None:
    """Return the lists of prompt.json; a missing file is only noted."""
    path = _file(root, "prompt.json")
    if path is None:
        notes.append("prompt.json is missing: there are no refusals")
        return None
    return _fields(_loaded(path), path.name)


def _file(root: Path, name: str) -> Path | None:
    for path in (root / name, root / "dataset" / name):
        if path.is_file():
            return path
    return None


def _needed(root: Path, name: str) -> Path:
    path = _file(root, name)
    if path is None:
        raise DataError(
            f"{root} holds neither {name} nor dataset/{name}; name the folder of the data set"
        )
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _loaded(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}") from error


def _records(path: Path) -> list[_Fields]:
    """Return the records of a JSON array or of JSON Lines, each with its place."""
    text = _text(path)
    if text.lstrip().startswith("["):
        values = _loaded(path)
    else:
        values = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path} is neither a JSON array nor JSON Lines: line {number}: {error}"
                ) from error
    if not values:
        raise DataError(f"{path} holds no records")
    return [
        _fields(value, f"{path.name} record {number}") for number, value in enumerate(values, 1)
    ]


def _fields(value: Any, place: str) -> _Fields:
    if not isinstance(value, dict):
        raise DataError(f"{place} must be an object with named fields, but is {_kind(value)}")
    return _Fields(value, place)


def _id(value: Any, place: str) -> str:
    if isinstance(value, str) and ID.fullmatch(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        raise DataError(
            f"{place} is the number {value}, so zeros in front of it may be lost; ids are strings "
            f'of 8 digits, such as "{value:08d}"'
        )
    raise DataError(f"{place} must be a string of 8 digits, but is {value!r}")


def _unique(pairs: Iterable[tuple[str, str]], field: str) -> None:
    """Refuse a key that occurs twice; each comes with its place."""
    first: dict[str, str] = {}
    for key, place in pairs:
        if key in first:
            raise DataError(f"{place}: {field} {key!r} occurs twice, first in {first[key]}")
        first[key] = place


def _images(wanted: Sequence[tuple[_Fields, str, str]], root: Path) -> list[Path]:
    """Return the file of each (record, field, path as given); all must be there."""
    found, missing = [], []
    for record, field, given in wanted:
        path = _image(root, given)
        if path is None:
            missing.append(f"{record.place}: {field} {given!r}")
        else:
            found.append(path)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} images are missing below {root}: {_some(missing)}"
        )
    return found


def _image(root: Path, given: str) -> Path | None:
    inner = Path(*Path(given).parts[1:]) if Path(given).parts[:1] == ("dataset",) else Path(given)
    name = Path(given).name
    for path in (
        root / given,
        root.parent / given,
        root / inner,
        root / "SFHQ" / name,
        root / "dataset" / "SFHQ" / name,
    ):
        if path.is_file():
            return path
    return None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return {**names, list: "a list", dict: "an object"}[type(value)]
