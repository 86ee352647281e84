"""Every verb on a toy modality, in this process; one finished sweep serves most of them."""

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mmforget.cli import application
from mmforget.pipeline import Pipeline
from mmforget.record import load_run

PLUGIN = Path(__file__).with_name("toy_plugin.py")
TOY = ["benchmark=toy/points", "runtime.device=cpu", "runtime.progress=false"]


def call(*words: object, status: int = 0, plugin: bool = True) -> Any:
    extra = ["--plugin", str(PLUGIN)] if plugin else []
    result = CliRunner().invoke(application(), [*map(str, words), *extra])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, (result.stdout, result.stderr)
    return result


class Place:
    def __init__(self, root: Path) -> None:
        self.runs, self.cache = root / "runs", root / "cache"
        self.options = ("--runs", self.runs, "--cache", self.cache)

    def run(self, method: str) -> Path:
        (folder,) = (self.runs / "toy/points" / method).iterdir()
        return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("swept"))
    page = place.runs / "page.html"
    result = call("run", *TOY, "method=finetune,grad_diff", *place.options, "--report", page)
    place.result = result  # type: ignore[attr-defined]
    return place


def test_run_makes_every_run_and_says_where(swept: Place) -> None:
    result = swept.result  # type: ignore[attr-defined]
    for method in ("original", "retrain", "finetune", "grad_diff"):
        assert load_run(swept.run(method)).status == "finished"
        assert method in result.stdout
    assert f"record: {swept.run('grad_diff')}/run.json" in result.stdout
    assert f"report: {swept.runs}/page.html" in result.stdout
    assert (swept.runs / "page.html").is_file()
    steps = result.stderr.splitlines()
    assert any(s.startswith("[1/2] 0:0") and s.endswith("-s0: evaluate") for s in steps)
    assert any(s.startswith("[2/2] ") and "/grad_diff/" in s for s in steps)


def test_running_again_does_nothing_and_quiet_says_nothing(swept: Place) -> None:
    before = (swept.run("finetune") / "run.json").stat().st_mtime_ns
    result = call("run", *TOY, "method=finetune", *swept.options, "--json", "-q")
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    content = json.loads(line)
    assert content["status"] == "finished"
    assert content["folder"] == str(swept.run("finetune"))
    assert (swept.run("finetune") / "run.json").stat().st_mtime_ns == before
    named = call("run", *TOY, "method=finetune", *swept.options)
    assert f"report: mmforget report {swept.runs} -o {swept.runs}/report.html" in named.stdout


def test_fresh_does_a_stage_again(swept: Place) -> None:
    result = call("run", *TOY, "method=finetune", *swept.options, "--fresh", "evaluate")
    assert "evaluate" in result.stderr
    assert "unlearn" not in result.stderr
    failed = call("run", *TOY, "method=npo", *swept.options, "--fresh", "evalute", status=2)
    assert "one of original, retrained" in failed.stderr


def test_shards_part_a_sweep(tmp_path: Path) -> None:
    place = Place(tmp_path)
    words = [*TOY, "method=original", "seed=0", "reference=false", "method=original,finetune"]
    call("run", *words, *place.options, "--shard", "1/2")
    assert {p.name for p in (place.runs / "toy/points").iterdir()} == {"original"}
    for text in ("0/2", "3/2", "2", "a/b"):
        assert "write I/N" in call("run", *words, "--shard", text, status=2).stderr


def test_a_failed_run_does_not_stop_the_others_and_ends_with_2(tmp_path: Path) -> None:
    place = Place(tmp_path)
    words = [*TOY, "method=finetune", "request.count=0,24", "reference=false", "attack=none"]
    result = call("run", *words, *place.options, status=2)
    assert "the forget set is empty" in result.stderr
    assert "error: 1 of 2 runs failed" in result.stderr
    assert "record: " in result.stdout
    assert load_run(place.run("finetune")).status == "finished"


def test_a_collapsed_run_is_a_warning_and_no_failure(tmp_path: Path) -> None:
    place = Place(tmp_path)
    words = [*TOY, "method=finetune", "method.lr=1e30", "method.epochs=3", "reference=false"]
    result = call("run", *words, *place.options)
    assert "warning: toy/points/finetune/" in result.stderr
    assert "collapsed: the loss is" in result.stderr
    assert load_run(place.run("finetune")).status == "collapsed"


def test_config_repeats_a_run(swept: Place) -> None:
    file = swept.run("finetune") / "config.yaml"
    result = call("run", "--config", file, *swept.options, "--json")
    assert json.loads(result.stdout)["folder"] == str(swept.run("finetune"))
    checked = call("check", "--config", file, "method.lr=0.5,0.25", "--json")
    rates = [json.loads(line)["config"]["method"]["lr"] for line in checked.stdout.splitlines()]
    assert rates == [0.5, 0.25]


def test_check_touches_nothing_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*TOY, "method=finetune,npo", "seed=0,1", "method.optimizer=adam"]
    result = call("check", *words, "model.width=100", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["config"]["method"]["name"] for line in lines] == [
        *("finetune", "finetune", "npo", "npo")
    ]
    weights = 2 * 100 + 100 + 100 * 4 + 4
    # float32: original, student, gradient, two moments of Adam; npo keeps one more copy.
    expected = [4 * 5 * weights, 4 * 5 * weights, 4 * 6 * weights, 4 * 6 * weights]
    assert [line["estimate"]["bytes"] for line in lines] == expected
    head = call("check", *words, "method.scope=head", "model.width=100", "--json").stdout
    assert json.loads(head.splitlines()[0])["estimate"]["trained"] == 404
    assert "4 runs, 1 original models" in call("check", *words).stdout
    assert list(tmp_path.iterdir()) == []


def test_check_collects_the_faults_of_all_runs(tmp_path: Path) -> None:
    words = [*TOY, "method=npo", "seed=0,1", "method.lrr=1", "model.width=0"]
    result = call("check", *words, status=2)
    assert result.stderr.startswith("error: 2 faults in the config:")
    assert result.stderr.count("unknown key 'method.lrr'") == 1
    assert "model.width=0 is too small" in result.stderr
    scope = call("check", *TOY, "method=npo", "method.scope=arms", status=2)
    assert "scope 'arms': all or head" in scope.stderr


def test_eval_does_a_run_again_with_other_metrics(swept: Place) -> None:
    folder = swept.run("grad_diff")
    result = call("eval", folder, "metrics=loss,count", "--cache", swept.cache, "--json")
    content = json.loads(result.stdout)
    assert content["folder"] == str(folder)
    assert {"loss/forget", "count"} <= set(content["metrics"])
    assert content["attacks"].keys() == {"toy/guess"}
    refused = call("eval", folder, "method.lr=5", "--cache", swept.cache, status=2)
    assert "method.lr=5: a finished run takes other attacks" in refused.stderr


def test_attack_adds_to_a_record(swept: Place) -> None:
    folder = swept.run("finetune")
    words = ["attack=peek", "attack.peek.queries=3"]
    result = call("attack", folder, *words, "--cache", swept.cache, "--json")
    attacks = json.loads(result.stdout)["attacks"]
    assert {"toy/guess", "toy/peek"} <= set(attacks)
    assert attacks["toy/peek"]["queries"] == 3
    assert attacks["toy/peek"]["values"]["loss"]["reference"] is not None
    assert "no attack named" in call("attack", folder, status=2).stderr


def test_a_checkpoint_from_elsewhere_is_evaluated_and_attacked(swept: Place) -> None:
    file = swept.run("grad_diff") / "model.safetensors"
    theirs = load_run(swept.run("grad_diff")).metrics["loss/forget"].value
    result = call("eval", file, *TOY, "attack=none", *swept.options, "--json")
    content = json.loads(result.stdout)
    assert (content["method"], content["attacks"]) == ("external", {})
    assert content["metrics"]["loss/forget"]["value"] == pytest.approx(theirs)
    again = call("attack", content["folder"], "attack=guess", "--cache", swept.cache, "--json")
    assert json.loads(again.stdout)["folder"] == content["folder"]
    assert json.loads(again.stdout)["attacks"].keys() == {"toy/guess"}
    wrong = call("eval", file, *TOY, "model.width=8", *swept.options, status=2)
    assert "does not fit the model" in wrong.stderr
    assert "leave it out" in call("eval", file, *TOY, "method=npo", status=2).stderr
    assert "no such file" in call("eval", "nowhere.pt", *TOY, status=2).stderr


def test_report_writes_all_forms(swept: Place, tmp_path: Path) -> None:
    page = tmp_path / "all.html"
    result = call("report", swept.runs, "-o", page, "--title", "Mine")
    assert "grad_diff" in result.stdout
    assert "Mine" in page.read_text()
    for suffix in ("html", "csv", "tex", "json"):
        assert f"report: {tmp_path}/all.{suffix}" in result.stdout
        assert (tmp_path / f"all.{suffix}").is_file()
    call("report", swept.runs / "toy", swept.run("finetune"), "--json")
    assert (swept.runs / "toy" / "report.html").is_file()
    assert "no run found" in call("report", tmp_path, status=2).stderr
    assert "no such folder" in call("report", tmp_path / "no", status=2).stderr


def test_show_prints_what_an_entry_says_of_itself() -> None:
    npo = call("show", "method/npo").stdout
    for part in ("citation", "reads", "forget, retain", "removal", "method.beta", "sgd | adam"):
        assert part in npo
    toy = json.loads(call("show", "benchmark/toy/points", "--json").stdout)
    keys = {option["key"]: option for option in toy["options"]}
    assert {"benchmark.training.lr", "data.source", "model.width", "request.count"} <= keys.keys()
    assert keys["model.width"]["low"] == 1 and keys["model.width"]["high"] == 1024
    assert keys["benchmark.training.epochs"]["default"] == 20
    assert toy["metrics"] == ["toy/loss"] and toy["headline"] == ["loss/forget"]
    attack = json.loads(call("show", "toy/guess", "--json").stdout)
    assert (attack["access"], attack["budget"]) == ("grey", {"queries": 8})
    assert "Number of test points." in call("show", "metrics/toy/count").stdout
    assert "method=" in call("show", "suite/vision/demo").stdout
    assert "Close: method/npo" in call("show", "nppo", status=2).stderr
    assert "Close: npo" in call("show", "method/nppo", status=2).stderr


def test_list_takes_kinds_and_wildcards(tmp_path: Path) -> None:
    assert call("list", "benchmarks", "toy/*").stdout == (
        "toy/points  Points in a plane, by quadrant.\n"
    )
    assert call("list", "attack", "toy/p*").stdout.splitlines()[0].startswith("toy/peek")
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text("# My words.\nwords: [method=npo]\n")
    assert "mine" in call("list", "suites", "--config-dir", tmp_path).stdout
    assert "My words." in call("list", "suites", "--config-dir", tmp_path).stdout
    assert "Close: methods" in call("list", "metods", status=2).stderr
    assert "nothing matches" in call("list", "methods", "zzz*", status=2).stderr


def test_data_mini_writes_a_new_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "points"
    assert "1 files" in call("data", "mini", "toy/points", folder, "--seed", "3").stdout
    first = (folder / "points.json").read_text()
    assert "not empty" in call("data", "mini", "toy/points", folder, status=2).stderr
    assert (folder / "points.json").read_text() == first
    call("data", "mini", "toy/points", tmp_path / "other", "--seed", "4")
    assert (tmp_path / "other" / "points.json").read_text() != first


def test_cache_lists_verifies_and_prunes(swept: Place, tmp_path: Path) -> None:
    place = Place(tmp_path)
    call("run", *TOY, "method=original", "reference=false", "attack=none", *place.options)
    where = ("--cache", place.cache)
    entry = json.loads(call("cache", "list", *where, "--json", plugin=False).stdout)
    assert (entry["kind"], entry["inputs"]["benchmark"]) == ("models", "toy/points")
    assert "1 entries" in call("cache", "list", *where, plugin=False).stdout
    assert "as it was written" in call("cache", "verify", *where, plugin=False).stdout
    call("cache", "prune", "--older-than", "1", *where, plugin=False)
    assert Path(entry["path"]).is_dir()
    file = Path(entry["path"]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert "damaged" in call("cache", "verify", *where, plugin=False, status=2).stderr
    call("run", *TOY, "method=finetune", "reference=false", "attack=none", *place.options)
    freed = json.loads(
        call("cache", "prune", "--keep-gib", "0", *where, "--json", plugin=False).stdout
    )
    assert freed["freed"] > 0
    assert call("cache", "list", *where, "--json", plugin=False).stdout == ""


def test_doctor_looks_at_this_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(application(), ["doctor", "--cache", str(tmp_path), "--json"])
    names = {check["name"] for check in json.loads(result.stdout)}
    assert {"python", "torch", "cache"} <= names


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted. The same command goes on"),
        (OSError(errno.ENOSPC, "full", "x.npz"), 2, "error: no space left while writing x.npz"),
    ],
)
def test_interrupts_and_full_disks_end_in_one_line(
    raised: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Pipeline, plan: object) -> None:
        raise raised

    monkeypatch.setattr(Pipeline, "run", fail)
    result = call("run", *TOY, "method=finetune", status=status)
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1


def test_other_exceptions_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Pipeline, plan: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Pipeline, "run", fail)
    with pytest.raises(ZeroDivisionError):
        call("run", *TOY, "method=finetune", status=1)


def test_debug_shows_where_an_error_came_from() -> None:
    words = ["run", "benchmark=toy/pionts", "method=npo"]
    assert "Traceback" not in call(*words, status=2).stderr
    shown = call(*words, "--debug", status=2).stderr
    assert "Traceback" in shown and "error: unknown benchmark" in shown


def test_only_the_main_process_prints(swept: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = call("list")
    assert (result.stdout, result.stderr) == ("", "")
    failed = call("list", "metods", status=2)
    assert failed.stderr.startswith("[process 1] error: unknown kind")


def test_logging_is_left_as_it_was() -> None:
    library = logging.getLogger("mmforget")
    before = (library.level, list(library.handlers))
    call("list", "-v")
    assert (library.level, list(library.handlers)) == before


def test_a_broken_plugin_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    result = call("list", "--plugin", broken, status=2, plugin=False)
    assert f"--plugin {broken}: ZeroDivisionError" in result.stderr


def test_config_dir_comes_first(tmp_path: Path) -> None:
    preset = tmp_path / "preset" / "toy" / "points" / "mini" / "finetune.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("# @package _global_\n" + yaml.safe_dump({"method": {"lr": 0.125}}))
    words = [*TOY, "method=finetune", "--config-dir", tmp_path, "--json"]
    content = json.loads(call("check", *words).stdout)["config"]
    assert content["method"]["lr"] == 0.125
    assert content["presets"] == ["preset=toy/points/mini/finetune"]
    assert torch.get_num_threads() == 1
