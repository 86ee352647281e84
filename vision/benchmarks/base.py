"""What the face benchmarks share: where data come from, requests, splits, samples."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from mmforget.checkpoint import state_sha
from mmforget.errors import ConfigError, DataError, SplitError, unknown
from mmforget.options import option
from mmforget.record import RunResult, disk_error
from mmforget.report.section import Section
from mmforget.rng import derive
from mmforget.types import Benchmark, Splits, Subset, Trial
from mmforget.vision import gallery, mini
from mmforget.vision.adapter import FaceAdapter
from mmforget.vision.images import ImageData, ImageFile, open_images
from mmforget.vision.models import ModelConfig, build_model

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".pgm", ".bmp", ".webp")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    source: str = option(
        "mini",
        "mini: portraits drawn here; local: a folder; hub: a Hugging Face data set",
        choices=("mini", "local", "hub"),
    )
    root: str | None = option(None, "folder in the published layout, for source=local")
    seed: int = option(0, "which mini world is drawn", low=0)
    repo: str | None = option(None, "data set id, for source=hub; null takes the published one")
    revision: str | None = option(None, "revision of the hub data set; null takes the newest")


@dataclass(frozen=True)
class IdentityRequest:
    """Who is to be forgotten."""

    kind: str = option(
        "published",
        "published: the benchmark's own split; identities: those listed; fraction: random ones",
        choices=("published", "identities", "fraction"),
    )
    identities: list[str] = option([], "for kind=identities: whom to forget")
    retain: list[str] = option([], "for kind=identities: whom to keep; empty keeps all others")
    fraction: float = option(0.1, "for kind=fraction: share of identities", low=0, high=1)
    seed: int = option(0, "for kind=fraction: seed of the choice", low=0)


class Row(NamedTuple):
    """One image as its benchmark lists it.

    Attributes:
        file: Id, path and place in the listing.
        label: Class index, or one 0 or 1 for each attribute.
        person: Whose face it is.
        group: What is split as a whole: a family, or the person.
        part: The published folder or range: "train", "test" or "unseen", or the benchmark's own.
    """

    file: ImageFile
    label: int | tuple[int, ...]
    person: str
    group: str
    part: str


class FaceBenchmark(Benchmark):
    """A benchmark of face images.

    A subclass says how a folder is read (`read`), who is in which split (`assign`) and what labels
    mean (`label_names`, `multilabel`).

    Attributes:
        published_repo: Hugging Face id of the data set; None where there is none.
        mini_name: Name of its mini world below the store.
    """

    data_type: ClassVar[type] = DataConfig
    model_type: ClassVar[type] = ModelConfig
    metrics: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "forgetting",
        "average_gap",
        "divergence",
        "agreement",
        "zrf",
        "representation",
        "probes",
        "cost",
    )
    attacks: ClassVar[tuple[str, ...]] = ("membership", "relearn")
    headline: ClassVar[tuple[str, ...]] = (
        "accuracy/forget",
        "accuracy/retain",
        "accuracy/test",
        "forgetting/mia_accuracy",
        "forgetting/nomus",
        "gap/average",
    )
    distance: ClassVar[str] = "gap/average"
    published_repo: ClassVar[str | None] = None
    mini_name: ClassVar[str]
    multilabel: bool = False

    def __init__(self, config: Any, data: Any, model: Any, request: Any, store: Path) -> None:
        super().__init__(config, data, model, request, store)
        self._revision = ""

    @abstractmethod
    def read(self, root: Path) -> list[Row]:
        """Return every image of a folder in the published layout, in the published order.

        Raises:
            DataError: The folder is not in that layout.
        """

    @abstractmethod
    def assign(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Return the rows of each split by name; names besides the fixed ones are probes.

        Raises:
            SplitError: The request names what is not there.
        """

    @abstractmethod
    def label_names(self) -> Sequence[str]:
        """Return what each class, or each attribute, is called; known once splits are read."""

    @classmethod
    @abstractmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world of a seed into `folder`, in the published layout."""

    def splits(self) -> Splits:
        """Read, decode and split the images; see `Benchmark.splits`."""
        rows = self.read(self._root())
        table = open_images([row.file for row in rows], self.config.image_size, self.store)
        parts = self.assign(rows)
        if self.config.dedup == "phash":
            parts = deduplicate(parts, table.perceptual_hashes())
        labels = np.array(
            [row.label for row in rows], dtype=np.float32 if self.multilabel else np.int64
        )
        persons = {name: k for k, name in enumerate(sorted({row.person for row in rows}))}
        identity = np.array([persons[row.person] for row in rows], dtype=np.int64)
        data = ImageData(table, labels, identity)
        self._revision = _revision(data)
        names = self.label_names()
        self.adapter = FaceAdapter(len(names), self.multilabel, self.config.augment == "published")
        named = {name: Subset(data, chosen) for name, chosen in parts.items()}
        fixed = {name: named.pop(name) for name in ("forget", "retain", "holdout", "test")}
        val = named.pop("val", None)
        train = Subset(data, sorted(parts["forget"] + parts["retain"]))
        return Splits(train=train, val=val, probes=named, **fixed)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return data revision, image size, transform and architecture; after `splits`."""
        model = asdict(self.model)
        if self.model.checkpoint is not None:
            model["checkpoint"] = state_sha(self.build(0))
        return {
            "data": self._revision,
            "image_size": self.config.image_size,
            "augment": self.config.augment,
            "model": model,
        }

    def build(self, seed: int) -> nn.Module:
        """Return a freshly initialised classifier; after `splits`."""
        return build_model(self.model, len(self.label_names()), seed)

    def samples(self, trial: Trial, folder: Path) -> None:
        """Write up to 24 forget images and what the model says about them."""
        gallery.write(trial, self.label_names(), self.multilabel, folder)

    @classmethod
    def sections(cls, runs: Sequence[RunResult]) -> Sequence[Section]:
        """Return the section that shows forget images before and after."""
        return gallery.sections(runs)

    def _root(self) -> Path:
        """Return the folder to read, drawing or downloading it when it is not there yet."""
        if self.data.source == "hub":
            return download(self.data.repo or self.published_repo, self.data.revision, self.name)
        if self.data.source == "local":
            if self.data.root is None:
                raise ConfigError(
                    f"data.source=local needs data.root: the folder of {self.name} in its "
                    f"published layout"
                )
            root = Path(self.data.root).expanduser()
            if not root.is_dir():
                raise DataError(f"data.root={root}: there is no such folder")
            return root
        return self._mini_world()

    def _mini_world(self) -> Path:
        name = f"{self.mini_name}-v{mini.VERSION}-s{self.data.seed}"
        parent = self.store / "mini"
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / name
        with FileLock(parent / f"{name}.lock"):
            if not folder.is_dir():
                write_whole(folder, lambda place: self.write_mini(place, self.data.seed))
        return folder


def write_whole(folder: Path, write: "Callable[[Path], None]") -> None:
    raise NotImplementedError
