"""Records sorted into what a page shows: one block a benchmark and request, one row a method.

Runs that differ only in their seeds are one row, mean and standard deviation. The rows `original`
and `retrain` are always there, because no other row can be read without them.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mmforget.errors import DataError, MMForgetError
from mmforget.record import MetricValue, RunResult, load_run
from mmforget.registry import BENCHMARKS

if TYPE_CHECKING:
    from mmforget.types import Benchmark

_FALLBACK_COLUMNS = 6
ORIGINAL, RETRAIN = "original", "retrain"


@dataclass(frozen=True)
class Number:
    """One value of a row, over the runs of that row.

    Attributes:
        value: Mean over runs in which it is defined; NaN if there is none.
        std: Standard deviation over runs (n - 1); None for fewer than two.
        n: Runs in which it is defined.
        direction: As in `MetricValue`.
        reference: Mean of the retrained model's values; None without one.
        low: 95 % interval of a single run; None for several runs, or if none was computed.
        high: Upper end of it.
        examples: Examples behind the value.
        note: What a reader must know.
    """

    value: float
    std: float | None
    n: int
    direction: str
    reference: float | None = None
    low: float | None = None
    high: float | None = None
    examples: int | None = None
    note: str = ""

    @property
    def delta(self) -> float | None:
        """Value minus the retrained model's; None if either is not defined."""
        if self.reference is None or not math.isfinite(self.value - self.reference):
            return None
        return self.value - self.reference

    @property
    def covers_reference(self) -> bool:
        """Whether the 95 % interval of a single run holds the retrained model's value."""
        if self.reference is None or self.low is None or self.high is None:
            return False
        return self.low <= self.reference <= self.high


@dataclass(frozen=True)
class Row:
    """One method under one config, over its seeds.

    Attributes:
        label: What tells it from the other rows.
        kind: "original", "retrain" or "method".
        runs: All its runs; empty for a pinned row that no run stands behind.
        numbers: Metric values by name, and attack values as `<attack>/<value>`.
        distance: Distance to the retrained model; None without one, or if no run finished.
        status: Shared status of the runs; "mixed" if they differ; "missing" without a run.
        reason: Why runs did not finish, or where the numbers of the row come from.
        slot: Number of its colour.
    """

    label: str
    kind: str
    runs: tuple[RunResult, ...]
    numbers: Mapping[str, Number]
    distance: Number | None
    status: str
    reason: str
    slot: int = 0

    @property
    def counted(self) -> tuple[RunResult, ...]:
        """The runs behind the numbers: the finished ones, or all if none is finished."""
        return _counted(self.runs)

    @property
    def finished(self) -> bool:
        """Whether at least one run finished."""
        return any(_is_finished(run) for run in self.runs)


@dataclass(frozen=True)
class Block:
    """Runs that can be compared: same benchmark, data, model recipe and forget set.

    Attributes:
        benchmark: Registry name.
        mini: Whether the data were generated here.
        request: What was asked to be forgotten.
        rows: `original`, `retrain`, then methods by distance to the retrained model.
        headline: Names of the values of the first table.
        distance_name: The value that ranks; None: mean gap over the headline.
        noise: Mean distance between the reference and other retrained models; None if unknown.
        known: Whether the benchmark could be asked for its headline.
    """

    benchmark: str
    mini: bool
    request: Mapping[str, Any]
    rows: tuple[Row, ...]
    headline: tuple[str, ...]
    distance_name: str | None
    noise: float | None
    known: bool

    @property
    def runs(self) -> list[RunResult]:
        """All runs of the block, in the order of its rows."""
        return [run for row in self.rows for run in row.runs]

    @property
    def methods(self) -> list[Row]:
        """The rows that are neither original nor retrained."""
        return [row for row in self.rows if row.kind == "method"]

    @property
    def numbered(self) -> list[Row]:
        """The rows that hold any number."""
        return [row for row in self.rows if row.numbers]

    def row(self, kind: str) -> Row:
        """Return the pinned row "original" or "retrain"."""
        return next(row for row in self.rows if row.kind == kind)

    @property
    def has_reference(self) -> bool:
        """Whether anything here was compared with a retrained model."""
        return any(row.distance is not None for row in self.rows)


def numbers_of(run: RunResult) -> dict[str, MetricValue]:
    """Return a run's metric values by name, and its attacks' values as `<attack>/<value>`."""
    attacks = {
        f"{attack}/{name}": value
        for attack, result in run.attacks.items()
        for name, value in result.values.items()
    }
    return run.metrics | {name: attacks[name] for name in attacks if name not in run.metrics}


def collect(runs: Sequence[RunResult]) -> list[Block]:
    """Sort records into blocks; parents that lie beside them on the disk are added.

    Raises:
        DataError: No run is finished.
    """
    if not any(_is_finished(run) for run in runs):
        states = ", ".join(f"{run.method}: {run.status}" for run in runs) or "no run was given"
        raise DataError(
            f"nothing to report: no finished run ({states}). Give the folder of at least one "
            f"finished run; the command of an interrupted run continues it"
        )
    blocks: dict[str, list[RunResult]] = {}
    for run in _with_parents(runs):
        blocks.setdefault(_block_key(run), []).append(run)
    return [_block(part) for part in blocks.values()]


def _with_parents(runs: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs once each, and the `original` and `retrain` runs that they name."""
    found = {run.id: run for run in runs}
    for run in runs:
        depth = run.id.count("/")
        if len(run.folder.parents) <= depth or not run.folder.as_posix().endswith(run.id):
            continue
        for parent in ("original", "retrained"):
            name = run.parents.get(parent)
            folder = run.folder.parents[depth] / (name or "")
            if name and name not in found and (folder / "run.json").is_file():
                found[name] = load_run(folder)
    return list(found.values())


def _block_key(run: RunResult) -> str:
    recipe = [run.config.get(section) for section in ("benchmark", "model")]
    forget = run.request.get("ids_sha", run.request)
    return json.dumps([run.benchmark, run.mini, forget, recipe], sort_keys=True, default=str)


def _block(runs: Sequence[RunResult]) -> Block:
    first = runs[0]
    benchmark = benchmark_class(first.benchmark)
    finished = [numbers_of(run) for run in runs if _is_finished(run)]
    present = {name for numbers in finished for name in numbers}
    if benchmark is not None:
        headline = tuple(name for name in benchmark.headline if name in present)
        distance = benchmark.distance if benchmark.distance in present else None
    else:
        headline = tuple(_likely_headline(finished))
        distance = None
    headline = tuple(name for name in headline if name != distance)
    rows = _rows(runs, headline, distance)
    return Block(
        benchmark=first.benchmark,
        mini=first.mini,
        request=first.request,
        rows=tuple(rows),
        headline=headline,
        distance_name=distance,
        noise=_noise(next(row for row in rows if row.kind == RETRAIN), distance),
        known=benchmark is not None,
    )


def benchmark_class(name: str) -> "type[Benchmark] | None":
    """Return a benchmark's class, or None where it or a package that it needs is missing."""
    try:
        return BENCHMARKS.get(name)
    except (MMForgetError, ImportError):
        return None


def _likely_headline(finished: Iterable[Mapping[str, MetricValue]]) -> list[str]:
    """Return the first metrics that can be compared with a retrained model, then any."""
    values = {name: value for numbers in finished for name, value in numbers.items()}
    names = [name for name in values if not name.startswith("cost/")]
    names.sort(key=lambda name: (values[name].reference is None, not name.startswith("accuracy/")))
    return names[:_FALLBACK_COLUMNS]


def _rows(runs: Sequence[RunResult], headline: Sequence[str], distance: str | None) -> list[Row]:
    groups: dict[str, list[RunResult]] = {ORIGINAL: [], RETRAIN: []}
    for run in runs:
        groups.setdefault(_row_key(run), []).append(run)
    labels = _labels({key: group[0] for key, group in groups.items() if group})
    rows = {
        key: _row(labels[key], _kind(group[0]), group, headline, distance)
        for key, group in groups.items()
        if group
    }
    pinned = [
        rows.pop(ORIGINAL, None)
        or Row(ORIGINAL, ORIGINAL, (), {}, None, "missing", "no run given"),
        rows.pop(RETRAIN, None) or _reference_row(rows.values(), distance),
    ]
    ranked = sorted(rows.values(), key=_rank)
    return pinned + [replace(row, slot=slot) for slot, row in enumerate(ranked)]


def _row_key(run: RunResult) -> str:
    if run.method in (ORIGINAL, RETRAIN):
        return run.method  # seeds of these two may stand in their config
    if run.method == "external":
        return run.id  # a checkpoint from elsewhere is told apart by its hash only
    return json.dumps([run.method, run.config.get("method")], sort_keys=True, default=str)


def _kind(run: RunResult) -> str:
    return run.method if run.method in (ORIGINAL, RETRAIN) else "method"


def _labels(groups: Mapping[str, RunResult]) -> dict[str, str]:
    """Return a label for each row: the method's short name, and what tells equal names apart."""
    by_method: dict[str, dict[str, RunResult]] = {}
    for key, run in groups.items():
        by_method.setdefault(run.method, {})[key] = run
    labels = {}
    for method, rows in by_method.items():
        short = method.rpartition("/")[2]
        configs = {key: flatten(run.config.get("method") or {}) for key, run in rows.items()}
        options = {name for config in configs.values() for name in config}
        differ = sorted(
            name
            for name in options
            if len({str(config.get(name)) for config in configs.values()}) > 1
        )
        for key, run in rows.items():
            parts = [f"{name}={configs[key].get(name)}" for name in differ]
            if method == "external":
                parts = [run.id.rpartition("/")[2]]
            labels[key] = " ".join([short, *parts])
    return labels


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _row(
    label: str,
    kind: str,
    runs: Sequence[RunResult],
    headline: Sequence[str],
    distance: str | None,
) -> Row:
    per_run = [numbers_of(run) for run in _counted(runs)]
    names = dict.fromkeys(name for numbers in per_run for name in numbers)
    numbers = {name: _number([part[name] for part in per_run if name in part]) for name in names}
    ranked = [part for part, run in zip(per_run, _counted(runs), strict=True) if _is_finished(run)]
    distances = [_distance(part, headline, distance) for part in ranked]
    known = [value for value in distances if value is not None]
    if kind == RETRAIN and any(value.value > 0 for value in known):
        known = [value for value in known if value.value > 0]  # the reference itself is at 0
    states = {run.status for run in runs}
    status = states.pop() if len(states) == 1 else "mixed"
    errors = dict.fromkeys(f"{run.status}: {run.error}" for run in runs if run.error)
    return Row(
        label=label,
        kind=kind,
        runs=tuple(runs),
        numbers=numbers,
        distance=_number(known) if known else None,
        status=status,
        reason="; ".join(errors),
    )


def _reference_row(rows: Iterable[Row], distance: str | None) -> Row:
    """Return the retrained row as the other records remember it."""
    numbers = {
        name: replace(number, value=number.reference, std=None, low=None, high=None, note="")
        for row in rows
        for name, number in row.numbers.items()
        if number.reference is not None
    }
    if not numbers:
        return Row(RETRAIN, RETRAIN, (), {}, None, "missing", "no retrained model was made")
    zero = Number(0.0, None, 1, "down", 0.0)
    return Row(RETRAIN, RETRAIN, (), numbers, zero, "missing", "as the other records remember it")


def _counted(runs: Sequence[RunResult]) -> tuple[RunResult, ...]:
    return tuple(run for run in runs if _is_finished(run)) or tuple(runs)


def _is_finished(run: RunResult) -> bool:
    return run.status == "finished"


def _number(values: Sequence[MetricValue]) -> Number:
    """Return the mean and standard deviation over runs, NaN left out."""
    finite = [value.value for value in values if math.isfinite(value.value)]
    references = [value.reference for value in values if value.reference is not None]
    single = values[0] if len(values) == 1 else None
    return Number(
        value=fmean(finite) if finite else math.nan,
        std=stdev(finite) if len(finite) > 1 else None,
        n=len(finite),
        direction=values[0].direction,
        reference=fmean(references) if references else None,
        low=_finite(single.low) if single else None,
        high=_finite(single.high) if single else None,
        examples=values[0].n,
        note="; ".join(dict.fromkeys(value.note for value in values if value.note)),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _distance(
    numbers: Mapping[str, MetricValue], headline: Sequence[str], name: str | None
) -> MetricValue | None:
    """Return a run's distance to the retrained model: the benchmark's, or the mean gap."""
    if name is not None:
        return numbers.get(name)
    gaps = [
        numbers[column].gap
        for column in headline
        if column in numbers and not column.startswith("cost/")
    ]
    known = [gap for gap in gaps if gap is not None and math.isfinite(gap)]
    return MetricValue(fmean(known), "down", 0.0) if known else None


def _rank(row: Row) -> tuple[bool, float, str]:
    ranked = row.finished and row.distance is not None and math.isfinite(row.distance.value)
    return not row.finished, row.distance.value if ranked and row.distance else math.inf, row.label


def _noise(retrain: Row, distance: str | None) -> float | None:
    """Return how far retrained models of other seeds lie from the reference, if that was run."""
    if len(retrain.runs) < 2 or retrain.distance is None or retrain.distance.value <= 0:
        return None
    return retrain.distance.value
