"""`run`, `eval`, `attack` and `report`: the work itself."""

import logging
import os
import shutil
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmforget.cli.base import (
    CacheDir,
    ConfigDir,
    ConfigFile,
    Json,
    Plugins,
    Runs,
    Words,
    console,
    is_main,
    part_of,
    say,
    say_json,
    verb,
)
from mmforget.errors import ConfigError, DataError, MMForgetError
from mmforget.registry import load_plugins

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmforget.config import Plan
    from mmforget.pipeline import Pipeline
    from mmforget.record import RunResult

logger = logging.getLogger(__name__)

Fresh = Annotated[
    str | None,
    typer.Option("--fresh", metavar="STAGE", help="Redo this stage and those after it."),
]
Shard = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Do part I of N of a sweep.")
]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait for a run that another process holds.")
]
Page = Annotated[
    Path | None, typer.Option("--report", metavar="PAGE", help="Write the report page there.")
]
Target = Annotated[Path, typer.Argument(help="A finished run's folder, or a checkpoint.")]


@verb("run", "mmforget run benchmark=vision/mufac data=mini method=npo,scrub seed=0,1")
def run(
    words: Words = None,
    config: ConfigFile = None,
    runs: Runs = Path("runs"),
    cache: CacheDir = None,
    fresh: Fresh = None,
    shard: Shard = None,
    wait: Wait = True,
    report: Page = None,
    plugin: Plugins = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Train, unlearn, evaluate and attack.

    Comma lists make a sweep. The same command again goes on where the last one stopped, and skips
    what is finished.
    """
    part = part_of(shard)
    load_plugins(tuple(plugin or ()))
    from mmforget.api import plans
    from mmforget.cache import Cache
    from mmforget.pipeline import Pipeline

    todo = plans(words or [], config=config, config_dir=config_dir, shard=part)
    pipeline = Pipeline(runs, Cache(cache), fresh, wait)
    done, failures = _all(pipeline, todo)
    _present(done, json)
    if done and report is not None:
        _write(done, report, None, json)
    elif done and not json:
        say(f"report: mmforget report {runs} -o {runs / 'report.html'}")
    if failures:
        raise (
            failures[0]
            if len(todo) == 1
            else MMForgetError(
                f"{len(failures)} of {len(todo)} runs failed, the first with: {failures[0]}"
            )
        )


@verb("eval", "mmforget eval unlearned.safetensors benchmark=vision/mufac data=mini")
def evaluate(
    target: Target,
    words: Words = None,
    runs: Runs = Path("runs"),
    cache: CacheDir = None,
    plugin: Plugins = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Evaluate a run again, or a checkpoint from elsewhere."""
    load_plugins(tuple(plugin or ()))
    from mmforget.api import again, is_run

    if is_run(target):
        result = again(target, words or [], cache, fresh="evaluate")
    else:
        from mmforget.api import evaluate_path

        result = evaluate_path(target, words or [], runs, cache, config_dir)
    _present([result], json)


@verb("attack", "mmforget attack runs/vision/mufac/npo/1a2b3c4d5e6f-s0 attack=relearn")
def attack(
    target: Target,
    words: Words = None,
    runs: Runs = Path("runs"),
    cache: CacheDir = None,
    plugin: Plugins = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Attack a run or a checkpoint from elsewhere.

    What a run's record holds stays; what the attacks find is added.
    """
    given = words or []
    if not any(word.startswith("attack=") for word in given):
        raise ConfigError("no attack named. Say attack=NAME. See: mmforget list attacks")
    load_plugins(tuple(plugin or ()))
    from mmforget.api import again, is_run

    if is_run(target):
        result = again(target, given, cache)
    else:
        from mmforget.api import attack_path

        result = attack_path(target, given, runs, cache, config_dir)
    _present([result], json)


@verb("report", "mmforget report runs -o report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.")],
    page: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PAGE", help="The HTML file.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Write one page of tables and plots.

    The same numbers go into CSV, LaTeX and JSON files beside it.
    """
    load_plugins(tuple(plugin or ()))
    from mmforget.record import find_runs

    for place in runs:
        if not place.is_dir():
            raise DataError(f"{place}: no such folder. Give run folders, or a folder of runs")
    found = list(find_runs(runs))
    if not found:
        raise DataError(
            f"no run found below {', '.join(map(str, runs))}. Make one: mmforget run --help"
        )
    if page is None:
        page = Path(os.path.commonpath([place.absolute() for place in runs])) / "report.html"
    if not json:
        say(_table(found))
    _write(found, page, title, json)


def _all(
    pipeline: "Pipeline", todo: "Sequence[Plan]"
) -> tuple[list["RunResult"], list[MMForgetError]]:
    """Run plans one after another; a failed one does not stop the others."""
    done, failures = [], []
    for index, plan in enumerate(todo, start=1):
        console().place = f"[{index}/{len(todo)}]"
        try:
            done.append(pipeline.run(plan))
        except MMForgetError as error:
            failures.append(error)
            if len(todo) > 1:
                logger.error("[%d/%d] %s: %s", index, len(todo), plan.method, error)
    console().place = ""
    return done, failures


def _present(done: "Sequence[RunResult]", json: bool) -> None:
    """Print results, and say where each record is and what a reader must know."""
    from mmforget.record import to_json

    for result in done:
        if result.status != "finished":
            logger.warning("%s: %s: %s", result.id, result.status, result.error)
        if json:
            say_json({"folder": str(result.folder), **loads(to_json(result))})
    if done and not json:
        if any(result.status == "finished" for result in done):
            say(_table(done))
        say("\n".join(f"record: {result.folder / 'run.json'}" for result in done))


def _table(runs: "Sequence[RunResult]") -> str:
    from mmforget.report import text_table

    return text_table(runs, shutil.get_terminal_size((120, 24)).columns)


def _write(runs: "Sequence[RunResult]", page: Path, title: str | None, json: bool) -> None:
    """Write the report of some runs, and print where its files are."""
    from mmforget.api import write_report

    if not is_main():
        return
    paths = write_report(runs, page, title)
    if json:
        say_json({"report": [str(path) for path in paths]})
    else:
        say("\n".join(f"report: {path}" for path in paths))
