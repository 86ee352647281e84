"""MUCAC: attributes of celebrity faces; whole persons are forgotten (arXiv 2311.02240)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from mmforget.errors import DataError
from mmforget.images import ImageFile
from mmforget.options import option
from mmforget.types import Dataset, Splits, Training
from mmforget.vision import mini
from mmforget.vision.benchmarks.base import (
    SHOWN,
    FaceBenchmark,
    IdentityRequest,
    Row,
    find_layout,
    hold_back,
    split_by_request,
)

if TYPE_CHECKING:
    from mmforget.engine import Engine

logger = logging.getLogger(__name__)

ATTRIBUTES = ("Male", "Smiling", "Young")
TASKS = {"multi": None, "male": 0, "smiling": 1, "young": 2}
IMAGES = 30_000
MISSING = 0.01  # share of images that may be missing: a published run had 29,900 files
IDENTITY_FILES = ("CelebA-HQ-identity.txt",)
ATTRIBUTE_FILES = ("CelebA-HQ-attribute.txt", "CelebAMask-HQ-attribute-anno.txt")


@dataclass(frozen=True)
class MUCACConfig:
    """Options of MUCAC; the defaults are the published recipes."""

    task: str = option(
        "multi",
        "multi: three attributes at once (sigmoid); or one of them as two classes (softmax)",
        choices=("multi", "male", "smiling", "young"),
    )
    training: Training = option(
        Training(epochs=8, lr=0.01, batch_size=64, norm="train"),
        "for task=multi; published: SGD without momentum, learning rate 0.01, 8 epochs",
    )
    training_binary: Training = option(
        Training(epochs=10, lr=0.01, momentum=0.9, batch_size=64, norm="train"),
        "for the other tasks; published: SGD, momentum 0.9, learning rate 0.01, 10 epochs",
    )
    reference: bool = option(
        False,
        "retrain by the weaker published recipe (multi: 7 epochs; else SGD without momentum at "
        "0.001) instead of by that of the original model",
    )
    image_size: int = option(128, "side of the images, pixels", low=8)
    augment: str = option("published", "training transform", choices=("published", "none"))
    dedup: str = option("none", "drop images of equal perceptual hash", choices=("none", "phash"))
    val_fraction: float = option(
        0.0, "share of the test persons set apart for tuning", low=0, high=0.9
    )


class MUCAC(FaceBenchmark):
    """Machine Unlearning for Celebrity Attribute Classifier.

    Split by identity number. Forget and unseen persons are not alike (9.6 against 1.5 images each,
    other attribute rates), so read attacks of forget against holdout beside the retrained model.
    """

    name: ClassVar[str] = "vision/mucac"
    citation: ClassVar[str] = (
        "Choi and Na, Towards Machine Unlearning Benchmarks: Forgetting the Personal Identities "
        "in Facial Recognition Systems, arXiv 2311.02240"
    )
    config_type: ClassVar[type] = MUCACConfig
    request_type: ClassVar[type] = IdentityRequest
    allow_shared_content: ClassVar[bool] = True
    mini_name: ClassVar[str] = "mucac"

    def __init__(self, config: Any, data: Any, model: Any, request: Any, store: Path) -> None:
        """Keep the configs; see `Benchmark`."""
        super().__init__(config, data, model, request, store)
        self.multilabel = config.task == "multi"
        self._retain: frozenset[str] = frozenset()

    @property
    def training(self) -> Training:
        """The recipe of the task."""
        chosen: Training = self.config.training if self.multilabel else self.config.training_binary
        return chosen

    def splits(self) -> Splits:
        """Read, decode and split the images; see `Benchmark.splits`."""
        found = super().splits()
        self._retain = frozenset(found.retain.ids)
        return found

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what decides the weights, the task included; after `splits`."""
        chosen = {"task": self.config.task, "reference": self.config.reference}
        return {**super().fingerprint(), **chosen}

    def train(
        self, engine: "Engine", model: nn.Module, data: Dataset, seed: int, state: Path | None
    ) -> nn.Module:
        """Train by the task's recipe; see `Benchmark.train`."""
        from mmforget.training import fit

        training = self.training
        if self.config.reference and frozenset(data.ids) == self._retain:
            training = published_retrain(training, self.multilabel)
        return fit(engine, model, self.adapter, data, training, seed, state)

    def read(self, root: Path) -> list[Row]:
        """Read the two text files; see `FaceBenchmark.read`."""
        base = find_layout(root, IDENTITY_FILES)
        folder = find_layout(root, ("CelebA-HQ-img",)) / "CelebA-HQ-img"
        attributes = next((base / n for n in ATTRIBUTE_FILES if (base / n).is_file()), None)
        if attributes is None:
            attributes = find_layout(root, ATTRIBUTE_FILES) / ATTRIBUTE_FILES[0]
        rows = read_rows(base / IDENTITY_FILES[0], attributes, folder, self.config.task)
        there = {path.name for path in folder.iterdir()}
        kept = [row for row in rows if row.file.id in there]
        missing = len(rows) - len(kept)
        if missing > MISSING * len(rows):
            first = [row.file.id for row in rows if row.file.id not in there][:SHOWN]
            raise DataError(
                f"{missing} of the {len(rows)} images that {IDENTITY_FILES[0]} lists are not in "
                f"{folder}, such as {', '.join(first)}; unpack the data set again"
            )
        if missing:
            logger.warning("MUCAC: %d of %d images are missing and left out", missing, len(rows))
        if self.data.source != "mini" and len(rows) != IMAGES:
            logger.warning("MUCAC: %d images are listed; published are %d", len(rows), IMAGES)
        return kept

    def assign(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Split by the request; see `FaceBenchmark.assign`."""
        return split_rows(rows, self.request, self.config.val_fraction)

    def label_names(self) -> Sequence[str]:
        """Return the attributes, or the two classes."""
        if self.config.task == "multi":
            return [name.lower() for name in ATTRIBUTES]
        return (f"not {self.config.task}", self.config.task)

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world; see `mini.write_mucac`."""
        mini.write_mucac(folder, seed)


def published_retrain(training: Training, multilabel: bool) -> Training:
    """Return the recipe of the published retrained models: weaker than the original's."""
    if multilabel:
        return replace(training, epochs=max(1, training.epochs - 1))
    return replace(training, lr=training.lr / 10, momentum=0.0)


def part_of(identity: int) -> str:
    """Return the published split of a person: test, forget, retain or unseen."""
    if identity < 190:
        return "test"
    if identity < 1250:
        return "forget"
    return "retain" if identity < 4855 else "unseen"


def read_rows(identities: Path, attributes: Path, folder: Path, task: str) -> list[Row]:
    """Return a row for each image, by number.

    Args:
        identities: Lines `<n>.jpg <person>`.
        attributes: A count, the attribute names, then lines `<n>.jpg` and -1 or 1 for each name.
        folder: Where the images are.
        task: Which labels: "multi" or one attribute in lower case.

    Raises:
        DataError: A file is not in that form, or the two name different images.
    """
    person = _read_identities(identities)
    values = _read_attributes(attributes)
    if person.keys() != values.keys():
        odd = sorted(person.keys() ^ values.keys())
        raise DataError(
            f"{identities.name} and {attributes.name} disagree on {len(odd)} images, such as "
            f"{', '.join(odd[:SHOWN])}; use the files of one release"
        )
    chosen = TASKS[task]
    rows = []
    for name in sorted(person, key=lambda n: int(n.partition(".")[0])):
        label = values[name] if chosen is None else values[name][chosen]
        identity = person[name]
        file = ImageFile(name, folder / name, f"{identities.name}, {name}")
        rows.append(Row(file, label, str(identity), str(identity), part_of(identity)))
    return rows


def split_rows(
    rows: Sequence[Row], request: IdentityRequest, val_fraction: float = 0.0
) -> dict[str, list[int]]:
    """Return the rows of forget, retain, test, holdout and, if asked for, val.

    Raises:
        SplitError: The request names what is not there.
    """
    by = {part: [i for i, row in enumerate(rows) if row.part == part] for part in _PARTS}
    parts = {"test": by["test"], "holdout": by["unseen"]}
    if request.kind == "published":
        parts |= {"forget": by["forget"], "retain": by["retain"]}
    else:
        train = sorted(by["forget"] + by["retain"])
        parts["forget"], parts["retain"] = split_by_request(rows, train, request)
    if val_fraction > 0:
        parts["test"], parts["val"] = hold_back(rows, parts["test"], val_fraction)
    return parts


_PARTS = ("test", "forget", "retain", "unseen")


def _read_identities(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdecimal() or not _numbered(fields[0]):
            raise DataError(f"{path.name} line {number}: {line!r}; expected `<n>.jpg <person>`")
        if fields[0] in found:
            raise DataError(f"{path.name} line {number}: {fields[0]} is listed twice")
        found[fields[0]] = int(fields[1])
    return found


def _read_attributes(path: Path) -> dict[str, tuple[int, ...]]:
    lines = path.read_text().splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    lacking = [name for name in ATTRIBUTES if name not in names]
    if lacking:
        raise DataError(
            f"{path.name} line 2 names no {', '.join(lacking)}; expected a count, then the "
            f"40 attribute names of CelebA"
        )
    places = [1 + names.index(name) for name in ATTRIBUTES]
    found: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(lines[2:], start=3):
        fields = line.split()
        if len(fields) != 1 + len(names) or not set(fields[1:]) <= {"-1", "1"}:
            raise DataError(
                f"{path.name} line {number}: expected a file name and {len(names)} values, "
                f"each -1 or 1"
            )
        found[fields[0]] = tuple(int(fields[place] == "1") for place in places)
    return found


def _numbered(name: str) -> bool:
    return name.partition(".")[0].isdecimal()
