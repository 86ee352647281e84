"""Captioned images in latent space: encoded once by a pipeline's own image codec, then mapped."""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from mmforget.checkpoint import state_sha
from mmforget.diffusion.models import DiffusionModel
from mmforget.images import ImageTable
from mmforget.progress import progress
from mmforget.record import disk_error

logger = logging.getLogger(__name__)

BATCH = 16  # images encoded together


class CaptionedLatents:
    """A `Dataset` of codec moments and captions.

    Args:
        ids: Stable ids.
        digests: Content hashes.
        moments: float32 [N, 2C, h, w]: mean and log-variance of the codec's posterior.
        captions: For each image its captions, the official one first.
        anchors: For each image the same captions with the anchor in the concept's place; empty
            where the request does not name the image.
    """

    def __init__(
        self,
        ids: Sequence[str],
        digests: Sequence[str],
        moments: npt.NDArray[np.float32],
        captions: Sequence[Sequence[str]],
        anchors: Sequence[Sequence[str]],
    ) -> None:
        self.ids = tuple(ids)
        self.digests = tuple(digests)
        self.moments = moments
        self.captions = captions
        self.anchors = anchors

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return `moments` [B, 2C, h, w], `captions` and `anchors`."""
        rows = np.asarray(indices, dtype=np.int64)
        return {
            "moments": torch.from_numpy(np.array(self.moments[rows])),
            "captions": [self.captions[i] for i in indices],
            "anchors": [self.anchors[i] for i in indices],
        }


def encode_table(model: DiffusionModel, table: ImageTable, store: Path) -> npt.NDArray[np.float32]:
    """Return the codec moments of a table's images, memory-mapped; encoded on first use.

    Args:
        model: Its codec encodes.
        table: uint8 images of the size the codec is used at.
        store: Folder for decoded data.

    Returns:
        float32 [N, 2C, h, w].

    Raises:
        ResourceError: The disk is full.
    """
    key = hashlib.sha256(f"{state_sha(model.vae)} {table.folder.name}".encode()).hexdigest()[:32]
    root = store / "latents"
    path = root / f"{key}.npy"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        if not path.is_file():
            temporary = root / f".{key}.part"
            try:
                _encode(model, table, temporary)
                temporary.rename(path)
            except OSError as error:
                raise disk_error(error, path) from error
            finally:
                if temporary.is_dir():
                    shutil.rmtree(temporary)
                temporary.unlink(missing_ok=True)
    found: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    return found


@torch.no_grad()
def _encode(model: DiffusionModel, table: ImageTable, path: Path) -> None:
    vae = model.vae
    dtype = next(vae.parameters()).dtype
    count = len(table.pixels)
    with path.open("wb") as out, progress("encode images", count) as advance:
        for start in range(0, count, BATCH):
            pixels = torch.from_numpy(np.array(table.pixels[start : start + BATCH]))
            images = pixels.to(model.device, dtype) / 127.5 - 1.0
            moments = vae.encode(images).latent_dist.parameters.float().cpu().numpy()
            if start == 0:
                header = {
                    "descr": "<f4",
                    "fortran_order": False,
                    "shape": (count, *moments[0].shape),
                }
                np.lib.format.write_array_header_1_0(out, header)
            out.write(moments.tobytes())
            advance(len(images))
