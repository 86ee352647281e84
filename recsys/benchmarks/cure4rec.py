"""CURE4Rec: forget the most active, the least active, or random users."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmforget.errors import SplitError
from mmforget.options import option
from mmforget.recsys import mini
from mmforget.recsys.benchmarks.base import Bools, Ints, RecommenderBenchmark
from mmforget.recsys.data import Interactions
from mmforget.recsys.formats import Table
from mmforget.rng import derive


@dataclass(frozen=True)
class UserSetRequest:
    """Which users are forgotten, with all their interactions."""

    set: str = option(
        "core",
        "core: most training interactions; edge: fewest; random: drawn",
        choices=("core", "edge", "random"),
    )
    percent: float = option(5.0, "percent of the users with training interactions", low=0, high=99)
    seed: int = option(42, "seed of the random set", low=0)


class CURE4RecBenchmark(RecommenderBenchmark):
    """The protocol of CURE4Rec: completeness, utility, efficiency and fairness.

    Completeness is the AUC of a membership oracle on forgotten pairs, utility NDCG@20 and HR@20,
    efficiency the seconds, fairness A-IGF: see the metrics. The published code holds no attack, so
    the oracle is this project's; its data files count all ratings where its code counts training
    rows, as done here, ties by id.
    """

    name: ClassVar[str] = "recsys/cure4rec"
    citation: ClassVar[str] = "Chen et al., CURE4Rec, NeurIPS 2024, arXiv 2408.14393"
    request_type: ClassVar[type] = UserSetRequest
    metrics: ClassVar[tuple[str, ...]] = (
        "recsys/ranking",
        "recsys/completeness",
        "recsys/fairness",
        "recsys/gap",
        "recsys/groups",
        "cost",
    )
    headline: ClassVar[tuple[str, ...]] = (
        "completeness/auc",
        "ndcg@20/test",
        "hr@20/test",
        "fairness/a_igf",
        "cost/wall_s",
        "gap/average",
    )

    def request_kind(self) -> str:
        """Return users: all sets are of users."""
        return "users"

    def request_mask(self, train: Interactions, table: Table) -> Bools:
        """Return the training pairs of the users in the set; see `chosen_users`."""
        counts = np.bincount(train.user, minlength=table.users)
        return np.isin(train.user, chosen_users(counts, self.request))

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world; see `mini.write_unlearnrec`."""
        mini.write_unlearnrec(folder, seed)


def chosen_users(counts: Ints, request: UserSetRequest) -> Ints:
    """Return the users of a set, floor(active · percent / 100) of them.

    Args:
        counts: Training interactions of each user, [U]; users with none are not counted.
        request: Which set.

    Raises:
        SplitError: The set is empty.
    """
    active = np.nonzero(counts)[0]
    size = math.floor(len(active) * request.percent / 100)
    if size == 0:
        raise SplitError(
            f"request.percent={request.percent} of {len(active)} users is none; raise it"
        )
    if request.set == "random":
        rng = np.random.default_rng(derive(request.seed, "request", "random"))
        return np.sort(rng.choice(active, size, replace=False))
    sign = -1 if request.set == "core" else 1
    order = np.lexsort((active, sign * counts[active]))
    return np.sort(active[order[:size]])
