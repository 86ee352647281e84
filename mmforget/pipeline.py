"""From a plan to a record: unlearn, evaluate, attack, each stage with its own finished mark.

A run's folder is `<runs>/<benchmark>/<method>/<hash>-s<seed>/`. A stage writes what it made and
then its mark, `stages/<stage>.json`; a killed run that is started again does only what has no
mark. `run.json` is composed from the marks.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from torch import nn

from mmforget.cache import Cache, canonical
from mmforget.checkpoint import state_sha
from mmforget.config import Plan, from_mapping
from mmforget.engine import Engine
from mmforget.environment import environment
from mmforget.errors import BusyError, CollapsedError, ConfigError, MMForgetError
from mmforget.record import (
    AttackResult,
    Cost,
    MetricValue,
    RunResult,
    decode_result,
    encode_result,
    load_run,
    save_arrays,
    to_json,
    write_text,
)
from mmforget.registry import ATTACKS, METRICS
from mmforget.types import ModelView, Trial
from mmforget.workbench import Bench, Steps, TrialLab, Workbench, ids_sha

logger = logging.getLogger(__name__)

STAGES = ("original", "retrained", "unlearn", "evaluate", "attack", "report")
ROWS = ("original", "retrain")


@dataclass(frozen=True)
class Place:
    """Where a run is kept."""

    id: str
    folder: Path

    def mark(self, stage: str) -> Path:
        """Return the path of a stage's finished mark."""
        return self.folder / "stages" / f"{stage.replace('/', '.')}.json"


class Pipeline:
    """Runs plans on one engine; models and views are shared between them.

    Args:
        runs: Root of the run folders.
        cache: Cache of models and data; None takes the default place.
        fresh: A stage to redo, with those after it, even if it is marked finished.
        wait: Whether to wait for another process that holds the same run.
    """

    def __init__(
        self,
        runs: Path,
        cache: Cache | None = None,
        fresh: str | None = None,
        wait: bool = True,
    ) -> None:
        if fresh is not None and fresh not in STAGES:
            raise ConfigError(f"--fresh {fresh}: one of {', '.join(STAGES)}")
        self.runs = runs
        self.cache = cache or Cache()
        self.fresh = fresh
        self.wait = wait
        self._engine: tuple[Any, Engine] | None = None
        self._workbench: Workbench | None = None
        self._redone: set[tuple[str, str]] = set()

    def workbench(self, plan: Plan) -> Workbench:
        """Return the workbench for a plan's runtime; the same one while the runtime is the same."""
        if self._engine is None or self._engine[0] != plan.runtime:
            self._engine = (plan.runtime, Engine(plan.runtime, self.runs))
            trained = ("original", "retrained")
            anew = trained[trained.index(self.fresh) :] if self.fresh in trained else ()
            self._workbench = Workbench(self._engine[1], self.cache, anew)
        assert self._workbench is not None
        return self._workbench

    def run(self, plan: Plan) -> RunResult:
        """Run a plan, or return its record if it is finished.

        The rows `original` and `retrain` are run first where the plan asks for a reference.

        Raises:
            MMForgetError: What the user gave cannot be run; nothing half-written is left.
        """
        plan = _referable(plan)
        bench = self.workbench(plan).bench(plan)
        parents: dict[str, RunResult] = {}
        reference = plan.with_method("retrain")
        if plan.reference and plan.sections["method"] != reference.sections["method"]:
            parents["retrained"] = self.run(reference)
        if plan.method not in ROWS:
            parents["original"] = self.run(plan.with_method("original"))
        return self._run(plan, bench, parents, None)

    def evaluate(self, plan: Plan, checkpoint: Path) -> RunResult:
        """Evaluate and attack a checkpoint made elsewhere, as a run of method `external`.

        Raises:
            CheckpointError: It is no checkpoint of the plan's model.
        """
        plan = _referable(plan)
        workbench = self.workbench(plan)
        bench = workbench.bench(plan)
        original, _, _ = workbench.trained(
            bench, plan, bench.splits.train, plan.seeds.train, "original"
        )
        model = bench.benchmark.rebuild(checkpoint, original)  # first: it may not fit
        parents = {"original": self.run(plan.with_method("original"))}
        if plan.reference:
            parents["retrained"] = self.run(plan.with_method("retrain"))
        return self._run(plan.with_method("original"), bench, parents, model)

    def place(self, plan: Plan, bench: Bench, external: nn.Module | None = None) -> Place:
        """Return where a plan's run is kept: a hash of all that decides its numbers."""
        resolved = plan.resolved()
        for name in ("runtime", "attack", "metrics", "presets", "reference"):
            del resolved[name]  # how to run, and stages that can be added to a finished run
        resolved["data"] = dict(bench.fingerprint)  # content in place of a path
        resolved["forget"] = ids_sha(bench.splits.forget)
        method = plan.method
        if external is not None:
            method = "external"
            resolved["checkpoint"] = state_sha(external)
        key = hashlib.sha256(canonical(resolved).encode()).hexdigest()[:12]
        name = f"{plan.benchmark}/{method.rpartition('/')[2]}/{key}-s{plan.seeds.unlearn}"
        return Place(name, self.runs / name)

    def _run(
        self,
        plan: Plan,
        bench: Bench,
        parents: Mapping[str, RunResult],
        external: nn.Module | None,
    ) -> RunResult:
        workbench = self.workbench(plan)
        engine = workbench.engine
        place = self.place(plan, bench, external)
        with self._locked(place, engine):
            self._forget_stages(plan, place, engine)
            before = self._known(place)
            if before is not None and self._complete(before, plan):
                return before
            runner = _Runner(workbench, plan, bench, place, parents, external)
            try:
                result = runner.result()
            except CollapsedError as error:
                result = runner.record("collapsed", str(error))
            except KeyboardInterrupt:
                runner.write(runner.record("interrupted", "interrupted; the same command goes on"))
                raise
            except MMForgetError as error:
                runner.write(runner.record("failed", str(error)))
                raise
            runner.write(result)
            return result

    def _known(self, place: Place) -> RunResult | None:
        return load_run(place.folder) if (place.folder / "run.json").is_file() else None

    def _complete(self, known: RunResult, plan: Plan) -> bool:
        """Return whether a record holds all that the plan asks for."""
        if known.status == "collapsed" and not known.metrics:
            return True
        asked = set(plan.attacks) <= set(known.attacks) and set(plan.metrics) <= set(
            known.config["metrics"]
        )
        same = all(known.config["attack"].get(n) == asdict(c) for n, c in plan.attacks.items())
        return known.status in ("finished", "collapsed") and asked and same

    def _forget_stages(self, plan: Plan, place: Place, engine: Engine) -> None:
        """Remove the marks of the stages that `fresh` names, once in this process."""
        if self.fresh is None or (place.id, self.fresh) in self._redone:
            return
        self._redone.add((place.id, self.fresh))
        first = STAGES.index(self.fresh)
        row = {"original": "original", "retrain": "retrained"}.get(plan.method)
        if engine.is_main:
            if first <= STAGES.index("unlearn") or row == self.fresh:
                shutil.rmtree(place.folder / "stages", ignore_errors=True)
                shutil.rmtree(place.folder / "steps", ignore_errors=True)
            for path in (place.folder / "stages").glob("*.json"):
                stage = path.stem.partition(".")[0]
                if STAGES.index(stage) >= first:
                    path.unlink()
            if self.fresh != "report":
                (place.folder / "run.json").unlink(missing_ok=True)
        engine.barrier()

    @contextmanager
    def _locked(self, place: Place, engine: Engine) -> Iterator[None]:
        """Hold a run's folder; a second process waits, and says so.

        Raises:
            BusyError: Another process holds it, and waiting was not wanted.
        """
        if not engine.is_main:
            engine.barrier()
            yield
            return
        place.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.folder / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            message = f"another process works on {place.folder}"
            if not self.wait:
                raise BusyError(f"{message}; try again later, or without --no-wait") from None
            logger.warning("%s; waiting for it", message)
            lock.acquire()
        try:
            engine.barrier()
            yield
        finally:
            lock.release()


class _Runner:
    """The stages of one run."""

    def __init__(
        self,
        workbench: Workbench,
        plan: Plan,
        bench: Bench,
        place: Place,
        parents: Mapping[str, RunResult],
        external: nn.Module | None,
    ) -> None:
        self.workbench = workbench
        self.engine = workbench.engine
        self.plan = plan
        self.bench = bench
        self.place = place
        self.parents = parents
        self.external = external
        self.keys: dict[str, str] = {}
        self.model: nn.Module | None = None
        self.is_reference = plan.method == "retrain" and "retrained" not in parents

    def result(self) -> RunResult:
        """Do every stage that has no mark; return the record."""
        self.stage("unlearn", self._unlearn)
        self.stage("evaluate", self._evaluate)
        for name in self.plan.attacks:
            self.stage(f"attack/{name}", partial(self._attack, name))
        reason = self.bench.benchmark.collapsed(self._metrics())
        return self.record("finished" if reason is None else "collapsed", reason)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do a stage unless it is marked finished for the same config, then mark it."""
        mark = self.place.mark(name)
        wanted = self._wanted(name)
        known = json.loads(mark.read_text()) if mark.is_file() else None
        if self.engine.share(known is not None and known["config"] == wanted):
            return
        started = time.perf_counter()
        logger.info("%s: %s", self.place.id, name)
        made = work()
        if self.engine.is_main:
            content = {"config": wanted, "seconds": time.perf_counter() - started, **made}
            write_text(mark, json.dumps(content))
        self.engine.barrier()

    def _wanted(self, stage: str) -> Any:
        """Return what of the config decides a stage beyond the run's own id."""
        kind, _, name = stage.partition("/")
        if kind == "attack":
            return json.loads(json.dumps(asdict(self.plan.attacks[name])))
        return list(self.plan.metrics) if kind == "evaluate" else None

    def _unlearn(self) -> dict[str, Any]:
        plan, bench, workbench = self.plan, self.bench, self.workbench
        events = self.place.folder / "events.jsonl"
        original, _, key = workbench.trained(
            bench, plan, bench.splits.train, plan.seeds.train, "original"
        )
        cost = Cost()
        if self.external is not None:
            model = self.engine.place(self.external).eval()
        elif plan.method == "original":
            model = original
        else:
            events.parent.mkdir(parents=True, exist_ok=True)
            if self.engine.is_main and not (self.place.folder / "state").exists():
                events.unlink(missing_ok=True)
            with self.engine.recording(self.place.id, plan.resolved(), events):
                model, cost = workbench.unlearn(
                    bench,
                    plan,
                    original,
                    bench.splits,
                    plan.seeds.unlearn,
                    self.place.folder / "state",
                    Steps(self.place.folder, bench.benchmark),
                )
        self.model = model
        if self.engine.is_main:
            bench.benchmark.save(model, self.place.folder, original)
        return {"cost": asdict(cost), "original_key": key}

    def _evaluate(self) -> dict[str, Any]:
        trial = self._trial()
        observed = self.bench.benchmark.observed(self.bench.splits)
        numbers = {name: trial.view.numbers(name) for name in observed}
        known = set(next(iter(numbers.values()))) if numbers else set()
        metrics: dict[str, MetricValue] = {}
        notes = []
        for name in self.plan.metrics:
            metric = METRICS.get(name)()
            missing = metric.needs - known
            if missing:
                notes.append(f"metric {name} left out: no {', '.join(sorted(missing))} here")
                continue
            metrics.update(metric.compute(trial))
        if self.engine.is_main:
            kept = {
                split: {name: array for name, array in part.items() if name != "features"}
                for split, part in numbers.items()
            }
            save_arrays(self.place.folder / "predictions.npz", kept)
            self.bench.benchmark.samples(trial, self.place.folder / "samples")
        return {"metrics": {k: asdict(v) for k, v in metrics.items()}, "notes": notes}

    def _attack(self, name: str) -> dict[str, Any]:
        kept = self.place.folder / "attacks" / name.replace("/", ".")
        trial = replace(self._trial(), folder=kept)
        attack = ATTACKS.get(name)(self.plan.attacks[name])
        missing = attack.needs and attack.needs - set(trial.view.numbers("forget"))
        if missing:
            return {"result": None, "notes": [f"attack {name} left out: no {', '.join(missing)}"]}
        budget = attack.budget()
        result = attack.run(trial, budget)
        if self.engine.is_main and result.targets:
            save_arrays(kept.with_name(f"{kept.name}.npz"), {"": result.targets})
        spent = {key: value for key, value in asdict(budget).items() if value is not None}
        return {"result": encode_result(replace(result, budget=spent)), "notes": []}

    def _trial(self) -> Trial:
        plan, bench, workbench = self.plan, self.bench, self.workbench
        seed = plan.seeds.evaluate
        original, _, key = workbench.trained(
            bench, plan, bench.splits.train, plan.seeds.train, "original"
        )
        before = workbench.view(bench, original, seed, key)
        retrained, retrain_cost = None, None
        if plan.reference:
            reference, retrain_cost, retrain_key = workbench.trained(
                bench, plan, bench.splits.retain, plan.seeds.train, "retrained"
            )
            retrained = workbench.view(bench, reference, seed, retrain_key)
            self.keys["retrained_model"] = retrain_key
        self.keys["original_model"] = key
        if self.model is None:
            made = bench.benchmark.rebuild(self.place.folder / "model.safetensors", original)
            self.model = self.engine.place(made).eval()
        name = f"{self.place.id}/{state_sha(self.model)}"
        view = workbench.view(bench, self.model, seed, name)
        return Trial(
            view=view,
            original=before,
            retrained=retrained,
            splits=bench.splits,
            seed=seed,
            cost=self._cost(),
            cost_reference=retrain_cost,
            benchmark=bench.benchmark,
            lab=TrialLab(workbench, bench, plan),
            steps=self._steps(original, view),
        )

    def _steps(self, original: nn.Module, last: ModelView) -> list[ModelView]:
        """Return views of the model after each stage of a sequence; none if there was only one."""
        bench, workbench = self.bench, self.workbench
        count = len(bench.benchmark.stages(bench.splits))
        if count == 1 or self.plan.method in ROWS or self.external is not None:
            return []
        kept, views = Steps(self.place.folder, bench.benchmark), []
        for k in range(count - 1):
            found = kept.load(k, original)
            assert found is not None, "the unlearn stage kept every step before it was marked"
            name = f"{self.place.id}/step{k}"
            model = self.engine.place(found).eval()
            views.append(workbench.view(bench, model, self.plan.seeds.evaluate, name))
        return [*views, last]

    def _mark(self, stage: str) -> dict[str, Any]:
        path = self.place.mark(stage)
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def _cost(self) -> Cost:
        return Cost(**self._mark("unlearn").get("cost", {}))

    def _metrics(self) -> dict[str, MetricValue]:
        """Return the metrics, each with the retrained run's value as its reference."""
        found = self._mark("evaluate").get("metrics", {})
        values = {name: MetricValue(**value) for name, value in found.items()}
        return _referenced(values, self._reference_metrics(values))

    def _reference_metrics(self, own: Mapping[str, MetricValue]) -> Mapping[str, MetricValue]:
        if "retrained" in self.parents:
            return self.parents["retrained"].metrics
        return own if self.is_reference else {}

    def _attacks(self) -> dict[str, AttackResult]:
        found = {}
        for name in self.plan.attacks:
            content = self._mark(f"attack/{name}").get("result")
            if content is None:
                continue
            result = decode_result(content)
            parent = self.parents.get("retrained")
            own = result.values if self.is_reference else {}
            known = parent.attacks[name].values if parent and name in parent.attacks else own
            found[name] = replace(result, values=_referenced(result.values, known))
        return found

    def record(self, status: str, error: str | None) -> RunResult:
        """Return the record of what the marks hold."""
        plan, splits = self.plan, self.bench.splits
        method = "external" if self.external is not None else plan.method
        notes = list(self.bench.notes) + self._mark("evaluate").get("notes", [])
        for name in plan.attacks:
            notes += self._mark(f"attack/{name}").get("notes", [])
        return RunResult(
            id=self.place.id,
            status=status,
            benchmark=plan.benchmark,
            modality=plan.modality,
            method=method,
            seeds=plan.seeds,
            mini=plan.sections["data"].source == "mini",
            request={
                **asdict(plan.sections["request"]),
                "sizes": {name: len(splits.get(name)) for name in splits.names()},
                "ids_sha": ids_sha(splits.forget),
            },
            parents={**{name: run.id for name, run in self.parents.items()}, **self.keys},
            metrics=self._metrics(),
            attacks=self._attacks(),
            cost=self._cost(),
            environment=environment(str(self.engine.device)) | self._launch(),
            config=plan.resolved(),
            notes=notes,
            error=error,
            folder=self.place.folder,
        )

    def _launch(self) -> dict[str, Any]:
        runtime = self.plan.runtime
        return {
            "processes": self.engine.world,
            "precision": runtime.precision,
            "accumulation": runtime.accumulation,
        }

    def write(self, result: RunResult) -> None:
        """Write the record and the resolved config; drop what only resuming needed."""
        if not self.engine.is_main:
            return
        text = yaml.safe_dump(result.config, sort_keys=False, allow_unicode=True)
        write_text(self.place.folder / "config.yaml", text)
        write_text(self.place.folder / "run.json", to_json(result))
        if result.status in ("finished", "collapsed"):
            shutil.rmtree(self.place.folder / "state", ignore_errors=True)


def _referable(plan: Plan) -> Plan:
    """Return a plan without a retrained reference where nothing is trained.

    An original that is taken as it is (0 epochs) would be its own "retrained" model.
    """
    if not plan.reference or plan.sections["benchmark"].training.epochs > 0:
        return plan
    logger.warning(
        "no retrained reference: benchmark.training.epochs=0, so the original is taken as it is"
    )
    return replace(plan, reference=False)


def _referenced(
    values: Mapping[str, MetricValue], reference: Mapping[str, MetricValue]
) -> dict[str, MetricValue]:
    """Fill in the retrained model's value where a metric left its reference open."""
    return {
        name: replace(value, reference=reference[name].value)
        if value.reference is None and name in reference
        else value
        for name, value in values.items()
    }


def replay(folder: Path) -> Plan:
    """Return the plan of a finished run's folder.

    Raises:
        ConfigError: It holds no resolved config.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no config.yaml; give the folder of a finished run")
    content = yaml.safe_load(path.read_text())
    return from_mapping(content)


def run_all(pipeline: Pipeline, plans: Sequence[Plan]) -> Iterator[RunResult]:
    """Run plans one after another, yielding each record; a failed one does not stop the others.

    Raises:
        MMForgetError: After the last plan, if any failed: the first failure.
    """
    failures: list[MMForgetError] = []
    for plan in plans:
        try:
            yield pipeline.run(plan)
        except MMForgetError as error:
            if len(plans) > 1:
                logger.error("%s failed: %s", plan.method, error)
            failures.append(error)
    if failures:
        raise failures[0]
