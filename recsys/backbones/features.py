"""Image and text features of items, shared by a model's copies, and the graph of similar items."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import ConfigError, DataError
from mmforget.recsys.graph import csr

logger = logging.getLogger(__name__)

NAMES = ("image", "text")
CELLS = 16_000_000  # similarities held at once: 64 MB


class ItemFeatures:
    """Features of all items, one row an item; immutable and shared by copies.

    Args:
        tensors: "image" [I, dv], "text" [I, dt], or both.
        items: Number of items I.

    Raises:
        ConfigError: There are none, or others.
        DataError: A tensor has another number of rows, or values that are not finite.

    Attributes:
        names: Those there are; image before text.
    """

    def __init__(self, tensors: Mapping[str, Tensor], items: int) -> None:
        strange = sorted(tensors.keys() - set(NAMES))
        if strange or not tensors:
            raise ConfigError(
                f"features {strange or 'are missing'}: a multimodal recommender needs image or "
                f"text features, or both, one row an item"
            )
        for name, values in tensors.items():
            if values.ndim != 2 or len(values) != items:
                raise DataError(
                    f"{name} features have the shape {tuple(values.shape)}; wanted are {items} "
                    f"rows, one an item, in the order of item ids"
                )
            if not bool(values.isfinite().all()):
                raise DataError(f"{name} features hold values that are not finite")
        self.names = tuple(name for name in NAMES if name in tensors)
        self._tensors = {name: tensors[name].detach() for name in self.names}
        self._moved: dict[tuple[str, torch.device], Tensor] = {}
        self._near: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ItemFeatures":
        return self

    def width(self, name: str) -> int:
        """Return the number of columns of a feature."""
        return self._tensors[name].shape[1]

    def on(self, name: str, device: torch.device) -> Tensor:
        """Return a feature on a device, [I, width]; moved there once."""
        key = (name, device)
        if key not in self._moved:
            self._moved[key] = self._tensors[name].to(device)
        return self._moved[key]

    def neighbours(self, name: str, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the nearest items of each item and their similarity; computed once.

        Args:
            name: The feature.
            count: Neighbours k, the item itself included.
            device: Where it is computed.

        Returns:
            int64 [I, k] and the cosine similarities [I, k], on the CPU.
        """
        key = (name, count)
        if key not in self._near:
            found = nearest(self.on(name, device), count)
            if device.type != "cpu" and not right(self.on(name, device), *found):
                logger.warning("the device found wrong neighbours; the CPU finds them again")
                found = nearest(self._tensors[name], count)
            self._near[key] = (found[0].cpu(), found[1].cpu())
        return self._near[key]


def similarity(rows: Tensor, others: Tensor) -> Tensor:
    """Return cosine similarities, [B, w] and [M, w] -> [B, M]; 0 for rows of zeros, never NaN."""
    return F.normalize(rows, dim=1) @ F.normalize(others, dim=1).T


@torch.no_grad()
def nearest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return each row's nearest rows by cosine, itself included, exactly and in blocks.

    Args:
        values: [I, w].
        count: Neighbours k; at most I.

    Returns:
        int64 [I, k], nearest first, and similarities [I, k].
    """
    unit = F.normalize(values, dim=1)
    size = max(1, CELLS // max(len(unit), 1))
    blocks = [
        (rows @ unit.T).topk(min(count, len(unit)), dim=1) for rows in torch.split(unit, size)
    ]
    return torch.cat([b.indices for b in blocks]), torch.cat([b.values for b in blocks])


@torch.no_grad()
def right(values: Tensor, near: Tensor, found: Tensor, tolerance: float = 1e-3) -> bool:
    """Return whether neighbours stand a check that costs I·k products, no search.

    Each similarity is computed again from the pair, falls along a row, and begins with the row
    itself or its double: a top-k on a GPU was reported to return wrong indices for 63001 items.

    Args:
        values: [I, w].
        near: Neighbours, int64 [I, k].
        found: Their similarities, [I, k].
        tolerance: Of similarities.
    """
    if bool((near < 0).any() | (near >= len(values)).any()):
        return False
    unit = F.normalize(values, dim=1)
    again = torch.stack([(unit * unit[column]).sum(1) for column in near.unbind(1)], dim=1)
    itself = (unit * unit).sum(1)
    falls = found[:, 1:] <= found[:, :-1] + tolerance
    same = (again - found).abs() <= tolerance
    return bool(same.all() & falls.all() & (found[:, 0] >= itself - tolerance).all())


def item_graph(near: Tensor, found: Tensor, withdrawn: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the directed graph of nearest items, D^-1/2 S D^-1/2, and its transpose.

    As in MMRec both factors use the sums of ROWS. Withdrawn items lose row and column, and the
    rest is normalised without them, or their features would go on spreading.

    Args:
        near: Neighbours, int64 [I, k].
        found: Their similarities, the weights, [I, k].
        withdrawn: Items that are left out, bool [I]; None: none.

    Returns:
        Two sparse CSR [I, I] with int32 indices, on the device of `near`. A row whose weights sum
        to nothing or less is zero.
    """
    items, count = near.shape
    row = torch.arange(items, device=near.device).repeat_interleave(count)
    column, value = near.reshape(-1), found.reshape(-1)
    if withdrawn is not None and bool(withdrawn.any()):
        stays = ~(withdrawn[row] | withdrawn[column])
        row, column, value = row[stays], column[stays], value[stays]
    total = value.new_zeros(items).index_add_(0, row, value)
    scale = torch.where(total > 0, total, torch.inf).rsqrt()
    value = value * scale[row] * scale[column]
    made = []
    for first, second in ((row, column), (column, row)):
        order = first.argsort(stable=True)
        pointers = F.pad(torch.bincount(first, minlength=items).cumsum(0), (1, 0))
        made.append(csr(pointers, second[order], value[order], (items, items), near.device))
    return tuple(made)
