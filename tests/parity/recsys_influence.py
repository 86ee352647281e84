"""Golden vectors of influence functions on matrix factorisation with explicit 0/1 labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.graph import Graph
from mmforget.recsys.influence import (
    Curvature,
    Examples,
    Pointwise,
    Vectors,
    conjugate_gradients,
    gradient,
    selected_rows,
)


def influence_mf(inputs: Mapping[str, Any]) -> dict[str, Any]:
    users, items = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("U", "I"))
    data = np.array(inputs["data_user_item_label"])
    data = data[np.lexsort((data[:, 1], data[:, 0]))]
    assert (data == inputs["data_user_item_label"]).all()
    graph = Graph(len(users), len(items), data[:, 0], data[:, 1])
    model = MatrixFactorisation(graph, dim=users.shape[1], decay=0.0).double()
    with torch.no_grad():
        model.users.copy_(users)
        model.items.copy_(items)
    vectors, table = Vectors(model), torch.from_numpy(data)
    train = Examples(table[:, 0], table[:, 1:2], table[:, 2:].double())
    removed = train.where(torch.tensor(inputs["removed_indices"]))
    rows = selected_rows(model, removed, "touched", 0.4)
    g = gradient(vectors, removed, Pointwise)[rows]
    summed, n = Curvature(vectors, train, Pointwise, rows, exact=True), len(train.user)

    def product(direction: Tensor) -> Tensor:
        return summed(direction) / n

    p = conjugate_gradients(product, g, inputs["damping"], 500, 1e-13).x
    basis = torch.eye(g.numel(), dtype=g.dtype).view(-1, *g.shape)
    after = torch.cat([users, items]).index_add(0, rows, p, alpha=1 / n)
    return {
        "touched_users": rows[rows < len(users)].tolist(),
        "touched_items": (rows[rows >= len(users)] - len(users)).tolist(),
        "grad_removed_sum": g.flatten().tolist(),
        "hessian_mean": [product(column).flatten().tolist() for column in basis],
        "p": p.flatten().tolist(),
        "U_after": after[: len(users)].tolist(),
        "I_after": after[len(users) :].tolist(),
    }


ADAPTERS = {"influence_mf": influence_mf}
