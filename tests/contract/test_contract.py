from typing import Any

import pytest
import torch

from mmforget.registry import METHODS
from mmforget.testing.contract import Case, check_loss_method
from mmforget.testing.toys import WORLDS, toy_world

torch.set_num_threads(1)

PLAIN: dict[str, Any] = {
    "epochs": 2,
    "lr": 0.05,
    "batch_size": 12,
    "optimizer": "sgd",
    "momentum": 0.9,
}
SCRUB = {**PLAIN, "max_epochs": 1, "forget_batch_size": 12, "retain_batch_size": 24}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", PLAIN),
    "grad_ascent": ("grad_ascent", PLAIN),
    "grad_ascent_clamped": ("grad_ascent", {**PLAIN, "max_loss": 1.5}),
    "grad_diff": ("grad_diff", PLAIN),
    "neggrad_plus": ("grad_diff", {**PLAIN, "anchor": "retain", "pull": 0.1, "epochs": 1}),
    "kl_retain": ("kl_retain", PLAIN),
    "kl_retain_reference": ("kl_retain", {**PLAIN, "reference": True}),
    "random_label": ("random_label", PLAIN),
    "amnesiac": ("random_label", {**PLAIN, "order": "union", "exclude_true": True}),
    "npo": ("npo", PLAIN),
    "idk": ("idk", PLAIN),
    "idk_sum_of_means": ("idk", {**PLAIN, "sum_of_means": True}),
    "dpo": ("dpo", PLAIN),
    "npo_kl": ("npo", {**PLAIN, "retain": "kl", "ratio": "mean"}),
    "simnpo": ("simnpo", PLAIN),
    "scrub": ("scrub", SCRUB),
    "scrub_rewind": ("scrub", {**SCRUB, "rewind": True}),
    "bad_teacher": ("bad_teacher", {**PLAIN, "retain_fraction": 0.5}),
    "l1_sparse": ("l1_sparse", PLAIN),
    "salun": ("salun", {"inner": PLAIN}),
    "salun_npo": ("salun", {"ratio": 0.3, "inner": {"name": "npo", **PLAIN}}),
    "sam": ("sam", {"rho": 0.1, "inner": PLAIN}),
    "sam_grad_diff": ("sam", {"rho": 0.1, "inner": {"name": "grad_diff", "pull": 0.1, **PLAIN}}),
    "sam_salun": ("sam", {"inner": {"name": "salun", "inner": PLAIN}}),
    "task_vector": ("task_vector", PLAIN),
}


# Settings of a method that runs in every world already: two worlds, one of them with a mask.
VARIANTS = {
    "idk_sum_of_means",
    "grad_ascent_clamped",
    "kl_retain_reference",
    "amnesiac",
    "npo_kl",
    "sam_salun",
}
CASES = [
    (key, world)
    for key in SETTINGS
    for world in (("classes", "tokens") if key in VARIANTS else WORLDS)
]


@pytest.mark.parametrize(("key", "world"), CASES)
def test_contract(key, world, tmp_path):
    name, settings = SETTINGS[key]
    partial = "salun" in key
    check_loss_method(Case(name, settings, toy_world(world), partial=partial), tmp_path)


def test_every_shared_loss_method_is_covered():
    shared = {name for name in METHODS if "/" not in name}
    assert shared - {name for name, _ in SETTINGS.values()} == {"original", "retrain"}
