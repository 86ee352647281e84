"""Golden vectors of methods that unlearn from images: ScissorHands (SalUn's mask is the core's)."""

from collections.abc import Callable
from typing import Any

import torch

from mmforget.diffusion.methods.shs import project, snip


def shs_snip_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    names = list(inputs["weights"])
    weights = [torch.tensor(inputs["weights"][name]) for name in names]
    slopes = [torch.tensor(inputs["summed_abs_gradients"][name]) for name in names]
    masks, threshold = snip(weights, slopes, inputs["sparsity"])
    return {
        "threshold": threshold,
        "reinitialise": {name: mask.int() for name, mask in zip(names, masks, strict=True)},
        "n_reinitialised": sum(int(mask.sum()) for mask in masks),
    }


def shs_gem(inputs: dict[str, Any]) -> dict[str, Any]:
    gradient, memory = torch.tensor(inputs["gradient"]), torch.tensor(inputs["memory"])
    made, added = project(gradient, memory, inputs["margin"], inputs["eps"])
    return {
        "dot": float(gradient @ memory),
        "projected": added is not None,
        "v": added,
        "new_gradient": made,
    }


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "shs_snip_mask": shs_snip_mask,
    "shs_gem": shs_gem,
}
