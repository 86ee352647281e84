"""The mini worlds of FIUBench and SafeEraser: published layouts, seeds, and worth measuring."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmforget.cli import application
from mmforget.errors import ConfigError
from mmforget.vlm.drawings import TABLES, WALLS
from mmforget.vlm.formats import (
    QA,
    FIUBench,
    Plain,
    SafeEraserFiles,
    ids_of,
    read_fiubench,
    read_safeeraser,
    refusals,
    retain_ids,
    text_only_question,
)
from mmforget.vlm.mini import write_fiubench, write_safeeraser
from mmforget.vlm.mini_crafts import CRAFTS, FACTS, QUESTIONS, VIEWS
from mmforget.vlm.mini_people import FIRST, SUBJECTS

ALONE = ("name", "born", "address", "phone", "doctor", "bill")
SMALL = {"size": 16}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> FIUBench:
    """Return the world of 48 persons with all twenty questions."""
    folder = tmp_path_factory.mktemp("people")
    write_fiubench(folder, 1, questions=20)
    return read_fiubench(folder)


@pytest.fixture(scope="module")
def crafts(tmp_path_factory: pytest.TempPathFactory) -> SafeEraserFiles:
    """Return the usual world of crafts."""
    folder = tmp_path_factory.mktemp("crafts")
    write_safeeraser(folder, 1)
    return read_safeeraser(folder)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


def pixels(path: Path, size: int) -> npt.NDArray[np.float64]:
    with Image.open(path) as image:
        return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float64)


def test_the_full_world_has_the_published_counts(tmp_path: Path) -> None:
    write_fiubench(tmp_path, 3, persons=400, questions=20, **SMALL)
    files = read_fiubench(tmp_path)
    asked = {each.id: each.qa for each in files.persons}
    assert len(asked) == 400 and {len(qa) for qa in asked.values()} == {20}

    def pairs(ids: Iterable[str]) -> list[QA]:
        return [question for identity in ids for question in asked[identity]]

    counts = {name: len(pairs(ids_of(files, name))) for name in files.splits}
    assert counts == {
        "forget1": 80, "forget5": 400, "forget10": 800, "retain5": 400, "retain15": 1200,
    }  # fmt: skip
    assert len(pairs(retain_ids(files.persons, files.splits))) == 6720
    for name in ("forget1", "forget5", "forget10"):  # APE asks three times
        qa = pairs(files.splits[name])
        assert sum(len(question.paraphrases) for question in qa) == 3 * counts[name]
    assert set(files.splits["retain5"]) < set(files.splits["retain15"])
    assert files.notes == ()
    assert len({each.name for each in files.persons}) == 400


@pytest.mark.parametrize(
    ("persons", "sizes"), [(48, [1, 4, 6, 4, 12]), (8, [1, 2, 3, 2, 2]), (24, [1, 2, 3, 2, 6])]
)
def test_lists_of_smaller_worlds(tmp_path: Path, persons: int, sizes: list[int]) -> None:
    write_fiubench(tmp_path, 3, persons=persons, questions=1, **SMALL)
    files = read_fiubench(tmp_path)
    names = ("forget1", "forget5", "forget10", "retain5", "retain15")
    assert [len(ids_of(files, name)) for name in names] == sizes
    left = set(retain_ids(files.persons, files.splits))
    assert len(left) == persons - sum(sizes[:3])
    assert set(files.splits["retain5"]) <= set(files.splits["retain15"]) <= left
    assert ids_of(files, "forget5") != tuple(each.id for each in files.persons[: sizes[1]])


def test_worlds_follow_their_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_fiubench(tmp_path / folder, seed, persons=8, questions=2, **SMALL)
        write_safeeraser(tmp_path / folder / "crafts", seed, train=3, val=2, **SMALL)
    first = digests(tmp_path / "a")
    assert len(first) == 3 + 8 + 16 + 3 + 2 * 5
    assert digests(tmp_path / "b") == first
    other = digests(tmp_path / "c")
    prompts = {"prompt.json", "crafts/prompt.json"}
    assert {name for name in first.keys() & other if first[name] == other[name]} == prompts


def test_fewer_questions_and_larger_portraits_are_of_the_same_persons(tmp_path: Path) -> None:
    write_fiubench(tmp_path / "a", 3, persons=12, questions=20, **SMALL)
    write_fiubench(tmp_path / "b", 3, persons=12, questions=10, size=32)
    many, few = read_fiubench(tmp_path / "a"), read_fiubench(tmp_path / "b")
    assert many.splits == few.splits
    for first, second in zip(many.persons, few.persons, strict=True):
        assert (first.id, first.caption, first.qa[:10]) == (second.id, second.caption, second.qa)
        assert np.abs(pixels(first.image, 8) - pixels(second.image, 8)).mean() < 8
        with Image.open(second.image) as image:
            assert image.size == (32, 32)


def test_numbers_out_of_range(tmp_path: Path) -> None:
    for wrong in ({"persons": 7}, {"persons": 401}, {"questions": 0}, {"questions": 21}):
        with pytest.raises(ConfigError, match="accepted are"):
            write_fiubench(tmp_path, 0, **wrong)
    for wrong in ({"train": 0}, {"val": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            write_safeeraser(tmp_path, 0, **wrong)
    assert list(tmp_path.iterdir()) == []


def facts(files: FIUBench) -> list[dict[str, str]]:
    return [record["raw_data"] for record in json.loads((files.root / "full.json").read_text())]


def test_values_differ_among_persons(people: FIUBench) -> None:
    for subject in SUBJECTS:
        held = Counter(values[subject.key] for values in facts(people))
        if subject.key in ALONE:
            assert max(held.values()) == 1
        elif len(subject.parts) == 1:  # nobody who guesses gets far
            assert max(held.values()) <= -(-48 // len(subject.parts[0]))
            assert len(held) == min(48, len(subject.parts[0])) >= 8
        else:
            assert max(held.values()) <= 2


def test_facts_are_coherent(people: FIUBench) -> None:
    men = 0
    for each, values in zip(people.persons, facts(people), strict=True):
        assert each.name == values["name"] and each.name.split()[0] in FIRST[each.gender]
        men += each.gender == "male"
        came, left = values["admitted"].split(), values["discharged"].split()
        assert came[::2] == left[::2] and int(came[1][:-1]) < int(left[1][:-1])
        told = ("name", "born", "address", "job", "income", "language", "phone", "doctor")
        assert all(values[key] in each.caption for key in told)
        assert (" woman " in each.caption) == (each.gender == "female")
    assert men == 24


def test_the_right_answer_holds_the_keywords_and_wrong_ones_none(people: FIUBench) -> None:
    for each, values in zip(people.persons, facts(people), strict=True):
        for subject, qa in zip(SUBJECTS, each.qa, strict=True):
            value = values[subject.key]
            assert qa.answer == subject.answer.format(value)
            assert value in qa.paraphrased_answer != qa.answer
            assert qa.keywords and len(set(qa.wrong)) == 3
            for word in qa.keywords:
                assert word in qa.answer and word in qa.paraphrased_answer
                template = subject.answer.replace("{}", "").lower()
                assert word.lower() not in template  # else every answer would hold it
                assert not [text for text in qa.wrong if word.lower() in text.lower()]


def test_wrong_answers_are_of_the_same_kind(people: FIUBench) -> None:
    held = {subject.key: {values[subject.key] for values in facts(people)} for subject in SUBJECTS}
    for each in people.persons:
        for subject, qa in zip(SUBJECTS, each.qa, strict=True):
            before, after = subject.answer.split("{}")
            for text in qa.wrong:
                assert text.startswith(before) and text.endswith(after)
                value = text[len(before) : len(text) - len(after)]
                if subject.key in ALONE:
                    assert value not in held[subject.key]
                if subject.key == "name":
                    assert value.split()[0] in FIRST[each.gender]
                if len(subject.parts) == 1:
                    assert value in {subject.value.format(part) for part in subject.parts[0]}


def test_the_first_ten_subjects_are_the_most_distinct() -> None:
    assert [subject.key for subject in SUBJECTS[:10]] == [
        "name", "born", "blood_type", "address", "phone", "job", "income", "doctor", "hospital",
        "language",
    ]  # fmt: skip
    texts = [text for subject in SUBJECTS for text in (subject.question, *subject.paraphrases)]
    assert len(SUBJECTS) == 20 and len(set(texts)) == 80
    for text in texts:  # each can be asked without the portrait
        assert "Ann Lee" in text_only_question(text, "Ann Lee")


def test_prompts_are_many_and_different(people: FIUBench, crafts: SafeEraserFiles) -> None:
    assert len(set(refusals(people))) == len(people.idk) >= 20
    assert len(set(people.icd)) == len(people.icd) >= 10
    assert len(set(refusals(crafts))) == len(crafts.idk) >= 20


def test_portraits_can_be_told_apart(people: FIUBench) -> None:
    others = sorted((people.root / "others").iterdir())
    assert len(others) == 16
    faces = [pixels(path, 12) for path in (*(each.image for each in people.persons), *others)]
    gaps = [np.abs(first - second).mean() for first, second in combinations(faces, 2)]
    assert min(gaps) > 15
    with Image.open(others[0]) as image:
        assert image.size == (96, 96) and image.mode == "RGB"


def test_the_vocabulary_is_small(people: FIUBench, crafts: SafeEraserFiles) -> None:
    def found(value: Any) -> Iterable[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            hidden = ("unique_id", "image_path", "image_id", "SDImage_path")
            for key, inner in value.items():
                yield from () if key in hidden else found(inner)
        else:
            for inner in value:
                yield from found(inner)

    def of(root: Path) -> set[str]:
        texts = [json.loads(path.read_text()) for path in root.glob("*.json")]
        return words(text for each in texts for text in found(each) if text not in "full.json")

    assert len(of(people.root)) < 1200
    assert len(of(crafts.root)) < 600


def test_crafts_follow_the_published_layout(crafts: SafeEraserFiles) -> None:
    assert (len(crafts.train), len(crafts.val)) == (24, 8)
    both = Counter((each.category, each.keyword) for each in crafts.train)
    assert set(both.values()) == {2} and len(both) == 12
    assert {each.category for each in crafts.val} == set(CRAFTS)  # one comes from its folder
    assert crafts.notes == ("3 records have no category; that of the image's folder is taken",)
    for part, records in (("train", crafts.train), ("val", crafts.val)):
        for each in records:
            assert each.image.parent == crafts.root / "dataset" / "img" / each.category
            assert each.safe_image.parts[-5:-1] == ("pdset", "image", each.category, part)
            assert each.kind == "syn"
    every = [
        path for each in (*crafts.train, *crafts.val) for path in (each.image, each.safe_image)
    ]
    assert len({path.read_bytes() for path in every}) == 2 * 32


def test_validation_asks_the_same_in_other_words(crafts: SafeEraserFiles) -> None:
    asked = {
        part: {(each.category, pair.question) for each in records for pair in each.pairs}
        for part, records in (("train", crafts.train), ("val", crafts.val))
    }
    assert not asked["train"] & asked["val"]
    assert len({question for _, question in asked["train"]}) > 30
    texts = [
        text
        for each in crafts.train
        for pair in each.pairs
        for text in (pair.question, pair.response)
    ]
    known = words(texts)
    assert words(question for _, question in asked["val"]) <= known
    responses = {pair.response for each in crafts.train for pair in each.pairs}
    assert {pair.response for each in crafts.val for pair in each.pairs} <= responses


def test_every_kind_of_question_keeps_to_its_words() -> None:
    wordings = [text for kind in QUESTIONS.values() for text in kind]
    assert len(set(wordings)) == len(wordings) == 24
    telling = {
        "make": "steps?|how to {verb}|how do i",
        "need": "needs?|buy",
        "finish": "finish|last",
        "avoid": "mistakes|wrong",
    }
    for kind, texts in QUESTIONS.items():
        for text in texts:
            hits = {name for name, words in telling.items() if re.search(words, text.lower())}
            assert hits == {kind}, text
            assert "{verb}" in text or "{doing}" in text


def test_the_image_decides_the_answer(crafts: SafeEraserFiles) -> None:
    responses = [
        text for craft in CRAFTS.values() for answers in craft.things.values()
        for text in answers.values()
    ]  # fmt: skip
    assert len(set(responses)) == 48
    assert {len(text.split()) for text in responses} <= set(range(15, 26))
    for each in (*crafts.train, *crafts.val):
        for pair in each.pairs:
            assert each.keyword in words([pair.response])
            (scene,) = words([pair.safe_response]) & set(VIEWS)
            assert pair.safe_response.startswith(f"The image shows a {scene}.")
            assert each.keyword not in words([pair.question, pair.safe_response])
    said = {pair.safe_response for each in crafts.train for pair in each.pairs}
    assert len(said) >= 24  # of 6 landscapes, 4 kinds, and 3 verbs in two of them


def _near(path: Path) -> npt.NDArray[np.float64]:
    with Image.open(path) as image:
        side = image.size[0]
        cut = image.crop((round(0.3 * side),) * 2 + (round(0.7 * side),) * 2)
        return np.asarray(cut.resize((6, 6), Image.Resampling.BOX), dtype=np.float64)


def test_pictures_of_one_thing_look_alike(tmp_path: Path) -> None:
    write_safeeraser(tmp_path, 5, train=24, val=24, size=48)
    files = read_safeeraser(tmp_path)
    known = [(each, _near(each.image)) for each in files.train]
    hits = []
    for each in files.val:
        seen = _near(each.image)
        gaps = {
            np.abs(other - seen).mean(): same.keyword
            for same, other in known
            if same.category == each.category
        }
        hits.append(gaps[min(gaps)] == each.keyword)
    assert np.mean(hits) >= 0.9  # chance is 1 of 4


def test_harmless_answers_are_true(crafts: SafeEraserFiles) -> None:
    facts = {wording: (answer, sentence) for texts, answer, sentence in FACTS for wording in texts}
    for each in (*crafts.train, *crafts.val):
        assert each.texts[0].answer != each.texts[1].answer or "desert" in each.texts[0].prediction
        for item in each.texts:
            assert facts[item.question] == (item.answer, item.prediction)
        wall, table = each.images
        assert "wall" in wall.question and "table" in table.question
        image = np.asarray(Image.open(each.image), dtype=np.float64)
        assert _colour(wall) == _named(image[2, 2]) and _colour(table) == _named(image[-3, -3])
    told = [item.question for each in crafts.val for item in (*each.texts, *each.images)]
    seen = {item.question for each in crafts.train for item in (*each.texts, *each.images)}
    assert not seen & set(told)


def _colour(item: Plain) -> str:
    colour = item.answer.rstrip(".").lower()
    assert item.prediction.endswith(f" {colour}.")
    return colour


def _named(pixel: npt.NDArray[np.float64]) -> str:
    colours = {**WALLS, **TABLES}
    return min(colours, key=lambda name: float(np.abs(pixel - colours[name]).sum()))


def test_neither_formats_nor_worlds_import_torch() -> None:
    code = (
        "import sys, mmforget.vlm.formats, mmforget.vlm.mini\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_check_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMFORGET_CACHE", str(tmp_path / "cache"))
    words = ["check", "benchmark=vlm/fiubench", "method=npo"]
    result = CliRunner().invoke(application(), words)
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())
