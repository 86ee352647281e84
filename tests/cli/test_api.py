import copy
from pathlib import Path

import pytest
import torch

import mmforget
from mmforget import api
from mmforget.config import plan
from mmforget.engine import Runtime
from mmforget.errors import ConfigError, SplitError
from mmforget.testing.toys import toy_world

CPU = {"runtime": {"device": "cpu", "progress": False}}


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "two words",
        "a, b",
        "it's",
        'say "it"',
        'it\'s "both"',
        "back\\slash",
        "ends in \\",
        "\\'",
        "key=value",
        "{a: b}",
        "[1, 2]",
        "${oc.env:HOME}",
        "a\\${b} \\\\${c}",
        "null",
        "true",
        "1",
        "ünïcode ✓",
        "",
        "~/a b/*.txt",
    ],
)
def test_text_reaches_the_config_unchanged(text: str) -> None:
    given = {"benchmark": "toy/points", "method": "finetune", "request.note": text}
    given["request.only"] = [text, "b"]  # type: ignore[assignment]
    request = plan(api.words(given)).sections["request"]
    assert request.note == text
    assert request.only == [text, "b"]


def test_values_become_words() -> None:
    assert api.words({"method": {"lr": 1e-05, "clip_norm": None}, "reference": False}) == [
        "method.lr=1e-05",
        "method.clip_norm=null",
        "reference=false",
    ]
    assert api.words({"a": [1, True, None, (2.5,)], "b": Path("x y"), "c": {}}) == [
        "a=[1,true,null,[2.5]]",
        "b='x y'",
        "c={}",
    ]
    assert api.words({"a": [{"k": "v"}]}) == ["a=[{k:'v'}]"]
    with pytest.raises(ConfigError, match=r"a=.*a set cannot be part of a config"):
        api.words({"a": {1, 2}})


def test_run_sweep_evaluate_attack_and_report(tmp_path: Path) -> None:
    place = {"runs": tmp_path / "runs", "cache": tmp_path / "cache"}
    tuned = {"method.lr": 0.05}
    one = mmforget.run(
        "toy/points", method="finetune", attack="none", seed=1, **place, **CPU, **tuned
    )
    assert one.status == "finished" and one.seeds.unlearn == 1
    assert one.config["method"]["lr"] == 0.05
    assert mmforget.load_run(one.folder) == one

    words = ["benchmark=toy/points", "method=finetune", "method.lr=0.05", "runtime.device=cpu"]
    both = mmforget.sweep(*words, "seed=1,2", "attack=none", **place)
    assert [result.seeds.unlearn for result in both] == [1, 2]
    assert both[0].id == one.id
    second = mmforget.sweep(*words, "seed=1,2", "attack=none", shard=(2, 2), **place)
    assert [result.id for result in second] == [both[1].id]

    attacked = mmforget.attack(one, ["peek"], cache=place["cache"], **{"attack.peek.queries": 2})
    assert attacked.id == one.id and attacked.attacks["toy/peek"].queries == 2

    file = one.folder / "model.safetensors"
    outside = mmforget.evaluate(file, "toy/points", attack="none", **place, **CPU)
    assert outside.method == "external"
    assert outside.metrics["loss/forget"].value == pytest.approx(one.metrics["loss/forget"].value)
    with pytest.raises(ConfigError, match="no benchmark named"):
        mmforget.attack(file, "peek")

    written = mmforget.write_report([one, place["runs"]], tmp_path / "page.html")
    assert tmp_path / "page.html" in written
    assert all(path.is_file() for path in written)


def test_a_moved_run_is_not_taken_for_another(tmp_path: Path) -> None:
    place = {"runs": tmp_path / "runs", "cache": tmp_path / "cache"}
    made = mmforget.run(
        "toy/points", method="original", attack="none", reference=False, **place, **CPU
    )
    moved = tmp_path / "a" / "b" / "c" / "d"
    moved.parent.mkdir(parents=True)
    made.folder.rename(moved)
    with pytest.raises(ConfigError, match="was moved"):
        mmforget.attack(moved, "guess", cache=place["cache"])


@pytest.mark.parametrize("name", ["classes", "tokens"])
def test_unlearn_works_on_your_own_model(name: str) -> None:
    world = toy_world(name)
    model = world.build(0)
    before = copy.deepcopy(model.state_dict())

    def made(seed: int) -> dict[str, torch.Tensor]:
        return api.unlearn(
            model,
            world.adapter,
            world.splits,
            "grad_diff",
            {"lr": 0.1, "epochs": 2},
            seed=seed,
            runtime=Runtime(device="cpu", progress=False),
        ).state_dict()

    first, second = made(0), made(0)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], before[key]) for key in before)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_unlearn_checks_what_it_is_given() -> None:
    world = toy_world("classes")
    model = world.build(0)
    with pytest.raises(ConfigError, match=r"unknown key 'config.lrr'. Close: config.lr"):
        api.unlearn(model, world.adapter, world.splits, "finetune", {"lrr": 1})
    with pytest.raises(ConfigError, match="unknown method 'finetun'"):
        api.unlearn(model, world.adapter, world.splits, "finetun")
    overlapping = copy.copy(world.splits)
    object.__setattr__(overlapping, "retain", world.splits.forget)
    with pytest.raises(SplitError, match="in both forget and retain"):
        api.unlearn(model, world.adapter, overlapping, "finetune")


def test_unlearn_hands_over_your_trainer() -> None:
    world = toy_world("classes")
    reference = world.build(7)
    runtime = Runtime(device="cpu")
    result = api.unlearn(
        world.build(0),
        world.adapter,
        world.splits,
        "retrain",
        runtime=runtime,
        retrain=lambda seed: reference,
    )
    assert result is reference


def test_names_are_found_and_others_are_not() -> None:
    assert mmforget.run is api.run
    assert {"run", "sweep", "evaluate", "attack", "write_report", "load_run"} <= set(dir(mmforget))
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        mmforget.rum  # noqa: B018
