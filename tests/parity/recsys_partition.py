"""Golden vectors of RecEraser: balanced partitions and the attention over shards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmforget.recsys.methods.receraser import ShardAttention
from mmforget.recsys.partition import Clusters, balanced_kmeans, by_interactions

VARIANTS = {"reference_scalar_centroid": True, "corrected_vector_centroid": False}
SLACK = 1.2


def partition(inputs: Mapping[str, Any]) -> dict[str, Any]:
    pairs = np.array([(int(u), i) for u, chosen in inputs["train"].items() for i in chosen])
    users, items = np.array(inputs["user_pretrain"]), np.array(inputs["item_pretrain"])
    order = [tuple(pair) for pair in pairs.tolist()]
    pair_start = np.array([order.index((u, i)) for u, i in inputs[PAIRS]])
    user_start = np.array(inputs["ubp_initial_centroid_users"])
    found = {}
    for name, scalar in VARIANTS.items():
        for rounds in range(1, inputs["T"] + 1):
            ubp = balanced_kmeans(users, user_start, rounds, SLACK, scalar=scalar)
            inbp = by_interactions(
                *pairs.T, users, items, pair_start, rounds, SLACK, reference=scalar
            )
            shards = range(inputs["k"])
            found[f"{name}_T{rounds}"] = {
                "ubp_users": [np.flatnonzero(ubp.labels == m).tolist() for m in shards],
                "ubp_items": [
                    np.unique(pairs[ubp.labels[pairs[:, 0]] == m, 1]).tolist() for m in shards
                ],
                "inbp_interactions": [pairs[inbp.labels == m].tolist() for m in shards],
                "losses_ubp_then_inbp": moves(ubp, rounds) + moves(inbp, rounds),
            }
    return found


PAIRS = "inbp_initial_centroid_interactions"


def moves(clusters: Clusters, rounds: int) -> list[float]:
    """Return the moves of all rounds: those after the labels repeated are zero."""
    return clusters.moves + [0.0] * (rounds - len(clusters.moves))


def attention(inputs: Mapping[str, Any]) -> dict[str, Any]:
    shards = {
        side: tensor(inputs[f"{side}_shard_embeddings"]).transpose(0, 1)
        for side in ("user", "item")
    }
    count, _, dim = shards["user"].shape
    module = ShardAttention(count, dim, len(inputs["BA"]), seed=0)
    module.load_state_dict(
        {
            "transfer": tensor(inputs["trans_W"]),
            "shift": tensor(inputs["trans_B"]),
            "users.weight": tensor(inputs["WA"]),
            "users.bias": tensor(inputs["BA"]),
            "users.head": tensor(inputs["HA"])[:, 0],
            "items.weight": tensor(inputs["WB"]),
            "items.bias": tensor(inputs["BB"]),
            "items.head": tensor(inputs["HB"])[:, 0],
        }
    )
    with torch.no_grad():
        user, user_share = module(shards["user"], "users")
        item, item_share = module(shards["item"], "items")
    return {
        "user_attention": user_share.tolist(),
        "item_attention": item_share.tolist(),
        "user_agg": user.tolist(),
        "item_agg": item.tolist(),
        "scores": (user @ item.T).tolist(),
    }


def tensor(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values)


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "receraser_partition": partition,
    "receraser_attention": attention,
}
