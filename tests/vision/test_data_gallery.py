"""Samples of a run and the report section made of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from mmforget.images import ImageTable
from mmforget.record import Cost, RunResult, Seeds
from mmforget.types import Dataset, ModelView, Splits, Trial
from mmforget.vision import gallery
from mmforget.vision.images import ImageData


def _data(count: int, labels: np.ndarray[Any, Any]) -> ImageData:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    ids = tuple(f"<face {k}>" for k in range(count))
    return ImageData(ImageTable(ids, pixels, ids, Path()), labels)


def _trial(data: ImageData, logits: np.ndarray[Any, Any]) -> Trial:
    def predict(_: torch.nn.Module, given: Dataset) -> dict[str, np.ndarray[Any, Any]]:
        numbers = {"loss": np.zeros(len(given)), "logits": logits, "label": data.labels}
        return {**numbers, "ids": np.array(given.ids)}

    splits = Splits(forget=data, retain=data, train=data, holdout=data, test=data)
    view = ModelView(torch.nn.Identity, predict, splits)
    unused = cast(Any, None)
    return Trial(view, view, None, splits, 0, Cost(), None, benchmark=unused, lab=unused)


def _run(method: str, folder: Path, seed: int = 0) -> RunResult:
    return RunResult(
        id=f"vision/mufac/{method}/x-s{seed}", status="finished", benchmark="vision/mufac",
        modality="vision", method=method, seeds=Seeds(unlearn=seed), mini=True, request={},
        parents={}, metrics={}, attacks={}, cost=Cost(), environment={}, config={}, folder=folder,
    )  # fmt: skip


def _write(folder: Path, logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
    data = _data(len(logits), labels)
    gallery.write(_trial(data, logits), ["young", "old"], False, folder / "samples")


def test_samples_hold_images_labels_and_confidence(tmp_path: Path) -> None:
    logits = np.tile(np.array([[0.0, np.log(3.0)]], dtype=np.float32), (30, 1))
    data = _data(30, np.arange(30, dtype=np.int64) % 2)
    gallery.write(_trial(data, logits), ["young", "old"], False, tmp_path)
    said = json.loads((tmp_path / "forget.json").read_text())
    assert (
        len(said["ids"]) == 24 and said["ids"][0] == "<face 0>" and said["ids"][-1] == "<face 29>"
    )
    assert set(said["predicted"]) == {"old"} and said["confidence"][0] == pytest.approx(0.75)
    with Image.open(tmp_path / "forget.png") as sheet:
        assert sheet.size == (48, 32)
        corner = np.asarray(sheet)[24:, 40:]  # the last of 24: fourth line, sixth column
    assert np.array_equal(corner, data.table.pixels[29].transpose(1, 2, 0))


def test_attribute_samples_name_what_is_present(tmp_path: Path) -> None:
    labels = np.array([[1, 0], [0, 0]], dtype=np.float32)
    logits = np.array([[np.log(3.0), np.log(3.0)], [-np.log(3.0), -np.log(3.0)]])
    gallery.write(_trial(_data(2, labels), logits), ["male", "smiling"], True, tmp_path)
    said = json.loads((tmp_path / "forget.json").read_text())
    assert said["true"] == ["male", "none"] and said["predicted"] == ["male, smiling", "none"]
    assert said["confidence"] == pytest.approx([0.75, 0.75])


def test_section_compares_the_models_on_the_same_images(tmp_path: Path) -> None:
    labels = np.zeros(7, dtype=np.int64)
    right, wrong = np.tile([4.0, 0.0], (7, 1)), np.tile([0.0, 4.0], (7, 1))
    for name, logits in (("npo", wrong), ("retrain", right), ("original", right)):
        _write(tmp_path / name, logits, labels)
    runs = [_run(name, tmp_path / name) for name in ("npo", "retrain", "original", "absent")]
    (section,) = gallery.sections(runs)
    assert section.html.count("<figure>") == 7
    assert section.html.count('class="right"') == 14 and section.html.count('class="wrong"') == 7
    first = section.html.split("</figure>")[0]
    assert first.index("original") < first.index("retrain") < first.index("npo")
    assert "<face 0>" not in section.html and "&lt;face 0&gt;" in section.html
    assert "<script" not in section.html and "data:image/png;base64," in section.html


def test_section_leaves_out_other_requests_and_numbers_seeds(tmp_path: Path) -> None:
    labels = np.zeros(6, dtype=np.int64)
    for name, count in (("a", 6), ("b", 6), ("c", 5)):
        _write(tmp_path / name, np.zeros((count, 2)), labels[:count])
    runs = [
        _run("npo", tmp_path / "a"),
        _run("npo", tmp_path / "b", 1),
        _run("scrub", tmp_path / "c"),
    ]
    (section,) = gallery.sections(runs)
    assert "npo s0" in section.html and "npo s1" in section.html and "scrub" not in section.html
    assert gallery.sections([replace(runs[0], folder=tmp_path / "nowhere")]) == []
