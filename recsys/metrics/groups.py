"""Recall and NDCG by how many training pairs a user has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mmforget.metrics.common import with_interval
from mmforget.record import MetricValue
from mmforget.recsys.metrics.pairs import interactions
from mmforget.recsys.metrics.ranking import HEADLINE_K, rankings, share_interval
from mmforget.recsys.ranking import Ints, Ranked
from mmforget.types import Metric, Splits, Trial

GROUPS = 4


class Groups(Metric):
    """Who pays for the forgetting: `recall@20/group1` to `group4` and `ndcg@20/group1` to `group4`.

    The users of the test set are cut at the quartiles of their number of training pairs, group 1
    the least active. Forgotten pairs count, so that the groups are the same before and after and
    for every model; users of equal numbers share a group, so groups differ in size. The note of a
    value says which numbers the group has. Direction up; masking as in `recsys/ranking`.

    Pitfalls: the groups of two data sets differ in their bounds. Users with few training pairs
    often have few test pairs, so their recall is coarse.
    """

    citation: ClassVar[str] = "Chen et al., CURE4Rec, arXiv 2408.14393 (effects on groups of users)"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; NaN with a note for a group without users."""
        own, theirs = rankings(trial, "test")
        values = {}
        for number, group in enumerate(groups(own, trial.splits), start=1):
            for name in ("recall", "ndcg"):
                reference = None
                if theirs is not None and len(group.rows):
                    reference = float(theirs.at(name, HEADLINE_K)[group.rows].mean())
                found = share_interval(own.at(name, HEADLINE_K)[group.rows])
                values[f"{name}@{HEADLINE_K}/group{number}"] = with_interval(
                    found, "up", reference, len(group.rows), group.note
                )
        return values


@dataclass(frozen=True)
class Group:
    """Users of about the same number of training pairs.

    Attributes:
        rows: Their places among the users of a ranking, int64 [n].
        low: Smallest number of training pairs in it.
        high: Largest; below `low` where the group is empty.
    """

    rows: Ints
    low: int
    high: int

    @property
    def note(self) -> str:
        """What to say beside a value of the group."""
        if not len(self.rows):
            return "not defined: no users between these quartiles"
        return f"users with {self.low} to {self.high} training pairs"


def groups(ranked: Ranked, splits: Splits) -> list[Group]:
    """Return the users of a ranking in groups by quartiles of their training pairs, fewest first.

    Args:
        ranked: A ranking of users.
        splits: The data.
    """
    train = interactions(splits.train)
    size = int(max(train.user.max(initial=0), ranked.user.max(initial=0))) + 1
    degree = np.bincount(train.user, minlength=size)[ranked.user]
    # Degrees up to a cut are below it: users of equal degree never part.
    shares = np.arange(1, GROUPS) / GROUPS
    cuts = np.quantile(degree, shares, method="inverted_cdf") if len(degree) else np.zeros(3)
    place = np.searchsorted(cuts, degree, side="left")
    found = []
    for number in range(GROUPS):
        rows = np.flatnonzero(place == number)
        bounds = (int(degree[rows].min()), int(degree[rows].max())) if len(rows) else (0, -1)
        found.append(Group(rows, *bounds))
    return found
