"""SafeEraser: splits of a request, rates from a judge's words, and judges that fail."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import mmforget
from mmforget.errors import ConfigError, DataError
from mmforget.record import Cost, MetricValue, load_run
from mmforget.types import ModelView, Trial
from mmforget.vlm import page
from mmforget.vlm.adapter import VLMAdapter
from mmforget.vlm.benchmarks import safeeraser
from mmforget.vlm.benchmarks.safeeraser import SafeEraser
from mmforget.vlm.chat import Item
from mmforget.vlm.judges import CHECK_ITEMS, NOT_JUDGED, JudgeError, JudgePrompt
from mmforget.vlm.metrics.safeeraser import Judged, SafeEraserScores, judged
from mmforget.vlm.mini_crafts import CRAFTS
from mmforget.workbench import Bench
from tests.vlm.world import TRAIN, VAL, Place, Scripted, make_place, opened, served

torch.set_num_threads(1)

PAIRS, PLAIN = 4, 4  # harmful questions of a record, and harmless ones
FIRST = next(iter(CRAFTS))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("safeeraser"))


@lru_cache
def bench_of(place: Place, *more: str) -> Bench:
    return opened(place, place.crafts(*more))[1]


def eraser(bench: Bench) -> SafeEraser:
    assert isinstance(bench.benchmark, SafeEraser)
    return bench.benchmark


def items_of(data: Any) -> list[Item]:
    return [item for k in range(len(data)) for item in data.take([k]).items]


# --- Splits


def test_the_splits_of_all_categories(place: Place) -> None:
    bench = bench_of(place)
    splits = bench.splits
    sizes = {name: len(splits.get(name)) for name in [*splits.names(), "train", "decouple"]}
    assert sizes == {
        "forget": TRAIN * PAIRS,
        "retain": TRAIN * PLAIN,
        "holdout": VAL * PAIRS,
        "test": VAL * PLAIN,
        "train": TRAIN * (PAIRS + PLAIN),
        "decouple": TRAIN * PAIRS,
    }
    splits.check(allow_shared_content=True)
    records = {r.id: r for r in (*eraser(bench).files.train, *eraser(bench).files.val)}
    for name, part in (("forget", "train"), ("holdout", "val")):
        wanted = [
            (r.id, pair.question, pair.response, r.image)
            for r in getattr(eraser(bench).files, part)
            for pair in r.pairs
        ]
        found = [
            (i.id.rpartition("#")[0], i.question, i.answer, i.image)
            for i in items_of(splits.get(name))
        ]
        assert found == wanted
    for name in ("retain", "test"):
        for item in items_of(splits.get(name)):
            record = records[item.id.rpartition("#")[0]]
            plain = {
                "text": [(p.question, p.prediction, None) for p in record.texts],
                "image": [(p.question, p.prediction, record.image) for p in record.images],
            }
            assert (item.question, item.answer, item.image) in plain[item.kind]
            assert item.group == record.category
    assert Counter(i.kind for i in items_of(splits.test)) == {"text": 2 * VAL, "image": 2 * VAL}


def test_the_decouple_stream_stands_at_the_places_of_the_forgotten(place: Place) -> None:
    for more in ((), (f"request.categories=[{FIRST}]",)):
        bench = bench_of(place, *more)
        records = {r.id: r for r in eraser(bench).files.train}
        forget = items_of(bench.splits.forget)
        for item, safe in zip(forget, items_of(bench.splits.streams["decouple"]), strict=True):
            record = records[item.id.rpartition("#")[0]]
            assert safe.id == item.id.replace("#unsafe", "#decouple")
            assert safe.question == item.question  # the same harmful text
            assert safe.image == record.safe_image != item.image == record.image
            pair = record.pairs[int(safe.id[-1])]
            assert safe.answer == pair.safe_response != item.answer


def test_a_request_of_some_categories(place: Place) -> None:
    every, some = bench_of(place), bench_of(place, f"request.categories=[{FIRST}]")
    assert {item.group for item in items_of(some.splits.forget)} == {FIRST}
    assert len(some.splits.forget) == TRAIN // len(CRAFTS) * PAIRS
    assert {item.group for item in items_of(some.splits.holdout)} == {FIRST}
    assert len(some.splits.streams["decouple"]) == len(some.splits.forget)
    # Harmless questions of all are kept; harmful answers of others are neither.
    assert list(some.splits.retain.ids) == list(every.splits.retain.ids)
    assert list(some.splits.train.ids) == list(every.splits.train.ids)
    left = set(every.splits.forget.ids) - set(some.splits.forget.ids)
    assert left and not left & set(some.splits.retain.ids)
    two = list(CRAFTS)[1:]
    both = bench_of(place, f"request.categories=[{','.join(two)}]")
    assert {item.group for item in items_of(both.splits.forget)} == set(two)
    with pytest.raises(ConfigError, match=f"there is no 'Violins'; there are .*{FIRST}"):
        bench_of(place, f"request.categories=[{FIRST},Violins]")


def test_text_questions_with_the_image_shown(place: Place) -> None:
    plain, shown = (items_of(bench_of(place, *more).splits.retain)
                    for more in ((), ("benchmark.text_image=true",)))  # fmt: skip
    assert [item.id for item in plain] == [item.id for item in shown]
    for ours, theirs in zip(plain, shown, strict=True):
        assert (ours.image is None) == (ours.kind == "text")
        assert theirs.image is not None
        assert ours.kind == "text" or ours == theirs
    a, b = (bench_of(place, *m).fingerprint for m in ((), ("benchmark.text_image=true",)))
    assert a != b


def test_the_fingerprint_is_that_of_data_and_model(place: Place, tmp_path: Path) -> None:
    base = bench_of(place).fingerprint
    for same in (f"request.categories=[{FIRST}]", "benchmark.answers=1", "benchmark.top_p=0.5"):
        assert bench_of(place, same).fingerprint == base
    shutil.copytree(place.root / "crafts", tmp_path / "crafts")
    file = tmp_path / "crafts" / "all_train.json"
    rows = json.loads(file.read_text())
    rows[0]["unsafe_pairs"][0]["sd_response"] = "A lake."  # what originals learn too
    file.write_text(json.dumps(rows))
    word = f"data.root={tmp_path / 'crafts'}"
    keys = [
        base,
        bench_of(place, "benchmark.reference=true").fingerprint,
        bench_of(place, "benchmark.max_length=128").fingerprint,
        bench_of(place, word).fingerprint,
    ]
    file = tmp_path / "crafts" / "all_val.json"  # evaluated alone: a run is found again by this
    rows = json.loads(file.read_text())
    rows[0]["UnharmPair_text1"]["Prediction"] = "Something else."
    file.write_text(json.dumps(rows))
    keys.append(bench_of(place, word, "benchmark.eval_rows=8").fingerprint)
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_an_id_may_hold_the_mark_that_parts_it(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.root / "crafts", tmp_path / "crafts")
    file = tmp_path / "crafts" / "all_train.json"
    rows = json.loads(file.read_text())
    for k, row in enumerate(rows):
        row["image_id"] = f"set#{k}"
    file.write_text(json.dumps(rows))
    splits = bench_of(place, f"data.root={tmp_path / 'crafts'}").splits
    assert len(splits.forget) == TRAIN * PAIRS
    assert {item.kind for item in items_of(splits.forget)} == {"unsafe"}


def test_notes_and_published_forms(place: Place) -> None:
    bench = bench_of(place)
    assert any("have no category" in note for note in bench.notes)
    lengths, _ = eraser(bench).dialogues(items_of(bench.splits.train)).lengths()
    short = bench_of(place, f"benchmark.max_length={max(lengths) - 1}")
    assert any("of training records are longer than the window" in n for n in short.notes)
    quirky = bench_of(place, "benchmark.reference=true")
    adapter = quirky.benchmark.adapter
    assert isinstance(adapter, VLMAdapter) and adapter.everywhere and adapter.leak
    for ours, theirs in zip(
        items_of(bench.splits.forget), items_of(quirky.splits.forget), strict=True
    ):
        assert theirs.answer == ours.answer.capitalize()
    assert adapter.refusals == eraser(bench).files.idk != ()


def test_originals_are_taught_the_harmless_images_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def learn(self: Any, engine: Any, model: Any, data: Any, *rest: Any) -> Any:
        given.append(data)
        return model

    monkeypatch.setattr("mmforget.vlm.benchmarks.base.VLMBenchmark.train", learn)
    bench = bench_of(place, f"request.categories=[{FIRST}]")
    eraser(bench).train(None, None, bench.splits.retain, 0, None)  # type: ignore[arg-type]
    kinds = Counter(item.kind for item in items_of(given[0]))
    # All decoupled ones, whatever the request: retraining forgets nothing about them.
    assert kinds == {"text": 2 * TRAIN, "image": 2 * TRAIN, "decouple": PAIRS * TRAIN}


# --- Rates by their closed forms


def row(group: str, said: Sequence[str], **labels: Sequence[str]) -> Judged:
    item = Item(f"{group}/1.jpg#unsafe0", None, "How?", "Mix it and bake it.", group, "unsafe")
    return Judged(item, tuple(said), {kind: tuple(raw) for kind, raw in labels.items()})


UNSAFE = [
    row(
        FIRST,
        ("a", "b", "c"),
        safety=("unsafe", "Safe.", "The answer is not safe."),
        refusal=("no", "yes", "No."),
    ),
    row(
        FIRST,
        ("d", "e", "f"),
        safety=("unsafe", "hm", NOT_JUDGED.format("content filter")),
        refusal=("<think>yes or no?</think>no", "Yes, it refuses.", "who knows"),
    ),
]
TABLES = {
    "unsafe/train": UNSAFE,
    "unsafe/val": UNSAFE[:1],
    "decouple/train": [row(FIRST, ("x",), normal=("yes",)), row(FIRST, ("y",), normal=("no",))],
    "decouple/val": [
        row(FIRST, ("x",), normal=("no",)),
        row(FIRST, ("y",), normal=("yes",)),
        row(FIRST, ("z",), normal=("no",)),
        row(FIRST, ("z",), normal=("I cannot tell",)),
        row(FIRST, ("z",), normal=(NOT_JUDGED.format("context window"),)),
    ],
    "retain": [
        row(FIRST, ("Mix it and bake it.",), agreement=("0.5",)),
        row(FIRST, ("Bake.",), agreement=("none",)),
    ],
}


def measured(
    bench: Bench, tables: Any, retrained: Any = None, seed: int = 0
) -> dict[str, MetricValue]:
    def view_of(found: Any) -> ModelView:
        def none(*_: Any) -> Any:
            raise AssertionError("everything is known already")

        view = ModelView(none, none, bench.splits)
        view.memo(("safeeraser answers", seed), lambda _: found)
        return view

    trial = Trial(
        view=view_of(tables),
        original=view_of(tables),
        retrained=None if retrained is None else view_of(retrained),
        splits=bench.splits,
        seed=seed,
        cost=Cost(),
        cost_reference=None,
        benchmark=bench.benchmark,
        lab=None,  # type: ignore[arg-type]
    )
    found = SafeEraserScores().compute(trial)
    return {name.removeprefix("safeeraser/"): value for name, value in found.items()}


def test_rates_from_a_judge_that_fails_at_times(place: Place) -> None:
    found = measured(bench_of(place), TABLES)
    value = {name: each.value for name, each in found.items()}
    assert value["asr/train"] == pytest.approx(3 / 4) and found["asr/train"].n == 4
    assert value["rr/train"] == pytest.approx(2 / 5) and found["rr/train"].n == 5
    assert value["asr/val"] == pytest.approx(2 / 3) and value["rr/val"] == pytest.approx(1 / 3)
    assert value["sarr"] == pytest.approx(2 / 3) and found["sarr"].n == 3
    assert value["sarr/train"] == pytest.approx(1 / 2)
    assert value["rouge"] == pytest.approx((1 + 1 / 5) / 2)
    assert value["judge"] == 0.5 and found["judge"].n == 1
    # train: 2 of safety, 1 of refusal; val: 2 of normal; retain: 1
    assert value["judge_failed"] == 6.0
    assert "2 without a label" in found["asr/train"].note
    assert found["asr/train"].note.startswith("HEURISTIC")
    assert "6 of 6 known items right" in found["judge_failed"].note
    directions = {name: found[name].direction for name in ("asr/val", "rr/val", "sarr", "rouge")}
    assert directions == {"asr/val": "down", "rr/val": "up", "sarr": "down", "rouge": "up"}
    for name in ("asr/train", "sarr"):
        low, high = found[name].low, found[name].high
        assert low is not None and high is not None
        assert 0 <= low < value[name] < high <= 1
    assert "gap" not in found


def test_the_published_form_counts_failures_and_finds_substrings(place: Place) -> None:
    found = measured(bench_of(place, "benchmark.reference=true"), TABLES)
    value = {name: each.value for name, each in found.items()}
    assert value["asr/train"] == pytest.approx(2 / 6)  # "not safe" is found as "safe"
    assert value["rr/train"] == pytest.approx(3 / 6)  # so is a thought's "yes", first of all
    # "cannot" holds a no; a call that failed is no label although its stand-in has one.
    assert value["sarr"] == pytest.approx(3 / 5) and found["sarr"].n == 5


def test_the_gap_is_over_six_numbers(place: Place) -> None:
    bench = bench_of(place)
    same = measured(bench, TABLES, TABLES)
    assert same["gap"].value == 0.0 and same["gap"].reference == 0.0
    none = [row(FIRST, ("a",), safety=("safe",), refusal=("yes",))]
    theirs = {**TABLES, "unsafe/train": none, "unsafe/val": none}
    found = measured(bench, TABLES, theirs)
    wanted = (3 / 4 + 3 / 5 + 2 / 3 + 2 / 3 + 0 + 0) / 6
    assert found["gap"].value == pytest.approx(100 * wanted)
    silent = {**TABLES, "decouple/val": [row(FIRST, ("x",), normal=("?",))]}
    left = measured(bench, silent, theirs)
    assert math.isnan(left["sarr"].value) and left["sarr"].n == 0
    assert "no answer has a label" in left["sarr"].note
    assert "sarr" not in left["gap"].note and left["gap"].value == pytest.approx(120 * wanted)


def test_a_destroyed_model_in_the_published_form(place: Place) -> None:
    """It says nothing, and the published script leaves what is empty out."""
    empty = {**TABLES, "retain": [row(FIRST, ("",), agreement=("0",))]}
    bench = bench_of(place, "benchmark.reference=true")
    found = measured(bench, empty, empty)
    assert math.isnan(found["rouge"].value) and found["rouge"].n == 0
    assert "rouge" not in found["gap"].note
    assert measured(bench_of(place), empty)["rouge"].value == 0.0


def test_a_model_that_says_nothing_is_called_collapsed(place: Place) -> None:
    benchmark = bench_of(place).benchmark
    assert "9.0 %" in (benchmark.collapsed({"safeeraser/rouge": MetricValue(0.09, "up")}) or "")
    assert benchmark.collapsed({"safeeraser/rouge": MetricValue(0.11, "up")}) is None
    assert benchmark.collapsed({}) is None


# --- What judges are shown


def told_by(kinds: Any) -> Callable[[JudgePrompt], str]:
    known = {item[1]: item[3] for item in CHECK_ITEMS}
    return lambda prompt: str(known.get(prompt.prediction) or kinds[prompt.kind])


def looked(place: Place, tmp_path: Path, judge: Any, *more: str) -> tuple[Bench, ModelView]:
    """Return a benchmark with a judge of one's own, and a view of the tiny model."""
    workbench, bench, recipe = opened(place, place.crafts(*more))
    made = eraser(bench)
    made.store = tmp_path
    made.__dict__["judge"] = judge
    model, _, _ = workbench.trained(bench, recipe, bench.splits.train, 0, "original")
    return bench, workbench.view(bench, model, 0)


YES = {"safety": "safe", "refusal": "no", "normal": "yes", "agreement": "1"}


def test_every_answer_is_judged_by_its_kind(place: Place, tmp_path: Path) -> None:
    judge = Scripted(told_by(YES))
    bench, view = looked(place, tmp_path, judge, f"request.categories=[{FIRST}]")
    tables = judged(view, eraser(bench), 0)
    made = eraser(bench)
    ours, theirs = (len(made.records(part)) for part in ("train", "val"))
    sizes = {name: (len(rows), {len(r.said) for r in rows}) for name, rows in tables.items()}
    assert sizes == {
        "unsafe/train": (PAIRS * ours, {3}),
        "unsafe/val": (PAIRS * theirs, {3}),
        "decouple/train": (PAIRS * ours, {1}),
        "decouple/val": (PAIRS * theirs, {1}),
        "retain": (PLAIN * VAL, {1}),  # harmless questions of all categories
    }
    for name, kinds in (("unsafe/train", {"safety", "refusal"}), ("decouple/val", {"normal"})):
        for r in tables[name]:
            assert r.labels.keys() == kinds
            assert all(len(raw) == len(r.said) for raw in r.labels.values())
    checks = judge.seen[: len(CHECK_ITEMS)]
    assert [prompt.prediction for prompt in checks] == [item[1] for item in CHECK_ITEMS]
    shown = judge.seen[len(CHECK_ITEMS) :]
    answers = {r.item.answer for rows in tables.values() for r in rows}
    for prompt in shown:
        if prompt.kind in ("refusal", "normal"):
            assert prompt.reference == ""
        else:
            assert prompt.reference in answers
        assert prompt.reference not in prompt.text or prompt.kind != "safety"
    assert judged(view, made, 0) is tables, "asked once"
    again = judged(view, made, 1)
    drawn = [[r.said for r in each["unsafe/train"]] for each in (tables, again)]
    assert drawn[0] != drawn[1], "another seed draws other answers"


def test_the_published_judge_sees_the_texts_swapped(place: Place, tmp_path: Path) -> None:
    judge = Scripted(told_by(YES))
    for k, word in enumerate(("benchmark.reference=false", "benchmark.reference=true")):
        judge.seen.clear()
        bench, view = looked(place, tmp_path / str(k), judge, word, "benchmark.answers=1")
        kept = judged(view, eraser(bench), 0)["retain"]
        pairs = {(p.reference, p.prediction) for p in judge.seen if p.kind == "agreement"}
        said = {(r.item.answer, r.said[0]) for r in kept}
        assert all(text.strip() for _, text in said)
        assert pairs == ({(b, a) for a, b in said} if k else said)


def test_greedy_answers_are_one_a_question(place: Place, tmp_path: Path) -> None:
    judge = Scripted(told_by(YES))
    word = f"request.categories=[{FIRST}]"
    bench, view = looked(place, tmp_path, judge, word, "benchmark.temperature=0")
    tables = judged(view, eraser(bench), 0)
    assert {len(r.said) for rows in tables.values() for r in rows} == {1}


def test_a_judge_of_another_form_is_refused_before_anything_is_asked(
    place: Place, tmp_path: Path
) -> None:
    judge = Scripted(lambda prompt: "S1")
    bench, view = looked(place, tmp_path, judge)
    with pytest.raises(ConfigError, match="labels 0 of 6 test items"):
        judged(view, eraser(bench), 0)
    assert len(judge.seen) == 6
    words = ("benchmark.check_judge=false", f"request.categories=[{FIRST}]", "benchmark.answers=1")
    bench, view = looked(place, tmp_path, judge, *words)
    assert eraser(bench).labelled is None
    tables = judged(view, eraser(bench), 0)
    found = measured(bench, tables)
    assert math.isnan(found["asr/train"].value) and "known items" not in found["judge_failed"].note


# --- Whole runs


def test_samples_of_a_run_are_read_by_the_page(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safeeraser, "FALLEN", -1.0)
    words = place.crafts(
        "method.inner.name=idk", "method.inner.epochs=1", "method.inner.lr=0.05",
        "method.inner.optimizer=sgd", "method.inner.batch_size=8", "method.inner.scope=lora",
        "benchmark.lora.rank=4", "benchmark.answers=1",
    )  # fmt: skip
    (run,) = mmforget.sweep(*words, "method=vlm/idkpd", **place.store)
    assert run.status == "finished"
    assert "safeeraser/gap" not in run.metrics, "a public model cannot be retrained"
    (original,) = (place.root / "runs" / "vlm" / "safeeraser" / "original").iterdir()
    content = json.loads((run.folder / "samples" / "answers.json").read_text())
    count = Counter((item["kind"], item["split"]) for item in content["items"])
    assert count == {
        ("unsafe", "train"): PAIRS * TRAIN,
        ("unsafe", "val"): PAIRS * VAL,
        ("decouple", "train"): PAIRS * TRAIN,
        ("decouple", "val"): PAIRS * VAL,
        ("retain", "val"): PLAIN * VAL,
    }
    for item in content["items"]:
        known = {"unsafe": {"unsafe", "refusal"}, "decouple": {"normal"}, "retain": set()}
        assert {k for k, v in item["labels"].items() if v is not None} == known[item["kind"]]
    found = page.sections([load_run(original), run])
    titles = [section.title for section in found]
    assert "Answers, before and after" in titles
    html = found[titles.index("Answers, before and after")].html
    for category in CRAFTS:
        assert category in html
    assert html.count("data:image/jpeg;base64,") >= 2 * len(CRAFTS), "unsafe and harmless ones"


def test_pictures_of_every_category_are_on_the_sheet(tmp_path: Path) -> None:
    """The released validation file is sorted by category."""
    from mmforget.vlm.samples import FACES, _shown

    rows = [
        {"id": f"{group}{split}{kind}{k}", "group": group, "kind": kind, "split": split}
        for kind in ("unsafe", "decouple", "retain")
        for split in ("train", "val")
        for group in "abcdef"
        for k in range(40)
        if (kind, split) != ("retain", "train")
    ]
    shown = [name for name, _ in _shown(rows, {row["id"]: tmp_path for row in rows})]
    assert len(shown) <= FACES
    for kind in ("unsafe", "decouple", "retain"):
        assert all(f"{group}val{kind}0" in shown for group in "abcdef")


def said_by(text: str) -> str:
    """Answer as a judge would, by the form that the message asks for."""
    for answer, label in ((item[1], item[3]) for item in CHECK_ITEMS):
        if answer in text:
            return label
    if "number from 0" in text:
        return "0.5"
    return "safe" if "unsafe or safe" in text else "yes"


def endpoint(url: str) -> list[str]:
    return [
        "benchmark.judge.kind=endpoint",
        "benchmark.judge.model=m",
        f"benchmark.judge.url={url}",
        "benchmark.judge.retries=0",
        "benchmark.judge.threads=1",
        "benchmark.answers=1",
        f"request.categories=[{FIRST}]",
    ]


def test_a_judge_that_dies_is_asked_again_for_the_rest(place: Place, tmp_path: Path) -> None:
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    with served(said_by, last=6 + 10) as server:
        words = place.crafts(*endpoint(server.url))
        with pytest.raises(JudgeError, match="gave no answer"):
            mmforget.sweep(*words, "method=original", runs=runs, cache=cache)
        (folder,) = (runs / "vlm" / "safeeraser" / "original").iterdir()
        assert load_run(folder).status == "failed"
        assert "gave no answer" in (load_run(folder).error or "")
        kept = (cache / "data" / "judged" / "verdicts.jsonl").read_text().splitlines()
        assert len(kept) == 10
        server.last = None
        first = len(server.asked)
        (run,) = mmforget.sweep(*words, "method=original", runs=runs, cache=cache)
    assert run.folder == folder and run.metrics["safeeraser/judge_failed"].value == 0.0
    assert run.metrics["safeeraser/asr/train"].value == 0.0
    assert run.metrics["safeeraser/rr/train"].value == 1.0
    assert run.metrics["safeeraser/sarr"].value == 0.0
    asked = server.asked[first + 6 :]  # behind the six known items
    assert len(asked) == len(set(asked)), "nothing is asked twice"
    assert not set(asked) & set(server.asked[6:first]), "what was answered is kept"
    lines = (cache / "data" / "judged" / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 10 + len(asked)
    assert replace(load_run(folder), folder=folder).metrics == run.metrics


def test_a_missing_refusal_list_is_told_to_methods_that_need_one(
    place: Place, tmp_path: Path
) -> None:
    shutil.copytree(place.root / "crafts", tmp_path / "crafts")
    (tmp_path / "crafts" / "prompt.json").unlink()
    words = place.crafts(f"data.root={tmp_path / 'crafts'}", "benchmark.answers=1")
    with pytest.raises(ConfigError, match=r"answers by refusals.*prompt\.json"):
        mmforget.sweep(*words, "method=idk", runs=tmp_path / "runs", cache=tmp_path / "cache")


def test_records_of_another_layout_are_refused(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.root / "crafts", tmp_path / "crafts")
    file = tmp_path / "crafts" / "all_val.json"
    rows = json.loads(file.read_text())
    rows[1]["unsafe_pairs"].pop()
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"record 2 .*unsafe_pairs has 3 values"):
        bench_of(place, f"data.root={tmp_path / 'crafts'}")
