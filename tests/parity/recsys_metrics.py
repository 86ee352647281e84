"""Golden vectors of ranking measures, MI ratios and what CURE4Rec adds, mapped to what runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.metrics.fairness import a_igf, active_users
from mmforget.recsys.metrics.mi import margin, mi_bf, mi_ng
from mmforget.recsys.ranking import Ranked, rank, top_items

Vector = dict[str, Any]


def _pairs(lists: dict[str, list[int]]) -> tuple[Any, Any]:
    user = np.concatenate([np.full(len(items), int(u)) for u, items in lists.items()])
    return user, np.concatenate([np.array(items) for items in lists.values()])


def _ranking(inputs: Vector) -> Vector:
    """Return what each repository prints; scores are those of vectors e_u and columns."""
    scores = torch.tensor(inputs["scores"], dtype=torch.float64)
    users, items = scores.shape
    table = torch.cat([torch.eye(users, dtype=torch.float64), scores.T])
    known = Known(*_pairs(inputs["train"]), items)
    truth = Interactions(*_pairs(inputs["test"]), items)
    ks = tuple(inputs["Ks"])
    found: Ranked = rank(table, users, truth, known, ks)

    def means(name: str) -> list[float]:
        return [found.mean(name, k) for k in ks]

    three = {name: means(name) for name in ("recall", "precision", "ndcg")}
    return {
        "topk_items": top_items(table, users, torch.arange(users), known, ks[-1]).tolist(),
        "gusye": {f"{name}@{k}": v for name in three for k, v in zip(ks, three[name], strict=True)},
        "mmrec": {
            **three,
            "recall2": [found.pooled_recall(k) for k in ks],
            "map": means("map"),
        },
        "cure4rec": {
            "K": ks[0],
            "hit_mean": found.mean("recall", ks[0]),
            "ndcg_mean": found.mean("ndcg_all", ks[0]),
        },
        "receraser": {**three, "map": means("map_all"), "mrr": means("mrr")},
    }


def _mi(inputs: Vector) -> Vector:
    before, after, negative = (
        np.array(inputs[f"scores_{name}"])
        for name in ("unlearned_before", "unlearned_after", "negative_after")
    )
    return {
        "mi_bf_raw": mi_bf(before, after, "score"),
        "mi_ng_raw": mi_ng(negative, after, "score"),
        "mi_bf_probability": mi_bf(before, after),
        "mi_ng_probability": mi_ng(negative, after),
        "gap_neg_minus_dropped": margin(negative, after),
    }


def _cure4rec(inputs: Vector) -> Vector:
    from mmforget.recsys.benchmarks.cure4rec import UserSetRequest, chosen_users
    from mmforget.recsys.partition import balanced_kmeans

    ndcg = np.array(inputs["per_user_ndcg"])
    counts = np.bincount(np.array(inputs["interactions"])[:, 0], minlength=len(ndcg))
    found: Vector = {}
    for name, sign in (("core", -1), ("edge", 1)):
        chosen = chosen_users(counts, UserSetRequest(set=name, percent=inputs["del_per"]))
        found[f"{name}_counts"] = np.sort(counts[chosen])
        found[f"{name}_users"] = chosen[np.lexsort((chosen, sign * counts[chosen]))]
    found["n_delete"] = len(chosen)
    active = active_users(counts)
    parts = (ndcg[active], np.delete(ndcg, active))
    found |= {"n_active": len(active), "active_users": active, "a_igf": a_igf(*parts).value}
    found |= {"active_mean": parts[0].mean(), "inactive_mean": parts[1].mean()}
    x, start = np.array(inputs["kmeans_X"]), np.array(inputs["kmeans_initial_centroid_rows"])
    clusters = {
        "balanced_iters_1": balanced_kmeans(x, start, rounds=1, reference=True),
        "balanced_iters_30": balanced_kmeans(x, start, rounds=30, reference=True),
        "plain": balanced_kmeans(x, start, rounds=30, slack=float(inputs["k"])),
    }
    found["kmeans"] = {
        name: {"inertia": _as_written(made.inertia), "labels": made.labels}
        for name, made in clusters.items()
    }
    return found


def _as_written(value: float) -> float:
    """Return a number with the ten digits of the vectors where these are coarser than 1e-8."""
    return float(f"{value:.10g}") if abs(value) >= 100 else value


ADAPTERS: dict[str, Callable[[Vector], Vector]] = {
    "ranking_metrics": _ranking,
    "mi_bf_mi_ng": _mi,
    "cure4rec": _cure4rec,
}
