from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmforget
from mmforget.cache import Cache
from mmforget.config import Plan, plan
from mmforget.diffusion import canvas
from mmforget.diffusion.benchmarks.unlearncanvas import UnlearnCanvas
from mmforget.diffusion.canvas import PHOTOS
from mmforget.diffusion.models import DiffusionModel
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError, DataError, SplitError
from mmforget.record import RunResult
from mmforget.workbench import Bench, Workbench
from tests.diffusion.world import pipeline

STYLES = ("Crayon", "Monet", "Winter")
OBJECTS = ("Birds", "Cats", "Dogs")
ARCH = "test_resnet"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder copy of 3 styles and 3 objects, a pipeline folder and two classifiers."""
    import timm

    root = tmp_path_factory.mktemp("canvas")
    rng = np.random.default_rng(0)
    for theme in (*STYLES, PHOTOS):
        for name in OBJECTS:
            for k in (1, 2, 3):
                path = root / "data" / theme / name / f"{k}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    made = pipeline("sd")
    made.tokenizer.model_max_length = 16
    made.save_pretrained(root / "pipe")
    torch.manual_seed(0)
    for file, classes in (("style.pth", 51), ("object.pth", 20)):
        network = timm.create_model(ARCH, pretrained=False, num_classes=classes)
        torch.save({"model_state_dict": network.state_dict()}, root / file)
    return root


def words(place: Path, *more: str) -> list[str]:
    return [
        "benchmark=diffusion/unlearncanvas",
        "method=original",
        "data=local",
        f"data.root={place / 'data'}",
        "data.images=3",
        "data.trained=2",
        "model=pipeline",
        f"model.pipeline={place / 'pipe'}",
        f"benchmark.styles=[{','.join(STYLES)}]",
        f"benchmark.objects=[{','.join(OBJECTS)}]",
        "benchmark.seeds=[1,2]",
        "benchmark.real_images=2",
        "benchmark.sampling.steps=2",
        "benchmark.sampling.guidance=3.0",
        f"benchmark.judges.style={place / 'style.pth'}",
        f"benchmark.judges.object={place / 'object.pth'}",
        f"benchmark.judges.arch={ARCH}",
        "runtime.threads=1",
        "runtime.progress=false",
        *more,
    ]


def opened(place: Path, tmp_path: Path, *more: str) -> tuple[Workbench, Bench, Plan]:
    recipe = plan(words(place, *more))
    workbench = Workbench(Engine(Runtime(threads=1, progress=False)), Cache(tmp_path / "cache"))
    return workbench, workbench.bench(recipe), recipe


def made_by(place: Path, tmp_path: Path, method: str, *more: str) -> RunResult:
    given = [w for w in words(place, *more) if not w.startswith("method=")]
    found = mmforget.sweep(
        *given, f"method={method}", runs=tmp_path / "runs", cache=tmp_path / "cache"
    )
    return list(found)[-1]


def target_of(bench: Bench, stage: int = 0) -> Any:
    return bench.benchmark.stages(bench.splits)[stage].target


def test_a_style_request_splits_by_style_and_by_trained_images(place: Path, tmp_path: Path) -> None:
    _, bench, _ = opened(place, tmp_path, "request={style: Monet}")
    splits = bench.splits
    assert {name.split("/")[0] for name in splits.forget.ids} == {"Monet"}
    assert {name.split("/")[2] for name in splits.forget.ids} == {"1", "2"}
    assert {name.split("/")[2] for name in splits.holdout.ids} == {"3"}
    assert len(splits.forget) == 6 and len(splits.retain) == 18 and len(splits.test) == 9
    assert PHOTOS in {name.split("/")[0] for name in splits.retain.ids}
    row = splits.forget.take([0])
    assert row["captions"] == [["A Birds image in Monet style."]]
    assert row["anchors"] == [["A Birds image in Photo style."] * 1]
    assert row["moments"].shape == (1, 8, 8, 8)
    assert splits.retain.take([0])["anchors"] == [[]]


def test_what_methods_are_told_of_a_style_an_object_and_a_pair(place: Path, tmp_path: Path) -> None:
    style = target_of(opened(place, tmp_path, "request={style: Monet}")[1])
    (concept,) = style.concepts
    assert (concept.name, concept.text, concept.anchor) == ("Monet", "Monet style", "Photo style")
    assert len(concept.prompts) == len(OBJECTS)
    assert not any("Monet" in text for text in (*style.preserve, *style.retain))
    assert "A Dogs image in Photo style." in style.retain
    named = target_of(opened(place, tmp_path, "request={object: Dogs}")[1])
    (concept,) = named.concepts
    # The next object stands in its place, the first one after the last.
    assert (concept.text, concept.anchor) == ("An image of Dogs", "An image of Birds")
    assert all(
        "Dogs" in p and "Birds" in a for p, a in zip(concept.prompts, concept.anchors, strict=True)
    )
    assert not any("Dogs" in text for text in (*named.preserve, *named.retain))
    pair = target_of(opened(place, tmp_path, "request={pair: [Monet, Dogs]}")[1])
    assert pair.concepts[0].text == "A Dogs image in Monet style."
    assert "A Cats image in Monet style." in pair.retain
    chosen = target_of(opened(place, tmp_path, "request={style: Monet, anchor: Winter}")[1])
    assert chosen.concepts[0].anchor == "Winter style"


def test_a_sequence_keeps_later_targets_until_their_turn(place: Path, tmp_path: Path) -> None:
    _, bench, _ = opened(place, tmp_path, "request={sequence: [Monet, Dogs]}")
    first, second = bench.benchmark.stages(bench.splits)
    assert {name.split("/")[0] for name in first.splits.forget.ids} == {"Monet"}
    dogs = [name for name in first.splits.retain.ids if "/Dogs/" in name]
    assert dogs and not any(name.startswith("Monet/") for name in dogs)
    assert {name.split("/")[1] for name in second.splits.forget.ids} == {"Dogs"}
    kept = set(second.splits.retain.ids)
    assert not any("/Dogs/" in name or name.startswith("Monet/") for name in kept)
    assert kept == set(bench.splits.retain.ids)
    assert len(first.splits.retain.ids) == len(set(first.splits.retain.ids))
    assert not any("Monet" in text or "Dogs" in text for text in second.target.retain)


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        ("request={}", ConfigError, "exactly one"),
        ("request={style: Monet, object: Dogs}", ConfigError, "exactly one"),
        ("request={style: Mone}", SplitError, "Monet"),
        ("request={object: Monet}", SplitError, "object"),
        ("request={pair: [Monet]}", ConfigError, "a style and an object"),
        ("request={sequence: [Monet, Monet]}", ConfigError, "twice"),
        ("request={sequence: [Monet, Nothing]}", SplitError, "Nothing"),
    ],
)
def test_bad_requests(
    place: Path, tmp_path: Path, request_: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        opened(place, tmp_path, request_)


def test_missing_images_are_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Monet|missing"):
        opened(place, tmp_path, "request={style: Monet}", "data.images=4")


def test_a_run_scores_its_own_answer_set(place: Path, tmp_path: Path) -> None:
    result = made_by(
        place, tmp_path, "grad_ascent", "request={style: Monet}", "method.max_steps=1",
        "method.batch_size=4", "method.lr=0.0",
    )  # fmt: skip
    assert result.status in ("finished", "collapsed")
    parent = result.parents["original"]
    assert parent is not None and "retrained" not in result.parents
    original = mmforget.record.load_run(tmp_path / "runs" / parent)
    for name in ("canvas/UA", "canvas/IRA", "canvas/CRA", "distance/fid"):
        assert result.metrics[name].value == original.metrics[name].value, "nothing was changed"
    assert result.metrics["drift/rmse_forget"].value == 0.0
    assert result.metrics["storage/bytes"].value == 0.0
    assert (result.folder / "samples" / "pictures.jpg").is_file()
    # The scores are those of the files in the cache.
    (folder,) = [p.parent for p in (tmp_path / "cache").rglob("manifest.json")]
    names = {path.name for path in folder.glob("*.jpg")}
    assert len(names) == 4 * 3 * 2 and "Monet_Dogs_seed2.jpg" in names


def test_a_changed_model_has_its_own_answers_and_file(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = made_by(
        place, tmp_path, "grad_ascent", "request={style: Monet}", "method.max_steps=2",
        "method.batch_size=4", "method.lr=0.05", "method.scope=esd-x",
    )  # fmt: skip
    assert result.metrics["drift/rmse_forget"].value > 0.0
    state = load_file(result.folder / "model.safetensors")
    assert state and all("attn2" in name for name in state), "only what changed is kept"
    plain = pipeline("sd").unet
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    assert result.metrics["storage/bytes"].value == sum(4 * v.numel() for v in state.values())


def test_a_sequence_is_scored_after_each_request(place: Path, tmp_path: Path) -> None:
    result = made_by(
        place, tmp_path, "grad_ascent", "request={sequence: [Monet, Dogs]}",
        "method.max_steps=1", "method.batch_size=4", "method.lr=0.01",
    )  # fmt: skip
    names = {name for name in result.metrics if name.startswith("sequence/")}
    assert names == {
        "sequence/1/UA/Monet", "sequence/1/retain",
        "sequence/2/UA/Monet", "sequence/2/UA/Dogs", "sequence/2/retain",
    }  # fmt: skip
    kept = result.folder / "steps" / "0" / "model.safetensors"
    assert (
        kept.is_file() and kept.read_bytes() != (result.folder / "model.safetensors").read_bytes()
    )
    assert result.cost.steps == 2, "the cost is that of both requests"


def test_retraining_without_training_is_refused_as_a_reference(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = made_by(place, tmp_path, "original", "request={style: Monet}")
    assert "canvas/gap" not in result.metrics
    assert "no retrained reference" in caplog.text


def test_classifiers_are_needed(place: Path, tmp_path: Path) -> None:
    _, bench, _ = opened(place, tmp_path, "request={style: Monet}", "benchmark.judges.style=null")
    assert isinstance(bench.benchmark, UnlearnCanvas)
    with pytest.raises(ConfigError, match=r"style50\.pth"):
        bench.benchmark.classifiers  # noqa: B018


def test_neighbours_are_nearest_by_text(place: Path, tmp_path: Path) -> None:
    workbench, bench, recipe = opened(place, tmp_path, "request={style: Monet}")
    made = bench.benchmark
    assert isinstance(made, UnlearnCanvas)
    model, _, _ = workbench.trained(bench, recipe, bench.splits.train, 0, "original")
    assert isinstance(model, DiffusionModel)
    assert set(made.nearest(model)) == {"Crayon", "Winter"}
    chosen = made.related(model)
    assert chosen and all(canvas.parse_answer_name(n)[0] in ("Crayon", "Winter") for n in chosen)
