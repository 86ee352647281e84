"""The same from Python as from the command line, and any method on your own model and data.

```python
result = mmforget.run("vision/mufac", method="npo", data="mini", **{"method.beta": 0.2})
results = mmforget.sweep("benchmark=vision/mufac", "data=mini", "method=npo,scrub", "seed=0,1")
mmforget.write_report(results, "report.html")
```
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from torch import nn

from mmforget.cache import Cache
from mmforget.config import Plan, expand, literal, load_config, plan
from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError
from mmforget.pipeline import Pipeline, replay, run_all
from mmforget.record import RunResult, find_runs, load_run
from mmforget.registry import METHODS, OPENERS, load_plugins
from mmforget.schema import instantiate
from mmforget.types import Adapter, Splits, UnlearningMethod

PathLike = str | Path
EXTERNAL = "external"


def run(
    benchmark: str,
    *,
    method: str,
    attack: str | Sequence[str] | None = None,
    data: str | None = None,
    model: str | None = None,
    seed: int | None = None,
    runs: PathLike = "runs",
    cache: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    **values: Any,
) -> RunResult:
    """Run one method on one benchmark, or return the record if it is finished already.

    Args:
        benchmark: Registry name, such as "vision/mufac".
        method: Registry name.
        attack: One or several attacks in place of the protocol's; "none" for none.
        data: Source of the data: mini, local or hub; None takes mini.
        model: Name of the model; None takes the benchmark's.
        seed: Unlearning seed.
        runs: Root of the run folders.
        cache: Folder of trained models and decoded data; None takes the default one.
        plugins: Python files that register more entries.
        **values: Any other key, dotted (`**{"method.beta": 0.2}`) or nested (`seeds={"train": 1}`).

    Raises:
        MMForgetError: What was given cannot be run.
    """
    load_plugins(tuple(map(Path, plugins)))
    named = {"benchmark": benchmark, "method": method, "attack": attack, "data": data}
    chosen = _given(**named, model=model, seed=seed)
    return _pipeline(runs, cache).run(plan(words(chosen | values)))


def sweep(
    *words: str,
    runs: PathLike = "runs",
    cache: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    shard: tuple[int, int] | None = None,
) -> list[RunResult]:
    """Run every combination of comma lists, given as on the command line; skip finished ones.

    Args:
        *words: Such as "benchmark=vision/mufac", "method=npo,scrub", "seed=0,1".
        runs: Root of the run folders.
        cache: Folder of trained models and decoded data; None takes the default one.
        plugins: Python files that register more entries.
        shard: (i, n): every n-th run from the i-th on, counted from 1.

    Raises:
        ConfigError: Faults in any of the runs, all at once, before the first one starts.
        MMForgetError: A run failed; the others were done.
    """
    load_plugins(tuple(map(Path, plugins)))
    return list(run_all(_pipeline(runs, cache), plans(words, shard=shard)))


def evaluate(
    checkpoint: PathLike,
    benchmark: str,
    *,
    attack: str | Sequence[str] | None = None,
    data: str | None = None,
    model: str | None = None,
    runs: PathLike = "runs",
    cache: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    **values: Any,
) -> RunResult:
    """Evaluate and attack weights made elsewhere by a benchmark's protocol.

    Args:
        checkpoint: A safetensors or state-dict file of the benchmark's model, or its folder.
        benchmark: Registry name.
        attack: Attacks in place of the protocol's; "none" for none.
        data: Source of the data; None takes mini.
        model: Name of the model; None takes the benchmark's.
        runs: Root of the run folders.
        cache: Folder of trained models and decoded data; None takes the default one.
        plugins: Python files that register more entries.
        **values: Any other key, as in `run`.

    Raises:
        CheckpointError: It is no checkpoint of the benchmark's model.
    """
    load_plugins(tuple(map(Path, plugins)))
    chosen = _given(benchmark=benchmark, method="original", attack=attack, data=data, model=model)
    made = plan(words(chosen | values))
    return _pipeline(runs, cache).evaluate(made, Path(checkpoint))


def attack(
    target: RunResult | PathLike,
    attack: str | Sequence[str],
    benchmark: str | None = None,
    *,
    runs: PathLike = "runs",
    cache: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    **values: Any,
) -> RunResult:
    """Attack a finished run, adding to its record, or weights made elsewhere.

    Args:
        target: A run, its folder, or a checkpoint.
        attack: One or several registry names.
        benchmark: Registry name, for a checkpoint; a run knows its own, and so does a path that a
            modality knows (a diffusers pipeline folder).
        runs: Root of the run folders, for a checkpoint.
        cache: Folder of trained models and decoded data; None takes the default one.
        plugins: Python files that register more entries.
        **values: Any other key, as in `run`: `**{"attack.relearn.examples": 16}`.

    Raises:
        ConfigError: No such attack, or a checkpoint without a benchmark.
    """
    load_plugins(tuple(map(Path, plugins)))
    place = target.folder if isinstance(target, RunResult) else Path(target)
    if not is_run(place):
        if benchmark is None:
            return attack_path(place, words({"attack": attack, **values}), runs, cache)
        return evaluate(
            place, benchmark, attack=attack, runs=runs, cache=cache, plugins=plugins, **values
        )
    return again(place, words({"attack": attack, **values}), cache)


def evaluate_path(
    target: Path,
    words: Sequence[str],
    runs: PathLike,
    cache: PathLike | None,
    config_dir: Path | None = None,
) -> RunResult:
    """Evaluate and attack a checkpoint, as words of the command line say.

    Raises:
        ConfigError: There is no such path, or the words name a method.
    """
    if not target.exists():
        raise ConfigError(f"{target}: no such file or folder. Give a run's folder or a checkpoint")
    made = plan(["method=original", *words], config_dir)
    if made.method != "original":
        raise ConfigError(f"method={made.method}: a checkpoint is evaluated as it is; leave it out")
    return _pipeline(runs, cache).evaluate(made, target)


def attack_path(
    target: Path,
    words: Sequence[str],
    runs: PathLike,
    cache: PathLike | None,
    config_dir: Path | None = None,
) -> RunResult:
    """Attack a checkpoint; without a benchmark among the words, as its modality knows it.

    Raises:
        ConfigError: There is no such path, or nothing known lies there and no benchmark is named.
    """
    if any(word.startswith("benchmark=") for word in words) or not target.exists():
        return evaluate_path(target, words, runs, cache, config_dir)
    for name in OPENERS:
        opened = OPENERS.get(name)(target, words)
        if opened is None:
            continue
        if opened.checkpoint is not None:
            return evaluate_path(opened.checkpoint, opened.words, runs, cache, config_dir)
        return _pipeline(runs, cache).run(plan(["method=original", *opened.words], config_dir))
    return evaluate_path(target, words, runs, cache, config_dir)


def write_report(
    runs: Sequence[RunResult | PathLike] | PathLike, page: PathLike, title: str | None = None
) -> list[Path]:
    """Write the report page, and the same numbers as CSV, LaTeX and JSON beside it.

    Args:
        runs: Records, run folders, or folders that hold runs.
        page: The HTML file.
        title: Heading; None makes one from the runs.

    Returns:
        The files written.

    Raises:
        DataError: A folder holds no readable record.
    """
    from mmforget.report import write_report as write

    given = [runs] if isinstance(runs, (str, Path)) else runs
    found: dict[Path, RunResult] = {}
    for each in given:
        records = [each] if isinstance(each, RunResult) else find_runs([Path(each)])
        found |= {record.folder.resolve(): record for record in records}
    return write(list(found.values()), Path(page), title)


def unlearn(
    model: nn.Module,
    adapter: Adapter,
    splits: Splits,
    method: str | UnlearningMethod[Any],
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    runtime: Runtime | None = None,
    fresh_model: Callable[[int], nn.Module] | None = None,
    retrain: Callable[[int | None], nn.Module] | None = None,
) -> nn.Module:
    """Run any method on your own model and data; no benchmark, cache or record is involved.

    Args:
        model: The trained model; it is copied, not changed.
        adapter: What one forward pass is, see `mmforget.types.Adapter`.
        splits: What to forget, what to keep.
        method: Registry name, or a method made by hand.
        config: Values of the named method's config.
        seed: Unlearning seed.
        runtime: Device and precision.
        fresh_model: Makes an untrained model from a seed, for methods that need one.
        retrain: Trains on the retain set from a seed, for the method `retrain`.

    Returns:
        The unlearned model, in evaluation mode, on the runtime's device.

    Raises:
        ConfigError: Faults in `config`.
        SplitError: Splits are empty or overlap.
        CollapsedError: The loss became NaN or infinite.
    """
    splits.check()
    if isinstance(method, str):
        label, cls = method, METHODS.get(method)
        method = cls(instantiate(cls.config_type, config or {}, "config"))
    elif config is not None:
        raise ConfigError("config goes with a method's name; this method has its config already")
    else:
        label = type(method).__name__
    engine = Engine(runtime)
    student = copy.deepcopy(model)
    adapter.apply_request(student, splits)
    ctx = Context(
        engine=engine,
        adapter=adapter,
        model=engine.place(student),
        splits=splits,
        reads=method.reads,
        label=label,
        seed=seed,
        fresh_model=fresh_model,
        retrain=retrain,
    )
    return method.run(ctx).eval()


def plans(
    words: Sequence[str],
    *,
    config: Path | None = None,
    config_dir: Path | None = None,
    shard: tuple[int, int] | None = None,
) -> list[Plan]:
    """Return the checked plans of a sweep.

    Args:
        words: Overrides as on the command line; comma lists are expanded.
        config: A resolved config file to start from.
        config_dir: A user's own folder of config groups.
        shard: (i, n): every n-th plan from the i-th on, counted from 1.

    Raises:
        ConfigError: The faults of all plans, each once.
    """
    made, faults = [], []
    for line in expand(words, config_dir):
        try:
            made.append(load_config(config, line) if config else plan(line, config_dir))
        except ConfigError as error:
            faults += [fault for fault in error.faults if fault not in faults]
    if faults:
        raise ConfigError(faults)
    if shard is None:
        return made
    first, count = shard
    return made[first - 1 :: count]


def again(
    folder: Path, words: Sequence[str], cache: PathLike | None, fresh: str | None = None
) -> RunResult:
    """Evaluate or attack a finished run anew: what it has is kept, what the words add is done.

    Args:
        folder: The run's folder.
        words: Overrides of metrics, attacks and runtime.
        cache: Folder of trained models and decoded data; None takes the default one.
        fresh: A stage to redo.

    Raises:
        ConfigError: The words change what was unlearned: that is another run.
    """
    known, record = replay(folder), load_run(folder)
    made = load_config(folder / "config.yaml", words)
    same = replace(known, attacks=made.attacks, metrics=made.metrics, runtime=made.runtime)
    if same != made:
        raise ConfigError(
            f"{' '.join(words)}: a finished run takes other attacks, metrics and runtime only. "
            f"What changes data, model or method is another run: mmforget run"
        )
    made = replace(made, attacks={**known.attacks, **made.attacks})
    root = _root(folder.resolve(), record.id)
    pipeline = Pipeline(root, _cache(cache), fresh)
    if record.method == EXTERNAL:
        return pipeline.evaluate(made, folder / "model.safetensors")
    return pipeline.run(made)


def is_run(place: Path) -> bool:
    """Return whether a path is a run's folder."""
    return (place / "run.json").is_file()


def words(values: Mapping[str, Any]) -> list[str]:
    """Return Python values as override words; nested mappings become dotted keys.

    Raises:
        ConfigError: A value that is no number, text, truth value, None, list or mapping.
    """
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += words({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            found.append(f"{key}={_literal(value, key)}")
    return found


def _literal(value: Any, key: str) -> str:
    """Return a value in Hydra's override grammar; text is quoted, so none of it is grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        return QuotedString(literal(str(value)), Quote.single).with_quotes()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_literal(item, key) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}:{_literal(v, key)}' for k, v in value.items())}}}"
    raise ConfigError(
        f"{key}={value!r}: a {type(value).__name__} cannot be part of a config; give a number, "
        f"text, true or false, None, a list or a mapping"
    )


def _given(**named: Any) -> dict[str, Any]:
    return {key: value for key, value in named.items() if value is not None}


def _cache(place: PathLike | None) -> Cache:
    return Cache(None if place is None else Path(place))


def _pipeline(runs: PathLike, cache: PathLike | None) -> Pipeline:
    return Pipeline(Path(runs), _cache(cache))


def _root(folder: Path, id: str) -> Path:
    """Return the root of the run folders that a run's folder lies in."""
    root = folder.parents[id.count("/")]
    if root / id != folder:
        raise ConfigError(
            f"{folder} was moved: its run is {id}. Move it back below a folder of runs"
        )
    return root
