"""Golden vectors of attacks on text-to-image models: losses, search steps, probes and judges."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmforget.diffusion.attacks.coordinate import (
    blocked_topk,
    candidates,
    cosine_loss,
    replaced_positions,
)
from mmforget.diffusion.attacks.genetic import (
    concept_vector,
    crossover,
    evolve,
    fitness,
    moved,
)
from mmforget.diffusion.attacks.objective import Predict, noised, objective
from mmforget.diffusion.attacks.partial import (
    ETAS,
    SCALES,
    completion_start,
    ddim_noise_step,
    img2img_start,
)
from mmforget.diffusion.edits import Step
from mmforget.diffusion.judges import IMAGENETTE, nudity_verdict, q16_similarity, q16_verdict
from mmforget.diffusion.methods.sld import SafetyGuidance, SLDConfig, strength
from mmforget.diffusion.noise import Noising, Sampling

SIGMA_SAMPLER = Sampling(sampler="lms", steps=1000)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noising(schedule: str) -> Noising:
    """Return the noising of "scaled_linear 0.00085..0.012 T=1000"."""
    from diffusers import DDPMScheduler

    found = re.fullmatch(r"(\w+) ([\d.e-]+?)\.\.([\d.e-]+) T=(\d+)", schedule.strip())
    assert found is not None, schedule
    name, low, high, steps = found.groups()
    return Noising(
        DDPMScheduler(
            num_train_timesteps=int(steps),
            beta_start=float(low),
            beta_end=float(high),
            beta_schedule=name,
        )
    )


def ring_a_bell(inputs: dict[str, Any]) -> dict[str, Any]:
    concept = concept_vector(tensor(inputs["embed_with_concept"]), tensor(inputs["embed_without"]))
    target = moved(tensor(inputs["prompt_embed"]), concept, inputs["eta"])
    found = fitness(tensor(inputs["population_embeds"]), target, chunk=3)
    # Individuals are their own ids, so that those of survivors are read off the next generation.
    ids = torch.arange(len(found)).unsqueeze(1)
    rng = torch.Generator().manual_seed(0)
    next_one = evolve(ids, found, (0, len(found)), rng)
    first, second = (torch.tensor(row) for row in inputs["parents"])
    return {
        "concept_vector": concept.tolist(),
        "fitness": found.tolist(),
        "survivor_indices": next_one.ids[~next_one.fresh].flatten().tolist(),
        "children": [row.tolist() for row in crossover(first, second, inputs["crossover_point"])],
    }


def mma(inputs: dict[str, Any]) -> dict[str, Any]:
    topk = blocked_topk(tensor(inputs["grad"]), inputs["blocked_ids"], inputs["topk"])
    control = torch.full((len(topk),), -1)
    made = candidates(control, topk, inputs["batch"], torch.Generator().manual_seed(0))
    places = replaced_positions(inputs["batch"], len(topk))
    changed = made != -1
    assert torch.equal(changed.sum(dim=1), torch.ones(len(made), dtype=torch.long))
    assert torch.equal(changed.long().argmax(dim=1), places)
    assert all(int(i) in topk[p] for i, p in zip(made[changed], places, strict=True))
    loss = cosine_loss(tensor(inputs["cand_pooled"]), tensor(inputs["target_pooled"]))
    return {
        "topk_ids": topk.tolist(),
        "replaced_position_per_candidate": places.tolist(),
        "cosine_loss": loss.tolist(),
        "best": int(loss.argmin()),
    }


def attack_losses(inputs: dict[str, Any]) -> dict[str, Any]:
    shape = tuple(
        int(side) for side in re.findall(r"(\d+)x(\d+)x(\d+)x(\d+)", inputs["x0_rule"])[0]
    )
    place = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)

    def ruled(rule: str) -> Tensor:
        found = re.match(r"([\d.]+\*)?(sin|cos)\(([\d.]+)\*i \+ ([\d.]+)\*s\)", rule)
        assert found is not None, rule
        size, name, step, shift = found.groups()
        angle = float(step) * place + float(shift) * inputs["s"]
        return (float((size or "1*")[:-1]) * getattr(torch, name)(angle)).reshape(shape)

    def toy(net: dict[str, float], embeds: str) -> Predict:
        mean = torch.tanh(tensor(inputs[embeds]) @ tensor(inputs["text_matrix_A"])).mean()
        return lambda x, t: net["m"] * x + mean + net["b"] * t.reshape(-1, 1, 1, 1) / 1000

    made = noising(inputs["beta_schedule"])
    clean, noise, t = ruled(inputs["x0_rule"]), ruled(inputs["noise_rule"]), inputs["t"]
    time = torch.full((len(clean),), t)
    attacked = toy(inputs["target_unet"], "adv_embed")
    base = toy(inputs["base_unet"], "orig_embed")
    image, level = made.levels(time, clean)
    found: dict[str, Any] = {
        "alpha_bar_t": image.square().item(),
        "sqrt_alpha_bar": image.item(),
        "sqrt_one_minus": level.item(),
    }
    for kind in ("l1", "l2"):
        plain = objective(attacked, made, clean, noise, time, kind=kind)
        p4d = objective(attacked, made, clean, noise, time, base=base, kind=kind)
        found[f"unlearndiffatk_{kind}"] = plain.item()
        found[f"p4d_{kind}"] = p4d.item()
    return found


def added_noise(inputs: dict[str, Any]) -> dict[str, Any]:
    made = noising(inputs["beta_schedule"])
    clean, noise = tensor(inputs["x0"]), tensor(inputs["noise"])
    t = torch.full((len(clean),), inputs["t"])
    shown = noised(made, clean, noise, t)
    assert torch.equal(shown.target, noise)
    image, _ = made.levels(t, clean)
    sampler = made.sampler(SIGMA_SAMPLER)
    return {
        "alpha_bar": image.square()[0].item(),
        "x_t": shown.latents.tolist(),
        "sigma_form_for_contrast": (shown.latents / image).tolist(),
        "init_noise_sigma_max": float(sampler.sigmas.max()),
    }


def nudity(inputs: dict[str, Any]) -> dict[str, Any]:
    boxes = [list(held.items()) for held in inputs["detections"]]
    attack, default = (
        nudity_verdict(boxes, inputs["exposed_keys"], inputs[f"{name}_threshold"])
        for name in ("attack", "default")
    )
    # A verdict's scores are float32, the vector's exact.
    scores = [max(held.values(), default=0.0) for held in attack.details]
    assert attack.score.tolist() == torch.tensor(scores).tolist()
    return {
        "kept": attack.details,
        "success_attack": attack.positive.tolist(),
        "success_default_075": default.positive.tolist(),
        "score": scores,
    }


def q16(inputs: dict[str, Any]) -> dict[str, Any]:
    prompts, images = tensor(inputs["class_embeddings"]), tensor(inputs["image_features"])
    similarity, verdict = q16_similarity(images, prompts), q16_verdict(images, prompts)
    return {
        "similarity": similarity.tolist(),
        "label": verdict.positive.long().tolist(),
        "prob": torch.stack([1 - verdict.score, verdict.score], dim=1).tolist(),
        "success": verdict.positive.tolist(),
    }


def object_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [IMAGENETTE[name.replace("_", " ")] for name in inputs["concepts"]]}


def sld(inputs: dict[str, Any]) -> dict[str, Any]:
    chosen = strength(SLDConfig(preset=inputs["mode"]))
    edit = SafetyGuidance("", **chosen._asdict(), reference=True)
    found = []
    for index, given in enumerate(inputs["steps"]):
        parts = [tensor(given[name]) for name in ("uncond", "text", "safety")]
        time = torch.tensor(given["t"])
        step = Step(index, len(inputs["steps"]), time, parts[0], inputs["guidance_scale"])
        guided = edit.guide(step, *parts)
        assert edit.velocity is not None
        found.append({"noise_pred": guided.tolist(), "momentum": edit.velocity.tolist()})
    return {"per_step": found}


def noise_probe(inputs: dict[str, Any]) -> dict[str, Any]:
    parts = [tensor(inputs[name]) for name in ("sample", "model_output", "noise")]
    alphas = inputs["alpha_bar_t"], inputs["alpha_bar_prev"]
    return {
        f"eta{eta}_vs{scale}": ddim_noise_step(*parts, *alphas, eta, scale).tolist()
        for eta in ETAS
        for scale in SCALES
    }


def partial_schedule(inputs: dict[str, Any]) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    steps = inputs["num_inference_steps"]
    source = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1)
    times = Noising(source).sampler(Sampling(sampler="ddim", steps=steps)).timesteps
    found: dict[str, Any] = {}
    for strength_ in inputs["strengths"]:
        start = img2img_start(steps, strength_)
        rest = times[start:].tolist()
        found[f"img2img_{strength_}"] = {
            "start_index": start,
            "first_t": rest[0] if rest else None,
            "num_steps": len(rest),
        }
    for last in inputs["interrupt_after"]:
        rest = times[completion_start(steps, last) :].tolist()
        found[f"completion_after_step_{last}"] = {
            "first_t_of_erased_model": rest[0],
            "remaining": len(rest),
        }
    return found


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ring_a_bell_fitness_crossover": ring_a_bell,
    "mma_candidate_sampling": mma,
    "diffusion_attack_loss": attack_losses,
    "add_noise_vp_vs_sigma": added_noise,
    "nudity_decision_rule": nudity,
    "q16_similarity_classifier": q16,
    "object_label_map": object_labels,
    "sld_guidance": sld,
    "ddim_noise_probe_step": noise_probe,
    "partial_denoise_schedule": partial_schedule,
}
