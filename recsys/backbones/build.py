"""Recommenders by name: what each can be told, its published defaults, and how it is built."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.recsys.backbones.base import L2_FORMS, Recommender
from mmforget.recsys.backbones.lightgcl import LightGCL
from mmforget.recsys.backbones.lightgcn import COMBINED, LightGCN
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.backbones.mgcn import MGCN
from mmforget.recsys.backbones.mmgcn import MMGCN
from mmforget.recsys.backbones.sgl import DROPS, SGL, VIEWS
from mmforget.recsys.backbones.simgcl import SimGCL
from mmforget.recsys.backbones.vbpr import VBPR
from mmforget.recsys.graph import Graph
from mmforget.recsys.losses import CONTRASTS
from mmforget.rng import derive

BACKBONES: Mapping[str, type[Recommender]] = {
    "mf": MatrixFactorisation,
    "lightgcn": LightGCN,
    "sgl": SGL,
    "simgcl": SimGCL,
    "lightgcl": LightGCL,
    "vbpr": VBPR,
    "mmgcn": MMGCN,
    "mgcn": MGCN,
}


def _defaults(kind: type[Recommender]) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


# What each backbone can be told, with its default. Where the code bases that publish one search
# over a value (decay of MMRec's models, ssl_weight of MGCN) it is one of their grid; std=None is
# Xavier's. BPR-MF begins small: with N(0, 1) of LightGCN-PyTorch's `mf` it learns far more slowly.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {n: _defaults(kind) for n, kind in BACKBONES.items()}
MULTIMODAL = ("vbpr", "mmgcn", "mgcn")


@dataclass(frozen=True)
class ModelConfig:
    """The recommender. What is null takes the backbone's published default."""

    name: str = option("lightgcn", "backbone", choices=tuple(BACKBONES))
    checkpoint: str | None = option(None, "weights to start from")
    dim: int | None = option(None, "width of the vectors; 64", low=1)
    layers: int | None = option(
        None, "hops over the user-item graph; 3, mgcn and lightgcl 2", low=1
    )
    std: float | None = option(None, "of initial values; 0.1 for mf, lightgcn, else Xavier", low=0)
    decay: float | None = option(None, "weight of the L2 term; 1e-4, lightgcl 1e-7", low=0)
    l2: str | None = option(
        None,
        "L2 over a batch's layer-0 vectors: half_squared (LightGCN), unsquared norm (MMRec), "
        "mean_squares (MMGCN); over final ones: final_half_squared (MGCN); or all_parameters",
        choices=L2_FORMS,
    )
    combine: str | None = option(
        None, "layers are averaged, or summed as by UnlearnRec; mean", choices=COMBINED
    )
    layer0: bool | None = option(None, "whether layer 0 is one of them; simgcl false, else true")
    ssl_weight: float | None = option(
        None, "weight of the contrast; sgl 0.1, simgcl 0.5, lightgcl 0.2, mgcn 0.01", low=0
    )
    temperature: float | None = option(None, "of the contrast; 0.2", low=1e-3)
    contrast: str | None = option(
        None,
        "denominator of the contrast: over a batch's nodes once each (unique; sgl, simgcl), with "
        "repeats (batch; mgcn), over all nodes (all), or all and summed (sum; SGL's paper)",
        choices=CONTRASTS,
    )
    drop_rate: float | None = option(
        None, "share of edges a view of sgl lacks; 0.1", low=0, high=0.9
    )
    drop: str | None = option(
        None,
        "sgl drops edges and normalises anew, or matrix entries and scales the rest up; edges",
        choices=DROPS,
    )
    views: str | None = option(None, "sgl draws views each step or epoch; step", choices=VIEWS)
    noise: float | None = option(None, "length of simgcl's noise; 0.1", low=0)
    rank: int | None = option(None, "rank of lightgcl's view; 5", low=1)
    hops: int | None = option(None, "mgcn's hops over similar items; 1", low=0)
    neighbours: int | None = option(None, "mgcn's similar items, itself included; 10", low=1)
    train_features: bool | None = option(None, "whether mgcn trains its features; true")


def build_backbone(
    config: ModelConfig, graph: Graph, features: Mapping[str, Tensor], seed: int
) -> Recommender:
    """Return a freshly initialised recommender, a function of the seed alone.

    Args:
        config: Which, and what differs from its defaults.
        graph: All training edges.
        features: "image" and "text" features of items, [I, width]; those that need none ignore
            them.
        seed: Seed of the initial weights; torch's global generator is put back.

    Raises:
        ConfigError: The backbone does not exist, lacks an option that is set, or needs features.
    """
    kind = BACKBONES.get(config.name)
    if kind is None:
        raise ConfigError(
            f"model.name={config.name!r} is unknown; accepted: {', '.join(BACKBONES)}"
        )
    given = {item.name: getattr(config, item.name) for item in fields(ModelConfig)}
    chosen = {
        name: value
        for name, value in given.items()
        if value is not None and name not in ("name", "checkpoint")
    }
    accepted = PUBLISHED[config.name]
    faults = [
        f"model.{name}={value}: {config.name} has no such option; it has {', '.join(accepted)}"
        for name, value in chosen.items()
        if name not in accepted
    ]
    if config.name in MULTIMODAL and not features:
        faults.append(
            f"model.name={config.name} needs image or text features of items (image_feat.npy, "
            f"text_feat.npy beside the interactions); without them take mf or lightgcn"
        )
    if faults:
        raise ConfigError(faults)
    given_features = {"features": features} if config.name in MULTIMODAL else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "backbone"))
        return kind(graph, **given_features, **chosen)


# Tensors of other code bases and their names here; a dot at the end: all that begin so.
FOREIGN: Mapping[str, str] = {
    # gusye1234/LightGCN-PyTorch
    "embedding_user.weight": "users",
    "embedding_item.weight": "items",
    # MMRec: BPR, LightGCN, MGCN, VBPR
    "user_embedding.weight": "users",
    "item_embedding.weight": "items",
    "item_id_embedding.weight": "items",
    "embedding_dict.user_emb": "users",
    "embedding_dict.item_emb": "items",
    "u_embedding": "users",
    "i_embedding": "items",
    "item_linear.": "linear.",
    "image_embedding.weight": "raw.image",
    "text_embedding.weight": "raw.text",
    "image_trs.": "project.image.",
    "text_trs.": "project.text.",
    "gate_v.0.": "purify.image.",
    "gate_t.0.": "purify.text.",
    "gate_image_prefer.0.": "prefer.image.",
    "gate_text_prefer.0.": "prefer.text.",
    "query_common.": "query.",
    # HKUDS/LightGCL; UnlearnRec
    "E_u_0": "users",
    "E_i_0": "items",
    "uEmbeds": "users",
    "iEmbeds": "items",
}


def foreign_state(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a checkpoint's tensors under the names used here; others keep theirs.

    Knows LightGCN-PyTorch, MMRec (BPR, LightGCN, VBPR, MGCN), LightGCL and UnlearnRec. None of
    them stores which edges were trained on.

    Args:
        state: Tensors by name.
    """
    found = {}
    for name, value in state.items():
        for theirs, ours in FOREIGN.items():
            if name == theirs:
                name = ours
                break
            if theirs.endswith(".") and name.startswith(theirs):
                name = ours + name[len(theirs) :]
                break
        found[name] = value
    return found
