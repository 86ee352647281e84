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
from torch import nn

from mmforget.checkpoint import state_sha
from mmforget.errors import ConfigError, DataError, MissingDependencyError, SplitError, unknown
from mmforget.images import ImageFile, open_images
from mmforget.options import option
from mmforget.record import MetricValue, RunResult
from mmforget.report.section import Section
from mmforget.rng import generator
from mmforget.sources import local_folder, mini_world
from mmforget.types import Benchmark, Splits, Subset, Trial
from mmforget.vision import gallery, mini
from mmforget.vision.adapter import FaceAdapter
from mmforget.vision.images import ImageData
from mmforget.vision.models import ModelConfig, build_model

logger = logging.getLogger(__name__)

SHOWN = 6  # names listed in an error
PRECEDENCE = ("retain", "forget", "holdout", "test", "val")  # which of two equal images stays


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
        named: dict[str, Any] = {name: Subset(data, chosen) for name, chosen in parts.items()}
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

    def collapsed(self, metrics: Mapping[str, MetricValue]) -> str | None:
        """Return why the utility is gone: a constant prediction would do as well."""
        accuracy, floor = metrics.get("accuracy/test"), metrics.get("accuracy/constant_predictor")
        if accuracy is None or floor is None or accuracy.value > floor.value:
            return None
        return (
            f"test accuracy {accuracy.value:.3f} does not beat a constant prediction "
            f"({floor.value:.3f})"
        )

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
            return local_folder(self.data.root, self.name)
        world = f"{self.mini_name}-v{mini.VERSION}-s{self.data.seed}"
        return mini_world(self.store / "mini" / world, self.write_mini, self.data.seed)


def download(repo: str | None, revision: str | None, benchmark: str) -> Path:
    """Return the local snapshot of a Hugging Face data set, downloaded once by its own cache.

    Raises:
        ConfigError: There is no published id and none is given.
        DataError: It cannot be downloaded: no network, no access, no such data set.
    """
    if repo is None:
        raise ConfigError(
            f"{benchmark} is not published on the hub. Give data.repo=OWNER/NAME, or obtain the "
            f"data and say data.source=local data.root=FOLDER"
        )
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise MissingDependencyError("huggingface_hub", "vision") from error
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"data set {repo} cannot be downloaded ({reason}). Check the network and the id, or "
            f"download it elsewhere and say data.source=local data.root=FOLDER"
        ) from error


def split_by_request(
    rows: Sequence[Row], train: Sequence[int], request: IdentityRequest
) -> tuple[list[int], list[int]]:
    """Return forget and retain rows of a request of kind `identities` or `fraction`.

    Args:
        rows: All rows.
        train: The rows that are trained on.
        request: Whom to forget; names are groups (families) or persons.

    Raises:
        SplitError: A name is unknown, or someone is to be both forgotten and kept.
    """
    if request.kind == "fraction":
        groups = sorted({rows[i].group for i in train})
        order = torch.randperm(len(groups), generator=generator(request.seed, "request")).tolist()
        count = max(1, round(request.fraction * len(groups)))
        chosen = {groups[k] for k in order[:count]}
        return _divide(train, [rows[i].group in chosen for i in train])
    if not request.identities:
        raise SplitError("request.kind=identities needs request.identities=[...]: whom to forget")
    forget = _rows_of(rows, train, request.identities)
    if not request.retain:
        return _divide(train, [i in forget for i in train])
    retain = _rows_of(rows, train, request.retain)
    both = forget & retain
    if both:
        names = sorted({rows[i].person for i in both})
        raise SplitError(
            f"{', '.join(names[:SHOWN])} ({len(names)} in all) are in both request.identities and "
            f"request.retain; a person is either forgotten or kept"
        )
    return sorted(forget), sorted(retain)


def hold_back(
    rows: Sequence[Row], test: Sequence[int], fraction: float
) -> tuple[list[int], list[int]]:
    """Return test rows without, and validation rows of, a fixed share of the test groups."""
    groups = sorted({rows[i].group for i in test})
    order = torch.randperm(len(groups), generator=generator(0, "validation")).tolist()
    chosen = {groups[k] for k in order[: round(fraction * len(groups))]}
    val, kept = _divide(test, [rows[i].group in chosen for i in test])
    return kept, val


def deduplicate(parts: Mapping[str, list[int]], hashes: Sequence[int]) -> dict[str, list[int]]:
    """Return splits without images of equal perceptual hash.

    Within a split the first stays. Across splits the one that stays is in retain before forget,
    training before holdout before test, so that nothing unseen looks like something trained on.
    (The rule whose counts the LoTUS clean-up of MUFAC reports.)

    Args:
        parts: Split name -> rows.
        hashes: Perceptual hash of each row.
    """
    kept: dict[str, list[int]] = {}
    seen: set[int] = set()
    for name in (name for name in PRECEDENCE if name in parts):
        first = {hashes[i]: i for i in reversed(parts[name])}
        kept[name] = sorted(i for value, i in first.items() if value not in seen)
        seen |= first.keys()
        removed = len(parts[name]) - len(kept[name])
        logger.info("dedup=phash removed %d of %d %s images", removed, len(parts[name]), name)
    left = {i for chosen in kept.values() for i in chosen}
    probes = {name: [i for i in chosen if i in left] for name, chosen in parts.items()}
    return {**probes, **kept}


def find_layout(root: Path, marks: Sequence[str]) -> Path:
    """Return `root` or its one sub-folder that holds a file or folder named in `marks`.

    Raises:
        DataError: Neither does.
    """
    for folder in [root, *sorted(path for path in root.iterdir() if path.is_dir())]:
        if any((folder / mark).exists() for mark in marks):
            return folder
    held = ", ".join(sorted(path.name for path in root.iterdir())[:SHOWN]) or "nothing"
    raise DataError(f"{root} holds no {' or '.join(marks)} but {held}; give the published folder")


def _rows_of(rows: Sequence[Row], train: Sequence[int], names: Sequence[str]) -> set[int]:
    places: dict[str, set[int]] = {}
    for i in train:
        places.setdefault(rows[i].group, set()).add(i)
        places.setdefault(rows[i].person, set()).add(i)
    for name in names:
        if name not in places:
            raise SplitError(
                unknown("identity in the request:", name, places, "the data's listing")
            )
    return {i for name in names for i in places[name]}


def _divide(items: Sequence[int], chosen: Sequence[bool]) -> tuple[list[int], list[int]]:
    pairs = list(zip(items, chosen, strict=True))
    return [i for i, yes in pairs if yes], [i for i, yes in pairs if not yes]


def _revision(data: ImageData) -> str:
    """Return a hash of ids, contents and labels: what training can see of the data."""
    text = hashlib.sha256("\n".join((*data.ids, *data.digests)).encode())
    text.update(data.labels.tobytes())
    return text.hexdigest()
