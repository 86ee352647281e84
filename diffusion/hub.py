"""The published UnlearnCanvas table, written once as the folder copy."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from mmforget.diffusion import canvas
from mmforget.sources import hub_dataset, mini_world


def snapshot(repo: str, revision: str | None, store: Path) -> Path:
    """Return a hub data set as `{Style}/{Object}/{k}.jpg`, downloaded and unpacked once.

    The table's rows have no k: it counts the images of a style and object in stored order.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        DataError: It cannot be downloaded, or holds other columns or captions.
    """
    return unpack(hub_dataset(repo, revision, "diffusion"), store)


def unpack(table: Path, store: Path) -> Path:
    """Return the folder copy of a table of parquet shards, written below `store` on first use."""
    place = store / "unlearncanvas" / table.name

    def write(folder: Path, _: int) -> None:
        for image in _rows(table):
            path = folder / image.style / image.object / f"{image.number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image.encoded, bytes):
                path.write_bytes(image.encoded)
            else:
                shutil.copyfile(image.encoded, path)

    return mini_world(place, write, 0)


def _rows(table: Path) -> Iterator[canvas.EncodedImage]:
    yield from canvas.read_parquet(table)
