"""The tables of a block as cells: text, what a pointer shows, sort key, gap to the retrained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmforget.record import RunResult
from mmforget.report.collect import RETRAIN, Block, Number, Row, numbers_of
from mmforget.report.numbers import ARROWS, DIRECTIONS, MISSING, decimals, fixed, memory, seconds

# Order of an attack's columns; others follow by name.
_ATTACK_COLUMNS = ("auc", "tpr@0.01", "tpr@0.001")
_ATTACK_HEADS = {"auc": "AUC", "tpr@0.01": "TPR @ 1 % FPR", "tpr@0.001": "TPR @ 0.1 % FPR"}


@dataclass(frozen=True)
class Head:
    """A column head: `family` small, `name` large, an arrow, and what the arrow means."""

    family: str
    name: str
    arrow: str
    title: str


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: The number.
        sub: Its spread, interval or gap, in small print.
        title: What a pointer shows.
        sort: Sort key; None sorts last.
        gap: Value minus the retrained's over the column's largest gap, -1 to 1; None: no bar.
        tone: "good", "bad", "off" (away from the target) or "near" (the interval holds it).
        mark: Number of the footnote.
    """

    text: str
    sub: str = ""
    title: str = ""
    sort: float | None = None
    gap: float | None = None
    tone: str = ""
    mark: int | None = None


@dataclass(frozen=True)
class Line:
    """A table row: what stands at its head, and its cells."""

    row: Row
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Metrics of one family: lines are metrics, columns the numbered rows."""

    family: str
    heads: tuple[Head, ...]
    lines: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AttackTable:
    """What one attack found; `signals` are named groups of lines."""

    name: str
    access: str
    effort: str
    heads: tuple[Head, ...]
    signals: tuple[tuple[str, tuple[Line, ...]], ...]


@dataclass(frozen=True)
class CostLine:
    """What one row cost; shares are of the block's largest."""

    row: Row
    time: str
    time_share: float
    speedup: str
    peak: str
    peak_share: float
    steps: str


def head(name: str, direction: str) -> Head:
    """Return the column head of a value."""
    family, _, rest = name.rpartition("/")
    return Head(family, rest.replace("_", " "), ARROWS[direction], DIRECTIONS[direction])


def headline(block: Block) -> tuple[list[Head], list[Line]]:
    """Return the first table: distance, then the headline values, one line a row."""
    distances = [row.distance for row in block.rows]
    columns = [[row.numbers.get(name) for row in block.rows] for name in block.headline]
    heads = [Head("", "distance", "↓", "distance to the retrained model; 0 is the target")]
    cells = [_distances(block, distances)]
    for name, column in zip(block.headline, columns, strict=True):
        heads.append(head(name, next(number.direction for number in column if number)))
        cells.append(_column(column))
    lines = [Line(row, tuple(column[i] for column in cells)) for i, row in enumerate(block.rows)]
    return heads, lines


def every_run(block: Block) -> list[tuple[RunResult, str, list[str]]]:
    """Return each run with its label and headline values as text."""
    listed = [(run, row.label, numbers_of(run)) for row in block.rows for run in row.runs]
    names = [name for name in (block.distance_name, *block.headline) if name]
    texts = []
    for name in names:
        values = [numbers[name].value if name in numbers else None for _, _, numbers in listed]
        places = decimals(values)
        texts.append([fixed(value, places) for value in values])
    return [(run, label, [t[i] for t in texts]) for i, (run, label, _) in enumerate(listed)]


def metric_groups(block: Block) -> list[Group]:
    """Return every metric by family."""
    names = dict.fromkeys(name for row in block.rows for run in row.counted for name in run.metrics)
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.partition("/")[0], []).append(name)
    return [_group(block, family, members) for family, members in families.items()]


def _group(block: Block, family: str, names: Sequence[str]) -> Group:
    notes: dict[str, int] = {}
    heads, lines = [], []
    for name in names:
        column = [row.numbers.get(name) for row in block.numbered]
        for number in column:
            if number is not None and number.note:
                notes.setdefault(number.note, len(notes) + 1)
        made = _column(column, notes, spread=True)
        if name == "cost/peak_bytes":
            made = [_bytes(cell, number) for cell, number in zip(made, column, strict=True)]
        heads.append(head(name, next(number.direction for number in column if number)))
        lines.append(tuple(made))
    return Group(family, tuple(heads), tuple(lines), tuple(notes))


def _bytes(cell: Cell, number: Number | None) -> Cell:
    if number is None or not math.isfinite(number.value):
        return cell
    return Cell(memory(number.value), title=cell.title, gap=cell.gap, tone=cell.tone)


def attack_tables(block: Block) -> list[AttackTable]:
    """Return one table an attack: its signals, each over all rows, beside the retrained's value."""
    attacks = dict.fromkeys(
        name for row in block.rows for run in row.counted for name in run.attacks
    )
    return [_attack(block, name) for name in attacks]


def _attack(block: Block, attack: str) -> AttackTable:
    results = [
        run.attacks[attack] for row in block.rows for run in row.counted if attack in run.attacks
    ]
    names = dict.fromkeys(name for result in results for name in result.values)
    signals: dict[str, list[str]] = {}
    for name in names:
        signals.setdefault(name.rpartition("/")[0], []).append(name.rpartition("/")[2])
    quantities = list(dict.fromkeys(part for parts in signals.values() for part in parts))
    quantities.sort(key=lambda q: _ATTACK_COLUMNS.index(q) if q in _ATTACK_COLUMNS else 99)
    directions = {
        name.rpartition("/")[2]: value.direction
        for result in results
        for name, value in result.values.items()
    }
    tables = []
    for signal in signals:
        start = f"{attack}/{signal}/" if signal else f"{attack}/"
        columns = [
            _column([row.numbers.get(start + quantity) for row in block.rows], spread=True)
            for quantity in quantities
        ]
        lines = tuple(
            Line(row, tuple(column[i] for column in columns))
            for i, row in enumerate(block.rows)
            if any(column[i].text != MISSING for column in columns)
        )
        tables.append((signal, lines))
    heads = tuple(
        Head(
            "",
            _ATTACK_HEADS.get(q, q.replace("_", " ")),
            ARROWS[directions[q]],
            DIRECTIONS[directions[q]],
        )
        for q in quantities
    )
    queries = max(result.queries for result in results)
    spent = max(result.seconds for result in results)
    limits = ", ".join(f"{key} {value}" for key, value in results[0].budget.items())
    effort = f"up to {queries:,} queries and {seconds(spent)} a run"
    effort += f"; budget: {limits}" if limits else ""
    return AttackTable(attack, results[0].access, effort, heads, tuple(tables))


def costs(block: Block) -> list[CostLine]:
    """Return what each method and the retraining cost."""
    measured = [
        (row, [run.cost for run in row.counted])
        for row in block.rows
        if row.kind != "original" and row.finished
    ]
    lines = []
    means = {
        id(row): (
            sum(cost.wall_s for cost in spent) / len(spent),
            sum(cost.peak_bytes for cost in spent) / len(spent),
            sum(cost.steps for cost in spent) / len(spent),
        )
        for row, spent in measured
    }
    longest = max((wall for wall, _, _ in means.values()), default=0.0) or 1.0
    largest = max((peak for _, peak, _ in means.values()), default=0.0) or 1.0
    retraining = _retraining_seconds(block, means)
    for row, _ in measured:
        wall, peak, steps = means[id(row)]
        ratio = retraining / wall if retraining and wall > 0 else None
        lines.append(
            CostLine(
                row,
                seconds(wall),
                wall / longest,
                f"{fixed(ratio, 1)}\N{MULTIPLICATION SIGN}" if ratio else MISSING,
                memory(peak) if peak else MISSING,
                peak / largest,
                f"{steps:,.0f}",
            )
        )
    return lines


def _retraining_seconds(
    block: Block, means: Mapping[int, tuple[float, float, float]]
) -> float | None:
    retrain = block.row(RETRAIN)
    if id(retrain) in means:
        return means[id(retrain)][0]
    known = retrain.numbers.get("cost/wall_s")
    return known.value if known else None


def _distances(block: Block, column: Sequence[Number | None]) -> list[Cell]:
    places = decimals(number.value for number in column if number)
    largest = max((n.value for n in column if n and math.isfinite(n.value)), default=0.0) or 1.0
    cells = []
    for row, number in zip(block.rows, column, strict=True):
        if number is None:
            cells.append(Cell(MISSING, title="not ranked" if row.runs else "no retrained model"))
            continue
        share = number.value / largest if math.isfinite(number.value) else None
        title = f"n = {number.n} run{'s' if number.n != 1 else ''}"
        if row.kind == RETRAIN and block.noise is not None:
            title = "mean over retrained models of other seeds: the noise floor"
        elif number.low is not None and number.high is not None:
            title = f"95 % interval {fixed(number.low, places)} to {fixed(number.high, places)}"
        cells.append(
            Cell(
                fixed(number.value, places),
                _spread(number, places),
                title,
                number.value if row.finished and math.isfinite(number.value) else None,
                share,
                "off",
            )
        )
    return cells


def _column(
    column: Sequence[Number | None], notes: Mapping[str, int] | None = None, spread: bool = False
) -> list[Cell]:
    """Return the cells of one value over all rows, with gaps scaled by the largest one."""
    places = decimals(number.value for number in column if number)
    gaps = [abs(number.delta) for number in column if number and number.delta is not None]
    largest = max(gaps, default=0.0)
    return [_cell(number, places, largest, notes or {}, spread) for number in column]


def _cell(
    number: Number | None, places: int, largest: float, notes: Mapping[str, int], spread: bool
) -> Cell:
    if number is None:
        return Cell(MISSING, title="not measured")
    delta = number.delta
    gap = delta / largest if delta is not None and largest > 0 else None
    sub = _spread(number, places)
    if spread and not sub and number.low is not None and number.high is not None:
        sub = f"{fixed(number.low, places)}…{fixed(number.high, places)}"
    return Cell(
        fixed(number.value, places),
        sub,
        _title(number, places),
        number.value if math.isfinite(number.value) else None,
        gap,
        _tone(number),
        notes.get(number.note),
    )


def _spread(number: Number, places: int) -> str:
    return "" if number.std is None else f"± {fixed(number.std, places)}"


def _title(number: Number, places: int) -> str:
    parts = []
    if number.std is not None:
        parts.append(f"mean ± standard deviation of {number.n} runs")
    if number.low is not None and number.high is not None:
        parts.append(f"95 % interval {fixed(number.low, places)} to {fixed(number.high, places)}")
    if number.reference is None:
        parts.append("no retrained value to compare with")
    else:
        gap = fixed(number.delta, places, sign=True)
        parts.append(f"retrained {fixed(number.reference, places)}, gap {gap}")
    if number.examples is not None:
        parts.append(f"{number.examples:,} examples")
    if number.note:
        parts.append(number.note)
    return "; ".join(parts)


def _tone(number: Number) -> str:
    """Return how a gap reads: a bar is coloured by it, and its side says the sign."""
    if number.delta is None or number.delta == 0:
        return ""
    if number.covers_reference:
        return "near"
    if number.direction == "to_reference":
        return "off"
    return "good" if (number.delta > 0) == (number.direction == "up") else "bad"
