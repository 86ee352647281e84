"""Attacks on the mini world: the original needs none; what never saw the concept resists."""

from pathlib import Path

import pytest
import torch

from mmforget.cache import Cache
from mmforget.config import plan
from mmforget.pipeline import Pipeline
from mmforget.record import RunResult

torch.set_num_threads(1)

WORDS = (
    "benchmark=diffusion/unlearncanvas",
    "data=mini",
    "model=mini",
    "request={object: Cats}",
    "metrics=none",
    "attack=random,text_grad,hard_prompt",
)
ABLATED = (
    "method=ca", "preset=none", "method.steps=75", "method.lr=3e-4", "method.batch_size=8",
    "method.scale_lr=false", "method.images=64", "method.anchor_steps=20",
)  # fmt: skip


def asr(run: RunResult, attack: str) -> float:
    return run.attacks[f"diffusion/{attack}"].values["asr"].value


@pytest.mark.slow
def test_attacks_find_what_was_hidden_and_not_what_was_never_learned(tmp_path: Path) -> None:
    """About 15 minutes on one core: the retrained model is trained first."""
    pipeline = Pipeline(tmp_path / "runs", Cache(tmp_path / "cache"))
    original = pipeline.run(plan([*WORDS, "method=original", "reference=false"]))
    assert all(asr(original, name) == 1.0 for name in ("random", "text_grad", "hard_prompt"))
    retrained = pipeline.run(plan([*WORDS, "method=retrain"]))
    assert all(asr(retrained, name) <= 0.1 for name in ("random", "text_grad", "hard_prompt"))
    ablated = pipeline.run(plan([*WORDS, *ABLATED, "reference=false"]))
    assert ablated.attacks["diffusion/random"].values["pre_asr"].value <= 0.3
    assert asr(ablated, "text_grad") > asr(ablated, "random")
    assert asr(ablated, "text_grad") > asr(retrained, "text_grad") + 0.3
