"""The stages of a run: what a kill at any moment, a second call or a second process leaves."""

import json
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from mmforget.cache import Cache
from mmforget.config import load_config, plan
from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.errors import BusyError, ConfigError, SplitError
from mmforget.pipeline import Pipeline, replay
from mmforget.record import RunResult, find_runs, load_run
from mmforget.registry import METHODS, load_plugins
from mmforget.types import ModelView, UnlearningMethod, subset
from mmforget.workbench import Workbench

load_plugins((Path(__file__).parents[1] / "cli" / "toy_plugin.py",))
WORDS = ["benchmark=toy/points", "benchmark.training.epochs=3", "runtime.checkpoint_every_s=0"]
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class PreparedConfig:
    pass


@METHODS.register("toy/prepared")
class Prepared(UnlearningMethod[PreparedConfig]):
    reads = frozenset({"retain"})
    intent = "removal"
    citation = "none"
    config_type = PreparedConfig
    prepares = True
    calls: ClassVar[list[str]] = []

    def prepare(self, ctx: Context) -> dict[str, torch.Tensor]:
        self.calls.append("prepare")
        assert len(ctx.split("train")) == 120
        with pytest.raises(SplitError, match="declares to read only train"):
            ctx.split("forget")
        made = ctx.train(ctx.fresh_model(5), subset(ctx.split("train"), range(8)), seed=1)
        return dict(made.state_dict())

    def run(self, ctx: Context) -> nn.Module:
        self.calls.append("run")
        ctx.model.load_state_dict(self.prepared)
        return ctx.model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pipeline(root: Path, **options: object) -> Pipeline:
    return Pipeline(root / "runs", Cache(root / "cache"), **options)  # type: ignore[arg-type]


def run(root: Path, *words: str, **options: object) -> RunResult:
    return pipeline(root, **options).run(plan([*WORDS, *words]))


def numbers(result: RunResult) -> dict[str, object]:
    """What a repeated run must give again: all but times."""
    attacks = {name: attack.values for name, attack in result.attacks.items()}
    return {"metrics": result.metrics, "attacks": attacks, "status": result.status}


def test_a_run_brings_its_original_and_retrained_rows(tmp_path: Path) -> None:
    result = run(tmp_path, "method=grad_diff")
    rows = {r.method: r for r in find_runs([tmp_path / "runs"])}
    assert set(rows) == {"original", "retrain", "grad_diff"}
    assert result.parents["original"] == rows["original"].id
    assert result.parents["retrained"] == rows["retrain"].id
    reference = rows["retrain"].metrics["loss/forget"].value
    for row in rows.values():
        assert row.metrics["loss/forget"].reference == reference
        assert row.attacks["toy/guess"].values["loss"].reference is not None
    assert rows["retrain"].metrics["loss/forget"].gap == 0
    assert result.cost.steps > 0 and result.cost.trainable > 0
    assert rows["retrain"].cost.steps > 0, "the reference's cost is that of its training"
    assert rows["original"].cost.steps == 0
    assert (result.folder / "model.safetensors").is_file()
    assert not (result.folder / "state").exists()
    steps = [json.loads(line)["step"] for line in (result.folder / "events.jsonl").open()]
    assert steps == list(range(1, result.cost.steps + 1))


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    first = run(tmp_path, "method=finetune")
    stamp = (first.folder / "run.json").stat().st_mtime_ns
    again = run(tmp_path, "method=finetune")
    assert again == first and (first.folder / "run.json").stat().st_mtime_ns == stamp


def test_a_run_repeats_from_its_config(tmp_path: Path) -> None:
    first = run(tmp_path / "a", "method=npo", "method.lr=0.01", "seed=3")
    again = pipeline(tmp_path / "b").run(load_config(first.folder / "config.yaml"))
    assert numbers(again) == numbers(first) and again.id == first.id
    assert (
        replay(first.folder).resolved()
        == plan([*WORDS, "method=npo", "method.lr=0.01", "seed=3"]).resolved()
    )


def test_runtime_stays_out_of_the_id_and_seeds_do_not(tmp_path: Path) -> None:
    first = run(tmp_path, "method=grad_ascent")
    assert run(tmp_path, "method=grad_ascent", "runtime.accumulation=2").id == first.id
    other = run(tmp_path, "method=grad_ascent", "seed=1")
    assert other.id != first.id and other.parents["original"] == first.parents["original"]


def test_an_attack_is_added_to_a_finished_run(tmp_path: Path) -> None:
    first = run(tmp_path, "method=finetune")
    weights = (first.folder / "model.safetensors").stat().st_mtime_ns
    more = run(tmp_path, "method=finetune", "attack=toy/guess,toy/peek")
    assert set(more.attacks) == {"toy/guess", "toy/peek"} and more.id == first.id
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize("stage", ["unlearn", "evaluate", "attack"])
def test_fresh_redoes_a_stage(tmp_path: Path, stage: str) -> None:
    first = run(tmp_path, "method=finetune")
    weights = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = run(tmp_path, "method=finetune", fresh=stage)
    assert numbers(again) == numbers(first)
    redone = (first.folder / "model.safetensors").stat().st_mtime_ns != weights
    assert redone == (stage == "unlearn")
    with pytest.raises(ConfigError, match="fresh"):
        pipeline(tmp_path, fresh="unlern")


def test_fresh_original_trains_the_cached_models_again(tmp_path: Path) -> None:
    first = run(tmp_path, "method=finetune")
    marks = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("cost.json")}
    again = run(tmp_path, "method=finetune", fresh="retrained")
    assert numbers(again) == numbers(first)
    assert sum(p.stat().st_mtime_ns != t for p, t in marks.items()) == 1
    run(tmp_path, "method=finetune", fresh="original")
    assert all(p.stat().st_mtime_ns != t for p, t in marks.items()) and len(marks) == 2


def test_a_tracker_gets_the_losses(tmp_path: Path) -> None:
    run(tmp_path, "method=finetune", "runtime.trackers=[tensorboard]")
    assert list((tmp_path / "runs").rglob("events.out.tfevents*"))


def test_without_a_reference_nothing_is_filled_in(tmp_path: Path) -> None:
    result = run(tmp_path, "method=finetune", "reference=false")
    assert result.metrics["loss/forget"].reference is None
    assert result.attacks["toy/guess"].values["loss"].reference is None
    assert "retrained" not in result.parents
    assert {r.method for r in find_runs([tmp_path / "runs"])} == {"original", "finetune"}


def test_a_collapsed_run_keeps_its_record(tmp_path: Path) -> None:
    result = run(tmp_path, "method=grad_ascent", "method.lr=1e30", "method.epochs=20")
    assert result.status == "collapsed" and "lower method.lr" in (result.error or "")
    assert load_run(result.folder).status == "collapsed" and not result.metrics
    assert run(tmp_path, "method=grad_ascent", "method.lr=1e30", "method.epochs=20") == result


def test_a_split_that_was_not_declared_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Peeking(UnlearningMethod):  # type: ignore[type-arg]
        """Opens the test set."""

        reads = frozenset({"forget"})
        intent, citation, config_type = "removal", "none", METHODS.get("original").config_type

        def run(self, ctx):  # type: ignore[no-untyped-def]
            ctx.split("test")
            return ctx.model

    monkeypatch.setitem(METHODS._targets, "toy/peeking", Peeking)
    with pytest.raises(SplitError, match="opened the test split"):
        run(tmp_path, "method=toy/peeking")
    (failed,) = [r for r in find_runs([tmp_path / "runs"]) if r.status == "failed"]
    assert "opened the test split" in (failed.error or "")


def test_the_empty_forget_set_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="forget set is empty"):
        run(tmp_path, "method=finetune", "request.count=0")
    assert not list((tmp_path / "runs").rglob("run.json"))


def test_a_checkpoint_from_elsewhere_is_evaluated(tmp_path: Path) -> None:
    first = run(tmp_path, "method=grad_diff")
    made = plan([*WORDS, "method=original"])
    result = pipeline(tmp_path).evaluate(made, first.folder / "model.safetensors")
    assert result.method == "external"
    assert result.metrics["loss/forget"] == first.metrics["loss/forget"]


def _child(root: Path, kill_at: int | None) -> None:
    """Run in a forked process; kill it before its n-th rename or removal of a file."""
    count = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("os.rename", "os.remove", "open") and str(root) in str(args):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run(root, "method=scrub", "method.epochs=2")
    (root / "events").write_text(str(count))


def _forked(root: Path, kill_at: int | None) -> int | None:
    process = FORK.Process(target=_child, args=(root, kill_at))
    process.start()
    process.join()
    return process.exitcode


def test_killed_at_any_moment_the_same_command_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert _forked(whole, None) == 0
    total = int((whole / "events").read_text())
    expected = {r.id: numbers(r) for r in find_runs([whole / "runs"])}
    for k in range(10):
        root = tmp_path / f"killed{k}"
        root.mkdir()
        moment = 3 + (total - 3) * k // 10
        assert _forked(root, moment) == -signal.SIGKILL
        for unfinished in (root / "runs").rglob("run.json"):
            load_run(unfinished.parent)  # whatever is there can be read
        assert _forked(root, None) == 0
        assert {r.id: numbers(r) for r in find_runs([root / "runs"])} == expected, moment


def test_a_second_process_waits_or_says_so(tmp_path: Path) -> None:
    result = run(tmp_path, "method=finetune")
    from filelock import FileLock

    with FileLock(result.folder / ".lock"), pytest.raises(BusyError, match="another process"):
        run(tmp_path, "method=finetune", wait=False)


def test_preparing_is_done_once_and_sees_no_request(tmp_path: Path) -> None:
    first = run(tmp_path, "method=toy/prepared")
    assert first.cost.prepare_s > 0 and Prepared.calls == ["prepare", "run"]
    again = run(tmp_path, "method=toy/prepared", fresh="unlearn")
    assert Prepared.calls == ["prepare", "run", "run"], "it is kept in the cache"
    assert again.metrics["loss/forget"] == first.metrics["loss/forget"]
    assert again.cost.prepare_s == first.cost.prepare_s


class Moved(nn.Linear):
    """A layer that notes where it is sent."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.places: list[str] = []

    def to(self, place: str) -> "Moved":  # type: ignore[override]
        self.places.append(place)
        return self


class Elsewhere(Engine):
    """An engine of a device that is not there."""

    def __init__(self) -> None:
        super().__init__(Runtime(device="cpu", progress=False))
        self.device = torch.device("cuda")

    def place(self, model: nn.Module) -> nn.Module:
        return model.to("device")  # type: ignore[arg-type]


def test_a_gpu_holds_no_other_model_while_a_method_runs(tmp_path: Path) -> None:
    workbench = Workbench(Elsewhere(), Cache(tmp_path))
    original, retrained = Moved(), Moved()
    workbench._views["retrained"] = ModelView(lambda: retrained, lambda m, d: {}, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError), workbench._aside(original, original):
        assert original.places == retrained.places == ["cpu"]
        raise RuntimeError  # a method fails, and the next one goes on
    assert original.places == retrained.places == ["cpu", "device"]
    here = Workbench(Engine(Runtime(device="cpu", progress=False)), Cache(tmp_path))
    with here._aside(original):
        assert original.places == ["cpu", "device"]
