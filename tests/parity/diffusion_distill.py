"""Golden vectors of ESD: its targets in both forms, and what it trains."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.diffusion.methods.distill import squared
from mmforget.diffusion.methods.esd import esd_target, paper_eta
from mmforget.diffusion.models import DiffusionModel, Shared
from mmforget.diffusion.noise import Noising
from mmforget.diffusion.scopes import parameters

SCOPES = ("esd-x", "esd-x-strict", "esd-u", "esd-all")


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def target(inputs: Mapping[str, Any]) -> dict[str, Any]:
    e0, ec, student = (tensor(inputs[f"eps_{name}"]) for name in ("null", "concept", "student"))
    base = tensor(inputs["eps_erase_from"]) if "eps_erase_from" in inputs else None
    erase_from, eta = "concept" if base is None else "anchor", inputs["negative_guidance"]
    forms = {
        "paper_form": esd_target(e0, ec, paper_eta(eta, "paper")),
        "current_script": esd_target(e0, ec, paper_eta(eta, "current", erase_from), base),
    }
    found: dict[str, Any] = {f"target_{name}": made.tolist() for name, made in forms.items()}
    losses = {f"loss_{name}": float(squared(student, made).mean()) for name, made in forms.items()}
    return {**found, **losses}


def selection(inputs: Mapping[str, Any]) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**inputs["unet_config"])
    models = {family: _model(family, unet) for family in ("sd", "sdxl")}
    every = parameters(models["sd"], "all")
    found: dict[str, Any] = {"all_parameters": {"count": len(every), "numel": _numel(every)}}
    for scope in SCOPES:
        chosen = {family: parameters(model, scope) for family, model in models.items()}
        found[scope] = _described(chosen)
        found[scope]["names"] = [n.removeprefix("unet.") for n in chosen["sd"]]
    # The script knows no xattn, trains nothing and fails; here it is what its README means by it.
    assert parameters(models["sd"], "xattn").keys() == parameters(models["sd"], "esd-x").keys()
    found["xattn"] = _described({"sd": {}, "sdxl": {}})
    return found


def _model(family: str, unet: nn.Module) -> DiffusionModel:
    from diffusers import DDPMScheduler

    shared = Shared(object, family, nn.Identity(), {}, Noising(DDPMScheduler()), "")
    return DiffusionModel(shared, {"unet": unet})


def _described(chosen: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, Any]:
    found: dict[str, Any] = {"sd_numel": _numel(chosen["sd"])}
    for family, named in chosen.items():
        names = "\n".join(name.removeprefix("unet.") for name in named)
        found[f"{family}_count"] = len(named)
        found[f"{family}_sha256"] = hashlib.sha256(names.encode()).hexdigest()
    return found


def _numel(named: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in named.values())


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "esd_target": target,
    "esd_param_selection": selection,
}
