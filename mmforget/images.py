"""Images decoded once into one memory-mapped array, shared by every run and process.

A listing of image files becomes a folder below `store/images`, named by a hash of the listing
(names, sizes, modification times, image size): `pixels.npy` uint8 [N, 3, S, S], memory-mapped, and
`digests.npy`, a SHA-256 of each image's own decoded pixels. The folder is filled under a lock and
renamed into place, so a killed process leaves nothing half-made.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from PIL import Image

from mmforget.errors import DataError
from mmforget.progress import progress
from mmforget.record import disk_error, writing

logger = logging.getLogger(__name__)

VERSION = 1  # raised when decoding or resizing changes, so that old tables are made anew
CHUNK = 256  # images decoded between two writes
SHOWN = 5  # names listed in an error


class ImageFile(NamedTuple):
    """One image of a listing.

    Attributes:
        id: Stable id, unique in the listing.
        path: The file.
        place: Where it is listed, such as "custom_train_dataset.csv row 12"; for messages.
    """

    id: str
    path: Path
    place: str


@dataclass(frozen=True)
class ImageTable:
    """Decoded images.

    Attributes:
        ids: Ids in listing order.
        pixels: uint8 [N, 3, S, S], memory-mapped.
        digests: SHA-256 of each image's decoded pixels and size, before resizing.
        folder: Where it is stored.
    """

    ids: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]
    digests: tuple[str, ...]
    folder: Path

    def perceptual_hashes(self) -> list[int]:
        """Return the 64-bit perceptual hash (imagehash.phash) of each image; computed once."""
        path = self.folder / "phash.npy"
        if not path.is_file():
            with ThreadPoolExecutor(_workers()) as pool:
                hashes = np.array(list(pool.map(_phash, self.pixels)), dtype=np.uint64)
            with writing(path) as temporary:
                np.save(temporary, hashes)
        return [int(value) for value in np.load(path)]


def open_images(files: Sequence[ImageFile], size: int, store: Path) -> ImageTable:
    """Return the decoded table of a listing, made on first use.

    Each image is converted to RGB and resized (bilinear) so that its shorter side is `size`; an
    image that is not square is then cropped about its centre, which is logged.

    Args:
        files: The listing; order is kept.
        size: Side of the stored images, pixels.
        store: Folder for decoded data.

    Raises:
        DataError: Files are missing, empty or cannot be decoded, or two have the same id.
        ResourceError: The disk is full.
    """
    ids = tuple(file.id for file in files)
    _check_listing(files, ids)
    root = store / "images"
    folder = root / _key(files, size)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.is_dir():
            temporary = root / f".{folder.name}.part"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                _decode_all(files, size, temporary)
                temporary.rename(folder)
            except OSError as error:
                raise disk_error(error, folder) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    digests = tuple(np.load(folder / "digests.npy").tolist())
    return ImageTable(ids, pixels, digests, folder)


def decode(path: Path, size: int) -> tuple[npt.NDArray[np.uint8], str, bool]:
    """Return one image as uint8 [3, size, size], the digest of its own pixels, and if it was cut.

    Raises:
        OSError: No readable image; PIL raises SyntaxError or ValueError for some broken files.
    """
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    width, height = image.size
    if min(width, height) != size:
        short = min(width, height)
        image = image.resize(
            (int(size * width / short), int(size * height / short)), Image.Resampling.BILINEAR
        )
        width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image)[top : top + size, left : left + size]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), digest, width != height


def _check_listing(files: Sequence[ImageFile], ids: tuple[str, ...]) -> None:
    if not files:
        raise DataError("the listing names no image; check the data folder")
    seen: dict[str, str] = {}
    for file in files:
        if file.id in seen:
            raise DataError(
                f"image {file.id!r} is listed twice: {seen[file.id]} and {file.place}; "
                f"remove one of the rows"
            )
        seen[file.id] = file.place
    missing = [file for file in files if not file.path.is_file()]
    if missing:
        raise DataError(_listed(f"{len(missing)} of {len(ids)} images are missing", missing))


def _listed(what: str, files: Sequence[ImageFile], reasons: Sequence[str] = ()) -> str:
    lines = [f"{file.path} ({file.place})" for file in files[:SHOWN]]
    if reasons:
        lines = [f"{line}: {reason}" for line, reason in zip(lines, reasons, strict=False)]
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{what}: {'; '.join(lines)}{more}. Restore the files or drop their rows"


def _key(files: Sequence[ImageFile], size: int) -> str:
    text = hashlib.sha256(f"{VERSION} {size}".encode())
    for file in files:
        status = file.path.stat()
        text.update(f"\n{file.id}\t{status.st_size}\t{status.st_mtime_ns}".encode())
    return text.hexdigest()[:32]


def _decode_all(files: Sequence[ImageFile], size: int, folder: Path) -> None:
    """Fill a folder; rows are appended, so a full disk is an error and never a torn mapping."""
    digests: list[str] = []
    bad: list[ImageFile] = []
    reasons: list[str] = []
    cropped = 0
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, size, size)}

    def read(file: ImageFile) -> tuple[npt.NDArray[np.uint8], str, bool] | str:
        try:
            return decode(file.path, size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return str(error)

    with (
        (folder / "pixels.npy").open("wb") as out,
        ThreadPoolExecutor(_workers()) as pool,
        progress("decode images", len(files)) as advance,
    ):
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            for file, found in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(found, str):
                    bad.append(file)
                    reasons.append(found)
                    continue
                pixels, digest, cut = found
                out.write(pixels.tobytes())
                digests.append(digest)
                cropped += cut
            advance(len(chunk))
    if bad:
        what = f"{len(bad)} of {len(files)} images cannot be read"
        raise DataError(_listed(what, bad, reasons))
    if cropped:
        logger.warning("%d of %d images are not square: cropped to the centre", cropped, len(files))
    np.save(folder / "digests.npy", np.array(digests))


def _phash(pixels: npt.NDArray[np.uint8]) -> int:
    import imagehash

    found = imagehash.phash(Image.fromarray(pixels.transpose(1, 2, 0)))
    return int(str(found), 16)


def _workers() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
