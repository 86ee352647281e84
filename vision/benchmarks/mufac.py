"""MUFAC: eight age classes of Korean families; whole families are forgotten (arXiv 2311.02240)."""

import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from mmforget.errors import DataError, SplitError
from mmforget.images import ImageFile
from mmforget.options import option
from mmforget.types import Training
from mmforget.vision import mini
from mmforget.vision.benchmarks.base import (
    FaceBenchmark,
    IdentityRequest,
    Row,
    find_layout,
    hold_back,
    split_by_request,
)

logger = logging.getLogger(__name__)

LETTERS = "abcdefgh"
AGES = ("0-6", "7-12", "13-19", "20-30", "31-45", "46-55", "56-66", "67-80")
LABEL_COLUMNS = ("age_class", "age_group")  # the zip; the Hugging Face variant
COUNTS = {"train": 10_025, "val": 1_539, "test": 1_504}
FOLDERS = {
    "train": (
        "train_images",
        "train_images_part1",
        "train_images_part2",
        "forget_images",
        "retain_images",
    ),
    "val": ("val_images",),
    "test": ("test_images",),
}
NAME = re.compile(r"(?P<family>F\d{4})_AGE_(?P<role>[A-Z]+\d*)_\d+_(?P<letter>[a-h])\d+\.\w+")


@dataclass(frozen=True)
class MUFACConfig:
    """Options of MUFAC; the defaults are the published recipe."""

    training: Training = option(
        Training(
            epochs=30,
            lr=0.01,
            momentum=0.9,
            batch_size=64,
            schedule="step",
            milestones=[10, 20],
            norm="train",
        ),
        "published: SGD, momentum 0.9, learning rate 0.01 / 10 at epochs 10 and 20, 30 epochs",
    )
    image_size: int = option(128, "side of the images, pixels", low=8)
    augment: str = option("published", "training transform", choices=("published", "none"))
    dedup: str = option(
        "none",
        "drop images of equal perceptual hash (the data hold many)",
        choices=("none", "phash"),
    )
    val_fraction: float = option(
        0.0, "share of the test families set apart for tuning", low=0, high=0.9
    )


@dataclass(frozen=True)
class MUFACRequest(IdentityRequest):
    """Who is to be forgotten: families such as F0001, or persons such as F0001_D."""

    n: int = option(1500, "for kind=published: the first n rows of the training CSV", low=1)


class MUFACName(NamedTuple):
    """What a MUFAC file name says: the number in it is the present age, not that of the photo."""

    family: str
    role: str
    letter: str


class MUFAC(FaceBenchmark):
    """Machine Unlearning for Facial Age Classifier.

    Forgotten are the first 1,500 training rows (the cut may fall within a family, as published);
    `val_images` are the test set, `test_images` were never seen by anyone (holdout).
    """

    name: ClassVar[str] = "vision/mufac"
    citation: ClassVar[str] = (
        "Choi and Na, Towards Machine Unlearning Benchmarks: Forgetting the Personal Identities "
        "in Facial Recognition Systems, arXiv 2311.02240"
    )
    config_type: ClassVar[type] = MUFACConfig
    request_type: ClassVar[type] = MUFACRequest
    allow_shared_content: ClassVar[bool] = True
    published_repo: ClassVar[str | None] = "Dasool/MUFAC"
    mini_name: ClassVar[str] = "mufac"

    def read(self, root: Path) -> list[Row]:
        """Read the three CSV files; see `FaceBenchmark.read`."""
        root = find_layout(root, ("custom_train_dataset.csv",))
        rows = []
        for part in FOLDERS:
            found = read_csv(root / f"custom_{part}_dataset.csv", part)
            if self.data.source != "mini" and len(found) != COUNTS[part]:
                logger.warning(
                    "MUFAC: %d rows in custom_%s_dataset.csv; published are %d",
                    len(found),
                    part,
                    COUNTS[part],
                )
            rows += found
        return rows

    def assign(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Split by the request; see `FaceBenchmark.assign`."""
        return split_rows(rows, self.request, self.config.val_fraction)

    def label_names(self) -> Sequence[str]:
        """Return the age spans in years."""
        return AGES

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world; see `mini.write_mufac`."""
        mini.write_mufac(folder, seed)


def parse_name(name: str) -> MUFACName | None:
    """Return what a file name says; None if it does not follow the published pattern."""
    match = NAME.fullmatch(name)
    return MUFACName(match["family"], match["role"], match["letter"]) if match else None


def read_csv(path: Path, part: str) -> list[Row]:
    """Return the rows of one CSV file in its order; images are looked up beside it.

    Args:
        path: Such as custom_train_dataset.csv.
        part: train, val or test.

    Raises:
        DataError: The file, a column, a label or a file name is not as published.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; MUFAC has custom_train, _val and _test_dataset.csv")
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        columns = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = columns
        labels = [column for column in LABEL_COLUMNS if column in columns]
        if "image_path" not in columns or not labels:
            raise DataError(
                f"{path.name} has the columns {', '.join(columns) or 'none'}; needed are "
                f"image_path and one of {', '.join(LABEL_COLUMNS)}"
            )
        entries = [(line["image_path"], line[labels[0]]) for line in reader]
    folders = [path.parent / name for name in FOLDERS[part]]
    folders = [folder for folder in folders if folder.is_dir()] or folders[:1]
    rows = []
    for number, (image, letter) in enumerate(entries, start=2):  # row 1 names the columns
        place = f"{path.name} row {number}"
        name = Path((image or "").strip()).name
        parsed = parse_name(name)
        if parsed is None:
            raise DataError(
                f"{place}: image_path {image!r} is not named like F0001_AGE_D_18_a1.jpg"
            )
        letter = (letter or "").strip()
        if len(letter) != 1 or letter not in LETTERS:
            raise DataError(f"{place}: {labels[0]} {letter!r}; accepted are the letters a to h")
        found = next((f / name for f in folders if (f / name).is_file()), folders[0] / name)
        rows.append(
            Row(
                file=ImageFile(name, found, place),
                label=LETTERS.index(letter),
                person=f"{parsed.family}_{parsed.role}",
                group=parsed.family,
                part=part,
            )
        )
    return rows


def split_rows(
    rows: Sequence[Row], request: MUFACRequest, val_fraction: float = 0.0
) -> dict[str, list[int]]:
    """Return the rows of forget, retain, test, holdout and, if asked for, val.

    Raises:
        SplitError: The request names what is not there or leaves nothing to keep.
    """
    train = [i for i, row in enumerate(rows) if row.part == "train"]
    if request.kind == "published":
        if request.n >= len(train):
            raise SplitError(
                f"request.n={request.n} leaves no image to keep: only {len(train)} are trained on"
            )
        forget, retain = train[: request.n], train[request.n :]
    else:
        forget, retain = split_by_request(rows, train, request)
    parts = {
        "forget": forget,
        "retain": retain,
        "test": [i for i, row in enumerate(rows) if row.part == "val"],
        "holdout": [i for i, row in enumerate(rows) if row.part == "test"],
    }
    if val_fraction > 0:
        parts["test"], parts["val"] = hold_back(rows, parts["test"], val_fraction)
    return parts
