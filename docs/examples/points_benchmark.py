"""A whole benchmark in one file: classify points, and forget those of some owners."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigError, DataError, SplitError, unknown
from mmforget.options import option
from mmforget.record import write_text
from mmforget.registry import BENCHMARKS
from mmforget.rng import Draws, generator
from mmforget.types import Benchmark, Outputs, Splits, Subset, Training, frozen_copy

CLASSES, SIZE = 4, 8
COUNTS = {"train": 240, "test": 120, "unseen": 120}
COLUMNS = ["id", "part", "owner", "label", *(f"x{k}" for k in range(SIZE))]


class Points:
    """The rows of points.csv, read a batch at a time."""

    def __init__(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.ids = [row["id"] for row in rows]
        self.digests = [hashlib.sha256(repr(row).encode()).hexdigest() for row in rows]
        self.x = torch.tensor([[float(row[f"x{k}"]) for k in range(SIZE)] for row in rows])
        self.y = torch.tensor([int(row["label"]) for row in rows])

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return coordinates [B, 8] and labels [B]."""
        return {"x": self.x[list(indices)], "y": self.y[list(indices)]}


class PointAdapter:
    """What one forward pass is: all that methods, metrics and attacks know of points."""

    random = False  # nothing is drawn for a batch

    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        """Put a batch on the device; in training points move a little, as a crop would."""
        x = raw["x"].to(draws.device)
        return {"x": x + 0.05 * draws.normal(SIZE) if train else x, "y": raw["y"].to(draws.device)}

    def units(self, data: Any) -> Tensor:
        """Return ones: a label is one unit."""
        return torch.ones(len(data["y"]), device=data["y"].device)

    def forward(self, model: nn.Module, data: Any) -> Outputs:
        """Return loss [B] and logits [B, 4]."""
        logits = model(data["x"])
        return Outputs(F.cross_entropy(logits, data["y"], reduction="none"), logits)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return KL(teacher || student)·T², [B]."""
        log_p, log_q = (F.log_softmax(o.pred / temperature, -1) for o in (student, teacher))
        return (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2

    def relabel(self, data: Any, draws: Draws, exclude_true: bool = True) -> Any:
        """Return the batch with labels drawn at random."""
        offset = 1 + draws.integers(CLASSES - 1) if exclude_true else draws.integers(CLASSES)
        return {**data, "y": (data["y"] + offset) % CLASSES}

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return a copy: a model this small has nothing cheaper."""
        return frozen_copy(model)

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        """Return the model: it is called as a whole."""
        return (model,)

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Return all weights, or those of the last layer."""
        if scope not in ("all", "head"):
            raise ConfigError(f"scope={scope!r} is none of a points model's; accepted: all, head")
        return {n: p for n, p in model.named_parameters() if scope == "all" or n.startswith("2.")}

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        """Do nothing: the model holds no data besides its weights."""

    def record(self, model: nn.Module, data: Any) -> dict[str, Tensor]:
        """Return loss, logits, label and features of each point."""
        loss, logits, _ = self.forward(model, data)
        features = model[:2](data["x"]).float()  # type: ignore[index]
        return {"loss": loss.float(), "logits": logits, "label": data["y"], "features": features}


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of points.csv."""
    if not path.is_file():
        raise DataError(f"{path} is missing. Give data.root=FOLDER, with points.csv in it")
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or list(rows[0]) != COLUMNS:
        raise DataError(f"{path.name}: the columns must be {', '.join(COLUMNS)}")
    return rows


@dataclass(frozen=True)
class Config:
    """The training recipe."""

    training: Training = option(Training(epochs=40, lr=0.1, momentum=0.9, batch_size=32), "recipe")


@dataclass(frozen=True)
class Data:
    """Where points.csv is."""

    source: str = option("mini", "mini: drawn here; local: a folder", choices=("mini", "local"))
    root: str | None = option(None, "folder that holds points.csv; needed for source=local")
    seed: int = option(0, "which mini world is drawn", low=0)


@dataclass(frozen=True)
class Model:
    """A network of one hidden layer."""

    name: str = option("mlp", "architecture", choices=("mlp",))
    width: int = option(128, "hidden units", low=1)


@dataclass(frozen=True)
class Request:
    """Whose points are forgotten."""

    owners: list[str] = option(["owner0"], "owners: all their training points")


@BENCHMARKS.register("points/owners")
class PointsBenchmark(Benchmark):
    """Four kinds of points in eight dimensions, a quarter of them under a wrong label."""

    name, citation = "points/owners", "docs/add_a_benchmark.md"
    config_type, data_type, model_type, request_type = Config, Data, Model, Request
    metrics, attacks = ("accuracy", "average_gap", "cost"), ("membership",)
    headline, distance = ("accuracy/forget", "accuracy/test", "gap/average"), "gap/average"
    adapter = PointAdapter()
    revision = ""

    def splits(self) -> Splits:
        """Read points.csv and apply the request."""
        folder = Path(self.data.root or self.store / "mini" / f"points-s{self.data.seed}")
        if self.data.source == "mini" and not (folder / "points.csv").is_file():
            self.write_mini(folder, self.data.seed)
        rows = read(folder / "points.csv")
        data = Points(rows)
        self.revision = hashlib.sha256("".join(data.digests).encode()).hexdigest()
        part = {p: [i for i, row in enumerate(rows) if row["part"] == p] for p in COUNTS}
        known, gone = {rows[i]["owner"] for i in part["train"]}, set(self.request.owners)
        for name in gone - known:
            raise SplitError(unknown("owner in the request:", name, known, "points.csv"))
        forget = [i for i in part["train"] if rows[i]["owner"] in gone]
        retain = [i for i in part["train"] if rows[i]["owner"] not in gone]
        chosen = (forget, retain, part["train"], part["unseen"], part["test"])
        forgotten, kept, train, holdout, test = (Subset(data, each) for each in chosen)
        return Splits(forgotten, kept, train, holdout, test)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the content of the data and the architecture."""
        return {"data": self.revision, "model": asdict(self.model)}

    def build(self, seed: int) -> nn.Module:
        """Return a fresh network; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            width = self.model.width
            return nn.Sequential(nn.Linear(SIZE, width), nn.SiLU(), nn.Linear(width, CLASSES))

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world in the layout that `read` reads."""
        rng = generator(seed, "points")
        centres, lines = torch.randn(CLASSES, SIZE, generator=rng), [",".join(COLUMNS)]
        for part, count in COUNTS.items():
            for i in range(count):
                kind = int(torch.randint(CLASSES, (), generator=rng))
                x = centres[kind] + 0.8 * torch.randn(SIZE, generator=rng)
                wrong = bool(torch.rand((), generator=rng) < 0.25)
                label = int(torch.randint(CLASSES, (), generator=rng)) if wrong else kind
                place = [f"{part}{i:03d}", part, f"owner{i % 8}", label]
                lines.append(",".join(map(str, [*place, *x.tolist()])))
        write_text(folder / "points.csv", "\n".join(lines) + "\n")
