"""Golden vectors of the closed-form edits of text-to-image models, and of attention losses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmforget.diffusion.attention_losses import joint_norm, summed_norms
from mmforget.diffusion.closed_form import Ridge, Rows, Site
from mmforget.diffusion.methods.mace import cross, importance, refit
from mmforget.diffusion.methods.rece import adversarial
from mmforget.diffusion.methods.uce import UCEConfig, debias, edit


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def single(embeddings: Mapping[str, Any]) -> Rows:
    """Return texts of which one position each is known."""
    found = {text: tensor(row)[None] for text, row in embeddings.items()}
    return Rows(found, dict.fromkeys(found, (0,)), ((0, 1),))


def uce(inputs: Mapping[str, Any]) -> dict[str, Any]:
    if "token_embeddings" in inputs:
        found = {text: tensor(rows) for text, rows in inputs["token_embeddings"].items()}
        last = {text: (count,) for text, count in inputs["n_real_tokens"].items()}
        rows = Rows(found, last, ((0, inputs["max_length"]),))
        pairs, preserve = [(inputs["old"], inputs["new"])], inputs["retain"]
    else:
        rows = single(inputs["last_token_embedding"])
        pairs = list(zip(inputs["edit_concepts"], inputs["guide_concepts"], strict=True))
        preserve = inputs["preserve_concepts"]
    config = UCEConfig(
        erase_scale=inputs["erase_scale"],
        preserve_scale=inputs["preserve_scale"],
        lamb=inputs["lamb"],
        technique=inputs.get("technique", "replace"),
    )
    weights = {f"{name}_new": tensor(inputs[name]) for name in ("W_to_k", "W_to_v")}
    edit(list(weights.values()), rows, pairs, preserve, config)
    return weights


def uce_debias(inputs: Mapping[str, Any]) -> dict[str, Any]:
    gaps = tensor(inputs["ratio_gaps_per_iteration"])
    weights = {f"{name}_final": tensor(inputs[name]) for name in ("W_to_k", "W_to_v")}
    config = UCEConfig(
        mode="debias",
        attributes=inputs["debias_concepts"],
        erase_scale=inputs["edit_scale"],
        preserve_scale=inputs["preserve_scale"],
        lamb=inputs["lamb"],
        step_size=1.0,
        rounds=len(gaps),
        tolerance=0.0,
    )
    site = Site(tuple(weights.values()), single(inputs["embedding"]))
    kept, concepts = inputs["preserve_concepts"], inputs["edit_concepts"]
    total = debias([site], concepts, kept, lambda turn: gaps[turn], config)
    return {**weights, "accumulated_coefficients": total}


def rece(inputs: Mapping[str, Any]) -> dict[str, Any]:
    edited, original = (
        [tensor(w) for name in sorted(inputs[key]) for w in inputs[key][name]]
        for key in ("W_edited", "W_original")
    )
    rows = tensor(inputs["concept_token_embeddings"])
    found = adversarial(edited, original, rows, inputs["regular_scale"])
    return {"adversarial_token_embeddings": found}


def mace(inputs: Mapping[str, Any]) -> dict[str, Any]:
    weight, old = tensor(inputs["W"]), tensor(inputs["old_token_embeddings"])
    new, scale = tensor(inputs["new_token_embeddings"]), inputs["preserve_scale"]
    gram = scale * tensor(inputs["cache_for_mat2"])
    ridge = Ridge(old.flatten(0, 1), 1.0, inputs["lamb"])
    ridge.hold_gram(gram)
    kept = scale * tensor(inputs["cache_for_mat1"])
    return {
        "W_new": refit(weight, weight @ cross(old, new), kept, gram, ridge),
        "importance": importance(torch.tensor(inputs["timesteps"])),
    }


def attention_loss(inputs: Mapping[str, Any]) -> dict[str, Any]:
    probs = [tensor(layer)[None] for layer in inputs["attention_probs"]]
    tokens = torch.tensor(inputs["concept_positions"]).bool()
    return {
        "fmn_loss": joint_norm(probs, tokens).item(),
        "mace_attention_loss_without_mask": summed_norms(probs, tokens).item(),
    }


ADAPTERS: dict[str, Callable[[dict[str, Any]], Mapping[str, Any]]] = {
    "uce": uce,
    "uce_debias": uce_debias,
    "rece_closed_form": rece,
    "mace_closed_form": mace,
    "fmn_attention_loss": attention_loss,
}
