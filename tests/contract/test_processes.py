import json

import pytest
import torch

from mmforget.checkpoint import read_state
from mmforget.testing.launched import launch, run_cases

torch.set_num_threads(1)

PLAIN = {"epochs": 2, "lr": 0.05, "batch_size": 13, "optimizer": "sgd", "momentum": 0.9}
SCRUB = {**PLAIN, "max_epochs": 1, "forget_batch_size": 7, "retain_batch_size": 23, "rewind": True}
CASES = [
    {"name": "grad_diff", "settings": {**PLAIN, "pull": 0.1}, "world": "tokens"},
    {"name": "grad_diff", "settings": {**PLAIN, "norm": "train"}, "world": "classes"},
    {"name": "l1_sparse", "settings": {**PLAIN, "norm": "train"}, "world": "classes"},
    {"name": "scrub", "settings": SCRUB, "world": "classes"},
    {"name": "bad_teacher", "settings": {**PLAIN, "clip_norm": 0.1}, "world": "noise"},
    {"name": "salun", "settings": {"inner": PLAIN}, "world": "graph"},
    {"name": "sam", "settings": {"rho": 0.1, "inner": PLAIN}, "world": "tokens"},
    # Batches of one: fewer rows than processes.
    {"name": "finetune", "settings": {**PLAIN, "batch_size": 1, "max_steps": 5}, "world": "noise"},
]


@pytest.mark.slow  # four imports of torch
def test_two_processes_give_the_weights_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    run_cases(CASES, one)
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(CASES))
    launch("mmforget.testing.launched", file, two)
    assert (two / "processes").read_text() == "2"
    for index, case in enumerate(CASES):
        alone = read_state(one / f"{index}.safetensors")
        split = read_state(two / f"{index}.safetensors")
        for name, value in alone.items():
            far = (split[name].double() - value.double()).abs().max()
            assert far <= 1e-5, f"{case['name']} in {case['world']}: {name} differs by {far:.2g}"
