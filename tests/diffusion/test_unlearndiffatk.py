"""The benchmark of attacked prompts: tables, judges, runs, pipelines from elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmforget.api import attack_path
from mmforget.cache import Cache
from mmforget.config import plan
from mmforget.diffusion import mini
from mmforget.diffusion.attacks.opener import pipeline_folder
from mmforget.diffusion.zero_shot import JudgeConfig, Means, ZeroShot, make_judge
from mmforget.engine import Engine
from mmforget.errors import ConfigError, DataError, MMForgetError
from mmforget.pipeline import Pipeline
from mmforget.record import RunResult, to_json
from mmforget.workbench import Bench, Workbench

torch.set_num_threads(1)

REAL = os.environ.get("MMFORGET_REAL_DATA")
SMALL = (
    "benchmark=diffusion/unlearndiffatk",
    "data.limit=3",
    "data.drawn=1",
    "benchmark.sampling.steps=4",
    "benchmark.targets.steps=4",
    "reference=false",
    "metrics=none",
)
QUICK = {"stages": 2, "iterations": 2, "images": 3, "tokens": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unlearndiffatk")


def quick(attack: str, **more: Any) -> list[str]:
    return [f"attack.{attack}.{key}={value}" for key, value in {**QUICK, **more}.items()]


def opened(place: Path, *words: str) -> Bench:
    recipe = plan(["method=original", *SMALL, *words])
    return Workbench(Engine(recipe.runtime), Cache(place / "cache")).bench(recipe)


def made_by(place: Path, *words: str) -> RunResult:
    return Pipeline(place / "runs", Cache(place / "cache")).run(plan([*SMALL, *words]))


def test_the_mini_table_is_split_and_judged(place: Path) -> None:
    bench = opened(place, "data=mini", "model=mini")
    benchmark: Any = bench.benchmark
    assert benchmark.concepts == ("Van Gogh",)
    assert [row.id for row in benchmark.examples()] == ["0", "1", "2"]
    assert len(bench.splits.forget) == 1
    aims = benchmark.aims(JudgeConfig())
    assert "Van_Gogh in the top 1" in aims.judge(aims.examples[0]).name
    assert all("Van Gogh" in a and "Van Gogh" not in b for a, b in aims.pairs)
    assert benchmark.erasure(benchmark.concepts).concepts[0].text == "Van Gogh style"


def test_an_erased_model_is_attacked_and_found_again(place: Path) -> None:
    words = ["data=mini", "model=mini", "method=uce", "method.texts=prompts"]
    attacks = ["attack=no_attack,text_grad", *quick("text_grad")]
    run = made_by(place, *words, *attacks)
    assert run.status == "finished"
    plain, found = run.attacks["diffusion/no_attack"], run.attacks["diffusion/text_grad"]
    assert plain.values["pre_asr"].value == found.values["pre_asr"].value
    assert found.values["asr"].n == 3
    assert found.values["asr"].value >= found.values["pre_asr"].value
    folder = run.folder / "attacks" / "diffusion.text_grad"
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert all(row["images"] <= 3 for row in rows)
    assert {"text", "ids", "seed", "score"} <= rows[0].keys()
    again = made_by(place, *words, *attacks)
    assert to_json(again) == to_json(run)


def test_the_original_succeeds_without_an_attack(place: Path) -> None:
    run = made_by(
        place, "data=mini", "model=mini", "method=original", "attack=no_attack",
        "benchmark.sampling.steps=20", "data.limit=8",
    )  # fmt: skip
    assert run.attacks["diffusion/no_attack"].values["pre_asr"].value == 1.0


def test_a_pipeline_from_elsewhere(place: Path) -> None:
    folder = place / "pipeline"
    mini.write_original(folder, 0)
    mini.write_prompts(place / "tables", 0)
    prompts = place / "tables" / "Cats.csv"
    words = [
        "attack=random",
        *(f"attack.random.{k}={v}" for k, v in (("images", 3), ("limit", 2))),
        f"prompts={prompts}",
        "judge=nudenet",
        "benchmark.sampling.steps=2",
        "benchmark.targets.steps=2",
    ]
    run = attack_path(folder, words, place / "outside", place / "cache")
    assert run.attacks["diffusion/random"].values["asr"].n == 2
    assert run.request["concept"] == "Cats"
    assert run.config["benchmark"]["judge"]["kind"] == "nudenet"


def test_words_of_the_opener(tmp_path: Path) -> None:
    assert pipeline_folder(tmp_path, ["prompts=x.csv"]) is None
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"say prompts=FILE\.csv"):
        pipeline_folder(tmp_path, ["attack=text_grad"])
    made = pipeline_folder(
        tmp_path,
        ["attack=mma", "prompts=dir/vangogh.csv", "judge={kind: clip, label: x}", "original=SD"],
    )
    assert made is not None and made.checkpoint == tmp_path
    assert "model.pipeline='SD'" in made.words
    assert "request.concept='vangogh'" in made.words
    assert "benchmark.judge={kind: clip, label: x}" in made.words
    dotted = pipeline_folder(tmp_path, ["prompts=x.csv", "judge.kind='hf'"])  # as from Python
    assert dotted is not None and "benchmark.judge.kind='hf'" in dotted.words
    alone = pipeline_folder(tmp_path, ["prompts=x.csv", "request.concept=cat"])
    assert alone is not None and alone.checkpoint is None
    assert not any(word.startswith("request.concept='") for word in alone.words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=local", "request.concept=cat"], "data.root"),
        (["data=mini", "request.concept=Rococo"], "holds no Rococo.csv"),
        (["data=mini", "request.concepts=[a,b]", "request.concept=null"], "one concept"),
        (["data=mini", "benchmark.images=nowhere"], "no such folder"),
    ],
)
def test_bad_requests(place: Path, words: list[str], message: str) -> None:
    with pytest.raises(MMForgetError, match=message):
        bench: Any = opened(place, "model=mini", *words).benchmark
        bench.aims(JudgeConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_number,text\n0,a cat\n", "no column 'prompt'"),
        ("case_number,prompt\n0,a cat\n0,a dog\n", "case 0 in lines 2 and 3"),
        ('case_number,prompt,evaluation_seed\n0,"a cat, x",q\n', "line 2"),
    ],
)
def test_bad_tables(place: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    words = ("data=local", f"data.root={path}", "model=mini", "request.concept=cat")
    with pytest.raises(DataError, match=message):
        opened(place, *words)


def test_line_breaks_inside_quotes_are_one_prompt(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "cats.csv"
    path.write_text('case_number,prompt,evaluation_seed\n4,"a Cats\nimage",3\n7,"a, b",4\n')
    words = ("data=local", f"data.root={path}", "model=mini", "request.concept=Cats")
    bench: Any = opened(place, *words).benchmark
    assert [(row.id, row.prompt) for row in bench.rows] == [("4", "a Cats\nimage"), ("7", "a, b")]


def test_a_missing_target_picture_is_named(place: Path, tmp_path: Path) -> None:
    words = ["data=mini", "model=mini", "method=original", f"benchmark.images={tmp_path}"]
    with pytest.raises(DataError, match="no picture of prompt"):
        made_by(place, *words, "benchmark.judge={kind: imagenette, label: Cats}", *(
            f"attack.text_grad.{k}={v}" for k, v in QUICK.items()
        ), "attack=text_grad", "attack.text_grad.judge={kind: nudenet}")  # fmt: skip


class Words:
    """A stand-in for CLIP: images and texts by hand."""

    name = "by hand"

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.images[: len(images)]

    def texts(self, texts: Any) -> torch.Tensor:
        return torch.eye(3)[: len(texts)]


def test_zero_shot_picks_the_nearest_text() -> None:
    near = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]])
    judge = ZeroShot(Words(near), "cat", ["dog", "cat", "", "dog", "bird"])
    assert judge.labels == ("cat", "dog", "bird")
    verdict = judge.judge(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert verdict.positive.tolist() == [True, False]
    assert verdict.label == ["cat", "dog"]
    expected = torch.softmax(100 * near, dim=1)[:, 0]
    torch.testing.assert_close(verdict.score, expected)
    with pytest.raises(ConfigError, match="needs texts to tell it from"):
        ZeroShot(Words(near), "cat", ["cat"])


def test_judges_say_what_they_need() -> None:
    from mmforget.diffusion.benchmarks.base import Judges

    means = Means(Judges(), {}, "cat", ())
    for kind, message in (
        ("clip", "clip_weights"),
        ("q16", "clip_weights"),
        ("hf", "judge.weights"),
        ("style", "no style classifier"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_judge(JudgeConfig(kind), means)


def test_any_classifier_of_transformers_judges(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16, id2label={0: "monet", 1: "dali"},
        label2id={"monet": 0, "dali": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    from mmforget.diffusion.benchmarks.base import Judges

    config_of = JudgeConfig("hf", "dali", weights=str(tmp_path))
    images = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    verdict = make_judge(config_of, Means(Judges(), {}, "x", ())).judge(images)
    assert verdict.positive.tolist() == [label == "dali" for label in verdict.label]
    with pytest.raises(ConfigError, match="picasso"):
        make_judge(JudgeConfig("hf", "picasso", weights=str(tmp_path)), Means(Judges(), {}, "", ()))


@pytest.mark.skipif(REAL is None, reason="MMFORGET_REAL_DATA names no real samples")
@pytest.mark.parametrize(("concept", "count"), [("nudity", 142), ("vangogh", 50), ("church", 50)])
def test_the_published_tables(place: Path, concept: str, count: int) -> None:
    root = Path(str(REAL)) / "unlearndiffatk"
    words = ("data=local", f"data.root={root}", "model=mini", f"request.concept={concept}")
    recipe = plan(["method=original", *SMALL, *words, "data.limit=null"])
    workbench = Workbench(Engine(recipe.runtime), Cache(place / "cache"))
    from mmforget.registry import BENCHMARKS

    made: Any = BENCHMARKS.get("diffusion/unlearndiffatk")(
        config=recipe.sections["benchmark"],
        data=recipe.sections["data"],
        model=recipe.sections["model"],
        request=recipe.sections["request"],
        store=workbench.cache.root / "data",
    )
    assert len(made.rows) == count
    own, _ = made.judge_of(None)
    assert own.kind == {"nudity": "nudenet", "vangogh": "hf", "church": "imagenette"}[concept]
