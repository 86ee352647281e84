"""The pictures of a block: trade-off, loss histograms, ROC and relearning curves, loss of a run."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mmforget.record import RunResult
from mmforget.report.collect import ORIGINAL, RETRAIN, Block, Number, Row
from mmforget.report.numbers import column_label
from mmforget.report.svg import (
    FG,
    FORGET,
    HOLDOUT,
    LINE,
    MUTED,
    RETAIN,
    Picture,
    dashes,
    series,
    shade,
)
from mmforget.report.verdict import forget_name, utility_name

Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]

LEAK_LIMITS = (0.02, 0.05, 0.10)  # distances of AUC at which the colour of a point changes
_LOSS_RANGE = (1e-6, 1e2)
_SPLITS = (("retain", RETAIN), ("holdout", HOLDOUT), ("forget", FORGET))


@dataclass(frozen=True)
class Panel:
    """One picture, its caption, and what a reader must know."""

    title: str
    svg: Markup
    note: str = ""


def tradeoff(block: Block, name: str) -> Panel | None:
    """Draw forgetting against utility, coloured by what membership inference still finds."""
    forget, utility = forget_name(block), utility_name(block)
    if forget is None or utility is None:
        return None
    relative = any(
        row.numbers[forget].delta is not None for row in block.rows if forget in row.numbers
    )
    points = []
    for row in block.rows:
        x, y = row.numbers.get(forget), row.numbers.get(utility)
        if x is None or y is None or not (row.finished or row.status == "missing"):
            continue
        across = x.delta if relative else x.value
        if across is not None and math.isfinite(across) and math.isfinite(y.value):
            points.append((row, abs(across), y.value))
    if not points:
        return None
    picture = Picture(400, 290)
    axes = picture.axes
    for row, across, up in points:
        step = leak_step(row)
        marker, size = {ORIGINAL: ("D", 42), RETRAIN: ("*", 130)}.get(row.kind, ("o", 52))
        face = FG if row.kind == RETRAIN else shade(step)
        axes.scatter(
            [across], [up], s=size, marker=marker, color=face, edgecolors=FG, linewidths=0.6
        )
        if row.kind == RETRAIN:
            axes.axhline(up, color=MUTED, linewidth=0.6, linestyle=(0, (3, 3)), zorder=0)
            if relative:
                axes.axvline(0, color=MUTED, linewidth=0.6, linestyle=(0, (3, 3)), zorder=0)
    gap = f"|{column_label(forget)} \N{MINUS SIGN} retrained|"
    axes.set_xlabel(gap if relative else column_label(forget))
    axes.set_ylabel(column_label(utility))
    axes.margins(0.13, 0.16)
    _place_labels(picture, points)
    note = "There is no retrained model to compare with: the target is not known."
    if relative:
        note = "The dashed lines cross at the retrained model: the closer to it, the better."
    label = "Trade-off: " + "; ".join(f"{row.label} {x:.3f}, {y:.3f}" for row, x, y in points)
    return Panel("trade-off", picture.svg(name, label), note)


def leak_step(row: Row) -> int:
    """Return the colour step of a row's membership AUC: 0 close to the retrained's, 4 unknown."""
    leak = leak_of(row)
    if leak is None or leak.delta is None:
        return 4
    return sum(abs(leak.delta) > limit for limit in LEAK_LIMITS)


def leak_of(row: Row) -> Number | None:
    """Return the membership AUC that stands for a row: on the loss, or the first there is."""
    names = [name for name in row.numbers if name.rpartition("/")[2] == "auc"]
    names.sort(key=lambda name: not name.endswith("loss/auc"))
    return row.numbers[names[0]] if names else None


def _place_labels(picture: Picture, points: Sequence[tuple[Row, float, float]]) -> None:
    """Write each point's name where it hides neither another name nor a point."""
    axes = picture.axes
    scale = 72 / picture.figure.dpi
    axes.autoscale_view()  # otherwise limits are set at drawing
    placed = scale * axes.transData.transform([(x, y) for _, x, y in points])
    spots = [(float(x), float(y)) for x, y in placed]
    frame = axes.get_window_extent()
    inside = tuple(edge * scale for edge in (frame.x0, frame.y0, frame.x1, frame.y1))
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for (row, x, y), (px, py) in zip(points, spots, strict=True):
        width = 5.2 * len(row.label) + 2
        offsets = [
            (dx, dy, align)
            for reach in (0, 9, 18)
            for dx, dy, align in (
                (7, reach, "left"),
                (7, -reach, "left"),
                (-7, reach, "right"),
                (-7, -reach, "right"),
                (0, 10 + reach, "center"),
                (0, -10 - reach, "center"),
            )
        ]
        boxes = [_text_box(px + dx, py + dy, width, align) for dx, dy, align in offsets]
        costs = [_cost(box, taken, inside) + 0.2 * i for i, box in enumerate(boxes)]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        dx, dy, align = offsets[best]
        axes.annotate(
            row.label,
            (x, y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=align,
            va="center",
            color=FG,
            fontweight="bold" if row.kind != "method" else "normal",
        )


def _text_box(x: float, y: float, width: float, align: str) -> Box:
    left = {"left": x, "right": x - width, "center": x - width / 2}[align]
    return left, y - 6, left + width, y + 6


def _cost(box: Box, taken: Iterable[Box], inside: Sequence[float]) -> float:
    """Return the area of a box that is covered by others or lies outside the axes."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    frame = (inside[0], inside[1], inside[2], inside[3])
    return sum(_overlap(box, other) for other in taken) + 2 * (area - _overlap(box, frame))


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def histograms(block: Block, name: str) -> tuple[list[Panel], list[str]]:
    """Draw the losses of forget, unseen and retain examples, one panel a row, on shared axes.

    Returns:
        The panels, and the labels of rows whose stored predictions cannot be read.
    """
    shown, broken = [], []
    for row in block.rows:
        try:
            losses = _losses(row)
        except (OSError, ValueError, BadZipFile):
            broken.append(row.label)
            continue
        if losses:
            shown.append((row, losses))
    if not shown:
        return [], broken
    everything = np.concatenate([part for _, losses in shown for part in losses.values()])
    low, high = np.log10(np.quantile(everything, [0.002, 0.998]))
    edges = np.linspace(low - 0.1, high + 0.1, 33)
    shares = [
        (row, {split: _shares(part, edges) for split, part in losses.items()})
        for row, losses in shown
    ]
    peaks = [max(float(part.max()) for part in parts.values()) for _, parts in shares]
    top = min(max(peaks), 2.5 * float(np.median(peaks)))  # one spike must not flatten the others
    panels = []
    for i, (row, parts) in enumerate(shares):
        picture = Picture(215, 130, left=6)
        axes = picture.axes
        for split, color in _SPLITS:
            if split in parts:
                axes.stairs(parts[split], edges, color=color, fill=True, alpha=0.22)
                axes.stairs(parts[split], edges, color=color, linewidth=1.1)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, top * 1.05)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xticks(_decades(edges[0], edges[-1]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{10.0**value:g}")
        axes.set_xlabel("loss")
        panels.append(Panel(row.label, picture.svg(f"{name}-{i}", f"Losses of {row.label}")))
    return panels, broken


def _decades(low: float, high: float) -> list[int]:
    exponents = range(math.ceil(low), math.floor(high) + 1)
    return list(exponents[:: max(1, len(exponents) // 4)])


def _losses(row: Row) -> dict[str, Floats]:
    """Return a row's losses by split, its seeds pooled, within the range of the axis."""
    pooled: dict[str, list[Floats]] = {}
    for run in row.counted:
        if not (run.folder / "predictions.npz").is_file():
            continue
        stored = run.predictions()
        for split, _ in _SPLITS:
            if "loss" in stored.get(split, {}):
                losses = np.asarray(stored[split]["loss"], dtype=np.float64)
                finite = losses[np.isfinite(losses)]
                pooled.setdefault(split, []).append(np.clip(finite, *_LOSS_RANGE))
    joined = {split: np.concatenate(parts) for split, parts in pooled.items()}
    return {split: losses for split, losses in joined.items() if losses.size}


def _shares(losses: Floats, edges: Floats) -> Floats:
    counts = np.histogram(np.clip(np.log10(losses), edges[0], edges[-1]), edges)[0]
    return np.asarray(counts / losses.size)


def rocs(block: Block, name: str) -> list[Panel]:
    """Draw the ROC curves of membership signals on log axes, one panel a signal."""
    found: dict[str, list[tuple[Row, Floats, Floats]]] = {}
    for row in block.rows:
        for run in row.counted:
            for attack, result in run.attacks.items():
                for curve, points in result.curves.items():
                    if curve.startswith("roc/"):
                        x, y = (np.asarray(points[axis], dtype=np.float64) for axis in "xy")
                        found.setdefault(f"{attack}: {curve[4:]}", []).append((row, x, y))
    panels = []
    for i, (title, curves) in enumerate(found.items()):
        floor = max(1e-5, min((x[x > 0].min() for _, x, _ in curves if (x > 0).any()), default=0.1))
        picture = Picture(280, 240)
        axes = picture.axes
        axes.plot([floor, 1], [floor, 1], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        for row, x, y in _drawing_order(curves):
            kept = y > 0  # a log axis has no zero: FPR 0 is drawn at the left edge
            axes.plot(np.maximum(x[kept], floor), y[kept], **_line(row))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(floor, 1)
        axes.set_ylim(floor, 1.08)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter("")
        axes.set_xlabel("false-positive rate")
        axes.set_ylabel("true-positive rate")
        axes.grid(color=LINE, linewidth=0.5)
        panels.append(Panel(title, picture.svg(f"{name}-{i}", f"ROC curves of {title}")))
    return panels


def relearning(block: Block, name: str) -> Panel | None:
    """Draw how fast each model relearns what it was to forget, beside the original's level."""
    curves, labels = [], ("step", "recovered")
    for row in block.rows:
        for run in row.counted:
            for result in run.attacks.values():
                points = result.curves.get("recovery")
                if points:
                    x, y = (np.asarray(points[axis], dtype=np.float64) for axis in "xy")
                    curves.append((row, x, y))
                    labels = (points.get("x_label", labels[0]), points.get("y_label", labels[1]))
    if not curves:
        return None
    picture = Picture(400, 290)
    axes = picture.axes
    start = [y[0] for row, _, y in curves if row.kind == ORIGINAL and y.size]
    if start:
        axes.axhline(start[0], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    for row, x, y in _drawing_order(curves):
        axes.plot(x, y, **_line(row))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    return Panel("relearning", picture.svg(name, "Relearning curves of all runs"))


def has_curves(row: Row) -> bool:
    """Return whether an attack left a curve of this row."""
    return any(result.curves for run in row.counted for result in run.attacks.values())


def _drawing_order(
    curves: Iterable[tuple[Row, Floats, Floats]],
) -> list[tuple[Row, Floats, Floats]]:
    """Return the curves with the retrained model's last, so that it lies on top."""
    return sorted(curves, key=lambda curve: curve[0].kind == RETRAIN)


def _line(row: Row) -> dict[str, Any]:
    if row.kind == RETRAIN:
        return {"color": FG, "linewidth": 2.0}
    if row.kind == ORIGINAL:
        return {"color": FG, "linewidth": 1.2, "linestyle": (0, (4, 2))}
    return {"color": series(row.slot), "linestyle": (0, dashes(row.slot) or None), "alpha": 0.9}


def sparkline(run: RunResult) -> tuple[Markup, str] | None:
    """Draw a run's loss over steps from `events.jsonl`; the text says where it starts and ends."""
    losses = _events(run.folder / "events.jsonl")
    if len(losses) < 2:
        return None
    steps, values = np.asarray(losses, dtype=np.float64).T
    chosen = np.unique(np.linspace(0, len(steps) - 1, 160).astype(int))
    x = 160 * (steps - steps[0]) / max(steps[-1] - steps[0], 1)
    spread = values.max() - values.min()
    y = 30 - 28 * (values - values.min()) / (spread if spread > 0 else 1)
    path = " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in chosen)
    svg = Markup(
        '<svg class="spark" viewBox="-2 0 164 32" role="img" aria-label="loss over steps">'
        '<polyline points="{}" fill="none" stroke="var(--accent)" stroke-width="1.4"/></svg>'
    ).format(path)
    return svg, f"loss {values[0]:.4g} at step {steps[0]:.0f}, {values[-1]:.4g} at {steps[-1]:.0f}"


def _events(path: Path) -> list[tuple[float, float]]:
    """Return (step, loss) of every whole line whose loss is finite."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
            point = float(event["step"]), float(event["loss"])
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run is cut short
        if math.isfinite(point[1]):
            found.append(point)
    return found
