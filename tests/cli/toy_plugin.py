"""A whole modality in one loose file: a benchmark, a metric and an attack on points in a plane."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.registry import ATTACKS, BENCHMARKS, METHODS, METRICS
from mmforget.rng import Draws, generator
from mmforget.training import Supervised
from mmforget.types import (
    Attack,
    Benchmark,
    Budget,
    Metric,
    Outputs,
    Splits,
    Training,
    Trial,
    frozen_copy,
)

torch.set_num_threads(1)
CLASSES = 4


class Points:
    def __init__(self, name: str, count: int, seed: int) -> None:
        rng = generator(seed, name)
        self.y = torch.arange(count) % CLASSES
        centre = torch.stack([torch.cos(self.y * 1.57), torch.sin(self.y * 1.57)], 1)
        self.x = centre + 0.3 * torch.randn(count, 2, generator=rng)
        self.ids = [f"{name}{i:03d}" for i in range(count)]
        self.digests = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in self.x]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"x": self.x[list(indices)], "y": self.y[list(indices)]}


class Both:
    def __init__(self, first: Points, second: Points) -> None:
        self.ids = [*first.ids, *second.ids]
        self.digests = [*first.digests, *second.digests]
        self.x, self.y = torch.cat([first.x, second.x]), torch.cat([first.y, second.y])

    def __len__(self) -> int:
        return len(self.ids)

    take = Points.take


class PointAdapter:
    random = False

    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        return {name: value.to(draws.device) for name, value in raw.items()}

    def units(self, data: Any) -> Tensor:
        return torch.ones(len(data["y"]))

    def forward(self, model: nn.Module, data: Any) -> Outputs:
        logits = model(data["x"])
        return Outputs(F.cross_entropy(logits, data["y"], reduction="none"), logits)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        wanted = F.log_softmax(teacher.pred / temperature, -1)
        found = F.log_softmax(student.pred / temperature, -1)
        return (wanted.exp() * (wanted - found)).sum(-1) * temperature**2

    def relabel(self, data: Any, draws: Draws, exclude_true: bool = True) -> Any:
        return {**data, "y": (data["y"] + 1 + draws.integers(CLASSES - 1)) % CLASSES}

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        return frozen_copy(model)

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        return (model,)

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        found = {n: p for n, p in model.named_parameters() if scope == "all" or n.startswith("2")}
        if scope not in ("all", "head"):
            raise ConfigError(f"scope {scope!r}: all or head")
        return found

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        return None

    def record(self, model: nn.Module, data: Any) -> dict[str, Tensor]:
        out = self.forward(model, data)
        return {"loss": out.loss.float(), "logits": out.pred.float(), "label": data["y"]}


@dataclass(frozen=True)
class ToyConfig:
    training: Training = field(
        default_factory=lambda: Training(epochs=20, lr=0.1, momentum=0.9, batch_size=32)
    )


@dataclass(frozen=True)
class ToyData:
    source: str = option("mini", "where data come from", choices=("mini", "local"))
    root: str | None = option(None, "folder of local data")
    noise: float = option(0.3, "spread of the points", low=0)


@dataclass(frozen=True)
class ToyModel:
    name: str = option("mlp", "architecture", choices=("mlp",))
    width: int = option(16, "hidden units", low=1, high=1024)


@dataclass(frozen=True)
class ToyRequest:
    count: int = option(24, "points to forget", low=0)
    note: str = option("", "free text")
    only: list[str] = option([], "names")


@BENCHMARKS.register("toy/points")
class ToyPoints(Benchmark):
    """Points in a plane, by quadrant.

    Nothing is downloaded and everything takes a moment.
    """

    name = "toy/points"
    citation = "none"
    config_type = ToyConfig
    data_type = ToyData
    model_type = ToyModel
    request_type = ToyRequest
    metrics = ("toy/loss",)
    attacks = ("toy/guess",)
    headline = ("loss/forget",)
    distance = "loss/forget"
    adapter = PointAdapter()

    def splits(self) -> Splits:
        forget, retain = Points("f", self.request.count, 1), Points("r", 96, 2)
        both = Both(forget, retain)
        return Splits(forget, retain, both, Points("h", 24, 3), Points("t", 48, 4))

    def fingerprint(self) -> Mapping[str, Any]:
        return {"width": self.model.width, "noise": self.data.noise}

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed % 2**31)
        width = self.model.width
        return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, CLASSES))

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "points.json").write_text(json.dumps(Points("f", 4, seed).x.tolist()))


@METRICS.register("toy/loss")
class ToyLoss(Metric):
    """Mean loss on each split."""

    citation = "none"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        values = {name: float(trial.view.numbers(name)["loss"].mean()) for name in ("forget",)}
        return {f"loss/{name}": MetricValue(v, "to_reference", n=1) for name, v in values.items()}


@METRICS.register("toy/count")
class ToyCount(Metric):
    """Number of test points."""

    citation = "none"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        return {"count": MetricValue(float(len(trial.splits.test)), "up")}


@dataclass(frozen=True)
class GuessConfig:
    queries: int = option(8, "points to look at", low=1)


@ATTACKS.register("toy/guess")
class Guess(Attack[GuessConfig]):
    """Look at the loss of a few points."""

    access = "grey"
    citation = "none"
    config_type = GuessConfig

    def budget(self) -> Budget:
        return Budget(queries=self.config.queries)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        loss = trial.view.numbers("forget")["loss"][: budget.queries]
        values = {"loss": MetricValue(float(loss.mean()), "to_reference", n=len(loss))}
        return AttackResult("grey", values, queries=len(loss), seconds=0.0)


@dataclass(frozen=True)
class PeekConfig(GuessConfig):
    label: str = option("x", "free text")


@ATTACKS.register("toy/peek")
class Peek(Guess):
    """The same under another name, outside the protocol."""

    config_type = PeekConfig


@METHODS.register("toy/elsewhere")
class Elsewhere(Supervised):
    """Serves another modality."""

    modalities = frozenset({"vision"})
