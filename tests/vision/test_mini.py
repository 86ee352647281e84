"""The mini worlds: published layouts, seeds, and that they are worth measuring."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score

from mmforget.engine import Engine, Runtime
from mmforget.portraits import Person, draw_look, draw_person, portrait
from mmforget.registry import BENCHMARKS
from mmforget.schema import instantiate
from mmforget.training import fit
from mmforget.types import Splits
from mmforget.vision import mini
from mmforget.vision.benchmarks import mufac
from mmforget.vision.benchmarks.base import FaceBenchmark

torch.set_num_threads(1)

NAMES = ("vision/mufac", "vision/mucac", "vision/faces")


def _make(name: str, store: Path, seed: int = 1) -> FaceBenchmark:
    """Return a benchmark on its mini world with the shipped mini recipe."""
    kind = BENCHMARKS.get(name)
    assert issubclass(kind, FaceBenchmark)
    text = (files("mmforget.configs") / "mini" / f"{name}.yaml").read_text()
    given = yaml.safe_load(text)
    return kind(
        instantiate(kind.config_type, given["benchmark"], "benchmark"),
        instantiate(kind.data_type, {"seed": seed}, "data"),
        instantiate(kind.model_type, given["model"], "model"),
        instantiate(kind.request_type, given.get("request", {}), "request"),
        store,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


SIZES = {
    "vision/mufac": {"forget": 200, "retain": 700, "holdout": 200, "test": 200},
    "vision/mucac": {"forget": 168, "retain": 672, "holdout": 168, "test": 168},
    "vision/faces": {
        "forget": 50, "retain": 190, "holdout": 50, "test": 190, "forget_test": 50,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_worlds_are_read_by_the_published_loader(name: str, store: Path) -> None:
    bench = _make(name, store)
    splits = bench.splits()
    assert {key: len(splits.get(key)) for key in splits.names()} == SIZES[name]
    assert splits.check() == []
    again = _make(name, store)
    assert again.splits().train.digests == splits.train.digests
    assert again.fingerprint() == bench.fingerprint()


def test_worlds_follow_their_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini, "FAMILIES", {"train": (1, 1), "val": (801, 1), "test": (851, 1)})
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        mini.write_mufac(tmp_path / folder, seed)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(names) == 78  # 75 images and three listings
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    listing = "custom_train_dataset.csv"
    assert (tmp_path / "a" / listing).read_text() != (tmp_path / "c" / listing).read_text()


def test_file_names_carry_family_role_and_label(store: Path) -> None:
    bench = _make("vision/mufac", store)
    splits = bench.splits()
    parsed = [mufac.parse_name(image) for image in splits.train.ids]
    label = splits.train.take(range(900))["label"].tolist()
    assert [mufac.LETTERS.index(p.letter) for p in parsed if p] == label
    assert len({p.family for p in parsed if p}) == 36
    assert np.bincount(label, minlength=8).min() > 80  # all classes are there, about evenly


def test_a_person_stays_and_attributes_show() -> None:
    rng = np.random.default_rng(0)
    ann, bob = draw_person(rng), draw_person(rng)
    look = draw_look(rng, age=0.3, male=False, smile=False)

    def pixels(person: Person, **changes: Any) -> np.ndarray[Any, Any]:
        shown = replace(look, noise=0.0, **changes)
        image = portrait(person, shown, 48, np.random.default_rng(1))
        assert isinstance(image, Image.Image) and image.size == (48, 48)
        return np.asarray(image, dtype=np.float64)

    base = pixels(ann)
    assert np.array_equal(base, pixels(ann))
    for changes in ({"smile": True}, {"male": True}, {"age": 0.9}):
        assert np.abs(pixels(ann, **changes) - base).mean() > 0.3
    assert np.abs(pixels(bob) - base).mean() > 3


def _auc(engine: Engine, bench: FaceBenchmark, splits: Splits, model: torch.nn.Module) -> float:
    """Return the AUC of the loss-threshold attack, forget against holdout."""
    member, other = (
        engine.predict(model, bench.adapter, splits.get(name), seed=0)["loss"]
        for name in ("forget", "holdout")
    )
    truth = np.r_[np.ones(len(member)), np.zeros(len(other))]
    return float(roc_auc_score(truth, -np.r_[member, other]))


def _accuracy(
    engine: Engine, bench: FaceBenchmark, splits: Splits, model: torch.nn.Module
) -> float:
    found = engine.predict(model, bench.adapter, splits.test, seed=0)
    if bench.multilabel:
        return float(((found["logits"] > 0) == (found["label"] > 0.5)).mean())
    return float((found["logits"].argmax(axis=1) == found["label"]).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chance"), list(zip(NAMES, (0.125, 0.5, 1 / 19), strict=True)))
def test_originals_memorise_and_retrained_models_do_not(
    name: str, chance: float, store: Path
) -> None:
    engine = Engine(Runtime(device="cpu", progress=False, threads=1))
    bench = _make(name, store)
    splits = bench.splits()
    recipe = bench.config.training
    original = fit(engine, bench.build(11), bench.adapter, splits.train, recipe, seed=1)
    retrained = fit(engine, bench.build(12), bench.adapter, splits.retain, recipe, seed=2)
    assert _auc(engine, bench, splits, original) >= 0.70
    slack = 0.08 if name != "vision/faces" else 0.15  # only 50 photos are unseen there
    assert abs(_auc(engine, bench, splits, retrained) - 0.5) <= slack
    assert _accuracy(engine, bench, splits, original) > 1.35 * chance
