import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmforget.checkpoint import read_state
from mmforget.vision.train import app

torch.set_num_threads(1)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Three persons of one colour each, ten photos a person."""
    rng = np.random.default_rng(0)
    root = tmp_path / "faces"
    for person, name in enumerate(("anna", "ben", "carl")):
        (root / name).mkdir(parents=True)
        for k in range(10):
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[:, :, person] += 150
            Image.fromarray(pixels).save(root / name / f"{k:02d}.png")
    return root


def test_trains_original_and_retrained(faces: Path, tmp_path: Path) -> None:
    words = [
        "benchmark=vision/faces",
        "data=local",
        f"data.root={faces}",
        "model=mini/resnet",
        "benchmark.image_size=32",
        "benchmark.training.epochs=20",
        "benchmark.augment=none",
        "benchmark.training.batch_size=8",
        "benchmark.training.lr=0.05",
        "runtime.device=cpu",
        "runtime.progress=false",
        "--cache",
        str(tmp_path / "cache"),
    ]

    def trained(*extra: str) -> dict[str, float]:
        out = tmp_path / "-".join(["out", *extra])
        result = CliRunner().invoke(app, [*words, "--out", str(out), "--json", *extra])
        assert result.exit_code == 0, (result.output, result.exception)
        written = json.loads((out / "metrics.json").read_text())
        assert json.loads(result.stdout)["accuracy"] == written["accuracy"]
        assert written["trained_on"] == ("retrained" if extra else "original")
        assert read_state(out)
        assert (out / "config.yaml").is_file()
        found: dict[str, float] = written["accuracy"]
        return found

    original, retrained = trained(), trained("--retrain")
    assert original["forget"] > 0.8 and original["retain"] > 0.8
    assert retrained["forget"] == 0.0  # a person that was never trained on is never named
    assert retrained["retain"] > 0.8


def test_other_benchmarks_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["benchmark=vision/fases", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "Close: vision/faces" in result.stderr
    assert not (tmp_path / "x").exists()
