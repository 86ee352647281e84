"""Ranking of all items for each user, and what is read off it: recall, NDCG, precision, MAP.

The final vectors are computed once, elsewhere; here users go through in chunks of one matrix
product each, pairs already known are masked by one gather, and no step loops over users.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmforget.errors import CollapsedError, ConfigError
from mmforget.recsys.data import Interactions, Known

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CHUNK_BYTES = 2**26  # of scores held at a time
KS = (10, 20, 50)
MEASURES = (
    "recall",
    "ndcg",
    "precision",
    "map",
    "hit",
    "mrr",
    "recall_capped",
    "ndcg_all",
    "map_all",
)


@dataclass(frozen=True)
class Ranked:
    """Which of each user's first places are right; users averaged equally.

    With n_u relevant items of a user, h hits among the first K places and gains 1/log2(place + 1):

    - `recall` h / n_u; `precision` h / K; `hit` whether h > 0; `mrr` 1 / place of the first hit,
      0 without one.
    - `ndcg` over the ideal of min(n_u, K) hits.
    - `map` sum of the precision at each hit, over min(n_u, K).

    Other repositories' definitions, never to be compared with the above: `recall_capped` h /
    min(n_u, K) (command line of Shuvayu12/UnlearnRec), `ndcg_all` over the ideal of n_u hits, even
    beyond K (CURE4Rec, which also prints `recall` as HR), `map_all` over n_u (RecEraser), and
    `pooled_recall` (`recall2` of MMRec).

    Attributes:
        user: The users ranked, each with at least one relevant item, int64 [n], ascending.
        relevant: Relevant items of each, int64 [n].
        hits: Whether the item at each place is relevant, bool [n, largest K].
        ks: Cut-offs, ascending.
    """

    user: Ints
    relevant: Ints
    hits: Bools
    ks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def recall(self) -> Floats:
        """Recall of each user at each K, [n, len(ks)]."""
        return self.values("recall")

    @property
    def ndcg(self) -> Floats:
        """NDCG of each user at each K, [n, len(ks)]."""
        return self.values("ndcg")

    @property
    def precision(self) -> Floats:
        """Precision of each user at each K, [n, len(ks)]."""
        return self.values("precision")

    @property
    def map(self) -> Floats:
        """Average precision of each user at each K, [n, len(ks)]."""
        return self.values("map")

    @property
    def hit(self) -> Floats:
        """Whether each user has a hit, 0 or 1, at each K, [n, len(ks)]."""
        return self.values("hit")

    def values(self, name: str) -> Floats:
        """Return a measure of each user at each K, [n, len(ks)]; see the class for the names.

        Raises:
            ConfigError: There is no such measure.
        """
        if name not in MEASURES:
            raise ConfigError(f"unknown ranking measure {name!r}. Accepted: {', '.join(MEASURES)}")
        ks = np.array(self.ks)
        most = self.relevant[:, None]
        capped = np.minimum(most, ks)
        if name in ("recall", "precision", "hit", "recall_capped"):
            found = self._counted[:, ks - 1]
            if name == "hit":
                return (found > 0).astype(np.float64)
            below = {"recall": most, "precision": ks, "recall_capped": capped}[name]
            return np.asarray(found / below)
        place = np.arange(1, self.hits.shape[1] + 1)
        if name == "mrr":
            first = np.where(self.hits.any(1), self.hits.argmax(1) + 1, np.inf)[:, None]
            return np.where(first <= ks, 1 / first, 0.0)
        if name in ("ndcg", "ndcg_all"):
            gain = np.cumsum(self.hits / np.log2(place + 1), axis=1)[:, ks - 1]
            size = int(max(self.relevant.max(initial=1), ks[-1]))
            ideal = np.cumsum(1 / np.log2(np.arange(2, size + 2)))
            return np.asarray(gain / ideal[(capped if name == "ndcg" else most) - 1])
        total = np.cumsum(self.hits * (self._counted / place), axis=1)[:, ks - 1]
        return np.asarray(total / (capped if name == "map" else most))

    def at(self, name: str, k: int) -> Floats:
        """Return a measure of each user at one K, [n].

        Raises:
            ConfigError: There is no such measure, or K is not among `ks`.
        """
        if k not in self.ks:
            raise ConfigError(f"no ranking at {k} here; there are: {', '.join(map(str, self.ks))}")
        return self.values(name)[:, self.ks.index(k)]

    def mean(self, name: str, k: int) -> float:
        """Return a measure at one K, the mean over users; NaN if there are none."""
        return float(self.at(name, k).mean()) if len(self) else float("nan")

    def pooled_recall(self, k: int) -> float:
        """Return hits of all users over relevant items of all users (`recall2` of MMRec)."""
        return float(self._counted[:, k - 1].sum() / self.relevant.sum())

    @cached_property
    def _counted(self) -> Ints:
        return np.cumsum(self.hits, axis=1, dtype=np.int64)


def rank(
    table: Tensor,
    users: int,
    truth: Interactions,
    masked: Known | None,
    ks: tuple[int, ...] = KS,
    candidates: Bools | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Ranked:
    """Rank all items for every user of `truth` by raw score, and mark the hits.

    Relevant items that are masked or no candidates count as missed. Ties: lower item id first.

    Args:
        table: Final vectors, users first, [N, d].
        users: Number of users.
        truth: The relevant pairs; users without one are left out.
        masked: Pairs left out of the ranking; None: none.
        ks: Cut-offs, from 1.
        candidates: Items that can be recommended, bool [I]; None: all.
        chunk_bytes: Memory for scores; ties take a few times as much.

    Raises:
        CollapsedError: A vector is not finite.
    """
    ks = tuple(sorted(set(ks)))
    relevant = Known(truth.user, truth.item, truth.items)
    user, count = torch.unique_consecutive(relevant.keys // truth.items, return_counts=True)
    allowed = None if candidates is None else torch.from_numpy(candidates)
    found = top_items(table, users, user, masked, ks[-1], allowed, chunk_bytes).cpu()
    hits = relevant.holds(user[:, None], found) & (found >= 0)
    return Ranked(user.numpy(), count.numpy(), hits.numpy(), ks)


def top_items(
    table: Tensor,
    users: int,
    who: Tensor,
    masked: Known | None,
    k: int,
    candidates: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Return the k best items of some users, best first, int64 [len(who), k].

    Ties: lower item id first, also at the last place. A user with fewer than k candidates gets -1
    in the places left over.

    Args:
        table: Final vectors, users first, [N, d]; the scores are computed where it is.
        users: Number of users.
        who: The users, int64 [n].
        masked: Pairs left out; None: none.
        k: Places.
        candidates: Items that can be recommended, bool [I]; None: all.
        chunk_bytes: Memory for scores; ties take a few times as much.

    Raises:
        CollapsedError: A vector is not finite.
    """
    table = _finite(table)
    items = table[users:]
    device, size = table.device, len(items)
    who = who.to(device)
    bias = torch.zeros(size, dtype=table.dtype, device=device)
    if candidates is not None:
        bias[~candidates.to(device)] = -torch.inf
    hidden = None if masked is None else _Hidden(masked, who)
    found = torch.full((len(who), k), -1, dtype=torch.int64, device=device)
    width = min(k, size)
    for first, block in _blocks(table, users, who, chunk_bytes):
        block += bias
        if hidden is not None:
            block[hidden.places(first, first + len(block))] = -torch.inf
        best, chosen = block.topk(min(k + 1, size), dim=1)
        tied = ((best[:, 1:] == best[:, :-1]) & (best[:, 1:] > -torch.inf)).any(1).nonzero()[:, 0]
        best, chosen = best[:, :width], chosen[:, :width]
        if len(tied):
            best[tied], chosen[tied] = _lowest_first(block[tied], best[tied, -1:], width)
        chosen[best == -torch.inf] = -1
        found[first : first + len(block), :width] = chosen
    return found


@dataclass(frozen=True)
class Standing:
    """Where pairs stand among the other items of their users.

    Attributes:
        above: Other items that score higher, int64 [n].
        equal: Other items that score the same, int64 [n].
        others: Other items there are, int64 [n].
    """

    above: Ints
    equal: Ints
    others: Ints

    @property
    def share_above(self) -> Floats:
        """Share of the other items that score higher, ties by half, [n]; 0.5 if there are none."""
        below = np.maximum(self.others, 1)
        return np.where(self.others > 0, (self.above + self.equal / 2) / below, 0.5)


def standing(
    table: Tensor,
    users: int,
    user: Ints,
    item: Ints,
    masked: Known | None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Standing:
    """Count, for each pair, its user's other items by whether they score higher.

    Args:
        table: Final vectors, users first, [N, d].
        users: Number of users.
        user: User of each pair, [n].
        item: Item of each pair, [n].
        masked: Pairs that are not counted (a pair itself never is); None: all count.
        chunk_bytes: Memory for scores; comparisons take half as much again.

    Raises:
        CollapsedError: A vector is not finite.
    """
    table = _finite(table)
    who = torch.from_numpy(user).to(table.device)
    own = torch.from_numpy(item).to(table.device)
    hidden = None if masked is None else _Hidden(masked, who)
    above, equal = torch.zeros_like(who), torch.zeros_like(who)
    for first, block in _blocks(table, users, who, chunk_bytes):
        rows = slice(first, first + len(block))
        # Read from the same product: another one may differ in the last bit.
        score = block.gather(1, own[rows, None])
        if hidden is not None:
            block[hidden.places(first, first + len(block))] = -torch.inf
        block.scatter_(1, own[rows, None], -torch.inf)
        above[rows] = _count(block > score)
        equal[rows] = _count(block == score)
    others = torch.full_like(who, len(table) - users - 1)
    if masked is not None and hidden is not None:
        others -= hidden.counts - masked.holds(who, own).long()
    return Standing(above.cpu().numpy(), equal.cpu().numpy(), others.cpu().numpy())


class _Hidden:
    """Masked pairs of some users, as places in a block of their scores."""

    def __init__(self, masked: Known, who: Tensor) -> None:
        self.keys = masked.keys.to(who.device)
        self.base = who * masked.items
        self.start = torch.searchsorted(self.keys, self.base)
        self.counts = torch.searchsorted(self.keys, self.base + masked.items) - self.start

    def places(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return row and column of every masked pair of users `first` to `last`."""
        counts = self.counts[first:last]
        rows = torch.repeat_interleave(torch.arange(last - first, device=counts.device), counts)
        within = torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.keys[self.start[first:last][rows] + within] - self.base[first:last][rows]


def _blocks(
    table: Tensor, users: int, who: Tensor, chunk_bytes: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the scores of all items for users of `who`, chunk by chunk, in one buffer.

    Yields:
        Place of the first user, and scores [c, I], overwritten by the next ones.
    """
    items = table[users:].T
    size = max(1, chunk_bytes // (items.shape[1] * table.element_size()))
    buffer = table.new_empty(min(size, len(who)), items.shape[1])
    for first in range(0, len(who), size):
        rows = table[who[first : first + size]]
        yield first, torch.mm(rows, items, out=buffer[: len(rows)])


def _lowest_first(block: Tensor, last: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the `width` best scores and items of each row, ties by item id.

    Args:
        block: Scores, [r, I].
        last: The width-th best score of each row, [r, 1].
        width: Places.
    """
    over, level = block > last, block == last
    room = width - over.sum(1, keepdim=True)
    chosen = over | (level & (level.cumsum(1, dtype=torch.int32) <= room))
    items = chosen.nonzero()[:, 1].view(-1, width)
    scores, order = block.gather(1, items).sort(dim=1, descending=True, stable=True)
    return scores, items.gather(1, order)


def _count(mask: Tensor) -> Tensor:
    """Return how many entries of each row are set, [r, I] -> [r]."""
    if mask.device.type == "cpu":  # ten times as fast as torch's sum of booleans
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(1)


def _finite(table: Tensor) -> Tensor:
    table = table.detach()
    table = table if table.dtype == torch.float64 else table.float()
    if not bool(torch.isfinite(table).all()):
        raise CollapsedError("the recommender's vectors are not finite, so it ranks nothing")
    return table
