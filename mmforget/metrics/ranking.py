"""How well a score tells members from non-members: ROC, AUC, low-FPR rates, intervals.

Everywhere a larger score means more member-like.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mmforget.errors import CollapsedError, SplitError
from mmforget.metrics.signals import Floats, Ints

_CELLS = 2_000_000  # resamples x thresholds held at a time


class Interval(NamedTuple):
    """A number and its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a rate `successes / n`; NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan
    rate, square = successes / n, z * z / n
    centre = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(rate * (1 - rate) / n + square / (4 * n)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: ArrayLike) -> Interval:
    """Return a mean and its normal 95 % interval (mean ± 1.96 standard errors)."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return Interval(float(x.mean()) if x.size else math.nan, math.nan, math.nan)
    mean, half = float(x.mean()), 1.959964 * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Ranking:
    """Members and non-members ordered by one score, ties kept together.

    Attributes:
        member_slot: [P], index of each member's score among the U distinct scores, largest first.
        other_slot: [Q], the same for non-members.
        slots: U.
    """

    member_slot: Ints
    other_slot: Ints
    slots: int

    @classmethod
    def of(cls, members: ArrayLike, others: ArrayLike) -> "Ranking":
        """Rank scores of members [P] and non-members [Q].

        Raises:
            CollapsedError: A score is NaN, because the model's outputs are not finite.
            SplitError: A side is empty.
        """
        scores = np.concatenate([np.ravel(members), np.ravel(others)]).astype(np.float64)
        p = np.size(members)
        if p in (0, scores.size):
            raise SplitError("a membership attack needs members and non-members; one side is empty")
        if np.isnan(scores).any():
            raise CollapsedError("membership scores are NaN: the model's outputs are not finite")
        distinct, slot = np.unique(-scores, return_inverse=True)
        return cls(slot[:p], slot[p:], distinct.size)

    @property
    def curve(self) -> tuple[Floats, Floats]:
        """FPR and TPR at every distinct threshold, [U + 1] each, from (0, 0) to (1, 1)."""
        hit, false = self._counts()
        return (
            np.concatenate([[0.0], false[0] / false[0, -1]]),
            np.concatenate([[0.0], hit[0] / hit[0, -1]]),
        )

    @property
    def auc(self) -> float:
        """Area under the ROC curve: P(member > non-member) + P(equal) / 2."""
        return float(_auc(*self._counts())[0])

    @property
    def balanced_accuracy(self) -> float:
        """Best (TPR + TNR) / 2 over thresholds, chosen on the same data: never below 0.5."""
        return float(_balanced(*self._counts())[0])

    def tpr_at(self, fpr: float) -> float:
        """Return the largest TPR whose FPR is at most `fpr`; NaN when `fpr` < 1 / Q.

        Below 1 / Q the empirical FPR is zero whatever the attack does: the number means nothing.
        """
        return float(_tpr_at(*self._counts(), fpr)[0])

    def intervals(
        self, fprs: tuple[float, ...], seed: int, resamples: int = 1000
    ) -> dict[str, Interval]:
        """Return `auc`, `balanced_accuracy` and `tpr@<fpr>` with bootstrap 95 % intervals.

        Members and non-members are resampled apart. Costs one cumulative sum over all resamples,
        because a resample of ranked data is only a change of counts.

        Args:
            fprs: False-positive rates in (0, 1].
            seed: Seed of the resampling.
            resamples: Bootstrap resamples.
        """
        names = ["auc", "balanced_accuracy", *(f"tpr@{fpr:g}" for fpr in fprs)]
        drawn = [
            np.stack([_auc(*c), _balanced(*c), *(_tpr_at(*c, fpr) for fpr in fprs)])
            for c in self._resampled(seed, resamples)
        ]
        low, high = np.percentile(np.concatenate(drawn, axis=1), [2.5, 97.5], axis=1)
        values = [self.auc, self.balanced_accuracy, *(self.tpr_at(fpr) for fpr in fprs)]
        return {
            name: Interval(value, float(low[i]), float(high[i]))
            for i, (name, value) in enumerate(zip(names, values, strict=True))
        }

    def _counts(self) -> tuple[Ints, Ints]:
        """Return true and false positives at each threshold, [1, U] each."""
        hit = np.bincount(self.member_slot, minlength=self.slots)
        false = np.bincount(self.other_slot, minlength=self.slots)
        return np.cumsum(hit)[None], np.cumsum(false)[None]

    def _resampled(self, seed: int, resamples: int) -> Iterator[tuple[Ints, Ints]]:
        rng = np.random.default_rng(seed)
        chunk = max(1, _CELLS // self.slots)
        for start in range(0, resamples, chunk):
            rows = min(chunk, resamples - start)
            yield tuple(  # type: ignore[misc]
                np.cumsum(self._redraw(slot, rows, rng), axis=1)
                for slot in (self.member_slot, self.other_slot)
            )

    def _redraw(self, slot: Ints, rows: int, rng: np.random.Generator) -> Ints:
        """Return counts per distinct score of `rows` resamples, [rows, U]."""
        picked = slot[rng.integers(slot.size, size=(rows, slot.size), dtype=np.int32)]
        picked += self.slots * np.arange(rows)[:, None]
        return np.bincount(picked.ravel(), minlength=rows * self.slots).reshape(rows, self.slots)


def thin(fpr: Floats, tpr: Floats, points: int = 200) -> tuple[list[float], list[float]]:
    """Return at most `points` points of a ROC curve, evenly spread over log FPR and over TPR.

    Both ends are kept; every point kept is a point of the curve.
    """
    if len(fpr) > points:
        floor = fpr[fpr > 0].min() / 2
        length = np.abs(np.diff(np.log(np.maximum(fpr, floor)))) / -np.log(floor)
        place = np.concatenate([[0.0], np.cumsum(length + np.abs(np.diff(tpr)))])
        chosen = np.searchsorted(place, np.linspace(0, place[-1], points))
        chosen = np.unique(np.concatenate([[0], np.minimum(chosen, len(fpr) - 1), [len(fpr) - 1]]))
        if len(chosen) > points:
            chosen = np.delete(chosen, 1)
        fpr, tpr = fpr[chosen], tpr[chosen]
    return fpr.tolist(), tpr.tolist()


def _auc(hit: Ints, false: Ints) -> Floats:
    """Return trapezoid areas of [B, U] cumulative counts, [B]."""
    steps = np.diff(false, axis=1, prepend=0)
    before = hit - np.diff(hit, axis=1, prepend=0)
    area = np.einsum("bu,bu->b", steps, hit + before)  # whole numbers: exact
    return np.asarray(area / (2.0 * hit[:, -1] * false[:, -1]))


def _balanced(hit: Ints, false: Ints) -> Floats:
    p, q = int(hit[0, -1]), int(false[0, -1])
    advantage = (hit * q - false * p).max(axis=1)
    return np.asarray(0.5 + np.maximum(advantage, 0) / (2.0 * p * q))


def _tpr_at(hit: Ints, false: Ints, fpr: float) -> Floats:
    p, q = int(hit[0, -1]), int(false[0, -1])
    allowed = math.floor(fpr * q + 1e-9)
    if allowed < 1:
        return np.full(len(hit), np.nan)
    last = (false <= allowed).sum(axis=1) - 1
    found = np.take_along_axis(hit, np.maximum(last, 0)[:, None], axis=1)[:, 0]
    return np.where(last >= 0, found, 0) / p
