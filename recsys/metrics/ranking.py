"""Recall, NDCG, precision, MAP and hit rate on unseen and on forgotten pairs, and their floor."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from mmforget.metrics.common import both, with_interval
from mmforget.metrics.ranking import Interval, mean_interval
from mmforget.record import MetricValue
from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.metrics.pairs import interactions, recommender
from mmforget.recsys.ranking import KS, Bools, Floats, Ranked, rank
from mmforget.types import Metric, ModelView, Splits, Trial

HEADLINE_K = 20
SHOWN = {"recall": "recall", "ndcg": "ndcg", "precision": "precision", "map": "map", "hr": "hit"}


class RankingMetrics(Metric):
    """Full ranking of all items for every user with a pair in the split.

    For `test`, `val` and `forget`, at each K of `benchmark.ks` (and 20): `recall@K`, `ndcg@K`,
    `precision@K`, `map@K` and `hr@K` (share of users with any hit), defined in
    `mmforget.recsys.ranking.Ranked`; each in [0, 1], the mean over users, with a normal 95 %
    interval over users. Direction: up on test and val; on forget closer to the retrained model.

    - test and val: all training pairs are masked, the forgotten ones too (`benchmark.mask=kept`:
      only the retained ones, as a system that forgot cannot mask what it does not know).
      Validation pairs stay candidates on test and the reverse, as in MMRec.
    - forget: only retained pairs are masked, so the forgotten ones can come back.
    - `popularity/recall@20`: the same ranking by retained training pairs of each item, a floor.

    Pitfalls: many repositories use other definitions under these names (`Ranked`); recall is
    hits / |relevant| here, also for users with more than K relevant items. A retrained model's
    forget recall is not 0: what fits a taste is recommended without having been seen.
    """

    citation: ClassVar[str] = "He et al., LightGCN, arXiv 2002.02126; Zhou, MMRec, arXiv 2302.03497"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        values: dict[str, MetricValue] = {}
        for split in (name for name in ("test", "val", "forget") if name in trial.splits.names()):
            own, theirs = rankings(trial, split)
            direction = "to_reference" if split == "forget" else "up"
            kept = split == "forget" or _option(trial.benchmark, "mask", "train") == "kept"
            note = "retained training pairs masked" if kept else "all training pairs masked"
            for label, name in SHOWN.items():
                rows = own.values(name)
                wanted = None if theirs is None else theirs.values(name).mean(0)
                for column, k in enumerate(own.ks):
                    values[f"{label}@{k}/{split}"] = with_interval(
                        share_interval(rows[:, column]),
                        direction,
                        None if wanted is None else float(wanted[column]),
                        len(own),
                        note,
                    )
        floor = popularity(trial).at("recall", HEADLINE_K)
        values[f"popularity/recall@{HEADLINE_K}"] = with_interval(
            share_interval(floor), "up", float(floor.mean()), len(floor), "a floor, not the model's"
        )
        return values


def share_interval(values: Floats) -> Interval:
    """Return the mean of values in [0, 1] with its normal 95 % interval, cut to [0, 1]."""
    value, low, high = mean_interval(values)
    return Interval(value, float(np.maximum(low, 0.0)), float(np.minimum(high, 1.0)))


def rankings(trial: Trial, split: str) -> tuple[Ranked, Ranked | None]:
    """Return the ranking of a split by the model under test and by the retrained one."""
    return both(trial, lambda view: split_ranking(view, trial.benchmark, trial.splits, split))


def split_ranking(view: ModelView, benchmark: Any, splits: Splits, split: str) -> Ranked:
    """Return a model's ranking for the users of a split, computed once a model.

    Args:
        view: The model.
        benchmark: Its config says what is masked on unseen splits (`mask`) and where lists are cut
            (`ks`; 20 is added), its `candidates` what can be recommended. None: the defaults.
        splits: The data.
        split: A split's name. On forget the retained pairs are masked, on retain nothing is.

    Raises:
        CollapsedError: A vector is not finite.
    """

    def ranked(own: ModelView) -> Ranked:
        model = recommender(own)
        table = model.final()
        return _ranked(table, model.graph.users, benchmark, splits, split)

    return view.memo(("recsys/ranking", split), ranked)


def popularity(trial: Trial) -> Ranked:
    """Return the ranking of the test users by retained training pairs of each item, ties by id."""

    def ranked(own: ModelView) -> Ranked:
        graph = recommender(own).graph
        counts = np.bincount(interactions(trial.splits.retain).item, minlength=graph.items)
        place = np.empty(graph.items, np.int64)
        place[np.lexsort((np.arange(graph.items), -counts))] = np.arange(graph.items)
        # One number an item, all distinct: float64 holds every place exactly.
        table = torch.cat([torch.ones(graph.users).double(), -torch.from_numpy(place).double()])
        return _ranked(table[:, None], graph.users, trial.benchmark, trial.splits, "test")

    return trial.view.memo("recsys/popularity", ranked)


def _ranked(table: torch.Tensor, users: int, benchmark: Any, splits: Splits, split: str) -> Ranked:
    masked = _masked(splits, split, _option(benchmark, "mask", "train"))
    ks = tuple({HEADLINE_K, *_option(benchmark, "ks", KS)})
    choose = getattr(benchmark, "candidates", None)
    candidates: Bools | None = None if choose is None else choose(splits.retain)
    return rank(table, users, interactions(splits.get(split)), masked, ks, candidates)


def _masked(splits: Splits, split: str, mask: str) -> Known | None:
    if split == "retain":
        return None
    kept = split == "forget" or mask == "kept"
    hidden: Interactions = interactions(splits.retain if kept else splits.train)
    return Known(hidden.user, hidden.item, hidden.items)


def _option(benchmark: Any, name: str, default: Any) -> Any:
    return getattr(getattr(benchmark, "config", None), name, default)
