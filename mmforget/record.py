"""What a run leaves behind: plain dataclasses with an exact round trip through JSON.

The folder of a run, `runs/<benchmark>/<method>/<hash>-s<seed>/`, holds `run.json` (a `RunResult`),
`config.yaml`, `events.jsonl`, `predictions.npz`, `attacks/<name>.npz` and `model.safetensors`.
Every file is written under a temporary name and renamed, so a reader never sees half of one.
"""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmforget.errors import DataError, ResourceError

SCHEMA = 1
STATUSES = ("finished", "collapsed", "failed", "interrupted")
DIRECTIONS = ("up", "down", "to_reference")


@dataclass(frozen=True)
class MetricValue:
    """One number and how to read it.

    Attributes:
        value: The number; NaN when it is not defined.
        direction: "up" or "down" (better), or "to_reference" (closer to the retrained model).
        reference: The same number of the retrained model; None when there is no such model.
        low: Lower end of a 95 % interval, if computed.
        high: Upper end of it.
        n: Examples it was computed on.
        note: What a reader must know, such as a departure from the published definition.
    """

    value: float
    direction: str
    reference: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction {self.direction!r}: one of {DIRECTIONS}")

    @property
    def gap(self) -> float | None:
        """Distance to the retrained model's value; None without one."""
        return None if self.reference is None else abs(self.value - self.reference)


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        access: "black", "grey" or "white".
        values: Named numbers, such as `loss/auc`, with intervals.
        queries: Single-example forward passes spent on the attacked model.
        seconds: Wall time spent, training of shadow models included.
        budget: What it was allowed to spend.
        curves: Named series to draw, each {"x": [...], "y": [...], "x_label", "y_label"};
            `roc/<signal>` and `recovery` are drawn by the core report.
        targets: Per-target arrays, stored in `attacks/<name>.npz`, not in `run.json`.
    """

    access: str
    values: dict[str, MetricValue]
    queries: int
    seconds: float
    budget: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Cost:
    """What unlearning took: loading, evaluation and attacks excluded.

    Attributes:
        wall_s: Wall seconds.
        device_s: Seconds the device was busy (CPU: processor seconds of all threads).
        peak_bytes: Peak memory (GPU: allocated on the device; CPU: resident, above the start).
        steps: Optimiser steps.
        examples_seen: Examples drawn for them, forget and retain.
        trainable: Parameters in scope.
        prepare_s: Wall seconds of what the method made once before any request was known, shared
            by all requests on one original; not part of `wall_s`.
    """

    wall_s: float = 0.0
    device_s: float = 0.0
    peak_bytes: int = 0
    steps: int = 0
    examples_seen: int = 0
    trainable: int = 0
    prepare_s: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Return the cost of serving one request after another; what was prepared is shared."""
        return Cost(
            wall_s=self.wall_s + other.wall_s,
            device_s=self.device_s + other.device_s,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            steps=self.steps + other.steps,
            examples_seen=self.examples_seen + other.examples_seen,
            trainable=max(self.trainable, other.trainable),
            prepare_s=max(self.prepare_s, other.prepare_s),
        )


@dataclass(frozen=True)
class Seeds:
    """Three seeds, set apart, so that each source of variance can be shown alone."""

    train: int = 0
    unlearn: int = 0
    evaluate: int = 0


@dataclass(frozen=True)
class RunResult:
    """One run; `run.json` holds all of it but `folder`.

    Attributes:
        id: `<benchmark>/<method>/<hash>-s<seed>`, the folder below the runs root.
        status: finished, collapsed, failed or interrupted.
        mini: Whether data were generated here: such numbers never stand beside published ones.
        request: What was asked to be forgotten: kind, sizes, hash of the forget ids.
        parents: Run ids of the `original` and `retrained` rows, and the cache keys of their models.
        notes: Warnings a reader of the numbers must see.
        error: Message of the error that ended a failed run.
    """

    id: str
    status: str
    benchmark: str
    modality: str
    method: str
    seeds: Seeds
    mini: bool
    request: dict[str, Any]
    parents: dict[str, str | None]
    metrics: dict[str, MetricValue]
    attacks: dict[str, AttackResult]
    cost: Cost
    environment: dict[str, Any]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    schema: int = SCHEMA
    folder: Path = field(default=Path(), compare=False)

    def predictions(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Return the stored per-example arrays: split -> name -> array (`ids` among them)."""
        return load_arrays(self.folder / "predictions.npz")

    def targets(self, attack: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the stored per-target arrays of an attack."""
        path = self.folder / "attacks" / f"{attack.replace('/', '.')}.npz"
        return load_arrays(path).get("", {})


def to_json(result: RunResult) -> str:
    """Return `run.json`'s text; NaN and infinities become strings, as JSON has none."""
    content = asdict(replace(result, folder=Path(), attacks={}))
    del content["folder"]
    content["attacks"] = {name: encode_result(attack) for name, attack in result.attacks.items()}
    return json.dumps(_encode(content), indent=1, sort_keys=True, allow_nan=False)


def from_json(text: str, folder: Path = Path()) -> RunResult:
    """Return the run that `to_json` wrote.

    Raises:
        DataError: The text is no record, or of a newer schema.
    """
    try:
        content = _decode(json.loads(text))
        if content["schema"] > SCHEMA:
            raise DataError(
                f"{folder}: record schema {content['schema']} is newer than this mmforget reads "
                f"({SCHEMA}); update mmforget"
            )
        content["seeds"] = Seeds(**content["seeds"])
        content["cost"] = Cost(**content["cost"])
        content["metrics"] = {k: MetricValue(**v) for k, v in content["metrics"].items()}
        content["attacks"] = {k: decode_result(v) for k, v in content["attacks"].items()}
        return RunResult(**content, folder=folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}/run.json is no run record: {error}") from error


def encode_result(result: AttackResult) -> dict[str, Any]:
    """Return an attack's result as plain values, its per-target arrays left out."""
    content = asdict(replace(result, targets={}))
    del content["targets"]
    return content


def decode_result(content: Mapping[str, Any]) -> AttackResult:
    """Return what `encode_result` wrote."""
    values = {name: MetricValue(**value) for name, value in content["values"].items()}
    return AttackResult(**{**content, "values": values})


def load_run(folder: Path) -> RunResult:
    """Read a run folder.

    Raises:
        DataError: There is no readable record.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no run.json; give the folder of a finished run")
    return from_json(path.read_text(encoding="utf-8", errors="replace"), folder)


def find_runs(roots: "list[Path]") -> Iterator[RunResult]:
    """Yield every record at or below the given folders, sorted by path."""
    for root in roots:
        paths = [root / "run.json"] if (root / "run.json").is_file() else root.rglob("run.json")
        for path in sorted(paths):
            yield load_run(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends well.

    Raises:
        ResourceError: The disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        clear = disk_error(error, path)
        if clear is error:
            raise
        raise clear from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path) -> Exception:
    """Return a clear error for a full disk or quota; any other error unchanged."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"no space left while writing {path}; nothing was half-written. Free space, or set "
            f"MMFORGET_CACHE and --runs to another disk, and run the same command again"
        )
    return error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_arrays(path: Path, groups: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]) -> None:
    """Write named groups of arrays to one compressed file, atomically.

    Raises:
        DataError: An array holds Python objects, which could only be stored as a pickle.
    """
    flat = {
        f"{group}|{name}": array for group, part in groups.items() for name, array in part.items()
    }
    for name, array in flat.items():
        if array.dtype.hasobject:
            raise DataError(f"{name} holds Python objects; give numbers, booleans or text")
    with writing(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **flat)  # type: ignore[arg-type]


def load_arrays(path: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Read what `save_arrays` wrote; strings are stored as fixed-width unicode, never pickled."""
    groups: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            group, _, name = key.partition("|")
            groups.setdefault(group, {})[name] = stored[key]
    return groups


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}  # NumPy's own repr names its type
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
            return float(value["float"])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
