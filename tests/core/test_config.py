import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mmforget.config import expand, from_mapping, load_config, plan
from mmforget.errors import ConfigError
from mmforget.registry import REGISTRIES, load_plugins

TOY = ["benchmark=toy/points", "method=finetune"]


@pytest.fixture(scope="module", autouse=True)
def _toy_modality() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for registry in REGISTRIES.values():
            patch.setattr(registry, "_targets", dict(registry._targets))
        load_plugins((Path(__file__).parents[1] / "cli" / "toy_plugin.py",))
        yield
    sys.modules.pop("mmforget_plugin_toy_plugin", None)


def faults(words: list[str], config_dir: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        plan(words, config_dir)
    return caught.value.faults


def test_comma_lists_make_one_plain_run_for_each_combination() -> None:
    runs = expand(["benchmark=toy/points", "method=npo,scrub", "seed=0,1", "method.lr=0.1"])
    assert [(run[1], run[2]) for run in runs] == [
        ("method=npo", "seed=0"),
        ("method=npo", "seed=1"),
        ("method=scrub", "seed=0"),
        ("method=scrub", "seed=1"),
    ]
    assert all(run[0] == "benchmark=toy/points" and run[3] == "method.lr=0.1" for run in runs)


def test_sweeping_keeps_quotes_of_strings_with_commas() -> None:
    runs = expand([*TOY, "request.note='a, b','it\\'s',plain", "request.only=['x, y',z]"])
    notes = [plan(run).sections["request"].note for run in runs]
    assert notes == ["a, b", "it's", "plain"]
    assert plan(runs[0]).sections["request"].only == ["x, y", "z"]


def test_lists_of_attacks_and_metrics_belong_to_one_run() -> None:
    (words,) = expand([*TOY, "attack=guess,peek", "metrics=loss,count"])
    made = plan(words)
    assert list(made.attacks) == ["toy/guess", "toy/peek"]
    assert made.metrics == ("toy/loss", "toy/count")
    assert plan([*TOY, "attack=[peek]", "metrics=count"]).metrics == ("toy/count",)
    assert plan([*TOY, "attack=none"]).attacks == {}


def test_other_sweeps_are_refused() -> None:
    with pytest.raises(ConfigError, match="comma lists, such as seed=0,1,2"):
        expand([*TOY, "seed=range(0,3)"])
    with pytest.raises(ConfigError, match="comma list of names"):
        plan([*TOY, "attack=range(0,3)"])


def test_the_last_word_of_a_key_wins_also_over_a_suite(tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    words = ["benchmark=toy/points", "method=npo,scrub", "method.lr=0.5"]
    (tmp_path / "suite" / "mine.yaml").write_text(yaml.safe_dump({"words": words}))
    (run,) = expand(["suite=mine", "method=finetune", "method.lr=0.1", "method.lr=0.2"], tmp_path)
    assert run == ["benchmark=toy/points", "method=finetune", "method.lr=0.2"]
    with pytest.raises(ConfigError, match=r"unknown suite 'mien'. Close: mine"):
        expand(["suite=mien"], tmp_path)


def test_interpolation_works_within_a_config() -> None:
    made = plan([*TOY, "request.count=7", "model.width=${request.count}"])
    assert made.sections["model"].width == 7


def test_values_reach_their_sections_with_their_types() -> None:
    made = plan(
        [
            *TOY,
            "seed=3",
            "seeds.train=4",
            "method.lr=1",
            "method.clip_norm=null",
            "benchmark.training.epochs=7",
            "model.width=8",
            "runtime.device=cpu",
            "reference=false",
            "attack.guess.queries=2",
        ]
    )
    assert (made.seeds.unlearn, made.seeds.train, made.seeds.evaluate) == (3, 4, 0)
    assert made.sections["method"].lr == 1.0
    assert made.sections["benchmark"].training.epochs == 7
    assert made.sections["model"].width == 8
    assert made.runtime.device == "cpu"
    assert made.reference is False
    assert made.attacks["toy/guess"].queries == 2
    assert made.modality == "toy"


def test_tuning_an_attack_keeps_the_others_of_the_protocol() -> None:
    made = plan([*TOY, "attack.guess.queries=3"])
    assert list(made.attacks) == ["toy/guess"]
    chosen = plan([*TOY, "attack=guess,peek", "attack.peek.queries=5"])
    assert (chosen.attacks["toy/guess"].queries, chosen.attacks["toy/peek"].queries) == (8, 5)
    (fault,) = faults([*TOY, "attack=guess", "attack.peek.queries=5"])
    assert fault == "attack.peek is set, but attack=toy/guess leaves it out"


def test_precedence_is_mini_then_preset_then_groups_then_words(tmp_path: Path) -> None:
    def write(name: str, content: dict[str, object]) -> None:
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# @package _global_\n" + yaml.safe_dump(content))

    mini = {"model": {"width": 4}, "method": {"lr": 0.5}, "request": {"count": 9}}
    write("mini/toy/points", mini)
    write("preset/toy/points/mini/finetune", {"method": {"lr": 0.25, "epochs": 3}})
    write("preset/toy/points/finetune", {"method": {"lr": 0.125}})
    write("preset/mine", {"method": {"lr": 0.75}, "attack": {"guess": {"queries": 4}}})
    write("runtime/small", {"runtime": {"eval_batch_size": 5}})

    made = plan([*TOY, "runtime=small", "request.count=10"], tmp_path)
    assert made.sections["model"].width == 4
    assert made.sections["method"].lr == 0.25
    assert made.sections["request"].count == 10
    assert made.runtime.eval_batch_size == 5
    assert made.presets == ("mini=toy/points", "preset=toy/points/mini/finetune", "runtime=small")

    local = plan([*TOY, "data=local"], tmp_path)
    assert (local.sections["model"].width, local.sections["method"].lr) == (16, 0.125)
    assert local.sections["data"].source == "local"

    named = plan([*TOY, "preset=mine"], tmp_path)
    assert (named.sections["method"].lr, named.attacks["toy/guess"].queries) == (0.75, 4)
    assert plan([*TOY, "preset=mine", "attack=peek"], tmp_path).attacks.keys() == {"toy/peek"}
    assert plan([*TOY, "preset=none"], tmp_path).sections["method"].lr == 0.5
    assert "Close: mine" in faults([*TOY, "preset=mime"], tmp_path)[0]
    assert "Close: small" in faults([*TOY, "runtime=smal"], tmp_path)[0]


def test_all_faults_of_a_config_come_at_once() -> None:
    found = faults(
        [
            *TOY,
            "method.lrr=1",
            "method.epochs=abc",
            "model.width=9999",
            "data.source=cloud",
            "request.cuont=3",
            "attack=guess,pek",
            "attack.guess.queries=0",
            "metrics=loss,cuont",
            "reference=5",
            "methd.lr=1",
            "runtime.precision=fp8",
        ]
    )
    text = "\n".join(found)
    for part in (
        "unknown key 'method.lrr'. Close: method.lr",
        "method.epochs: Value 'abc'",
        "unknown key 'request.cuont'. Close: request.count",
        "model.width=9999 is too large: at most 1024",
        "data.source: 'cloud'. Accepted: local, mini",
        "unknown attack 'pek'. Close: toy/peek",
        "attack.toy/guess.queries=0 is too small",
        "unknown metric 'cuont'. Close: cost, toy/count",
        "reference=5: true or false",
        "unknown key 'methd'. Close: method",
        "runtime.precision: 'fp8'",
    ):
        assert part in text, f"{part!r} is not in:\n{text}"


def test_unknown_benchmark_and_method_are_told_together() -> None:
    found = faults(["benchmark=toy/pionts", "method=nqo"])
    assert "Close: toy/points" in found[0]
    assert "Close: npo" in found[1]
    assert len(faults([])) == 2
    assert "Say method=NAME" in faults(["benchmark=toy/points"])[0]


def test_a_word_that_is_no_override_is_named() -> None:
    found = faults([*TOY, "oops", "~method", "a=b=c"])
    assert [fault.split(":")[0] for fault in found] == ["'oops'", "'~method'", "'a=b=c'"]
    assert all("Write key=value" in fault for fault in found)


def test_a_method_of_another_modality_is_refused() -> None:
    (fault,) = faults(["benchmark=toy/points", "method=toy/elsewhere"])
    assert fault.startswith("method toy/elsewhere serves vision; toy/points is toy")


def test_a_resolved_config_gives_the_same_plan(tmp_path: Path) -> None:
    text = r"request.note='\${x} and more'"
    words = ["method.lr=0.3", "attack=peek", "attack.peek.label='a b'", "seed=2", text]
    made = plan([*TOY, *words])
    assert made.sections["request"].note == "${x} and more"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(made.resolved()))
    again = load_config(path)
    assert again == made
    assert from_mapping(again.resolved()) == made
    changed = load_config(path, ["method.lr=0.4", "attack=guess,peek", "metrics=count"])
    assert changed.sections["method"].lr == 0.4
    assert changed.attacks["toy/peek"].label == "a b"
    assert changed.metrics == ("toy/count",)
    assert load_config(path, ["seed=5"]).seeds.unlearn == 5
    assert load_config(path, ["attack=none"]).attacks == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "holds no mapping"),
        ("a: [", "is no YAML"),
        ("method: npo", "no benchmark named"),
        ("benchmark: toy/points\nmethod: finetune\nmodel: 5", "a mapping of keys is needed"),
        ("benchmark: toy/points\nmethod: finetune\nattack: 5", "a mapping of keys is needed"),
    ],
)
def test_a_config_file_that_cannot_be_read_says_why(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_config_file_fixes_what_selects(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plan(TOY).resolved()))
    with pytest.raises(ConfigError, match="--config fixes it"):
        load_config(path, ["method=npo"])
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="no such folder"):
        plan(TOY, tmp_path / "nowhere")


def test_a_whole_request_replaces_the_one_of_the_mini_world() -> None:
    words = ["benchmark=vision/mufac", "method=npo"]
    assert plan(words).sections["request"].n == 200  # of the mini world
    published = plan([*words, "data=local", "data.root=x"]).sections["request"].n
    assert plan([*words, "request={}"]).sections["request"].n == published
    assert plan([*words, "request.n=7"]).sections["request"].n == 7


def test_an_attack_keeps_the_options_of_the_mini_world_beside_those_typed() -> None:
    words = ["benchmark=diffusion/unlearncanvas", "data=mini", "model=mini", "method=esd"]
    made = plan([*words, "attack=text_grad", "attack.text_grad.limit=3"])
    chosen = made.attacks["diffusion/text_grad"]
    assert (chosen.limit, chosen.stages, chosen.images) == (3, 20, 21)
    local = plan([*words[:1], "data=local", "method=esd", "attack=text_grad"])
    assert local.attacks["diffusion/text_grad"].images == 51


def test_a_field_of_the_request_may_stand_alone() -> None:
    made = plan([*TOY, "note=plain"])
    assert made.sections["request"].note == "plain"
    (first, second) = expand([*TOY, "note=one,two"])
    assert plan(first).sections["request"].note == "one"
    assert plan(second).sections["request"].note == "two"
    assert any("nothing" in fault for fault in faults([*TOY, "nothing=1"]))
