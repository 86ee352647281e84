"""Golden vectors of the edits of text-to-image models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.diffusion.edits import Step
from mmforget.diffusion.methods.sae import intervene, scores, selected, threshold
from mmforget.diffusion.methods.seot import soften
from mmforget.diffusion.methods.sld import SafetyGuidance, SLDConfig, strength
from mmforget.diffusion.methods.spm import gates, low_rank, similarity


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def spm_gate(inputs: dict[str, Any]) -> dict[str, Any]:
    erased = torch.tensor(inputs["erased_prompt_token_ids"])
    found = similarity(
        torch.tensor([inputs["prompt_token_ids"]]),
        tensor(inputs["prompt_embeds"]),
        erased,
        tensor(inputs["erased_prompt_embeds"]),
        inputs["special_token_ids"],
        inputs["matching_metric"],
    )
    gate = gates(found)
    given = inputs["layer"]
    weight, x = tensor(given["W"]), tensor(given["x"])
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.load_state_dict({"weight": weight})
    added = low_rank(layer, x, tensor(given["lora_down"]), tensor(given["lora_up"]))
    added = added * (given["alpha"] / given["rank"])
    plain = layer(x).detach()
    return {
        "score_per_erased_prompt": found[0].tolist(),
        "gate": gate[0].item(),
        "layer_output": (plain + gate * added).tolist(),
        "layer_output_reference_inference": (plain + gate.square() * added).tolist(),
    }


def sld(inputs: dict[str, Any]) -> dict[str, Any]:
    chosen = strength(SLDConfig(preset=inputs["preset"]))
    assert chosen == (
        inputs["sld_warmup_steps"],
        inputs["sld_guidance_scale"],
        inputs["sld_threshold"],
        inputs["sld_momentum_scale"],
        inputs["sld_mom_beta"],
    )
    edit = SafetyGuidance("", **chosen._asdict())
    found = []
    for given in inputs["steps"]:
        plain, prompt, unsafe = (
            tensor(given[f"eps_{name}"]) for name in ("uncond", "text", "safety")
        )
        step = Step(given["step"], 50, torch.tensor(0), plain, inputs["guidance_scale"])
        guided = edit.guide(step, plain, prompt, unsafe)
        assert edit.velocity is not None
        found.append(
            {
                "step": given["step"],
                "eps_guided": guided.tolist(),
                "momentum_after": edit.velocity.tolist(),
            }
        )
    return {"steps": found}


def seot_soft_weight(inputs: dict[str, Any]) -> dict[str, Any]:
    assert inputs["method"] == "soft-weight"
    made = soften(
        tensor(inputs["text_embeddings"])[0],
        torch.tensor(inputs["token_indices"]),
        inputs["n_tokens_with_bos_eos"],
        inputs["alpha"],
    )
    return {"text_embeddings_suppressed": made[None].tolist()}


def saeuron(inputs: dict[str, Any]) -> dict[str, Any]:
    at = {
        name: tensor(v)[:, inputs["timestep"]] for name, v in inputs["concept_activations"].items()
    }
    mean = at[inputs["target"]].mean(dim=0)
    rest = torch.cat([v for name, v in at.items() if name != inputs["target"]]).mean(dim=0)
    found = scores(mean, rest)
    chosen = selected(mean, rest, inputs["percentile"])
    overall = torch.stack([v.mean(dim=0) for v in at.values()]).mean(dim=0)
    scaling = inputs["multiplier"] * mean
    values = tensor(inputs["sae_latents"])
    outputs = [
        intervene(
            tensor(inputs["activation"]),
            values,
            torch.arange(values.shape[1]).expand_as(values),
            tensor(inputs["W_dec"]),
            tensor(inputs["b_dec"]),
            torch.where(chosen, overall, torch.inf).expand_as(values),
            scaling.expand_as(values),
            reference,
        ).tolist()
        for reference in (True, False)
    ]
    return {
        "scores": found.tolist(),
        "threshold": threshold(found, inputs["percentile"]).item(),
        "selected_features": torch.nonzero(chosen).flatten().tolist(),
        "mean_over_concepts": overall[chosen].tolist(),
        "scaling": scaling[chosen].tolist(),
        "output_reference_error_sign": outputs[0],
        "output_error_corrected_sign": outputs[1],
    }


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "spm_gate": spm_gate,
    "sld": sld,
    "seot_soft_weight": seot_soft_weight,
    "saeuron_feature_selection": saeuron,
}
