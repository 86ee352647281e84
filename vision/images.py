"""Labelled images: a decoded table with a class, attributes and, where known, a person each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmforget.images import ImageTable


class ImageData:
    """A `Dataset` of images, labels and, where known, whose face it is.

    Args:
        table: The images.
        labels: Class indices int64 [N], or attributes float32 [N, A] in {0, 1}.
        identity: Person indices int64 [N]; None where persons are not known.
    """

    def __init__(
        self,
        table: ImageTable,
        labels: npt.NDArray[Any],
        identity: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.table = table
        self.labels = labels
        self.identity = identity
        self.ids = table.ids
        self.digests = table.digests

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return `image` uint8 [B, 3, S, S], `label` [B] or [B, A], and `identity` [B] if known."""
        rows = np.asarray(indices, dtype=np.int64)
        batch = {
            "image": torch.from_numpy(self.table.pixels[rows]),
            "label": torch.from_numpy(self.labels[rows]),
        }
        if self.identity is not None:
            batch["identity"] = torch.from_numpy(self.identity[rows])
        return batch


def to_float(image: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]: the published evaluation transform (ToTensor)."""
    return image.float().mul_(1.0 / 255.0)
