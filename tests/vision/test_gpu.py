"""What must hold on an accelerator: `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import pytest
import torch

from mmforget.cache import Cache
from mmforget.config import plan
from mmforget.pipeline import Pipeline
from mmforget.rng import Draws
from mmforget.vision.augment import augment, draw

pytestmark = pytest.mark.gpu


def test_augmentation_is_that_of_the_cpu() -> None:
    image = torch.randint(256, (32, 3, 64, 64), dtype=torch.uint8)
    here = augment(image.clone(), draw(Draws(0, "x", total=32)))
    there = augment(image.cuda(), draw(Draws(0, "x", total=32, device="cuda")))
    # A pixel on the edge between two neighbours may round to the other one.
    assert ((here - there.cpu()).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_finishes(tmp_path: Path, precision: str) -> None:
    words = ["benchmark=vision/mufac", "method=npo", "benchmark.training.epochs=8"]
    made = plan([*words, "runtime.device=cuda", f"runtime.precision={precision}"])
    result = Pipeline(tmp_path / "runs", Cache(tmp_path / "cache")).run(made)
    assert result.status == "finished" and result.cost.device_s > 0
    assert result.metrics["accuracy/retain"].value > 0.5
