"""Every loss method of the core, which knows no modality, on a tiny text-to-image pipeline."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from mmforget.context import Context
from mmforget.methods.base import make_loss_method
from mmforget.registry import METHODS
from tests.diffusion import world

torch.set_num_threads(1)

SCOPE = "xattn"
STEPS = {"epochs": 2, "batch_size": 4, "lr": 2e-3, "optimizer": "adam", "scope": SCOPE}
NO_LOSS = {"original", "retrain"}  # they train nothing, or all from scratch

# Method -> its settings, and which way the mean losses on forget and retain go: +1 up, -1 down,
# 0 not said.
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "finetune": (STEPS, 0, -1),
    "grad_ascent": (STEPS, 1, 0),
    "grad_diff": ({**STEPS, "retain_weight": 0.5}, 1, 0),
    "kl_retain": (STEPS, 1, 0),
    "random_label": ({**STEPS, "epochs": 1}, 0, 0),
    "npo": ({**STEPS, "ratio": "mean"}, 1, 0),
    "simnpo": ({**STEPS, "beta": 1.0, "retain_weight": 0.0}, 1, 0),
    "dpo": ({**STEPS, "retain_weight": 0.0}, 1, 0),
    "idk": ({**STEPS, "epochs": 1}, 0, 0),
    "scrub": ({**STEPS, "forget_batch_size": 4, "retain_batch_size": 4}, 0, -1),
    "bad_teacher": (STEPS, 0, 0),
    "l1_sparse": (STEPS, 0, -1),
    "salun": ({"mask_batch_size": 4, "inner": {"name": "grad_ascent", **STEPS}}, 1, 0),
    "task_vector": (STEPS, 1, 0),
    "sam": ({"inner": {"name": "npo", "ratio": "mean", **STEPS}}, 1, 0),
}


def test_all_shared_loss_methods_are_here() -> None:
    shared = {name for name in METHODS.names() if "/" not in name}
    assert shared - NO_LOSS == set(CASES)


@pytest.mark.parametrize("name", list(CASES))
def test_shared_method(name: str) -> None:
    settings, forget, retain = CASES[name]
    method = make_loss_method(name, settings, "method")
    model = world.model("sd")
    before = deepcopy(model)
    data = world.splits()
    plain = world.context(model, method)
    ctx = Context(
        engine=plain.engine,
        adapter=plain.adapter,
        model=model,
        splits=data,
        reads=method.reads,
        label=name,
        seed=0,
        fresh_model=lambda seed: world.model("sd", seed % 1000 + 1),
        target=world.erasure(),
    )
    after = method.run(ctx)
    changed = world.changed(before, after)
    assert changed
    assert all(".attn2." in entry for entry in changed)
    assert 0 < len(changed) <= len(ctx.trainable)
    # What salun and an annealed loss leave alone aside, every weight of the scope has moved.
    if name != "salun":
        assert changed == set(ctx.trainable)
    assert ctx.engine.meter.steps >= 2

    def mean(model: Any, split: str) -> float:
        found = ctx.engine.predict(model, ctx.adapter, data.get(split), 0)
        return float(found["loss"].mean())

    for split, way in (("forget", forget), ("retain", retain)):
        rise = mean(after, split) - mean(before, split)
        assert torch.isfinite(torch.tensor(rise))
        assert rise * way > 0 or way == 0, f"the loss on {split} rose by {rise}"


def test_random_label_comes_closer_to_the_anchor() -> None:
    settings = {**STEPS, "epochs": 3, "order": "union", "lr": 5e-3}
    method = make_loss_method("random_label", settings, "method")
    model = world.model("sd")
    distance = [_distance(model)]
    method.run(world.context(model, method))
    distance.append(_distance(model))
    assert distance[1] < 0.9 * distance[0]


def test_bad_teacher_moves_to_the_random_network_on_forget() -> None:
    method = make_loss_method("bad_teacher", {**STEPS, "epochs": 3}, "method")
    model = world.model("sd")
    original, random = deepcopy(model), world.model("sd", 1)
    plain = world.context(model, method)
    ctx = Context(
        engine=plain.engine,
        adapter=plain.adapter,
        model=model,
        splits=world.splits(),
        reads=method.reads,
        label="bad_teacher",
        seed=0,
        fresh_model=lambda seed: random,
    )
    method.run(ctx)
    assert _apart(model, random) < _apart(original, random)


def _apart(first: Any, second: Any) -> float:
    latents, t, concept = _view(first)
    with torch.no_grad():
        found = [m.predict(latents, t, m.encode([concept] * 4)) for m in (first, second)]
    return float((found[0] - found[1]).square().mean())


def _distance(model: Any) -> float:
    """Return how far the concept's prediction is from the anchor's, both by this model."""
    latents, t, concept = _view(model)
    with torch.no_grad():
        found = model.predict(latents, t, model.encode([concept] * 4))
        anchor = model.predict(latents, t, model.encode(["a dog image in photo style"] * 4))
    return float((found - anchor).square().mean())


def _view(model: Any) -> tuple[torch.Tensor, torch.Tensor, str]:
    rng = torch.Generator().manual_seed(9)
    latents = torch.randn(4, 4, world.SIDE, world.SIDE, generator=rng)
    return latents, torch.tensor([100, 300, 600, 900]), "a dog image in monet style"
