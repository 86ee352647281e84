import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmforget.errors import DataError
from mmforget.record import MetricValue, RunResult
from mmforget.registry import BENCHMARKS
from mmforget.report import Section, headline_rows, text_table, write_report
from mmforget.report.collect import collect
from mmforget.report.exports import escape_latex, to_csv, to_latex, to_records
from mmforget.report.numbers import decimals, fixed, memory, seconds
from mmforget.report.verdict import verdict
from tests.core.report_fixtures import METHODS, make_run, make_runs


class Cited:
    """What the report asks of a benchmark's class."""

    headline = ("accuracy/test", "mia/loss/auc", "never/measured")
    distance = "forgetting/score"

    @classmethod
    def sections(cls, runs: list[RunResult]) -> list[Section]:
        return [Section("Samples", f"<p>{len(runs)} runs</p>", "look & see")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, path)
    return path.read_text()


def test_rows_are_pinned_then_ranked_then_unfinished(runs: list[RunResult]) -> None:
    rows = headline_rows(list(reversed(runs)))
    labels = [row.label for row in rows]
    assert labels[:2] == ["original", "retrain"]
    assert set(labels[-2:]) == {"fisher", "grad_ascent"}
    ranked = [row.distance.value for row in rows[2:-2] if row.distance is not None]
    assert len(ranked) == 6 and ranked == sorted(ranked)
    assert rows[1].distance is not None and rows[1].distance.value == 0
    assert rows[-1].distance is None, "a collapsed model must not look close"


def test_seeds_become_mean_and_standard_deviation(runs: list[RunResult]) -> None:
    npo = next(row for row in headline_rows(runs) if row.label == "npo")
    a, b = (run.metrics["accuracy/forget"].value for run in npo.runs)
    number = npo.numbers["accuracy/forget"]
    assert number.value == pytest.approx((a + b) / 2)
    assert number.std == pytest.approx(abs(a - b) / math.sqrt(2))
    assert number.n == 2 and number.low is None, "an interval of one run is not that of two"


def test_distance_without_a_benchmark_is_the_mean_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path, "npo")
    metrics = {
        "accuracy/forget": MetricValue(0.6, "to_reference", 0.5),
        "accuracy/test": MetricValue(0.4, "up", 0.7),
        "cost/speedup": MetricValue(50.0, "up", 1.0),
    }
    row = headline_rows([replace(run, metrics=metrics, attacks={})])[-1]
    assert row.distance is not None and row.distance.value == pytest.approx(0.2)


def test_benchmark_names_headline_distance_and_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BENCHMARKS._targets, "test/cited", Cited)  # type: ignore[arg-type]
    runs = [make_run(tmp_path, m, benchmark="test/cited", files=False) for m in METHODS]
    block = collect(runs)[0]
    assert block.headline == ("accuracy/test", "mia/loss/auc")
    assert block.distance_name == "forgetting/score"
    scores = [
        row.distance.value for row in block.methods if row.distance is not None and row.finished
    ]
    assert scores == sorted(scores)
    write_report(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert f"<p>{len(runs)} runs</p>" in text and "look &amp; see" in text
    assert "not installed here" not in text


def test_unknown_benchmark_falls_back_and_says_so(page: str) -> None:
    assert "The benchmark test/absent is not installed here" in page


def test_page_holds_every_part(page: str, runs: list[RunResult]) -> None:
    for title in (
        "Closest to the retrained model",
        "Forgetting, utility, privacy",
        "Relearning",
        "Losses, example by example",
        "Membership signals",
        "Cost",
        "Attacks",
        "All metrics",
        "How to read this page",
    ):
        assert title in page
    assert page.count('aria-label="ROC curves of') == 3
    assert page.count('aria-label="Losses of') == 9, "original, retrain, 6 methods and a collapsed"
    assert page.count('class="spark"') == sum(
        (run.folder / "events.jsonl").is_file() for run in runs
    )
    assert "out of memory. Lower method.batch_size" in page
    assert "test accuracy 0.21 is what a constant prediction reaches" in page


def test_page_needs_no_network(page: str) -> None:
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    for link in links:
        assert link.startswith("#") or link in ("report.csv", "report.tex", "report.json")
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_and_every_target_exists(page: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets <= set(ids)


def test_pictures_take_the_colours_of_the_page(page: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--fg)" in pictures and "var(--c0)" in pictures
    assert not re.findall(r"(?:fill|stroke|color): *#[0-9a-f]{3,6}", pictures)


def test_the_same_runs_give_the_same_page(runs: list[RunResult], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(runs[:3], tmp_path / name / "page.html")
    assert (tmp_path / "a/page.html").read_bytes() == (tmp_path / "b/page.html").read_bytes()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"' $x$ [b]"
    run = replace(
        make_run(tmp_path, "npo", benchmark="test/x"),
        method=hostile,
        benchmark=hostile,
        notes=[hostile],
        request={"kind": hostile, "onload": hostile, "sizes": {hostile: 3}},
        config={"method": {hostile: hostile}},
        error=hostile,
    )
    metrics = {**run.metrics, hostile: replace(run.metrics["accuracy/test"], note=hostile)}
    run = replace(run, metrics=metrics, attacks={hostile: run.attacks["mia"]})
    paths = write_report([run], tmp_path / "page.html", title=hostile)
    parsed = Tags()
    parsed.feed(paths[0].read_text())
    assert parsed.seen.count("script") == 1, "the page's own"
    assert "[b]" in text_table([run], 300)
    tex = paths[2].read_text()
    assert r"\$x\$" in tex and "$x$" not in tex.replace(r"\$x\$", "")


def test_csv_round_trip(runs: list[RunResult]) -> None:
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(to_csv(collect(runs))))}
    assert set(rows) == {run.id for run in runs}
    for run in runs:
        row = rows[run.id]
        assert row["status"] == run.status and row["mini"] == "True"
        for name, value in run.metrics.items():
            assert float(row[name]) == value.value
            assert row[f"{name}:reference"] == (
                "" if value.reference is None else str(value.reference)
            )
        for name, value in run.attacks["mia"].values.items() if run.attacks else ():
            assert float(row[f"mia/{name}"]) == pytest.approx(value.value, nan_ok=True)


def test_json_and_latex_hold_every_run(runs: list[RunResult]) -> None:
    blocks = collect(runs)
    listed = json.loads(to_records(blocks))
    assert {item["id"] for item in listed} == {run.id for run in runs}
    assert all("config" not in item and item["mini"] for item in listed)
    text = to_latex(blocks)
    assert text.count(r"\toprule") == 1 and "Mini" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    heads = text.splitlines()[text.splitlines().index(r"\toprule") + 1]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 10 and {line.count("&") for line in lines} == {heads.count("&")}


def test_files_are_named_after_the_page_and_nothing_else_is_left(
    runs: list[RunResult], tmp_path: Path
) -> None:
    paths = write_report(runs[:1], tmp_path / "sub" / "a.b.html")
    assert [path.name for path in paths] == ["a.b.html", "a.b.csv", "a.b.tex", "a.b.json"]
    assert sorted((tmp_path / "sub").iterdir()) == sorted(paths)


def test_mini_is_marked_everywhere_and_real_runs_never(tmp_path: Path) -> None:
    mini, real = (make_run(tmp_path, "npo", seed=m, mini=bool(m)) for m in (1, 0))
    blocks = collect([mini, real])
    assert [block.mini for block in blocks] == [True, False], "never in one table"
    write_report([real], tmp_path / "real.html")
    text = (tmp_path / "real.html").read_text()
    assert 'class="badge mini"' not in text and "generated data" not in text
    write_report([mini], tmp_path / "mini.html")
    text = (tmp_path / "mini.html").read_text()
    for heading in re.findall(r"<h3>(.*?)</h3>", text, flags=re.DOTALL):
        assert 'class="badge mini"' in heading or heading.startswith("Runs:")


def test_without_a_retrained_model_nothing_is_ranked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, m, reference=False) for m in ("original", "npo", "scrub")]
    block = collect(runs)[0]
    assert [row.distance for row in block.rows] == [None] * 4
    assert block.row("retrain").status == "missing"
    words = " ".join(verdict(block))
    assert "no retrained model" in words and "closest" not in words
    write_report(runs, tmp_path / "page.html")
    assert "no retrained model was made" in (tmp_path / "page.html").read_text()


def test_retrained_row_comes_from_references_or_from_the_disk(tmp_path: Path) -> None:
    npo = make_run(tmp_path, "npo")
    row = collect([npo])[0].row("retrain")
    assert row.runs == () and row.numbers["accuracy/forget"].value == 0.48
    retrain = make_run(tmp_path, "retrain")
    found = collect([replace(npo, parents={"retrained": retrain.id})])[0].row("retrain")
    assert [run.id for run in found.runs] == [retrain.id]


def test_noise_floor_needs_a_second_retrained_model(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, m) for m in ("original", "retrain", "npo", "scrub")]
    assert "noise floor is not known" in " ".join(verdict(collect(runs)[0]))
    second = make_run(tmp_path, "retrain", option=0.2, shift=0.3)
    block = collect([*runs, second])[0]
    assert block.noise is not None and block.noise >= 0.3 / 6
    assert "within this noise floor" in " ".join(verdict(block))


def test_verdict_names_the_closest_and_does_not_overclaim(runs: list[RunResult]) -> None:
    block = collect(runs)[0]
    sentences = verdict(block)
    assert sentences[0].startswith(f"{block.methods[0].label} is the closest of 6 methods")
    words = " ".join(sentences)
    assert "their order may be chance" in words
    assert "failed: fisher; collapsed: grad_ascent" in words
    assert "must not be set beside published ones" in words


def test_verdict_says_when_doing_nothing_is_as_close(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, m) for m in ("original", "retrain")]
    runs.append(make_run(tmp_path, "npo", shift=3.0))
    assert "no closer than doing nothing" in " ".join(verdict(collect(runs)[0]))


def test_configs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "npo", option=option) for option in (0.1, 0.2)]
    assert {row.label for row in collect(runs)[0].methods} == {"npo lr=0.1", "npo lr=0.2"}


def test_one_run_is_enough_and_none_is_an_error(tmp_path: Path) -> None:
    write_report([make_run(tmp_path, "npo", files=False)], tmp_path / "page.html")
    with pytest.raises(DataError, match="no run was given"):
        write_report([], tmp_path / "none.html")
    failed = make_run(tmp_path, "scrub", status="failed", error="disk")
    with pytest.raises(DataError, match="scrub: failed"):
        write_report([failed], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_broken_files_beside_a_record_cost_one_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path, "npo")
    (run.folder / "predictions.npz").write_bytes(b"PK\x03\x04 cut short")
    with (run.folder / "events.jsonl").open("a") as events:
        events.write('{"step": 41, "lo')
    write_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Stored predictions cannot be read: npo" in text
    assert "at 40." in text


def test_undefined_numbers_are_a_dash(tmp_path: Path) -> None:
    run = make_run(tmp_path, "npo")
    metrics = {**run.metrics, "accuracy/test": MetricValue(math.nan, "up", 0.5)}
    row = headline_rows([replace(run, metrics=metrics)])[-1]
    assert math.isnan(row.numbers["accuracy/test"].value) and row.numbers["accuracy/test"].n == 0
    write_report([replace(run, metrics=metrics)], tmp_path / "page.html")
    assert ">nan" not in (tmp_path / "page.html").read_text()


def test_text_table_fits_and_holds_every_row(runs: list[RunResult]) -> None:
    text = text_table(runs, 120)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "mini" in text.splitlines()[0]
    for label in ("original", "retrain", "npo", "fisher [failed]", "grad_ascent"):
        assert label in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("values", "expected"), [([1234.5, 2], 0), ([99.9], 2), ([0.5, None, math.nan], 3), ([1e-4], 5)]
)
def test_decimals_follow_the_largest(values: list[float | None], expected: int) -> None:
    assert decimals(values) == expected


def test_numbers_as_text() -> None:
    assert fixed(-0.25, 2) == "\N{MINUS SIGN}0.25"
    assert fixed(0.25, 1, sign=True) == "+0.2"
    assert fixed(math.nan, 3) == fixed(None, 3) == "\N{EN DASH}"
    assert fixed(12345.0, 0) == "12\N{THIN SPACE}345"
    assert [seconds(s) for s in (0.84, 12.2, 200, 7500)] == [
        "0.8 s",
        "12 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert memory(3 * 2**30) == "3.0 GiB"
    assert escape_latex("a_b & 5%") == r"a\_b \& 5\%"
