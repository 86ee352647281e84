"""Golden vectors of the recommenders: propagation, losses, views and the graph of similar items."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.recsys.adapter import Pairs, outputs, rows_of
from mmforget.recsys.backbones.base import Recommender, Triples
from mmforget.recsys.backbones.features import item_graph, nearest, similarity
from mmforget.recsys.backbones.lightgcl import LightGCL
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.backbones.simgcl import perturbed_layers
from mmforget.recsys.graph import Graph, csr
from mmforget.recsys.losses import bpr, contrast, embedding_norm, reverse_bpr


def tensor(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def sparse(dense: Tensor) -> Tensor:
    found = dense.to_sparse_csr()
    rows, columns, values = found.crow_indices(), found.col_indices(), found.values()
    return csr(rows, columns, values, tuple(dense.shape))


def graph_of(users: int, items: int, edges: list[list[int]]) -> Graph:
    user, item = np.array(sorted(map(tuple, edges))).T
    return Graph(users, items, user, item)


def loaded(model: Recommender, users: Any, items: Any) -> Recommender:
    state = model.state_dict() | {"users": tensor(users), "items": tensor(items)}
    model.load_state_dict(state)
    return model


def batch_terms(model: Recommender, inputs: Mapping[str, Any], names: str) -> dict[str, Tensor]:
    """Return BPR and the auxiliary terms of a batch, as `training.ranking_terms` puts them."""
    user, item, negative = (torch.tensor(inputs[name]) for name in names.split())
    pairs = Pairs(user, item, negative[:, None])
    rows = rows_of(model, pairs)
    extra = model.auxiliary(Triples(*pairs, *rows, size=len(user)))
    return {"bpr": outputs(rows).loss.mean(), **extra}


def lightgcn(inputs: Mapping[str, Any]) -> dict[str, Any]:
    edges = [[int(user), item] for user, items in inputs["train"].items() for item in items]
    graph = graph_of(inputs["n_users"], inputs["n_items"], edges)
    model = LightGCN(graph, 4, inputs["n_layers"], decay=inputs["decay"])
    loaded(model, inputs["user_embedding"], inputs["item_embedding"])
    adjacency = model.adjacency().to_sparse_coo().coalesce()
    terms = batch_terms(model, inputs, "users pos neg")
    total = sum(terms.values())
    total.backward()
    users, items = model.final().split([graph.users, graph.items])
    return {
        "norm_adj_rows": adjacency.indices()[0],
        "norm_adj_cols": adjacency.indices()[1],
        "norm_adj_vals": adjacency.values(),
        "final_users": users,
        "final_items": items,
        "bpr_loss": terms["bpr"].item(),
        "reg_loss": terms["l2"].item() / inputs["decay"],
        "total_loss": total.item(),
        "grad_user_embedding": model.users.grad,
        "grad_item_embedding": model.items.grad,
        "scores_sigmoid_user0": (items @ users[0]).sigmoid(),
    }


def bpr_losses(inputs: Mapping[str, Any]) -> dict[str, Any]:
    rows = {
        (split, kind): tensor(inputs[f"{split}_{kind}"], torch.float64)
        for split in ("forget", "retain")
        for kind in ("user", "pos", "neg")
    }

    def score(split: str, kind: str) -> Tensor:
        return (rows[split, "user"] * rows[split, kind]).sum(1).requires_grad_()

    positive = score("forget", "pos")
    backward = reverse_bpr(positive, score("forget", "neg"))
    forward = bpr(score("retain", "pos"), score("retain", "neg"))
    alpha = inputs["alpha"]
    (slope,) = torch.autograd.grad(backward.mean(), positive)
    retained = [rows["retain", kind] for kind in ("user", "pos", "neg")]
    return {
        "reverse_bpr_mean_forget": backward.mean(),
        "reverse_bpr_sum_forget": backward.sum(),
        "forward_bpr_mean_retain": forward.mean(),
        "forward_bpr_sum_retain": forward.sum(),
        "mix_alpha_reverse_plus_1_minus_alpha_forward": alpha * backward.mean()
        + (1 - alpha) * forward.mean(),
        "d_reverse_d_pos_score": slope,
        "mmrec_bpr_retain": forward.mean(),
        "mmrec_embloss_retain": embedding_norm(*retained),
        "unlearnrec_bpr_retain": forward.mean(),
    }


def infonce(inputs: Mapping[str, Any]) -> dict[str, Any]:
    views = [tensor(inputs[name], torch.float64) for name in ("view1", "view2")]
    nodes, temperature = torch.tensor(inputs["nodes"]), inputs["temperature"]
    forms = {
        "simgcl_contrast_unique_nodes_inbatch": "unique",
        "sgl_contrastLoss_inbatch_dups_kept": "batch",
        "infoNCE_all_node_denominator": "all",
        "mgcn_infonce_inbatch": "batch",
        "sgl_full_denominator_sum": "sum",
    }
    return {name: contrast(*views, nodes, temperature, form) for name, form in forms.items()}


def simgcl(inputs: Mapping[str, Any]) -> dict[str, Any]:
    matrix = sparse(tensor(inputs["norm_adj"], torch.float64))
    draws = tensor(inputs["uniform_noise_per_layer"], torch.float64)
    layers = perturbed_layers(matrix, tensor(inputs["E0"], torch.float64), draws, inputs["eps"])
    stack = torch.stack(layers)
    return {"layers": stack, "output_mean_without_layer0": stack.mean(0)}


def lightgcl(inputs: Mapping[str, Any]) -> dict[str, Any]:
    graph = graph_of(inputs["n_users"], inputs["n_items"], inputs["edges"])
    model = LightGCL(
        graph,
        len(inputs["E_u"][0]),
        inputs["layers"],
        decay=inputs["lambda2"],
        ssl_weight=inputs["lambda1"],
        temperature=inputs["temp"],
        rank=len(inputs["svd_s"]),
    )
    loaded(model, inputs["E_u"], inputs["E_i"])
    users, items = model.final().split([graph.users, graph.items])
    view = model.view(model.summed()[1]).split([graph.users, graph.items])
    terms = batch_terms(model, inputs, "users pos neg")
    return {
        "E_user": users,
        "E_item": items,
        "G_user": view[0],
        "G_item": view[1],
        "loss": sum(terms.values()),
        "bpr": terms["bpr"],
        "lambda1_times_cl": terms["ssl"],
    }


def similar_items(inputs: Mapping[str, Any]) -> dict[str, Any]:
    features = tensor(inputs["features"], torch.float64)
    graph, _ = item_graph(*nearest(features, inputs["k"]))
    return {
        "cosine": similarity(features, features),
        "dense_sym": graph.to_dense(),
        "sparse_sym_as_dense": graph.to_dense(),
    }


ADAPTERS: dict[str, Callable[[dict[str, Any]], Mapping[str, Any]]] = {
    "lightgcn_propagation_bpr": lightgcn,
    "bpr_and_reverse_bpr": bpr_losses,
    "infonce": infonce,
    "simgcl_perturbed_propagation": simgcl,
    "lightgcl": lightgcl,
    "mmrec_knn_item_graph": similar_items,
}
