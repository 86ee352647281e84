"""Interactions as a data set of the core: pairs with ids, and what each user is known to like."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmforget.rng import Draws

Ints = npt.NDArray[np.int64]

ROUNDS = 64  # of rejection, before the few rows that are left are drawn exactly


class Known:
    """A set of (user, item) pairs that can be asked and drawn from without a loop over users.

    Args:
        user: User of each pair, [n].
        item: Item of each pair, [n].
        items: Number of items of the data set.
    """

    def __init__(self, user: Ints, item: Ints, items: int) -> None:
        self.items = items
        self.keys = torch.from_numpy(np.unique(user.astype(np.int64) * items + item))
        self._moved: dict[torch.device, Tensor] = {}

    def holds(self, user: Tensor, item: Tensor) -> Tensor:
        """Return whether each pair is in the set, bool of the pairs' (broadcast) shape."""
        wanted = user * self.items + item
        if not len(self.keys):
            return torch.zeros(wanted.shape, dtype=torch.bool, device=wanted.device)
        keys = self._keys(wanted.device)
        place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return keys[place] == wanted

    def of_user(self, user: int) -> Tensor:
        """Return the sorted items of one user, int64."""
        edges = torch.tensor([user * self.items, (user + 1) * self.items])
        first, last = torch.searchsorted(self.keys, edges).tolist()
        return self.keys[first:last] - user * self.items

    def negatives(self, user: Tensor, draws: Draws, count: int = 1) -> Tensor:
        """Return items drawn uniformly from those not known of each user, int64 [B, count].

        By rejection in rounds, vectorised; a user who knows nearly all items is served exactly. A
        user who knows every item gets any item: there is no negative.
        """
        found = draws.integers(self.items, count)
        taken = self.holds(user[:, None], found)
        left = taken.nonzero()
        for _ in range(ROUNDS):
            if not len(left):
                return found
            # Drawn for all and used for a few: a row's items must not depend on how it is batched.
            row, column = left.unbind(1)
            drawn = draws.integers(self.items, count)[row, column]
            found[row, column] = drawn
            left = left[self.holds(user[row], drawn)]
        chance = draws.uniform(count)
        for row, column in left.tolist():
            free = torch.ones(self.items, dtype=torch.bool)
            free[self.of_user(int(user[row]))] = False
            choice = free.nonzero()[:, 0]
            if len(choice):
                found[row, column] = choice[int(chance[row, column] * len(choice))]
        return found

    def _keys(self, device: torch.device) -> Tensor:
        """Return the keys where they are asked for; copied once."""
        if device == self.keys.device:
            return self.keys
        if device not in self._moved:
            self._moved[device] = self.keys.to(device)
        return self._moved[device]


class Ids(Sequence[str]):
    """Ids `user:item`, made when asked for: a million strings would cost more than the pairs."""

    def __init__(self, user: Ints, item: Ints) -> None:
        self.user = user
        self.item = item

    def __len__(self) -> int:
        return len(self.user)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Ids(self.user[index], self.item[index])
        return f"{self.user[index]}:{self.item[index]}"

    def __iter__(self) -> Iterator[str]:
        return (f"{u}:{i}" for u, i in zip(self.user.tolist(), self.item.tolist(), strict=True))


class Interactions:
    """Pairs of user and item: `types.Dataset`.

    Args:
        user: User of each pair, int64 [n].
        item: Item of each pair, int64 [n].
        items: Number of items of the data set.
        edge: Place of each pair among the edges of the `Graph`, int64 [n]; -1 where it is no
            training edge. None: none is one.
        known: Pairs that are never drawn as negatives; None: the pairs themselves, also in a
            selection: a model trained on some of them must not learn of the others.
        by_user: While training draw as many examples as there are pairs, users uniformly and then
            one of their pairs (LightGCN's published sampling), instead of each pair once.
    """

    def __init__(
        self,
        user: Ints,
        item: Ints,
        items: int,
        edge: Ints | None = None,
        known: Known | None = None,
        by_user: bool = False,
    ) -> None:
        self.user = np.ascontiguousarray(user, np.int64)
        self.item = np.ascontiguousarray(item, np.int64)
        self.items = items
        self.edge = np.full(len(user), -1, np.int64) if edge is None else edge
        self.ids: Sequence[str] = Ids(self.user, self.item)
        self.by_user = by_user
        self._given = known
        self._own: Known | None = None
        self._tensors = (torch.from_numpy(self.user), torch.from_numpy(self.item))

    @property
    def known(self) -> Known:
        """Pairs that are never drawn as negatives."""
        if self._given is not None:
            return self._given
        if self._own is None:
            self._own = Known(self.user, self.item, self.items)
        return self._own

    @property
    def digests(self) -> Sequence[str]:
        """The ids: a pair's content is its name."""
        return self.ids

    def __len__(self) -> int:
        return len(self.user)

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return `user` and `item`, int64 [B], and the data set they are from (`source`)."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        user, item = self._tensors
        return {"user": user[rows], "item": item[rows], "source": self}

    def select(self, indices: Sequence[int]) -> "Interactions":
        """Return the pairs of these indices, in this order, as a data set of their own."""
        rows = np.asarray(indices, np.int64)
        return Interactions(
            self.user[rows], self.item[rows], self.items, self.edge[rows], self._given, self.by_user
        )

    def sampled(self, by_user: bool) -> "Interactions":
        """Return the same pairs with another way of sampling while training."""
        return Interactions(self.user, self.item, self.items, self.edge, self._given, by_user)

    def redraw(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return as many pairs as `draws` holds: a user uniformly, then one of the user's pairs."""
        starts, counts = self._rows()
        chance = draws.uniform(2).double()
        chosen = (chance[:, 0] * len(starts)).long().clamp_(max=len(starts) - 1)
        place = starts[chosen] + (chance[:, 1] * counts[chosen]).long()
        place = torch.minimum(place, starts[chosen] + counts[chosen] - 1)
        rows = self._order[place]
        return self._tensors[0][rows], self._tensors[1][rows]

    def _rows(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_starts"):
            order = np.argsort(self.user, kind="stable")
            _, starts, counts = np.unique(self.user[order], return_index=True, return_counts=True)
            self._order = torch.from_numpy(order)
            self._starts = (torch.from_numpy(starts), torch.from_numpy(counts))
        return self._starts

    def revision(self) -> str:
        """Return a hash of the pairs, in order."""
        digest = hashlib.sha256(self.user.tobytes())
        digest.update(self.item.tobytes())
        return digest.hexdigest()


def joined(parts: Iterable[Interactions], items: int) -> Known:
    """Return the pairs of several data sets as one set."""
    parts = list(parts)
    return Known(
        np.concatenate([part.user for part in parts]),
        np.concatenate([part.item for part in parts]),
        items,
    )
