"""Golden vectors of UnlearnRec: the influence encoder on a small LightGCN, and its losses."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.recsys.adapter import Pairs, RankingAdapter
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.data import Interactions
from mmforget.recsys.graph import Graph
from mmforget.recsys.influence_encoder import (
    InfluenceGraph,
    alignment_loss,
    choice,
    contrast_loss,
    unlearning_loss,
)
from mmforget.recsys.methods.unlearnrec import (
    Objective,
    UnlearnRecConfig,
    make_encoder,
    with_tables,
)
from mmforget.types import Batch, Splits


class Summed(LightGCN):
    """The vectors' LightGCN: its layers are summed, and nothing is averaged."""

    def table(self) -> Tensor:
        return super().table() * (self.layers + 1)


def influence_encoder(inputs: Mapping[str, Any]) -> dict[str, Any]:
    users, items, weights = inputs["n_users"], inputs["n_items"], inputs["weights"]
    edges = np.array(inputs["train_edges"])
    graph = Graph(users, items, edges[:, 0], edges[:, 1])
    wanted = torch.tensor(inputs["dropped_edges"])
    keys = graph.user * items + graph.item
    dropped = torch.isin(keys, wanted[:, 0] * items + wanted[:, 1]).nonzero()[:, 0]
    free, final = torch.tensor(inputs["E0"]), torch.tensor(inputs["E_final_before"])

    model = Summed(graph, dim=free.shape[1], layers=inputs["gnn_layers"], decay=0.0)
    model.drop(dropped)
    config = UnlearnRecConfig(
        layers=inputs["gnn_layers"],
        mlp_layers=inputs["mlp_layers"],
        withdraw_rate=inputs["overall_withdraw_rate"],
        temperature=weights["align_temp"],
    )
    encoder = make_encoder(config, free, final)
    with torch.no_grad():
        encoder.h0.copy_(torch.tensor(inputs["H0"]))
        encoder.eta.copy_(torch.tensor(inputs["w_eta"]))
    influence = InfluenceGraph(graph, dropped)
    table = encoder(influence, free)
    hops = encoder.hops(influence)
    whole = torch.arange(graph.nodes)
    found = with_tables(model, table, lambda changed: changed.table())

    user, item, negative = (torch.tensor(inputs["batch"][k]) for k in ("users", "pos", "neg"))
    objective = Objective(model, final, config, weights["unlearn"], weights["align"])
    ctx, batch = context(graph, Pairs(user, item, negative[:, None]))
    terms = objective.terms(ctx, batch, table, graph.user[dropped], graph.item[dropped])
    groups = (torch.unique(user), torch.unique(item) + users)
    contrast = contrast_loss(influence, encoder.h0[influence.nodes], hops, groups, rate=0.0)
    # The release's regulariser is that of the frozen E0: a constant, of no term of ours.
    regular = weights["reg"] * free.square().sum()
    total = torch.stack([*terms.values(), weights["ssl"] * contrast, regular]).sum()
    return {
        "E0_updated": table.tolist(),
        "influence_layer_embeddings": [influence.rows(hop, whole).tolist() for hop in hops],
        "final_user_after": found[:users].tolist(),
        "final_item_after": found[users:].tolist(),
        "loss_total": total.item(),
        "bpr": (weights["bpr"] * terms["retain"]).item(),
        "reg_weighted": regular.item(),
        "unlearn": terms["forget"].item() / weights["unlearn"],
        "align": terms["retain_align"].item() / weights["align"],
        "ssl_no_dropout": contrast.item(),
    }


def losses(inputs: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: torch.tensor(inputs[name]) for name in inputs if name != "align_temp"}
    scores = (given["drop_user"] * given["drop_item"]).sum(1)
    found = {f"unlearn_{form}": unlearning_loss(scores, form).item() for form in ("v1", "v2")}
    for form in ("v2", "v3"):
        new, old = (
            choice(given[f"{side}_user"], given[f"{side}_item"], inputs["align_temp"], form)
            for side in ("src", "target")
        )
        found[f"align_{form}"] = alignment_loss(new, old).item()
    return found


def context(graph: Graph, pairs: Pairs) -> tuple[Context, Batch]:
    data = Interactions(graph.user.numpy(), graph.item.numpy(), graph.items)
    ctx = Context(
        engine=Engine(Runtime(device="cpu", progress=False)),
        adapter=RankingAdapter(),
        model=torch.nn.Identity(),
        splits=Splits(forget=data, retain=data, train=data, holdout=data, test=data),
        reads=frozenset(),
        label="parity",
        seed=0,
    )
    size, units = len(pairs.user), torch.ones(len(pairs.user))
    none: Any = None  # nothing is drawn
    return ctx, Batch("retain", [""] * size, pairs, units, size, float(size), 1.0, none)


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "unlearnrec_influence_encoder": influence_encoder,
    "unlearnrec_losses": losses,
}
