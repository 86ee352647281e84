"""Any folder of faces: the classifier says who it is, and persons or photos are forgotten."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from mmforget.errors import DataError, SplitError, unknown
from mmforget.images import ImageFile
from mmforget.options import option
from mmforget.rng import generator
from mmforget.types import Training
from mmforget.vision import mini
from mmforget.vision.benchmarks.base import SHOWN, FaceBenchmark, Row

SUFFIXES = (".jpg", ".jpeg", ".png", ".pgm", ".bmp", ".webp")
COLUMNS = ("image_path", "person")


@dataclass(frozen=True)
class FacesConfig:
    """Options of a folder of faces."""

    training: Training = option(
        Training(
            epochs=30,
            lr=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            batch_size=32,
            schedule="cosine",
            norm="train",
        ),
        "training recipe; the default suits folders of a few hundred photos and more",
    )
    image_size: int = option(128, "side of the images, pixels", low=8)
    augment: str = option("published", "training transform", choices=("published", "none"))
    dedup: str = option("none", "drop images of equal perceptual hash", choices=("none", "phash"))
    test_fraction: float = option(
        0.2, "share of each person's photos that is never trained on", low=0, high=0.9
    )
    split_seed: int = option(0, "seed of that choice", low=0)


@dataclass(frozen=True)
class FacesRequest:
    """Whom, or which photos, to forget; with both lists empty the first person."""

    persons: list[str] = option([], "persons: all their training photos are forgotten")
    images: list[str] = option([], "single training photos, such as anna/03.jpg")


class Faces(FaceBenchmark):
    """Identity classification on a folder with one sub-folder a person, or a CSV listing.

    Forgetting persons: holdout (and the probe `forget_test`) are other photos of these persons,
    test is the photos of the REMAINING persons. A forgotten person stays a class of the head that
    is no training label, so the retrained model's accuracy on them is 0 by construction.
    Forgetting photos: holdout is unseen photos of the same persons, test the unseen photos of all.
    """

    name: ClassVar[str] = "vision/faces"
    citation: ClassVar[str] = "user data; splits as described in the documentation of mmforget"
    config_type: ClassVar[type] = FacesConfig
    request_type: ClassVar[type] = FacesRequest
    allow_shared_content: ClassVar[bool] = True
    mini_name: ClassVar[str] = "faces"

    _persons: Sequence[str] = ()

    def read(self, root: Path) -> list[Row]:
        """Read `faces.csv`, or else the sub-folders; see `FaceBenchmark.read`."""
        listing = root / "faces.csv"
        named = read_listing(listing) if listing.is_file() else read_folders(root)
        self._persons = sorted({person for _, person, _ in named})
        if len(self._persons) < 2:
            raise DataError(f"{root} shows {len(self._persons)} persons; two or more are needed")
        parts = divide([person for _, person, _ in named], self.config)
        return [
            Row(
                file=ImageFile(image, root / image, place),
                label=self._persons.index(person),
                person=person,
                group=person,
                part=part,
            )
            for (image, person, place), part in zip(named, parts, strict=True)
        ]

    def assign(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Split by the request; see `FaceBenchmark.assign`."""
        return split_rows(rows, self.request)

    def label_names(self) -> Sequence[str]:
        """Return the persons; known once splits are read."""
        return self._persons

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world; see `mini.write_faces`."""
        mini.write_faces(folder, seed)


def read_folders(root: Path) -> list[tuple[str, str, str]]:
    """Return (image, person, place) of every image in the sub-folders, sorted.

    Raises:
        DataError: There is none.
    """
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                found.append((f"{folder.name}/{path.name}", folder.name, f"folder {folder.name}"))
    if not found:
        raise DataError(
            f"{root} holds neither faces.csv ({','.join(COLUMNS)}) nor sub-folders of images "
            f"({', '.join(SUFFIXES)}), one for each person"
        )
    return found


def read_listing(path: Path) -> list[tuple[str, str, str]]:
    """Return (image, person, place) of every row; images are relative to the file's folder.

    Raises:
        DataError: A column or a value is missing.
    """
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or []
        if any(column not in columns for column in COLUMNS):
            raise DataError(
                f"{path} has the columns {', '.join(columns) or 'none'}; needed are "
                f"{', '.join(COLUMNS)}"
            )
        found = []
        for number, line in enumerate(reader, start=2):
            place = f"{path.name} row {number}"
            if not line["image_path"] or not line["person"]:
                raise DataError(f"{place}: image_path and person must both be given")
            found.append((line["image_path"], line["person"], place))
    return found


def divide(persons: Sequence[str], config: FacesConfig) -> list[str]:
    """Return "train" or "test" for each photo: a seeded share of every person's photos is test.

    Raises:
        DataError: A person has too few photos to be in both.
    """
    parts = ["train"] * len(persons)
    few = []
    photos: dict[str, list[int]] = {}
    for i, person in enumerate(persons):
        photos.setdefault(person, []).append(i)
    for person, own in photos.items():
        if len(own) < 2:
            few.append(person)
            continue
        count = min(len(own) - 1, max(1, round(config.test_fraction * len(own))))
        order = torch.randperm(len(own), generator=generator(config.split_seed, "test", person))
        for k in order[:count].tolist():
            parts[own[k]] = "test"
    if few:
        raise DataError(
            f"{len(few)} persons have a single photo, such as {', '.join(few[:SHOWN])}; each needs "
            f"one to train on and one that stays unseen"
        )
    return parts


def split_rows(rows: Sequence[Row], request: FacesRequest) -> dict[str, list[int]]:
    """Return the rows of forget, retain, test, holdout and the probe forget_test.

    Raises:
        SplitError: The request names someone unknown, a photo that is not trained on, or everyone.
    """
    if request.persons and request.images:
        raise SplitError("request.persons and request.images are both given; give one of them")
    train = [i for i, row in enumerate(rows) if row.part == "train"]
    test = [i for i, row in enumerate(rows) if row.part == "test"]
    if request.images:
        forget = _images(rows, train, request.images)
        persons = {rows[i].person for i in forget}
        holdout = [i for i in test if rows[i].person in persons]
        retain = sorted(set(train) - set(forget))
        return {"forget": forget, "retain": retain, "holdout": holdout, "test": test}
    known = sorted({row.person for row in rows})
    persons = set(request.persons or known[:1])
    for person in persons:
        if person not in known:
            raise SplitError(unknown("person in the request:", person, known, "the data folder"))
    if len(persons) == len(known):
        raise SplitError("the request forgets every person; at least one must be kept")
    unseen = [i for i in test if rows[i].person in persons]
    return {
        "forget": [i for i in train if rows[i].person in persons],
        "retain": [i for i in train if rows[i].person not in persons],
        "holdout": unseen,
        "test": [i for i in test if rows[i].person not in persons],
        "forget_test": unseen,
    }


def _images(rows: Sequence[Row], train: Sequence[int], images: Sequence[str]) -> list[int]:
    place = {row.file.id: i for i, row in enumerate(rows)}
    trained = set(train)
    for image in images:
        if image not in place:
            raise SplitError(unknown("image in the request:", image, place, "the data folder"))
        if place[image] not in trained:
            raise SplitError(
                f"image {image!r} was drawn as a test photo and is never trained on, so there is "
                f"nothing to forget; choose another or change benchmark.split_seed"
            )
    return sorted({place[image] for image in images})
