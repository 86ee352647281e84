"""What the report shows of recommenders: scores of pairs, who pays for forgetting, and time."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from zipfile import BadZipFile

import numpy as np

from mmforget.record import RunResult, load_arrays, save_arrays
from mmforget.recsys.data import joined
from mmforget.recsys.metrics.groups import GROUPS
from mmforget.recsys.metrics.pairs import (
    interactions,
    non_edges,
    pairs_of,
    recommender,
    view_scores,
)
from mmforget.recsys.metrics.ranking import HEADLINE_K
from mmforget.recsys.ranking import Floats
from mmforget.report.collect import ORIGINAL, RETRAIN, Block, Number, Row, collect
from mmforget.report.numbers import fixed, seconds
from mmforget.report.section import Section
from mmforget.report.svg import FG, FORGET, HOLDOUT, LINE, MUTED, RETAIN, Picture, series
from mmforget.types import Trial

KEPT = 1000  # scores of a kind that are stored: spread evenly over their ranks
NON_EDGES = 100_000  # of which those are taken
BINS = 36
FILE = "scores.npz"
# kind: colour, its CSS variable, whether its area is filled, name
KINDS: dict[str, tuple[str, str, bool, str]] = {
    "non_edges": (series(5), "--c5", True, "non-edges"),
    "forget": (FORGET, "--forget", True, "forgotten edges"),
    "retain": (RETAIN, "--retain", False, "retained edges"),
    "test": (HOLDOUT, "--holdout", False, "unseen test pairs"),
}
STYLE = """<style>
.times{position:relative;max-width:46rem;padding-bottom:1.5rem}
.times .line{position:relative;margin-bottom:.8rem}
.times .said{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem;font-size:.88rem}
.times .said>*{background:var(--bg)}
.times .said>:last-child{color:var(--muted)}
.times .said b{font-weight:600}
.times i{display:block;min-width:2px;border-radius:2px}
.times .request{height:.65rem;background:var(--accent)}
.times .retrain .request{background:var(--fg)}
.times .prepare{height:.35rem;margin-top:2px;background:var(--off)}
.times .rule{position:absolute;top:0;bottom:1.3rem;width:0;border-left:1px solid var(--line)}
.times .rule.whole{border-left:1px dashed var(--muted)}
.times .rule span{position:absolute;top:100%;transform:translateX(-50%);color:var(--muted);
font-size:.75rem;white-space:nowrap}
.times .rule:first-child span{transform:none}
.times .rule.last span{transform:translateX(-100%)}
.grid figcaption small{display:block}
.swatch{display:inline-block;width:1.4rem;height:.5rem;margin-right:.4rem;border-radius:2px;
vertical-align:.08em}
</style>"""
SCORE_NOTE = (
    "Share of pairs at each score (inner product of the final vectors), on the same axis for all; "
    "what lies beyond it is counted in the outermost bars, a spike is cut, and seeds are pooled. "
    "Under each name: how often a forgotten edge scores above a random pair that is no training "
    "edge. 50 % is not the aim in itself: the retrained model never saw these edges and still "
    "scores them high where they fit its users' taste, and a value far below its own singles them "
    "out."
)
GROUP_NOTE = (
    "Users of the test set by how many training pairs they have, forgotten ones included, the "
    "least active on the left; the same groups for every model. Hollow: the original model; "
    "solid: this one; the bar across: the retrained one. A group far below its bar pays for what "
    "others asked to be forgotten."
)
TIME_NOTE = (
    "Wall time on a logarithmic axis: each rule is ten times the one before it, so compare the "
    "numbers, not the lengths. Preparation is made once for a model, before any request, and "
    "shared by all of them; it pays off only from the number of requests named beside it."
)


def write(trial: Trial, folder: Path) -> None:
    """Write `scores.npz`: scores of forgotten, retained and test pairs, and of pairs of no edge.

    Up to 1000 scores of each kind, sorted, float32, spread evenly over their ranks: enough for a
    histogram on any axis. Recall by user group is in the record (`recsys/groups`), the original's
    in the original's.

    Args:
        trial: The model under test and its splits.
        folder: Where to; made if needed.

    Raises:
        CollapsedError: A score is not finite.
    """
    splits = trial.splits
    train = interactions(splits.train)
    known, users = joined([train], train.items), recommender(trial.view).graph.users
    pairs = {name: pairs_of(splits.get(name)) for name in ("forget", "retain", "test")}
    pairs["non_edges"] = non_edges(known, users, NON_EDGES, trial.seed)
    scores = {name: thinned(view_scores(trial.view, part)) for name, part in pairs.items()}
    save_arrays(folder / FILE, {"scores": scores})


def thinned(scores: Floats) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return at most 1000 of the scores, sorted and spread evenly over their ranks, float32."""
    count = len(scores)
    ranks = np.linspace(0, max(count - 1, 0), min(count, KEPT)).round().astype(np.int64)
    return np.sort(scores)[ranks].astype(np.float32)


def sections(runs: Sequence[RunResult]) -> list[Section]:
    """Return the sections only recommenders have; a run without what one shows is left out of it.

    Args:
        runs: The records of one benchmark, or of several: these get sections of their own.
    """
    if not any(run.status == "finished" for run in runs):
        return []
    found = []
    for block in collect(runs):
        ids = "\n".join(run.id for run in block.runs)
        name = f"rec-{hashlib.sha256(ids.encode()).hexdigest()[:8]}"  # a page shows several blocks
        made = (_scores(block, name), _groups(block, name), _times(block))
        found += [section for section in made if section is not None]
    return found


def _scores(block: Block, name: str) -> Section | None:
    """Draw the scores of each row's pairs, one panel a row, on a shared axis."""
    stored = [(row, _stored(row)) for row in block.rows]
    shown = [(row, scores) for row, scores in stored if scores]
    if not shown:
        return None
    edges = np.linspace(*_limits(shown), BINS + 1)
    shares = [
        {
            kind: np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] / len(part)
            for kind, part in scores.items()
        }
        for _, scores in shown
    ]
    # The outermost bars hold all that lies beyond the axis: they may be cut.
    peaks = [max(float(part[1:-1].max()) for part in parts.values()) for parts in shares]
    top = min(max(peaks), 2.5 * float(np.median(peaks))) or 1.0
    figures = []
    for i, ((row, scores), parts) in enumerate(zip(shown, shares, strict=True)):
        picture = Picture(215, 130, left=6)
        axes = picture.axes
        for kind, (color, _, filled, _) in KINDS.items():
            if kind not in parts:
                continue
            if filled:
                axes.stairs(parts[kind], edges, color=color, fill=True, alpha=0.28)
            dash = "-" if filled or kind == "test" else (0, (2.5, 1.5))
            axes.stairs(parts[kind], edges, color=color, linewidth=1.1, linestyle=dash)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, top * 1.05)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("score")
        drawn = picture.svg(f"{name}-score-{i}", f"Scores of {row.label}")
        said = ""
        if "forget" in scores and "non_edges" in scores:
            share = 100 * above(scores["forget"], scores["non_edges"])
            said = f"<small>forgotten above non-edges: {fixed(share, 0)}&nbsp;%</small>"
        caption = f"<figcaption>{escape(row.label)}{said}</figcaption>"
        figures.append(f"<figure>{caption}{drawn}</figure>")
    legend = "".join(
        f'<li><b class="dot" style="background:var({variable})"></b>{said}</li>'
        for kind, (_, variable, _, said) in KINDS.items()
        if any(kind in scores for _, scores in shown)
    )
    grid = f'<div class="grid small">{"".join(figures)}</div>'
    html = f'{STYLE}<ul class="legend">{legend}</ul>{grid}'
    return Section("Scores of forgotten edges", html, SCORE_NOTE)


def above(first: Floats, second: Floats) -> float:
    """Return how often a value of `first` exceeds one of `second`, in [0, 1]; ties count half."""
    order = np.sort(second)
    lower = np.searchsorted(order, first, side="left")
    upper = np.searchsorted(order, first, side="right")
    return float((lower + upper).mean() / (2 * len(order)))


def _stored(row: Row) -> dict[str, Floats]:
    """Return a row's stored scores by kind, its seeds pooled; kinds without any left out."""
    pooled: dict[str, list[Floats]] = {}
    for run in row.counted:
        try:
            found = load_arrays(run.folder / "samples" / FILE)["scores"]
        except (OSError, EOFError, KeyError, ValueError, BadZipFile):
            continue
        for kind in found.keys() & KINDS.keys():
            part = np.asarray(found[kind], np.float64)
            pooled.setdefault(kind, []).append(part[np.isfinite(part)])
    scores = {kind: np.concatenate(parts) for kind, parts in pooled.items()}
    return {kind: part for kind, part in scores.items() if len(part)}


def _limits(shown: Sequence[tuple[Row, Mapping[str, Floats]]]) -> tuple[float, float]:
    """Return the ends of the axis: what most rows need, set by the pinned ones.

    A method that blows scores up would otherwise squeeze all others into one bar.
    """
    ends = [
        np.quantile(np.concatenate(list(scores.values())), [0.002, 0.998]) for _, scores in shown
    ]
    pinned = [end for (row, _), end in zip(shown, ends, strict=True) if row.kind != "method"]
    low, high = np.median(pinned or ends, axis=0)
    reach = 0.4 * float(high - low)
    low = max(min(float(end[0]) for end in ends), low - reach)
    high = min(max(float(end[1]) for end in ends), high + reach)
    margin = max(0.02 * (high - low), 1e-6 * max(abs(low), abs(high)), 1e-6)
    return float(low - margin), float(high + margin)


def _groups(block: Block, name: str) -> Section | None:
    """Draw recall and NDCG by user group: before, after, and of the retrained model."""
    parts = []
    for measure, title in (("recall", "Recall"), ("ndcg", "NDCG")):
        names = [f"{measure}@{HEADLINE_K}/group{n + 1}" for n in range(GROUPS)]
        shown = [row for row in block.rows if row.kind != ORIGINAL and any(map(_known(row), names))]
        if not shown:
            continue
        before, target = block.row(ORIGINAL), block.row(RETRAIN)
        every = [n.value for row in (before, target, *shown) for n in _numbers(row, names).values()]
        top = max(every) * 1.12 or 1.0
        figures = "".join(
            _group_figure(row, names, block, top, f"{name}-{measure}-{i}", f"{title}@{HEADLINE_K}")
            for i, row in enumerate(shown)
        )
        heading = f"<p><b>{title}@{HEADLINE_K}</b></p>"
        parts.append(f'{heading}<div class="grid small">{figures}</div>')
    if not parts:
        return None
    return Section("Who pays: ranking by activity of the user", "".join(parts), GROUP_NOTE)


def _group_figure(
    row: Row, names: Sequence[str], block: Block, top: float, name: str, title: str
) -> str:
    """Return one row's panel: a dumbbell from before to after for each group."""
    own = _numbers(row, names)
    before = _numbers(block.row(ORIGINAL), names)
    target = _numbers(block.row(RETRAIN), names)
    picture = Picture(215, 140, left=34)
    axes = picture.axes
    color = FG if row.kind == RETRAIN else FORGET
    for place, key in enumerate(names):
        wanted = target[key].value if key in target else None
        if wanted is None and key in own:
            wanted = own[key].reference
        if wanted is not None and row.kind != RETRAIN:
            axes.plot([place - 0.3, place + 0.3], [wanted, wanted], color=FG, linewidth=1.6)
        if key in before and key in own:
            ends = [before[key].value, own[key].value]
            axes.plot([place, place], ends, color=MUTED, linewidth=1.0, zorder=1)
        if key in before:
            axes.plot([place], [before[key].value], "o", ms=5, mfc="none", mec=MUTED, zorder=2)
        if key in own:
            axes.plot([place], [own[key].value], "o", ms=5.5, mfc=color, mec=color, zorder=3)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, top)
    axes.set_xticks(range(len(names)), [_bounds(own.get(key), n) for n, key in enumerate(names)])
    axes.tick_params(axis="x", length=0)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("training pairs of the user")
    drawn = picture.svg(name, f"{title} by user group of {row.label}")
    return f"<figure><figcaption>{escape(row.label)}</figcaption>{drawn}</figure>"


def _known(row: Row) -> Callable[[str], bool]:
    return lambda name: name in row.numbers and math.isfinite(row.numbers[name].value)


def _numbers(row: Row, names: Iterable[str]) -> dict[str, Number]:
    """Return a row's numbers of these names that are defined."""
    return {name: row.numbers[name] for name in names if _known(row)(name)}


def _bounds(number: Number | None, place: int) -> str:
    """Return a group's numbers of training pairs, read off its note, or its own number."""
    found = re.search(r"(\d+) to (\d+) training pairs", number.note) if number else None
    if found is None:
        return f"group {place + 1}"
    low, high = found.groups()
    return low if low == high else f"{low}\N{EN DASH}{high}"


def _times(block: Block) -> Section | None:
    """Draw the time of a request and of its preparation beside that of retraining."""
    spent = {
        row.label: (
            row,
            fmean(run.cost.wall_s for run in row.counted),
            fmean(run.cost.prepare_s for run in row.counted),
        )
        for row in block.rows
        if row.kind != ORIGINAL and row.finished
    }
    retraining = _retraining(block)
    positive = [value for _, *pair in spent.values() for value in pair if value > 0]
    if not positive or all(row.kind == RETRAIN for row, _, _ in spent.values()):
        return None
    ends = [*positive, *([retraining] if retraining else [])]
    first = math.floor(math.log10(min(ends)) - 1e-9)
    last = max(math.ceil(math.log10(max(ends)) + 1e-9), first + 1)

    def across(value: float) -> float:
        return 100 * (math.log10(value) - first) / (last - first) if value > 0 else 0.0

    step = math.ceil((last - first) / 6)
    rules = "".join(
        f'<div class="rule{" last" if k == last else ""}" style="left:{across(10.0**k):.2f}%">'
        f"<span>{_tick(k)}</span></div>"
        for k in range(first, last + 1)
        if (k - first) % step == 0
    )
    if retraining:
        rules += f'<div class="rule whole" style="left:{across(retraining):.2f}%"></div>'
    lines = "".join(
        _time_line(row, wall, prepare, retraining, across)
        for row, wall, prepare in sorted(spent.values(), key=lambda part: -part[1])
    )
    legend = (
        '<li><b class="swatch" style="background:var(--fg)"></b>retraining</li>'
        '<li><b class="swatch" style="background:var(--accent)"></b>the request</li>'
    )
    if any(prepare > 0 for _, _, prepare in spent.values()):
        legend += '<li><b class="swatch" style="background:var(--off)"></b>preparation</li>'
    html = f'{STYLE}<ul class="legend">{legend}</ul><div class="times">{rules}{lines}</div>'
    return Section("Time of a request against retraining", html, TIME_NOTE)


def _time_line(
    row: Row,
    wall: float,
    prepare: float,
    retraining: float | None,
    across: Callable[[float], float],
) -> str:
    """Return one row: its name, its times in words, and its bars."""
    said = [_duration(wall)]
    if retraining and wall > 0 and row.kind != RETRAIN:
        ratio = retraining / wall
        word = "faster" if ratio >= 1 else "slower"
        ratio = max(ratio, 1 / ratio)
        places = 1 if ratio < 100 else 0
        said.append(f"{fixed(ratio, places)}\N{MULTIPLICATION SIGN} {word}")
    bars = f'<i class="request" style="width:{across(wall):.2f}%"></i>'
    if prepare > 0:
        said.append(f"preparation {_duration(prepare)}{_worth(prepare, wall, retraining)}")
        bars += f'<i class="prepare" style="width:{across(prepare):.2f}%"></i>'
    words = "; ".join(said)
    return (
        f'<div class="line {row.kind}"><div class="said"><b>{escape(row.label)}</b>'
        f"<span>{words}</span></div>{bars}</div>"
    )


def _worth(prepare: float, wall: float, retraining: float | None) -> str:
    """Return from how many requests on the preparation is cheaper than retraining for each."""
    if not retraining:
        return ""
    if wall >= retraining:
        return ", never pays off"
    count = math.ceil(prepare / (retraining - wall))
    return f", pays off from {count:,} request{'s' if count > 1 else ''}"


def _retraining(block: Block) -> float | None:
    """Return what retraining took, by its own run or as other records remember it."""
    row = block.row(RETRAIN)
    if row.finished:
        return fmean(run.cost.wall_s for run in row.counted) or None
    known = row.numbers.get("cost/wall_s")
    return known.value if known and known.value > 0 else None


def _tick(exponent: int) -> str:
    """Return 10^k seconds in words."""
    return f"{10.0**exponent:g} s" if exponent < 5 else f"10^{exponent} s"


def _duration(value: float) -> str:
    """Return a duration, also one far below a second."""
    return seconds(value) if value >= 0.95 else f"{1000 * value:.3g} ms"
