"""Samples of recommender runs, and the report sections made of them."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from mmforget.errors import CollapsedError
from mmforget.record import (
    Cost,
    MetricValue,
    RunResult,
    Seeds,
    load_arrays,
    save_arrays,
    to_json,
    write_text,
)
from mmforget.recsys import report
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.report import page
from mmforget.report.collect import collect
from mmforget.types import ModelView, Trial
from tests.recsys.world import make_world

# method: mean score of forgotten edges, test recall of the four groups, wall and preparation
WORLD: Mapping[str, tuple[float, tuple[float, ...], float, float]] = {
    "original": (3.2, (0.22, 0.19, 0.16, 0.14), 412.0, 0.0),
    "retrain": (1.4, (0.21, 0.19, 0.16, 0.14), 398.0, 0.0),
    "recsys/unlearnrec": (0.2, (0.19, 0.18, 0.155, 0.138), 0.21, 95.0),
    "recsys/sisa": (1.5, (0.15, 0.14, 0.12, 0.11), 61.0, 640.0),
    "recsys/gif": (2.6, (0.215, 0.186, 0.158, 0.139), 3.4, 0.0),
    "grad_ascent": (-30.0, (0.05, 0.06, 0.05, 0.07), 2.2, 0.0),
}
BOUNDS = ((1, 3), (4, 9), (10, 24), (25, 25))


def make_run(
    root: Path,
    method: str,
    seed: int = 0,
    *,
    samples: bool = True,
    groups: bool = True,
    status: str = "finished",
    cost: Cost | None = None,
) -> RunResult:
    level, recall, wall, prepare = WORLD[method]
    metrics: dict[str, MetricValue] = {}
    for n, (value, wanted, (low, high)) in enumerate(
        zip(recall, WORLD["retrain"][1], BOUNDS, strict=True), start=1
    ):
        note = f"users with {low} to {high} training pairs"
        for name, scale in (("recall", 1.0), ("ndcg", 0.6)) if groups else ():
            values = (scale * (value + 0.002 * seed), "up", scale * wanted)
            metrics[f"{name}@20/group{n}"] = MetricValue(*values, n=50, note=note)
    run = RunResult(
        id=f"recsys/absent/{method.rpartition('/')[2]}/ab12-s{seed}", status=status,
        benchmark="recsys/absent", modality="recsys", method=method, seeds=Seeds(unlearn=seed),
        mini=True, request={"kind": "edges", "ids_sha": "ab" * 32}, parents={}, metrics=metrics,
        attacks={}, cost=cost or Cost(wall, wall, 10**8, 100, prepare_s=prepare), environment={},
        config={"method": {"name": method}},
    )  # fmt: skip
    run = replace(run, folder=root / run.id)
    write_text(run.folder / "run.json", to_json(run))
    if samples:
        rng = np.random.default_rng([seed, len(method)])
        spread = abs(level) / 4 + 0.5
        kinds = {"forget": level, "retain": 3.2, "test": 1.3, "non_edges": 0.0}
        scores = {kind: report.thinned(rng.normal(m, spread, 3000)) for kind, m in kinds.items()}
        save_arrays(run.folder / "samples" / "scores.npz", {"scores": scores})
    return run


def _trial(model: torch.nn.Module, world: Any) -> Trial:
    view = ModelView(lambda: model, cast(Any, None), world.splits)
    unused = cast(Any, None)
    return Trial(view, view, None, world.splits, 0, Cost(), None, benchmark=unused, lab=unused)


def _titles(found: list[Any]) -> list[str]:
    return [section.title for section in found]


class _Balanced(HTMLParser):
    """Checks that tags close in order, and collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        names = ("src", "href", "xlink:href")
        self.loads += [value or "" for name, value in attrs if name in names]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_samples_hold_sorted_scores_of_the_pairs_they_name(tmp_path: Path) -> None:
    world = make_world(lambda graph: MatrixFactorisation(graph, dim=1))
    model = cast(MatrixFactorisation, world.build(0))
    with torch.no_grad():  # a pair's score is its key: it says which pair it is of
        model.users.copy_(torch.arange(world.graph.users)[:, None] + 1.0)
        model.items.copy_(torch.arange(world.graph.items)[:, None] / 1000 + 1.0)
    report.write(_trial(model, world), tmp_path)
    stored = load_arrays(tmp_path / "scores.npz")["scores"]
    assert set(stored) == {"forget", "retain", "test", "non_edges"}
    for name in ("forget", "test"):
        split: Any = world.splits.get(name)
        assert len(split) < 1000
        wanted = np.sort((split.user + 1.0) * (split.item / 1000 + 1.0))
        np.testing.assert_allclose(stored[name], wanted, rtol=1e-5)
    edges = (world.graph.user + 1.0) * (world.graph.item / 1000 + 1.0)
    keys = np.round(edges.numpy().astype(np.float64), 4)
    assert len(stored["non_edges"]) == 1000
    apart = ~np.isclose(stored["non_edges"][:, None], keys, rtol=1e-6).any(1)
    assert apart.mean() > 0.5  # products of other pairs may coincide
    assert (tmp_path / "scores.npz").stat().st_size < 20_000


def test_thinning_keeps_ends_and_quantiles() -> None:
    drawn = np.random.default_rng(0).exponential(size=12_345)
    kept = report.thinned(drawn)
    assert len(kept) == 1000 and (np.diff(kept) >= 0).all()
    assert kept[0] == np.float32(drawn.min()) and kept[-1] == np.float32(drawn.max())
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(kept, share) == pytest.approx(np.quantile(drawn, share), rel=2e-3)
    assert report.thinned(np.array([2.0, 1.0])).tolist() == [1.0, 2.0]
    assert len(report.thinned(np.zeros(0))) == 0


def test_samples_of_a_model_with_nan_are_refused(tmp_path: Path) -> None:
    world = make_world()
    model = world.build(0)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(CollapsedError, match="not finite"):
        report.write(_trial(model, world), tmp_path)


def test_above_counts_pairs_with_ties_by_half() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 9, 40).astype(float), rng.integers(0, 9, 55).astype(float)
    table = first[:, None] - second
    wanted = ((table > 0) + 0.5 * (table == 0)).mean()
    assert report.above(first, second) == pytest.approx(wanted)
    assert report.above(np.ones(3), np.zeros(2)) == 1.0


def test_all_sections_of_complete_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, method) for method in WORLD]
    found = report.sections(runs)
    assert _titles(found) == [
        "Scores of forgotten edges",
        "Who pays: ranking by activity of the user",
        "Time of a request against retraining",
    ]
    scores, groups, _ = found
    assert scores.html.count("<svg") == 6 and scores.html.count("<figure>") == 6
    # The original is what others are compared with: it is in every panel, and has none.
    assert groups.html.count("<svg") == 2 * 5
    for bounds in ("1\N{EN DASH}3", "10\N{EN DASH}24", ">25<"):
        assert bounds in groups.html
    assert all(section.note for section in found)
    for section in found:
        parser = _Balanced()
        parser.feed(section.html)
        assert not parser.open
        assert all(link.startswith("#") for link in parser.loads)
        for word in ("<script", "http:", "https:", "url(http", "@import"):
            assert word not in section.html.replace("http://www.w3.org", "")
        assert not re.search(r"#0[123]0[123][0-9a-f]{2}\b", section.html)  # stand-in colours
    ids = re.findall(r' id="([^"]+)"', "".join(section.html for section in found))
    assert len(ids) == len(set(ids))


def test_share_of_forgotten_edges_above_no_edge_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, "recsys/gif", samples=False)
    scores = {"forget": np.array([0.5, 2.5]), "non_edges": np.array([0.0, 1.0, 2.0, 3.0])}
    save_arrays(run.folder / "samples" / "scores.npz", {"scores": scores})
    (section, *_) = report.sections([run])
    assert "forgotten above non-edges: 50&nbsp;%" in section.html  # 1 + 3 of 8
    assert "retained edges" not in section.html  # the legend names what is drawn


def test_seeds_of_a_method_are_pooled(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "recsys/gif", seed) for seed in range(3)]
    runs += [make_run(tmp_path, "retrain")]
    scores, groups, times = report.sections(runs)
    assert scores.html.count("<figure>") == 2
    assert groups.html.count("<figure>") == 4
    assert times.html.count('class="line') == 2


def test_runs_without_data_are_left_out(tmp_path: Path) -> None:
    whole = make_run(tmp_path, "retrain")
    bare = make_run(tmp_path, "recsys/gif", samples=False, groups=False)
    broken = make_run(tmp_path, "recsys/sisa")
    (broken.folder / "samples" / "scores.npz").write_bytes(b"PK\x03\x04 cut short")
    empty = make_run(tmp_path, "recsys/unlearnrec")
    (empty.folder / "samples" / "scores.npz").write_bytes(b"")
    scores, groups, times = report.sections([whole, bare, broken, empty])
    assert scores.html.count("<figure>") == 1 and ">retrain" in scores.html
    assert groups.html.count("<figure>") == 2 * 3 and "gif" not in groups.html
    assert "gif" in times.html
    only = report.sections([bare])
    assert _titles(only) == ["Time of a request against retraining"]


def test_nan_groups_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, "recsys/gif")
    gone = MetricValue(math.nan, "up", n=0, note="not defined: no users between these quartiles")
    run = replace(run, metrics=run.metrics | {"recall@20/group2": gone})
    groups = next(s for s in report.sections([run]) if s.title.startswith("Who"))
    assert "group 2" in groups.html and "nan" not in groups.html.lower()


def test_no_finished_run_gives_no_section(tmp_path: Path) -> None:
    failed = make_run(tmp_path, "recsys/gif", status="failed")
    assert report.sections([failed]) == [] and report.sections([]) == []


def test_times_are_on_a_log_axis_and_preparation_is_apart(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "retrain", cost=Cost(100.0)),
        make_run(tmp_path, "recsys/unlearnrec", cost=Cost(1.0, prepare_s=1000.0)),
        make_run(tmp_path, "recsys/sisa", cost=Cost(200.0, prepare_s=10.0)),
    ]
    html = report.sections(runs)[-1].html
    lines = {
        part.split("</b>")[0].rpartition("<b>")[2]: part
        for part in html.split('<div class="line')[1:]
    }
    # The axis runs from 0.1 s, below the shortest, to 10 000 s: 5 decades.
    request = 'class="request" style="width:{:.2f}%'
    assert request.format(60) in lines["retrain"] and "prepare" not in lines["retrain"]
    assert request.format(20) in lines["unlearnrec"]
    assert 'class="prepare" style="width:80.00%' in lines["unlearnrec"]
    assert "100\N{MULTIPLICATION SIGN} faster" in lines["unlearnrec"]
    assert "pays off from 11 requests" in lines["unlearnrec"]  # 1000 / 99, rounded up
    assert "2.0\N{MULTIPLICATION SIGN} slower" in lines["sisa"] and "never pays" in lines["sisa"]
    assert 'class="rule whole" style="left:60.00%"' in html


def test_times_without_retraining_name_no_ratio(tmp_path: Path) -> None:
    html = report.sections([make_run(tmp_path, "recsys/unlearnrec")])[-1].html
    assert "faster" not in html and "pays off" not in html and "rule whole" not in html
    assert "210 ms" in html and "preparation" in html


def test_zero_times_give_no_time_section(tmp_path: Path) -> None:
    run = make_run(tmp_path, "recsys/gif", cost=Cost())
    assert "Time of a request against retraining" not in _titles(report.sections([run]))


def test_a_method_that_blows_up_does_not_set_the_axis(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, method) for method in ("original", "retrain", "grad_ascent")]
    shown = [(row, report._stored(row)) for row in collect(runs)[0].rows]
    low, high = report._limits(shown)
    pinned = np.concatenate([part for _, scores in shown[:2] for part in scores.values()])
    span = np.ptp(np.quantile(pinned, [0.002, 0.998]))
    assert shown[2][1]["forget"].min() < -30 and low > -30
    assert high - low < 2 * span


def test_equal_scores_have_an_axis(tmp_path: Path) -> None:
    run = make_run(tmp_path, "recsys/gif", samples=False)
    flat = {"forget": np.full(5, 1e6, np.float32), "non_edges": np.full(5, 1e6, np.float32)}
    save_arrays(run.folder / "samples" / "scores.npz", {"scores": flat})
    assert "forgotten above non-edges: 50&nbsp;%" in report.sections([run])[0].html


def test_names_are_escaped(tmp_path: Path) -> None:
    run = replace(make_run(tmp_path, "recsys/gif"), method="recsys/<b>&x")
    html = "".join(section.html for section in report.sections([run]))
    assert "<b>&x" not in html and "&lt;b&gt;&amp;x" in html


def test_sections_stand_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bench:
        headline = ("recall@20/group1",)
        distance = "recall@20/group1"
        sections = staticmethod(report.sections)

    monkeypatch.setattr(page, "benchmark_class", lambda name: Bench)
    runs = [make_run(tmp_path, method) for method in WORLD]
    page.write_report(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Scores of forgotten edges" in text and "Time of a request against retraining" in text
