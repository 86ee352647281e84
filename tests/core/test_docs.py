"""What the documentation says can be done, can be done: examples, commands, links, reference."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import mmforget
from mmforget.cli import application
from mmforget.config import expand, load_config, plan
from mmforget.registry import BENCHMARKS, OPENERS, REGISTRIES, load_plugins
from mmforget.rng import derive
from mmforget.testing.contract import Case, check_loss_method
from mmforget.testing.toys import WORLDS, ToyWorld, toy_world

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
METHOD = DOCS / "examples" / "margin_method.py"
BENCHMARK = DOCS / "examples" / "points_benchmark.py"
MOVES = {"epochs": 2, "lr": 0.05, "batch_size": 12, "momentum": 0.9}
TRAIN = "mmforget.vision.train"


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    """Register the examples for these tests and leave the registries as they were."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in REGISTRIES.values():
            patch.setattr(registry, "_targets", dict(registry._targets))
        yield
    for file in (METHOD, BENCHMARK):
        sys.modules.pop(f"mmforget_plugin_{file.stem}", None)


def commands() -> list[list[str]]:
    """Return the words of every command line in a fenced block that runs mmforget."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                for name in ("mmforget", TRAIN):
                    if name in words:
                        found.append(words[words.index(name) :])
    return found


def code_blocks() -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
    ]


def lines_of(file: Path) -> int:
    return sum(1 for line in file.read_text().splitlines() if line.strip())


# Runs first: the examples are not registered yet, and the page must not show them.
def test_the_reference_page_is_what_the_entries_say_now() -> None:
    command = [sys.executable, str(DOCS / "reference.py")]  # a process without other tests' plugins
    made = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent, check=True)
    assert (DOCS / "reference.md").read_text() == made.stdout, "python docs/reference.py > it"


@pytest.mark.parametrize("world", WORLDS)
def test_the_example_method_keeps_the_contract(world: str, tmp_path: Path) -> None:
    load_plugins((METHOD,))
    check_loss_method(Case("margin", {**MOVES, "margin": 5.0}, toy_world(world)), tmp_path)


def test_the_example_method_stops_at_its_margin(tmp_path: Path) -> None:
    load_plugins((METHOD,))
    from mmforget.testing.contract import run_case

    world = toy_world("tokens")  # its loss per unit is about log 12 from the start
    kept = run_case(Case("margin", {**MOVES, "margin": 1e-3, "scope": "head"}, world)).model
    raised = run_case(Case("margin", {**MOVES, "margin": 9.0, "scope": "head"}, world)).model
    plain = {**MOVES, "forget_weight": 0.0}
    same = run_case(Case("grad_diff", {**plain, "scope": "head"}, world)).model
    weights = [m.state_dict()["head.weight"] for m in (kept, raised, same)]
    assert torch.allclose(weights[0], weights[2], atol=1e-6)  # nothing left to push
    assert not torch.allclose(weights[1], weights[2], atol=1e-3)


def test_examples_are_short_and_shown_as_they_are() -> None:
    assert lines_of(METHOD) <= 20
    assert lines_of(BENCHMARK) < 150
    assert METHOD.read_text() in (DOCS / "add_a_method.md").read_text()


def test_the_example_benchmark_runs_and_forgets(tmp_path: Path) -> None:
    load_plugins((METHOD, BENCHMARK))
    places = {"runs": tmp_path / "runs", "cache": tmp_path / "cache"}
    made = mmforget.run(
        "points/owners", method="margin", **{"method.epochs": 10, "method.lr": 0.1}, **places
    )
    original = mmforget.load_run(places["runs"] / str(made.parents["original"]))
    assert made.status == "finished" and made.mini
    assert set(BENCHMARKS.get("points/owners").headline) <= set(made.metrics)
    forget = {run.method: run.metrics["accuracy/forget"] for run in (original, made)}
    assert forget["original"].gap > 0.2  # worth measuring: the original knows what to forget
    assert forget["margin"].gap < forget["original"].gap
    assert made.metrics["gap/average"].value < original.metrics["gap/average"].value

    mini = BENCHMARKS.get("points/owners")
    mini.write_mini(tmp_path / "points", seed=0)
    local = mmforget.run(
        "points/owners",
        method="finetune",
        data="local",
        **{"data.root": str(tmp_path / "points"), "method.epochs": 1},
        **places,
    )
    assert local.parents["original_model"] == original.parents["original_model"]  # same content
    assert not local.mini


def test_the_contract_runs_in_the_example_benchmark(tmp_path: Path) -> None:
    load_plugins((BENCHMARK,))
    cls = BENCHMARKS.get("points/owners")
    types = (cls.config_type, cls.data_type, cls.model_type, cls.request_type)
    made = cls(*(config() for config in types), store=tmp_path / "store")
    world = ToyWorld("points", made.adapter, made.splits(), lambda seed: made.build(derive(seed)))
    made.splits().check()
    for name in ("grad_diff", "random_label", "kl_retain"):
        check_loss_method(Case(name, {**MOVES, "lr": 0.02}, world), tmp_path / name)


def test_links_and_named_files_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\[[^\]`]+\]\(([^)\s]+)\)", text):
            if target.startswith(("http:", "https:")):
                continue
            file, _, anchor = target.partition("#")
            place = page.parent / file if file else page
            assert place.is_file(), f"{page.name}: {target}"
            heads = re.findall(r"^#+ (.+)$", place.read_text(), re.M) if anchor else []
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert not anchor or anchor in slugs, f"{page.name}: {target}"
        for name in re.findall(r"`((?:docs|configs|tests|mmforget|vision)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_code_blocks_compile_and_name_what_exists() -> None:
    assert code_blocks()
    for page, block in code_blocks():
        compile(block, page, "exec")
        for module, names in re.findall(r"^from (mmforget[\w.]*) import ([\w, ]+)$", block, re.M):
            exec(f"from {module} import {names}", {})
        for name in re.findall(r"\bmmforget\.(\w+)\(", block):
            assert name in mmforget.__all__, f"{page}: mmforget.{name}"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if words[0] == TRAIN:
        from mmforget.vision.train import app

        given = get_command(app).make_context("train", words[1:]).params
        plan(["method=original", *given["words"]])
        return
    group, name, rest = get_command(application()), words[1], words[2:]
    while hasattr(group.commands[name], "commands"):
        group, name, rest = group.commands[name], rest[0], rest[1:]
    given = group.commands[name].make_context(name, list(rest)).params
    load_plugins(tuple(given.get("plugin") or ()))
    if words[1] in ("list", "show"):
        with pytest.raises(SystemExit) as ended:
            application()([*words[1:], "--json"], prog_name="mmforget")
        assert ended.value.code in (0, None), capsys.readouterr().err
    if words[1] in ("eval", "attack"):
        said = given["words"]
        if not any(word.startswith("benchmark=") for word in said):  # a pipeline from elsewhere
            (tmp_path / "model_index.json").write_text("{}")
            opened = [OPENERS.get(name)(tmp_path, said) for name in OPENERS]
            said = next(found.words for found in opened if found is not None)
        plan(["method=original", *said])
    if words[1] in ("run", "check") and given["config"] is None:
        for line in expand(given["words"]):
            plan(line)


def test_the_replayed_config_of_the_docs_takes_its_word(tmp_path: Path) -> None:
    resolved = plan(["benchmark=vision/mufac", "method=scrub"]).resolved()
    (tmp_path / "config.yaml").write_text(str(resolved).replace("None", "null"))
    found = [words for words in commands() if "--config" in words]
    assert found
    for words in found:
        made = load_config(tmp_path / "config.yaml", words[words.index("--config") + 2 :])
        assert made.sections["method"].epochs == 3
