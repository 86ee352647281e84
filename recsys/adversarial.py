"""Implausible edges: the pairs a trained model finds worst, to be injected and then forgotten."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmforget.record import write_text
from mmforget.recsys.data import Known
from mmforget.rng import generator

Ints = npt.NDArray[np.int64]

CELLS = 16_000_000  # scores held at once: 64 MB


@torch.no_grad()
def implausible_edges(
    table: Tensor, known: Known, users: int, items: int, share: float = 1.0, seed: int = 0
) -> tuple[Ints, Ints]:
    """Return each user's lowest-scored item and each item's lowest-scored user, as pairs.

    The adversarial protocol of UnlearnRec (arXiv 2505.22649): these pairs join the training data,
    and a method must then forget exactly them. A pair that user and item both name counts once:
    in the published code it is subtracted twice, and what is left of it (-1) stays an edge.

    Args:
        table: Final vectors of a model trained on clean data, users first, [N, d].
        known: Pairs that are never returned: training and test data.
        users: Number of users.
        items: Number of items.
        share: Share of the users, and of the items, that name a pair, 0 to 1.
        seed: Seed of that choice.

    Returns:
        User and item of each pair, int64 [n] with n <= share·(users + items), sorted, each once. A
        node all of whose pairs are known names none.
    """
    user_rows, item_rows = table[:users].float(), table[users : users + items].float()
    worst_item = torch.zeros(users, dtype=torch.int64)
    user_low = torch.full((users,), torch.inf)
    worst_user = torch.zeros(items, dtype=torch.int64, device=table.device)
    item_low = torch.full((items,), torch.inf, device=table.device)
    size = max(1, CELLS // max(items, 1))
    for start in range(0, users, size):
        stop = min(start + size, users)
        scores = user_rows[start:stop] @ item_rows.T
        edges = torch.searchsorted(known.keys, torch.tensor([start, stop]) * items).tolist()
        taken = (known.keys[edges[0] : edges[1]] - start * items).to(scores.device)
        scores.view(-1)[taken] = torch.inf
        low, at = scores.min(dim=1)
        user_low[start:stop], worst_item[start:stop] = low.cpu(), at.cpu()
        low, at = scores.min(dim=0)
        better = low < item_low
        item_low = torch.where(better, low, item_low)
        worst_user = torch.where(better, at + start, worst_user)
    named_u = _chosen(users, share, seed, "users") & torch.isfinite(user_low)
    named_i = _chosen(items, share, seed, "items") & torch.isfinite(item_low.cpu())
    by_user, by_item = named_u.nonzero()[:, 0], named_i.nonzero()[:, 0]
    keys = torch.cat([by_user * items + worst_item[by_user], worst_user.cpu()[by_item] * items])
    keys[len(by_user) :] += by_item
    pairs = torch.unique(keys).numpy()
    return pairs // items, pairs % items


def write_edges(path: Path, user: Ints, item: Ints) -> None:
    """Write pairs as a request file: the header `user,item` and a pair a line, atomically.

    Args:
        path: The file.
        user: User of each pair, counted from 0, [n].
        item: Item of each pair, counted from 0, [n].
    """
    lines = [f"{u},{i}" for u, i in zip(user.tolist(), item.tolist(), strict=True)]
    write_text(path, "\n".join(["user,item", *lines]) + "\n")


def _chosen(size: int, share: float, seed: int, name: str) -> Tensor:
    """Return a random choice of round(share·size) nodes, bool [size]."""
    chosen = torch.zeros(size, dtype=torch.bool)
    order = torch.randperm(size, generator=generator(seed, "implausible", name))
    chosen[order[: round(share * size)]] = True
    return chosen
