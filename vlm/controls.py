"""Readers of POPE and MME, the two controls of what a model still sees.

Neither is downloaded here: the user names a copy. Scores are in `mmforget.vlm.text_scores`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmforget.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
SHOWN = 5  # faults listed in an error
_SKIPPED = ("eval_tool",)  # a folder in MME's archive that is no sub-task
_IMAGES, _TEXTS = "images", "questions_answers_YN"


@dataclass(frozen=True)
class PopeQuestion:
    """One question of a POPE list (Li et al., EMNLP 2023, arXiv 2305.10355).

    Attributes:
        id: Its `question_id`; unique in the list.
        image: The file.
        text: The question.
        label: "yes" or "no".
    """

    id: str
    image: Path
    text: str
    label: str


@dataclass(frozen=True)
class MmeImage:
    """One image of an MME sub-task (Fu et al., arXiv 2306.13394).

    Attributes:
        task: The sub-task, such as "existence".
        image: The file.
        questions: Its two questions.
        labels: "yes" or "no", of each.
    """

    task: str
    image: Path
    questions: tuple[str, str]
    labels: tuple[str, str]


def read_pope(path: Path, images: Path) -> list[PopeQuestion]:
    """Read one POPE list, such as `coco_pope_random.json`.

    Args:
        path: JSON Lines, or a JSON array, of objects with `question_id`, `image` (a file name),
            `text` and `label`.
        images: Folder of the images (COCO's `val2014` for the published lists).

    Returns:
        Questions in the order of the file.

    Raises:
        DataError: The file cannot be read, a record is not of this form, two have one id, or images
            are missing; all faults are counted, and some shown.
    """
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder. Give the one with POPE's images")
    faults: list[str] = []
    questions: list[PopeQuestion] = []
    seen: set[str] = set()
    for place, record in _records(path):
        found = _pope(record, images)
        if isinstance(found, str):
            faults.append(f"{place}: {found}")
            continue
        if found.id in seen:
            faults.append(f"{place}: question_id {found.id} comes twice")
        elif not found.image.is_file():
            faults.append(f"{place}: {found.image.name} is not in {images}")
        seen.add(found.id)
        questions.append(found)
    _raise(path, faults, "POPE: objects with question_id, image, text and label")
    if not questions:
        raise DataError(f"{path} holds no questions")
    return questions


def read_mme(folder: Path, tasks: Sequence[str] | None = None) -> list[MmeImage]:
    """Read MME: a folder for each sub-task, in either of its two layouts.

    Images and `NAME.txt` side by side, or in `images/` and `questions_answers_YN/`. A text has two
    lines, `question<TAB>answer`, and each image has one.

    Args:
        folder: Holds the sub-tasks' folders.
        tasks: Those to read; None: all that are there.

    Returns:
        Images by sub-task and name.

    Raises:
        DataError: A folder is missing, or images and texts do not pair up, or a text is not of this
            form; all faults are counted, and some shown.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. Give the one with MME's sub-tasks")
    if tasks is None:
        held = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        tasks = [name for name in held if not name.startswith(".") and name not in _SKIPPED]
    missing = [name for name in tasks if not (folder / name).is_dir()]
    if missing or not tasks:
        wanted = f"sub-tasks {', '.join(missing)}" if missing else "sub-tasks"
        raise DataError(f"{folder} has no folders of {wanted}. MME has one folder for each")
    faults: list[str] = []
    rows = [row for task in tasks for row in _mme_task(folder / task, faults)]
    _raise(folder, faults, "MME: images, and for each a NAME.txt of two lines question<TAB>answer")
    return rows


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of a JSON array, or of each line of JSON Lines."""
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is no JSON array: {error}") from error
        yield from ((f"record {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{path} line {number} is no JSON: {error}") from error


def _pope(record: Any, images: Path) -> PopeQuestion | str:
    """Return a question, or what is wrong with its record."""
    if not isinstance(record, dict):
        return f"{record!r:.40} is no object"
    lost = [name for name in ("question_id", "image", "text", "label") if name not in record]
    if lost:
        return f"without {', '.join(lost)}"
    key, name, text, label = (record[k] for k in ("question_id", "image", "text", "label"))
    if isinstance(key, bool) or not isinstance(key, int | str):
        return f"question_id {key!r} is neither a number nor a text"
    for field, value in (("image", name), ("text", text)):
        if not isinstance(value, str) or not value.strip():
            return f"{field} {value!r} is no text"
    if not isinstance(label, str) or label.strip().lower() not in ("yes", "no"):
        return f"label {label!r} is neither yes nor no"
    return PopeQuestion(str(key), images / name, text, label.strip().lower())


def _mme_task(folder: Path, faults: list[str]) -> list[MmeImage]:
    """Return the images of one sub-task; append what is wrong to `faults`."""
    apart = [(folder / name).is_dir() for name in (_IMAGES, _TEXTS)]
    if any(apart) and not all(apart):
        faults.append(f"{folder.name}: it has only one of the folders {_IMAGES} and {_TEXTS}")
        return []
    images_in, texts_in = (folder / _IMAGES, folder / _TEXTS) if all(apart) else (folder, folder)
    images: dict[str, Path] = {}
    for path in _files(images_in, SUFFIXES):
        if path.stem in images:
            faults.append(f"{folder.name}: {images[path.stem].name} and {path.name} share a text")
        images[path.stem] = path
    texts = {path.stem: path for path in _files(texts_in, (".txt",))}
    faults += [f"{folder.name}: {images[s].name} has no text" for s in images if s not in texts]
    faults += [f"{folder.name}: {texts[s].name} has no image" for s in texts if s not in images]
    if not images and not texts:
        faults.append(f"{folder.name}: it holds no images")
    rows = []
    for stem, image in images.items():
        if stem in texts:
            found = _mme_text(texts[stem])
            if isinstance(found, str):
                faults.append(f"{folder.name}/{texts[stem].name}: {found}")
            else:
                (one, first), (two, second) = found
                rows.append(MmeImage(folder.name, image, (one, two), (first, second)))
    return rows


def _mme_text(path: Path) -> list[tuple[str, str]] | str:
    """Return the two (question, label) of a text, or what is wrong with it."""
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if len(lines) != 2:
        return f"it has {len(lines)} lines"
    pairs = []
    for number, line in enumerate(lines, start=1):
        question, tab, answer = line.strip().rpartition("\t")
        label = answer.strip().lower()
        if not tab or not question.strip():
            return f"line {number} is not question<TAB>answer"
        if label not in ("yes", "no"):
            return f"line {number}: the answer {answer!r} is neither yes nor no"
        pairs.append((question.strip(), label))
    return pairs


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    held = sorted(folder.iterdir())
    return [p for p in held if p.suffix.lower() in suffixes and not p.name.startswith(".")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _raise(place: Path, faults: Sequence[str], expected: str) -> None:
    if faults:
        more = " ..." if len(faults) > SHOWN else ""
        raise DataError(
            f"{place}: {len(faults)} faults: {'; '.join(faults[:SHOWN])}{more}. Expected is "
            f"{expected}"
        )
