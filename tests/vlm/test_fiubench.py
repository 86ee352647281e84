"""FIUBench: splits of a request, what decides weights, and numbers by their closed forms."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.stats import ks_2samp
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import mmforget
from mmforget.config import plan
from mmforget.errors import CheckpointError, ConfigError, DataError
from mmforget.record import Cost, MetricValue, RunResult
from mmforget.types import ModelView, Trial
from mmforget.vlm import mini, page, scores, train
from mmforget.vlm.adapter import VLMAdapter
from mmforget.vlm.benchmarks import fiubench
from mmforget.vlm.benchmarks.fiubench import FIUBenchmark, subject
from mmforget.vlm.chat import Item
from mmforget.vlm.data import Dialogues
from mmforget.vlm.formats import QA, Person
from mmforget.vlm.metrics.asked import Answered, Answers, answers
from mmforget.vlm.metrics.fiubench import FIUBenchScores
from mmforget.vlm.mini_people import SUBJECTS
from mmforget.vlm.scores import TokenScores
from mmforget.workbench import Bench
from tests.vlm.families import ask, picture
from tests.vlm.world import PERSONS, QUESTIONS, Place, Scripted, make_place, opened

torch.set_num_threads(1)

FORGET, KEPT, OTHERS = 2, 2, 1 + 3  # persons of forget5 and retain5; of forget1 and forget10
AGAINST = {"ks_p", "ks_log_p", "ks_statistic", "forget_quality", "gap"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("fiubench"))


@lru_cache
def bench_of(place: Place, *more: str) -> Bench:
    return opened(place, place.people(*more))[1]


def fiu(bench: Bench) -> FIUBenchmark:
    assert isinstance(bench.benchmark, FIUBenchmark)
    return bench.benchmark


def items_of(data: Any) -> list[Item]:
    return [item for k in range(len(data)) for item in data.take([k]).items]


def changed(place: Place, tmp_path: Path, edit: Callable[[Any], Any], file: str) -> str:
    """Copy the people, edit one of their files, and return the word that names the copy."""
    folder = tmp_path / "people"
    shutil.copytree(place.root / "people", folder)
    content = edit(json.loads((folder / file).read_text()))
    (folder / file).write_text(json.dumps(content))
    return f"data.root={folder}"


# --- Splits


def test_the_splits_of_a_request(place: Place) -> None:
    splits = bench_of(place).splits
    sizes = {name: len(splits.get(name)) for name in [*splits.names(), "train", "profiles"]}
    assert sizes == {
        "forget": FORGET * QUESTIONS,
        "retain": (PERSONS - FORGET - OTHERS) * QUESTIONS,
        "holdout": FORGET * QUESTIONS,
        "test": KEPT * QUESTIONS,
        "train": PERSONS * QUESTIONS,
        "profiles": FORGET * QUESTIONS,
    }
    assert splits.check(allow_shared_content=True) == []
    names = [set(splits.get(name).ids) for name in ("forget", "retain", "holdout", "test")]
    assert sum(map(len, names)) == len(set().union(*names))
    lists = json.loads((place.root / "people" / "split.json").read_text())
    assert {item.group for item in items_of(splits.forget)} == set(lists["forget5"])
    for name in ("forget1", "forget5", "forget10"):
        assert not {item.group for item in items_of(splits.retain)} & set(lists[name])


def test_what_is_asked_in_each_split(place: Place) -> None:
    bench = bench_of(place)
    splits, made = bench.splits, fiu(bench)
    records = {p.id: p for p in made.files.persons}
    forget = items_of(splits.forget)
    for item in items_of(splits.train):
        qa = records[item.group].qa[int(item.id.rpartition("/")[2])]
        assert (item.question, item.answer) == (qa.question, qa.answer)
        assert item.image == records[item.group].image
    for item, false in zip(forget, items_of(splits.holdout), strict=True):
        qa = records[item.group].qa[int(item.id.rpartition("/")[2])]
        assert false.id == f"{item.id}/false"
        assert (false.image, false.question) == (item.image, item.question)
        assert false.answer == qa.wrong[0] != item.answer
    asked = {(item.question, item.group) for item in items_of(splits.train)}
    for item in items_of(splits.test):
        qa = records[item.group].qa[int(item.id.split("/")[1])]
        assert (item.question, item.answer) == (qa.paraphrases[0], qa.answer)
        assert (item.question, item.group) not in asked
        assert item.group in {person.id for person in made.kept}


def test_profiles_stand_at_the_places_of_the_forgotten(place: Place) -> None:
    bench = bench_of(place)
    made = fiu(bench)
    forget, profiles = bench.splits.forget, bench.splits.streams["profiles"]
    for item, profile in zip(items_of(forget), items_of(profiles), strict=True):
        person = made.persons[item.group]
        assert profile.id == f"{item.id}/profile"
        assert profile.image == item.image
        assert profile.question in made.files.icd
        assert profile.answer == person.caption and person.name in profile.answer
    asked = [item.question for item in items_of(profiles)]
    assert len(set(asked)) > 1, "requests are drawn for every item"


def test_no_profiles_without_captions_or_requests(place: Place, tmp_path: Path) -> None:
    for k, (file, edit) in enumerate({
        "full.json": lambda rows: [{**row, "caption": ""} for row in rows],
        "prompt.json": lambda lists: {"idk": lists["idk"]},
    }.items()):  # fmt: skip
        word = changed(place, tmp_path / str(k), edit, file)
        assert "profiles" not in bench_of(place, word).splits.streams


def test_complement_keeps_everyone_else(place: Place) -> None:
    splits = bench_of(place, "request.retain=complement").splits
    assert len(splits.retain) == (PERSONS - FORGET) * QUESTIONS
    assert set(splits.forget.ids) | set(splits.retain.ids) == set(splits.train.ids)


@pytest.mark.parametrize(("name", "count"), [("forget1", 1), ("forget5", 2), ("forget10", 3)])
def test_published_retain_is_the_same_whatever_is_forgotten(
    place: Place, name: str, count: int
) -> None:
    splits = bench_of(place, f"request.split={name}").splits
    assert len(splits.forget) == count * QUESTIONS
    assert list(splits.retain.ids) == list(bench_of(place).splits.retain.ids)


def test_retained_names_the_sample(place: Place) -> None:
    lists = json.loads((place.root / "people" / "split.json").read_text())
    splits = bench_of(place, "benchmark.retained=retain15").splits
    assert {item.group for item in items_of(splits.test)} == set(lists["retain15"])
    assert len(lists["retain15"]) > len(lists["retain5"])


def test_requests_that_cannot_be_served(place: Place) -> None:
    faults: Sequence[tuple[str, type[Exception], str]] = [
        ("request.split=retain5", ConfigError, "one of the forget lists.*forget1, forget5"),
        ("request.split=forget7", DataError, r"unknown list of ids 'forget7'\. Close: .*forget"),
        ("benchmark.retained=forget10", ConfigError, "holds 3 persons that are not retained"),
        ("benchmark.retained=forget5", ConfigError, "holds 2 persons that are not retained"),
        ("benchmark.retained=retain7", DataError, r"unknown list of ids 'retain7'\. Close: .*ret"),
    ]
    for word, kind, message in faults:
        with pytest.raises(kind, match=message):
            bench_of(place, word)
    both = ("benchmark.retained=forget10", "request.retain=complement")
    assert len(bench_of(place, *both).splits.test) == 3 * QUESTIONS


def test_what_evaluation_needs_is_looked_at_before_training(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = ("benchmark.judge.kind=endpoint", "benchmark.judge.model=m")
    url = "benchmark.judge.url=http://localhost:1/v1"
    (tmp_path / "pope.json").write_text("[]")
    faults: Sequence[tuple[tuple[str, ...], str]] = [
        ((f"benchmark.reference_model={tmp_path}/no",), "there is no such path"),
        (judge, r"needs judge\.url"),
        (("benchmark.judge.kind=local",), r"needs judge\.model"),
        ((*judge, url, "benchmark.judge.key_env=NO_SUCH_KEY"), "NO_SUCH_KEY.*not set"),
        ((f"benchmark.controls.pope={tmp_path}/pope.json",), r"needs controls\.pope_images"),
        ((f"benchmark.controls.mme={tmp_path}/no",), "no such folder"),
    ]
    for words, message in faults:
        with pytest.raises((ConfigError, DataError), match=message):
            bench_of(place, *words)
    unjudged = bench_of(place, "benchmark.judged=false", *judge)  # nobody is asked
    assert len(unjudged.splits.forget) == FORGET * QUESTIONS


def test_a_world_of_the_published_size(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """80, 400 and 800 forgotten pairs, 6,720 retained ones, 400 of retain5."""
    full = place.root / "full"
    mini.write_fiubench(full, 1, persons=400, questions=20, size=16)
    # Tokens of 8,000 dialogues take a quarter of a minute, and are counted elsewhere.
    monkeypatch.setattr(FIUBenchmark, "cut_note", lambda self, data, name: [])
    monkeypatch.setattr(FIUBenchmark, "check_prompts", lambda self, asked: None)
    monkeypatch.setattr(FIUBenchmark, "check_judge_config", lambda self: None)
    words = (f"data.root={full}", "request.split=")
    for name, pairs in (("forget1", 80), ("forget5", 400), ("forget10", 800)):
        splits = bench_of(place, words[0], f"{words[1]}{name}").splits
        assert len(splits.forget) == pairs == len(splits.holdout)
        assert (len(splits.retain), len(splits.test), len(splits.train)) == (6720, 400, 8000)


def test_subjects_are_told_by_their_words() -> None:
    found = [subject(each.question) for each in SUBJECTS]
    assert "other" not in found
    assert subject(SUBJECTS[0].question) == "name"
    assert found.count("name") == 1 and len(set(found)) == len(found) - 1  # two of an admission
    for other in ("What is the name of her medication?", "Which doctor's name is on the bill?"):
        assert subject(other) in ("medication", "doctor")  # asked by name too
    assert subject("What colour is the sky?") == "other"


# --- What decides weights, and what a reader is told


def fingerprint(place: Place, *more: str) -> Any:
    return bench_of(place, *more).fingerprint


def test_the_fingerprint_is_that_of_data_and_model(place: Place, tmp_path: Path) -> None:
    base = fingerprint(place)
    json.dumps(base)  # part of a cache key
    moved = tmp_path / "elsewhere"
    shutil.copytree(place.root / "people", moved)
    same = (
        f"data.root={moved}",
        "request.split=forget1",
        "request.retain=complement",
        "benchmark.retained=retain15",
        "benchmark.max_new_tokens=9",
        "benchmark.judge.unsafe_recall=0.4",
        "benchmark.lora.rank=3",  # nothing is trained with it
    )
    assert fingerprint(place, *same) == base
    keys = [
        base,
        fingerprint(place, "benchmark.reference=true"),
        fingerprint(place, "benchmark.max_length=80"),
        fingerprint(place, "model.dtype=bfloat16"),
        fingerprint(place, "benchmark.training.scope=lora"),
        fingerprint(place, "benchmark.training.scope=lora", "benchmark.lora.rank=3"),
    ]

    def answered(rows: Any) -> Any:
        rows[0]["qa_list"][0]["answer"] = "Nobody knows that."
        return rows

    keys.append(fingerprint(place, changed(place, tmp_path / "a", answered, "full.json")))
    # What is evaluated alone counts too: a run is found again by this.
    shorter: Sequence[tuple[str, Callable[[Any], Any]]] = [
        ("full.json", lambda rows: [r for r in rows if not r["qa_list"][1]["keywords"].clear()]),
        ("split.json", lambda lists: {**lists, "retain5": lists["retain5"][:1]}),
        ("prompt.json", lambda lists: {**lists, "icd": lists["icd"][:1]}),
    ]
    for k, (file, edit) in enumerate(shorter):
        keys.append(fingerprint(place, changed(place, tmp_path / str(k), edit, file)))
    image = json.loads((place.root / "people" / "full.json").read_text())[0]["image_path"]
    shutil.copytree(place.root / "people", tmp_path / "b")
    picture(5).save(tmp_path / "b" / image, quality=95)
    keys.append(fingerprint(place, f"data.root={tmp_path / 'b'}"))
    picture(6).save(tmp_path / "b" / "others" / "00.jpg", quality=95)
    keys.append(fingerprint(place, f"data.root={tmp_path / 'b'}", "benchmark.eval_rows=8"))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_notes_tell_what_was_cut_and_what_is_missing(place: Place, tmp_path: Path) -> None:
    assert bench_of(place).notes == ()
    whole = bench_of(place)
    lengths, _ = fiu(whole).dialogues(items_of(whole.splits.train)).lengths()
    longest = max(lengths)
    assert len(set(lengths)) > 1
    bench = bench_of(place, f"benchmark.max_length={longest - 2}")
    (note,) = bench.notes
    short = [n - (longest - 2) for n in lengths if n > longest - 2]
    assert note.startswith(f"{len(short)} of {PERSONS * QUESTIONS} answers of all persons are long")
    assert f"lose {sum(short)} tokens" in note
    (tmp_path / "people").mkdir()
    shutil.copytree(place.root / "people", tmp_path / "people", dirs_exist_ok=True)
    (tmp_path / "people" / "prompt.json").unlink()
    bare = bench_of(place, f"data.root={tmp_path / 'people'}")
    assert any("no refusals" in note for note in bare.notes)
    assert bare.benchmark.adapter.refusals == ()  # type: ignore[attr-defined]


def test_the_published_forms_of_texts_and_losses(place: Place) -> None:
    plain, quirky = bench_of(place), bench_of(place, "benchmark.reference=true")
    assert isinstance(quirky.benchmark.adapter, VLMAdapter)
    assert quirky.benchmark.adapter.everywhere and quirky.benchmark.adapter.leak
    assert isinstance(plain.benchmark.adapter, VLMAdapter)
    assert not plain.benchmark.adapter.everywhere and not plain.benchmark.adapter.leak
    ends = fiu(plain).chat.ends
    pair = (items_of(bench.splits.train) for bench in (plain, quirky))
    for ours, theirs in zip(*pair, strict=True):
        assert theirs.answer == ours.answer.capitalize()
        assert theirs.question == ours.question.capitalize()
    assert any(i.answer != i.answer.capitalize() for i in items_of(plain.splits.train))
    first = [bench.splits.train.take([0]).encoded[0].ids[-1] for bench in (plain, quirky)]
    assert first[0] in ends and first[1] not in ends
    false = items_of(quirky.splits.holdout)[0]
    assert any(false.answer in qa.wrong for qa in fiu(quirky).persons[false.group].qa), "a list"


# --- Numbers by their closed forms


def tokens(*logp: float) -> TokenScores:
    """Return scores of an answer whose distributions have mean -2 and deviation 1 throughout."""
    values = np.array(logp, dtype=np.float64)
    return TokenScores(values, np.full(len(logp), -2.0), np.ones(len(logp)), values > -0.5)


def row(
    right: TokenScores,
    paraphrase: TokenScores,
    wrong: Sequence[TokenScores],
    said: str,
    keywords: Sequence[str] = ("Ada", "Oak Way"),
    reworded: Sequence[str] = (),
    other: str | None = None,
    named: tuple[str, str, TokenScores] | None = None,
) -> Answered:
    answer = "She is Ada of Oak Way."
    qa = QA("Who?", ("a", "b", "c"), answer, "Ada it is.", ("x", "y", "z"), tuple(keywords))
    person = Person("00000001", "Ada Moreno", "female", "", Path("face.jpg"), (qa,))
    asked, told, probed = named or (None, "", None)
    return Answered(
        item=Item("00000001/00", person.image, qa.question, answer, person.id, "address"),
        qa=qa,
        person=person,
        right=right,
        paraphrase=paraphrase,
        wrong=tuple(wrong),
        said=said,
        reworded=tuple(reworded),
        named=asked,
        named_said=told,
        named_right=probed,
        other_said=other,
    )


FLAT = [tokens(-1.0, -1.0), tokens(-2.0, -2.0), tokens(-3.0, -3.0)]  # false answers, loss 2
FORGOTTEN = (
    row(
        tokens(-0.5, -1.5),  # loss 1
        tokens(-1.0, -1.0),  # loss 1, so R = e
        FLAT,
        "She is Ada of Oak Way.",
        reworded=("Ada", "Oak Way", "ada of oak way"),
        other="Ada",
        named=("Where does Ada Moreno live?", "Oak Way.", tokens(-4.0, -4.0)),
    ),
    row(tokens(-3.0), tokens(-4.0), FLAT, "Somebody.", reworded=("", "", ""), other="Nobody"),
    row(tokens(-2.0, -2.0, -2.0), tokens(-2.0), FLAT, "Ada.", (), ("Ada", "Ada", "Ada")),
)
RETAINED = (
    row(tokens(-1.0, -1.0), tokens(-1.0), FLAT, "Ada of Oak Way"),
    row(tokens(-2.0, -2.0), tokens(-3.0), FLAT, "Ada"),
)


def view_of(forget: Sequence[Answered], retain: Sequence[Answered], ref: bool = False) -> ModelView:
    """Return a view whose answers are given; there is no model behind it."""

    def none(*_: Any) -> Any:
        raise AssertionError("everything is known already")

    view = ModelView(none, none, None)  # type: ignore[arg-type]
    view.memo(("fiubench answers", "forget"), lambda _: Answers(forget, ref))
    view.memo(("fiubench answers", "retain"), lambda _: Answers(retain, ref))
    return view


def measured(
    bench: Bench,
    view: ModelView,
    original: ModelView | None = None,
    retrained: ModelView | None = None,
) -> dict[str, MetricValue]:
    trial = Trial(
        view=view,
        original=original or view,
        retrained=retrained,
        splits=bench.splits,
        seed=0,
        cost=Cost(),
        cost_reference=None,
        benchmark=bench.benchmark,
        lab=None,  # type: ignore[arg-type]
    )
    found = FIUBenchScores().compute(trial)
    assert all(name.startswith("fiubench/") for name in found)
    return {name.removeprefix("fiubench/"): value for name, value in found.items()}


@pytest.fixture(scope="module")
def unjudged(place: Place) -> Bench:
    return bench_of(place, "benchmark.judged=false")


def test_numbers_of_the_forget_set(unjudged: Bench) -> None:
    found = measured(unjudged, view_of(FORGOTTEN, RETAINED))
    value = {name: each.value for name, each in found.items()}
    e = math.e
    assert value["loss/forget"] == pytest.approx((1 + 3 + 2) / 3)
    assert value["probability/forget"] == pytest.approx((e**-1 + e**-3 + e**-2) / 3)
    # R: loss of wrong answers 2, of paraphrases 1, 4, 2
    assert value["truth_ratio/forget"] == pytest.approx((e**-1 + e**-2 + 1) / 3)
    assert value["em/forget"] == pytest.approx((1 + 0) / 2) and found["em/forget"].n == 2
    assert value["answered/forget"] == pytest.approx(1 / 2) and found["answered/forget"].n == 2
    assert value["ape"] == pytest.approx((0.5 + 0.5 + 1 + 0 + 0 + 0) / 6) and found["ape"].n == 6
    # The lowest floor(n r) of two, one and three tokens: one token, whatever the ratio.
    assert value["mink"] == pytest.approx((e**-1.5 + e**-3 + e**-2) / 3)
    assert value["minkpp"] == pytest.approx((e**0.5 + e**-1 + 1) / 3)
    assert value["rouge/forget"] == pytest.approx((1 + 0 + 1 / 6) / 3)
    assert value["text_only/em"] == 1.0  # Ada is in the question, Oak Way is told
    assert value["text_only/mink"] == pytest.approx(e**-4)
    assert value["leak_delta"] == pytest.approx(e**-1.5 - e**-4)
    assert found["text_only/em"].n == found["leak_delta"].n == 1
    assert value["other_face/em"] == pytest.approx((0.5 + 0) / 2)
    for name in ("rouge/forget", "em/forget", "ape", "mink", "other_face/em", "leak_delta"):
        assert found[name].direction == "to_reference"


def test_numbers_of_retained_persons(unjudged: Bench) -> None:
    found = measured(unjudged, view_of(FORGOTTEN, RETAINED))
    value = {name: each.value for name, each in found.items()}
    e = math.e
    wrong = e**-1 + e**-2 + e**-3
    first, second = e**-1 / (e**-1 + wrong), e**-2 / (e**-2 + wrong)
    assert value["probability/retain"] == pytest.approx((first + second) / 2)
    assert value["truth_ratio/retain"] == pytest.approx((1 - 1 / e + 0) / 2)  # R = e and 1/e
    assert value["em/retain"] == pytest.approx((1 + 0.5) / 2)
    assert value["rouge/retain"] == pytest.approx((4 / 6 + 1 / 6) / 2)
    assert found["rouge/retain"].note.startswith("retain5")
    parts = [value[f"{name}/retain"] for name in ("rouge", "probability", "truth_ratio", "em")]
    assert value["utility"] == pytest.approx((parts[0] + parts[2]) / 2)
    assert value["utility_code"] == pytest.approx(4 / sum(1 / part for part in parts))
    assert found["utility"].note == "arithmetic mean; not measured and left out: gpt, accuracy"
    assert found["utility_code"].note == "harmonic mean; not measured and left out: gpt"


def test_what_was_not_asked_is_missing(unjudged: Bench) -> None:
    bare = [replace(r, named=None, named_right=None, other_said=None) for r in FORGOTTEN]
    found = measured(unjudged, view_of(bare, RETAINED))
    for name in ("text_only/em", "text_only/mink", "leak_delta", "other_face/em", "accuracy"):
        assert name not in found
    assert not any(name.startswith("judge") for name in found)
    assert not AGAINST & found.keys(), "there is no retained model"


def test_questions_without_keywords_are_not_failures(unjudged: Bench) -> None:
    nothing = [replace(r, qa=replace(r.qa, keywords=())) for r in FORGOTTEN]
    found = measured(unjudged, view_of(nothing, RETAINED), retrained=view_of(FORGOTTEN, RETAINED))
    for name in ("em/forget", "answered/forget", "ape"):
        assert math.isnan(found[name].value) and found[name].n == 0
    assert "forget_quality" not in found  # one of its parts is not known
    assert "em/forget" not in found["gap"].note and "em/retain" in found["gap"].note
    assert math.isfinite(found["gap"].value)


def test_a_model_against_itself(unjudged: Bench) -> None:
    view = view_of(FORGOTTEN, RETAINED)
    found = measured(unjudged, view, view_of(RETAINED, RETAINED), view)
    value = {name: each.value for name, each in found.items()}
    assert (value["ks_p"], value["ks_log_p"], value["ks_statistic"]) == (1.0, 0.0, 0.0)
    assert value["gap"] == 0.0
    wanted = 0.5 + 0.15 * (1 - value["em/forget"]) + 0.2 * (1 - value["mink"])
    assert value["forget_quality"] == pytest.approx(wanted + 0.15 * (1 - value["ape"]))


def ratios(*values: float) -> list[Answered]:
    """Return answers of given R: false answers have loss 3, the paraphrase 3 - ln R."""
    wrong = [tokens(-3.0)] * 3
    return [row(tokens(-1.0), tokens(math.log(r) - 3.0), wrong, "Ada") for r in values]


def test_numbers_against_the_retained_model(unjudged: Bench) -> None:
    low, high = np.linspace(0.5, 0.9, 12), np.linspace(2.0, 6.0, 12)
    mixed = [*low[:6], *high[:6]]
    theirs, original = (view_of(ratios(*r), RETAINED) for r in (low, high))
    found = measured(unjudged, view_of(ratios(*mixed), RETAINED), original, theirs)
    test, worst = ks_2samp(mixed, low), ks_2samp(high, low)
    assert found["ks_p"].value == pytest.approx(test.pvalue)
    assert found["ks_statistic"].value == pytest.approx(0.5)
    assert found["ks_log_p"].value == pytest.approx(math.log(test.pvalue))
    ks = 1 - math.log(test.pvalue) / math.log(worst.pvalue)
    mia = math.exp(-1.0)
    wanted = 0.5 * ks + 0.15 * 0.5 + 0.2 * (1 - mia) + 0.15 * (1 - found["ape"].value)
    assert math.isnan(found["ape"].value), "nothing was reworded"
    assert math.isnan(wanted) and "forget_quality" not in found

    def told(values: Sequence[float]) -> ModelView:
        asked = [replace(r, reworded=("Ada", "", "")) for r in ratios(*values)]
        return view_of(asked, RETAINED)

    found = measured(unjudged, told(mixed), told(list(high)), told(list(low)))
    wanted = 0.5 * ks + 0.15 * 0.5 + 0.2 * (1 - mia) + 0.15 * (1 - 0.5 / 3)
    assert found["forget_quality"].value == pytest.approx(wanted)
    assert f"ln p = {math.log(worst.pvalue):.2f}" in found["forget_quality"].note
    assert "original, this run" in found["forget_quality"].note
    same = measured(unjudged, told(list(high)), told(list(high)), told(list(low)))
    assert same["forget_quality"].value == pytest.approx(wanted - 0.5 * ks)  # nothing forgotten
    assert found["gap"].direction == "down"
    gap = abs(scores.forget_truth_ratio(mixed) - scores.forget_truth_ratio(low)) / 10
    assert found["gap"].value == pytest.approx(100 * gap)


def test_a_floor_of_ones_own(place: Place) -> None:
    bench = bench_of(place, "benchmark.judged=false", "benchmark.floor=-26.1")
    low, high = ([*np.linspace(*ends, 12)] for ends in ((0.5, 0.9), (2.0, 6.0)))
    asked = [
        view_of([replace(r, reworded=("", "", "")) for r in ratios(*values)], RETAINED)
        for values in (high, high, low)
    ]
    found = measured(bench, *asked)
    ks = 1 + found["ks_log_p"].value / 26.1
    wanted = 0.5 * ks + 0.15 * 0.5 + 0.2 * (1 - math.exp(-1.0)) + 0.15
    assert found["forget_quality"].value == pytest.approx(wanted)
    assert "benchmark.floor=-26.1" in found["forget_quality"].note
    with pytest.raises(ConfigError, match="floor"):
        plan(["method=original", *place.people("benchmark.floor=26.1")])


def test_the_published_forms_of_numbers(place: Place) -> None:
    bench = bench_of(place, "benchmark.judged=false", "benchmark.reference=true")
    rows = [
        row(tokens(-9.0, -1.0, -3.0), tokens(-9.0, -2.0), [tokens(-9.0, -6.0)] * 3, "Ada. Oak Way.")
    ]
    found = measured(bench, view_of(rows, rows, ref=True))
    value = {name: each.value for name, each in found.items()}
    assert value["loss/forget"] == pytest.approx(4 / 3)  # first token dropped, divided by all
    assert value["truth_ratio/forget"] == pytest.approx(math.exp(1 - 3))
    assert value["rouge/forget"] == pytest.approx(1 / 6)  # cut at the first full stop
    assert "cut at the first full stop" in found["rouge/forget"].note
    # Of two tokens only ratio 0.5 takes one; the other weights are lost.
    assert value["mink"] == pytest.approx(0.1 * math.exp(-3.0))
    assert value["utility_code"] == 0.0 and "counted as 0 (reference): gpt" in (
        found["utility_code"].note
    )
    parts = value["rouge/retain"] + value["truth_ratio/retain"]
    assert value["utility"] == pytest.approx(parts / 4)
    plain = measured(bench_of(place, "benchmark.judged=false"), view_of(rows, rows))
    assert plain["rouge/forget"].value == pytest.approx(3 / 6)
    assert plain["loss/forget"].value == pytest.approx(13 / 3)


def judged_by(place: Place, judge: Any, tmp_path: Path) -> Bench:
    bench = opened(place, place.people())[1]
    made = fiu(bench)
    made.store = tmp_path
    made.__dict__["judge"] = judge
    return bench


def test_a_judge_is_part_of_utility_and_its_failures_are_counted(
    place: Place, tmp_path: Path
) -> None:
    told = {"Somebody.": "0.1", "Ada": "what?", "Ada of Oak Way": "0.75\nmuch agrees"}
    judge = Scripted(lambda prompt: told.get(prompt.prediction, "1"))
    bench = judged_by(place, judge, tmp_path)
    found = measured(bench, view_of(FORGOTTEN, RETAINED))
    assert found["judge/forget"].value == pytest.approx((1 + 0.1 + 1) / 3)
    assert found["judge/retain"].value == 0.75 and found["judge/retain"].n == 1
    assert found["judge/retain"].note == "judge scripted; 1 answers could not be read"
    assert "gpt" not in found["utility"].note
    parts = [found[f"{n}/retain"].value for n in ("rouge", "judge", "truth_ratio")]
    assert found["utility"].value == pytest.approx(sum(parts) / 3)
    assert {prompt.kind for prompt in judge.seen} == {"agreement"}
    assert {prompt.reference for prompt in judge.seen} == {"She is Ada of Oak Way."}
    asked = len(judge.seen)
    measured(bench, view_of(FORGOTTEN, RETAINED))
    assert len(judge.seen) == asked, "answers are kept"


def test_a_heuristic_judge_is_no_part_of_utility(place: Place, tmp_path: Path) -> None:
    judge = Scripted(lambda prompt: "1")
    judge.heuristic = True
    found = measured(judged_by(place, judge, tmp_path), view_of(FORGOTTEN, RETAINED))
    assert found["judge/retain"].value == 1.0
    assert found["judge/retain"].note.startswith("HEURISTIC")
    assert "gpt" in found["utility"].note and "gpt" in found["utility_code"].note


def test_a_judge_that_says_nothing_leaves_its_number_out(place: Place, tmp_path: Path) -> None:
    bench = judged_by(place, Scripted(lambda prompt: "no idea"), tmp_path)
    found = measured(bench, view_of(FORGOTTEN, RETAINED))
    assert "judge/forget" not in found and "judge/retain" not in found
    assert "gpt" in found["utility"].note


def test_another_benchmark_is_refused(unjudged: Bench) -> None:
    from mmforget.vlm.metrics.safeeraser import SafeEraserScores

    trial: Any = type("T", (), {"benchmark": unjudged.benchmark})
    with pytest.raises(ConfigError, match="needs benchmark=vlm/safeeraser"):
        SafeEraserScores().compute(trial)
    with pytest.raises(ConfigError, match="needs benchmark=vlm/fiubench"):
        FIUBenchScores().compute(type("T", (), {"benchmark": None}))  # type: ignore[arg-type]


def test_a_model_that_says_nothing_is_called_collapsed(unjudged: Bench) -> None:
    below, above = ({"fiubench/rouge/retain": MetricValue(value, "up")} for value in (0.099, 0.101))
    assert "9.9 %" in (unjudged.benchmark.collapsed(below) or "")
    assert unjudged.benchmark.collapsed(above) is None
    assert unjudged.benchmark.collapsed({}) is None


# --- What a model is asked


@pytest.fixture(scope="module")
def asked(place: Place) -> tuple[Bench, ModelView]:
    workbench, bench, recipe = opened(place, place.people("benchmark.judged=false"))
    model, _, _ = workbench.trained(bench, recipe, bench.splits.train, 0, "original")
    return bench, workbench.view(bench, model, 0)


def test_answers_stand_at_their_questions(asked: tuple[Bench, ModelView]) -> None:
    bench, view = asked
    made = fiu(bench)
    table = answers(view, made, "forget")
    assert [r.item.id for r in table.rows] == list(bench.splits.forget.ids)
    numbers = view.numbers("forget")
    assert table.right == pytest.approx(numbers["loss"] / numbers["tokens"], rel=1e-4)
    false = view.numbers("holdout")
    assert table.wrong[:, 0] == pytest.approx(false["loss"] / false["tokens"], rel=1e-4)
    for r in table.rows:
        assert len(r.reworded) == len(r.qa.paraphrases) == 3
        assert r.other_said is not None
        if r.item.kind == "name":
            assert r.named is None and r.named_right is None
        else:
            assert r.named is not None and r.person.name in r.named
            assert "in the image" not in r.named
    assert 0 < len(table.named) < len(table)
    kept = answers(view, made, "retain")
    assert {r.person.id for r in kept.rows} == {person.id for person in made.kept}
    assert all(r.reworded == () and r.other_said is None for r in kept.rows)
    assert answers(view, made, "retain") is kept, "asked once"


def test_other_faces_are_of_nobody_where_there_are_such(
    place: Place, asked: tuple[Bench, ModelView], tmp_path: Path
) -> None:
    made = fiu(asked[0])
    known = {person.image for person in made.files.persons}
    assert len(made.other_faces()) == mini.OTHERS and not known & set(made.other_faces())
    shutil.copytree(place.root / "people", tmp_path / "people")
    shutil.rmtree(tmp_path / "people" / "others")
    other = fiu(bench_of(place, f"data.root={tmp_path / 'people'}"))
    assert other.other_faces() == [person.image for person in other.kept]


def test_probes_can_be_left_out(place: Place) -> None:
    words = ("benchmark.judged=false", "benchmark.text_only=false", "benchmark.other_face=false")
    workbench, bench, recipe = opened(place, place.people(*words))
    model, _, _ = workbench.trained(bench, recipe, bench.splits.train, 0, "original")
    table = answers(workbench.view(bench, model, 0), fiu(bench), "forget")
    assert not table.named and all(r.other_said is None for r in table.rows)


def controls(folder: Path) -> list[str]:
    """Write two POPE questions and an MME task of two images; return the words that name them."""
    images = folder / "images"
    images.mkdir(parents=True)
    lines = []
    for k, label in enumerate(("yes", "no", "yes")):
        picture(k).save(images / f"{k}.png")
        lines.append({"question_id": k, "image": f"{k}.png", "text": f"Is {k}?", "label": label})
    (folder / "pope.json").write_text("\n".join(map(json.dumps, lines)))
    task = folder / "mme" / "existence"
    task.mkdir(parents=True)
    for k, labels in enumerate((("Yes", "No"), ("No", "No"))):
        picture(k).save(task / f"{k}.png")
        text = "\n".join(f"Is there {n}?\t{label}" for n, label in enumerate(labels))
        (task / f"{k}.txt").write_text(text)
    return [
        f"benchmark.controls.pope={folder / 'pope.json'}",
        f"benchmark.controls.pope_images={images}",
        f"benchmark.controls.mme={folder / 'mme'}",
        "benchmark.controls.parser=contains_yes",
    ]


def test_pope_and_mme_are_measured_where_they_are_named(place: Place, tmp_path: Path) -> None:
    words = place.people("benchmark.judged=false", *controls(tmp_path))
    workbench, bench, recipe = opened(place, words)
    model, _, _ = workbench.trained(bench, recipe, bench.splits.train, 0, "original")
    view = workbench.view(bench, model, 0)
    found = measured(bench, view)
    # A random model says no yes, and whatever is no yes is a no: 1 of 3, and 3 of 4.
    assert found["pope"].value == pytest.approx(1 / 3)
    assert found["pope_yes"].value == 0.0
    assert found["mme/existence"].value == pytest.approx(75.0 + 50.0)
    assert found["mme"].value == pytest.approx(0.75)
    assert found["accuracy"].value == pytest.approx((1 / 3 + 0.75) / 2)
    assert found["accuracy_relative"].value == 1.0, "of the original itself"
    assert "accuracy" not in found["utility"].note
    rouge, truth = found["rouge/retain"].value, found["truth_ratio/retain"].value
    assert found["utility"].value == pytest.approx((rouge + truth + 1.0) / 3)


# --- Whole runs


TRAINED = (
    "benchmark.training.epochs=2",
    "benchmark.training.lr=0.003",
    "benchmark.training.batch_size=8",
    "benchmark.lora.rank=4",
)


@pytest.fixture(scope="module")
def swept(place: Place) -> dict[str, RunResult]:
    """An original of two epochs, its rows, and three unlearned models."""
    quick = ["method.epochs=1", "method.batch_size=4", "method.optimizer=sgd"]
    words = place.people(*TRAINED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fiubench, "FALLEN", -1.0)  # so small a model says nothing of use
        made = {}
        for name, more in {
            "lora": ["method=grad_diff", "method.scope=lora", "method.lr=0.05", *quick],
            "still": ["method=grad_diff", "method.scope=lora", "method.lr=0", *quick],
            "full": ["method=vlm/icd", "method.scope=all", "method.lr=0.01", *quick],
            "retrain": ["method=retrain"],
            "original": ["method=original"],
        }.items():
            (made[name],) = mmforget.sweep(*words, *more, **place.store)
    return made


def test_every_run_is_recorded_against_the_retrained_model(swept: dict[str, RunResult]) -> None:
    for name, run in swept.items():
        assert run.status == "finished", (name, run.error)
        assert {f"fiubench/{each}" for each in AGAINST} <= run.metrics.keys()
        assert run.metrics["fiubench/ape"].n == 3 * FORGET * QUESTIONS
        base = swept["retrain"].metrics["fiubench/em/forget"].value
        assert run.metrics["fiubench/em/forget"].reference == base
        assert set(np.load(run.folder / "predictions.npz")) >= {"forget|loss", "holdout|tokens"}
    own = swept["retrain"].metrics
    assert own["fiubench/ks_p"].value == 1.0 and own["fiubench/gap"].value == 0.0
    assert swept["original"].metrics["fiubench/gap"].value > 0
    assert swept["lora"].request["sizes"]["retain"] == (PERSONS - FORGET - OTHERS) * QUESTIONS
    moved = swept["lora"].metrics["fiubench/loss/forget"].value
    assert moved > swept["original"].metrics["fiubench/loss/forget"].value + 0.01


def test_adapters_of_zero_change_nothing(swept: dict[str, RunResult]) -> None:
    still, original = swept["still"].metrics, swept["original"].metrics
    names = [name for name in original if name.startswith("fiubench/")]
    assert len(names) > 20
    for name in names:
        assert still[name].value == pytest.approx(original[name].value, abs=1e-5, nan_ok=True), name


def test_samples_are_read_by_the_page(swept: dict[str, RunResult]) -> None:
    run = swept["lora"]
    content = json.loads((run.folder / "samples" / "answers.json").read_text())
    assert len(content["items"]) == (FORGET + KEPT) * QUESTIONS
    first = content["items"][0]
    assert {"id", "group", "kind", "split", "question", "answer", "keywords", "generation"} <= (
        first.keys()
    )
    assert len(first["reworded"]) == 3 and 0 <= first["probability"] <= 1
    order = json.loads((run.folder / "samples" / "faces.json").read_text())["order"]
    assert set(order) == set(content["names"])
    found = page.sections([swept["original"], swept["retrain"], run])
    titles = [section.title for section in found]
    assert titles[:2] == ["Answers, before and after", "Forgotten and kept"]
    assert set(content["names"].values()) <= {
        name for name in content["names"].values() if name in found[0].html
    }
    assert "data:image/jpeg;base64," in found[0].html


def test_nothing_is_asked_for_samples_alone(place: Place) -> None:
    words = place.people("metrics=cost", "request.split=forget10")
    (run,) = mmforget.sweep(*words, "method=original", **place.store)
    assert {name.partition("/")[0] for name in run.metrics} == {"cost"}
    assert not (run.folder / "samples").exists()


def logits_of(net: Any, processor: Any) -> Tensor:
    inputs = ask(processor, picture(3), "Who is this?", "Ada Moreno.")
    with torch.no_grad():
        found: Tensor = net(**inputs).logits
    return found


@pytest.fixture(scope="module")
def stage1(swept: dict[str, RunResult], place: Place) -> Path:
    """The original of the runs, as the training script writes it."""
    out = place.root / "stage1"
    words = [*place.people(*TRAINED), "--cache", str(place.store["cache"]), "--out", str(out)]
    result = CliRunner().invoke(train.app, [*words, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    numbers = json.loads(result.stdout)["loss"]
    found = swept["original"].metrics["fiubench/loss/forget"].value
    assert numbers["forget"] == pytest.approx(found, rel=1e-4)
    assert set(numbers) == {"forget", "holdout", "test"}
    return out


def test_an_adapter_folder_opens_in_plain_peft(
    swept: dict[str, RunResult], place: Place, stage1: Path
) -> None:
    run = swept["lora"]
    bench = bench_of(place, f"model.path={stage1}", "benchmark.lora.rank=4")
    ours = bench.benchmark.rebuild(run.folder, fiu(bench).base)
    plain = AutoModelForImageTextToText.from_pretrained(stage1)
    processor = AutoProcessor.from_pretrained(stage1)
    before = logits_of(plain, processor)
    theirs = PeftModel.from_pretrained(plain, str(run.folder)).eval()
    found = logits_of(theirs, processor)
    assert torch.allclose(found, logits_of(ours, processor), atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)


def test_a_whole_folder_opens_in_plain_transformers(
    swept: dict[str, RunResult], place: Place
) -> None:
    run = swept["full"]
    plain = AutoModelForImageTextToText.from_pretrained(run.folder).eval()
    processor = AutoProcessor.from_pretrained(run.folder)
    bench = bench_of(place)
    ours = bench.benchmark.rebuild(run.folder / "model.safetensors", fiu(bench).base)
    found = logits_of(plain, processor)
    assert torch.equal(found, logits_of(ours, processor))
    assert not torch.allclose(found, logits_of(fiu(bench).base, processor), atol=1e-3)


def test_without_training_a_retained_model_may_be_named(
    swept: dict[str, RunResult], place: Place
) -> None:
    named = f"benchmark.reference_model={swept['retrain'].folder}"
    (run,) = mmforget.sweep(*place.people(named), "method=original", **place.store)
    assert {f"fiubench/{name}" for name in AGAINST} <= run.metrics.keys()
    assert run.metrics["fiubench/gap"].value > 0
    same = mmforget.evaluate(
        swept["retrain"].folder, "vlm/fiubench", **place.store,
        **{word.partition("=")[0]: word.partition("=")[2] for word in place.people(named)[1:]
           if word.partition("=")[0] not in ("data", "model")},
        data="local", model="pretrained",
    )  # fmt: skip
    assert same.metrics["fiubench/ks_p"].value == 1.0
    assert same.metrics["fiubench/gap"].value == pytest.approx(0.0, abs=1e-6)


def test_a_reference_model_of_another_kind_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"")
    words = place.people(f"benchmark.reference_model={tmp_path / 'other.safetensors'}")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        mmforget.sweep(*words, "method=original", **place.store)


def test_a_checkpoint_is_what_training_begins_with(
    swept: dict[str, RunResult], place: Place
) -> None:
    words = (f"model.checkpoint={swept['retrain'].folder}",)
    base = fiu(bench_of(place, *words)).base
    plain = AutoModelForImageTextToText.from_pretrained(swept["retrain"].folder)
    held = dict(plain.named_parameters())
    pairs = [(p, held[name]) for name, p in base.base.named_parameters()]
    assert pairs and all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(CheckpointError):
        _ = fiu(bench_of(place, f"model.checkpoint={place.root / 'nowhere'}")).base


def test_dialogues_keep_the_order_of_the_file(place: Place) -> None:
    bench = bench_of(place)
    assert isinstance(bench.splits.train, Dialogues)
    ids = list(bench.splits.train.ids)
    order = [person.id for person in fiu(bench).files.persons]
    assert ids == [f"{person}/{k:02d}" for person in order for k in range(QUESTIONS)]
    places = [ids.index(name) for name in bench.splits.retain.ids]
    assert all(a < b for a, b in pairwise(places))


def test_a_run_in_the_published_forms(place: Place) -> None:
    words = place.people(
        "benchmark.reference=true", "benchmark.judged=false", "benchmark.lora.rank=4",
        "method.epochs=1", "method.batch_size=8", "method.lr=0.001",
    )  # fmt: skip
    (run,) = mmforget.sweep(*words, "method=kl_retain", **place.store)
    told = json.loads((run.folder / "samples" / "answers.json").read_text())["items"]
    assert not {f"fiubench/{name}" for name in AGAINST} & run.metrics.keys(), "nothing retrained"
    assert run.cost.steps == 1 and math.isfinite(run.metrics["fiubench/loss/forget"].value)
    assert all(item["question"] == item["question"].capitalize() for item in told)
    # Answers end at their first full stop; those without one are cut to nothing.
    whole = [item["generation"].endswith(".") for item in told]
    assert all(item["generation"].count(".") <= 1 for item in told)
    assert all(ended or item["rouge"] == 0.0 for ended, item in zip(whole, told, strict=True))
