"""Models and data behind the runs: each original, retrained and shadow model is trained once.

Models are content-addressed by what decides their weights: benchmark, data revision, architecture,
training config, seed and the ids of the training set. So methods, sweeps and shards share them.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmforget.cache import Cache, key_of
from mmforget.checkpoint import load_model, save_model, state_sha
from mmforget.config import Plan
from mmforget.context import Context
from mmforget.engine import Engine
from mmforget.errors import ResourceError
from mmforget.record import Cost, write_text
from mmforget.registry import BENCHMARKS, METHODS
from mmforget.rng import derive
from mmforget.types import (
    Adapter,
    Benchmark,
    Dataset,
    ModelView,
    Splits,
    Stage,
    UnlearningMethod,
    subset,
)

logger = logging.getLogger(__name__)

MODELS = "models"


@dataclass(frozen=True)
class Bench:
    """An opened benchmark: its data read, its request applied and checked.

    Attributes:
        notes: Warnings about the data, for the record.
        fingerprint: What of data and model decides the weights.
    """

    benchmark: Benchmark
    splits: Splits
    notes: tuple[str, ...]
    fingerprint: Mapping[str, Any]


class Steps:
    """Results of a sequence of requests, all but the last, in a run's folder.

    Args:
        folder: The run's folder.
        benchmark: Saves and rebuilds models.
    """

    def __init__(self, folder: Path, benchmark: Benchmark) -> None:
        self.folder = folder / "steps"
        self.benchmark = benchmark

    def save(self, k: int, model: nn.Module, start: nn.Module, cost: Cost) -> None:
        """Keep the model after stage k; its cost is written last and marks it whole."""
        place = self.folder / str(k)
        place.mkdir(parents=True, exist_ok=True)
        self.benchmark.save(model, place, start)
        write_text(place / "cost.json", json.dumps(asdict(cost)))

    def load(self, k: int, start: nn.Module) -> nn.Module | None:
        """Return the model after stage k, or None if it is not there."""
        place = self.folder / str(k)
        if not (place / "cost.json").is_file():
            return None
        return self.benchmark.rebuild(place / "model.safetensors", start)

    def cost(self, k: int) -> Cost:
        """Return what stage k cost."""
        return Cost(**json.loads((self.folder / str(k) / "cost.json").read_text()))


class Workbench:
    """Opens benchmarks, trains models through the cache, and runs methods.

    Args:
        engine: Device, precision, processes.
        cache: Where models and decoded data are kept.
        anew: Labels of models ("original", "retrained") to train again, once each, though cached.
    """

    def __init__(self, engine: Engine, cache: Cache, anew: Collection[str] = ()) -> None:
        self.engine = engine
        self.cache = cache
        self.anew = anew
        self._made_anew: set[str] = set()
        self._benches: dict[str, Bench] = {}
        self._views: dict[str, ModelView] = {}

    def bench(self, plan: Plan) -> Bench:
        """Return the opened benchmark of a plan; the same one for plans that differ in method.

        Raises:
            DataError: The data are not in the published layout.
            SplitError: Splits are empty or overlap.
        """
        names = ("benchmark", "data", "model", "request")
        key = json.dumps([plan.benchmark, *(asdict(plan.sections[n]) for n in names)], default=str)
        if key not in self._benches:
            made = BENCHMARKS.get(plan.benchmark)(
                config=plan.sections["benchmark"],
                data=plan.sections["data"],
                model=plan.sections["model"],
                request=plan.sections["request"],
                store=self.cache.root / "data",
            )
            made.engine = self.engine
            with _main_first(self.engine):
                splits = made.splits()
            warnings = splits.check(allow_shared_content=made.allow_shared_content)
            for warning in warnings:
                logger.warning("%s", warning)
            self._benches[key] = Bench(made, splits, (*made.notes, *warnings), made.fingerprint())
        return self._benches[key]

    def trained(
        self, bench: Bench, plan: Plan, data: Dataset, seed: int, label: str
    ) -> tuple[nn.Module, Cost, str]:
        """Return a model trained on `data` by the benchmark's recipe, its cost and cache key.

        Trained once: later calls, runs and processes load it. A killed training goes on.

        Raises:
            CollapsedError: The loss became NaN or infinite.
        """
        inputs = self.model_inputs(bench, plan, data, seed)
        engine, benchmark = self.engine, bench.benchmark
        if benchmark.training.epochs == 0:  # used as it is: a copy in the cache serves nobody
            model = engine.place(benchmark.build(derive(seed, "init")))
            return model.eval(), Cost(), key_of(inputs)
        if label in self.anew and engine.is_main and key_of(inputs) not in self._made_anew:
            self._made_anew.add(key_of(inputs))
            self.cache.discard(MODELS, inputs)
        with ExitStack() as stack:
            place = (
                stack.enter_context(self.cache.building(MODELS, inputs)) if engine.is_main else None
            )
            found = (place.ready, place.path, place.scratch) if place is not None else None
            ready, path, scratch = engine.share(found)
            model = engine.place(benchmark.build(derive(seed, "init")))
            if not ready:
                logger.info("training the %s model", label)
                with engine.metered() as meter, _memory_hint():
                    model = benchmark.train(engine, model, data, seed, scratch / "state")
                if place is not None:
                    payload = place.scratch / "payload"
                    payload.mkdir(parents=True, exist_ok=True)
                    save_model(model, payload / "model.safetensors")
                    cost = meter.cost(sum(p.numel() for p in model.parameters()))
                    (payload / "cost.json").write_text(json.dumps(asdict(cost)))
                    place.commit()
            engine.barrier()
        load_model(model, path / "model.safetensors")
        cost = Cost(**json.loads((path / "cost.json").read_text()))
        return model.eval(), cost, path.name

    def model_inputs(self, bench: Bench, plan: Plan, data: Dataset, seed: int) -> dict[str, Any]:
        """Return what decides the weights of a trained model: the content of its cache key."""
        return {
            "benchmark": plan.benchmark,
            "recipe": bench.benchmark.recipe,
            "fingerprint": dict(bench.fingerprint),
            "training": bench.benchmark.training.recipe(),
            "seed": seed,
            "examples": ids_sha(data),
        }

    def view(self, bench: Bench, model: nn.Module, seed: int, name: str | None = None) -> ModelView:
        """Return a view of a model; a named one is kept, with its numbers, for later runs."""
        key = None if name is None else f"{name}/{seed}/{id(bench)}"
        if key is not None and key in self._views:
            return self._views[key]
        adapter, engine = bench.benchmark.adapter, self.engine

        def predict(m: nn.Module, data: Dataset) -> dict[str, np.ndarray[Any, Any]]:
            return engine.predict(m, adapter, data, seed)

        made = ModelView(lambda: model, predict, bench.splits)
        if key is not None:
            self._views[key] = made
        return made

    def unlearn(
        self,
        bench: Bench,
        plan: Plan,
        model: nn.Module,
        splits: Splits,
        seed: int,
        resume: Path | None,
        kept: "Steps | None" = None,
    ) -> tuple[nn.Module, Cost]:
        """Run the plan's method on a copy of `model`; return the result and its cost.

        Requests that come in stages are served one after the other, each from the last result.

        Args:
            bench: The benchmark.
            plan: Names the method.
            model: The model to start from.
            splits: What to forget and what to keep.
            seed: The unlearning seed.
            resume: Folder of step checkpoints; None: none.
            kept: Where the results of stages but the last are kept; None: nowhere.

        Raises:
            CollapsedError: The loss became NaN or infinite.
            ResourceError: Out of memory; the message names the knobs.
        """
        stages = bench.benchmark.stages(splits)
        if METHODS.get(plan.method).intent == "reference":
            stages = stages[-1:]  # what was never trained on needs no request before it
        made, total = model, Cost()
        for k, stage in enumerate(stages):
            last = k + 1 == len(stages)
            found = None if last or kept is None else kept.load(k, model)
            if found is not None:
                made, cost = self.engine.place(found).eval(), kept.cost(k) if kept else Cost()
            else:
                state = resume if resume is None or len(stages) == 1 else resume / f"stage{k}"
                made, cost = self._serve(bench, plan, made, stage, seed, state, model, splits)
                if not last and kept is not None and self.engine.is_main:
                    kept.save(k, made, model, cost)
                self.engine.barrier()
            total = total + cost
        return made, total

    def _serve(
        self,
        bench: Bench,
        plan: Plan,
        model: nn.Module,
        stage: Stage,
        seed: int,
        resume: Path | None,
        original: nn.Module,
        every: Splits,
    ) -> tuple[nn.Module, Cost]:
        """Run the plan's method on a copy of `model` for one stage; return result and cost."""
        engine, splits = self.engine, stage.splits
        cls: type[UnlearningMethod[Any]] = METHODS.get(plan.method)
        method = cls(plan.sections["method"])
        method.resume = resume
        reference: list[Cost] = []
        prepare_s = 0.0
        if method.prepares:
            method.prepared, prepare_s = self._prepared(bench, plan, method, original, every, seed)

        def retrain(chosen: int | None) -> nn.Module:
            train_seed = plan.seeds.train if chosen is None else chosen
            made, cost, _ = self.trained(bench, plan, splits.retain, train_seed, "retrained")
            reference.append(cost)
            return made

        def fresh(chosen: int) -> nn.Module:
            made = bench.benchmark.build(chosen)
            bench.benchmark.adapter.apply_request(made, splits)
            return made

        with self._aside(model, original), _memory_hint():
            student = copy.deepcopy(model)
            bench.benchmark.adapter.apply_request(student, splits)
            ctx = Context(
                engine=engine,
                adapter=bench.benchmark.adapter,
                model=engine.place(student),
                splits=splits,
                reads=method.reads,
                label=plan.method,
                seed=seed,
                fresh_model=fresh,
                retrain=retrain,
                train=partial(bench.benchmark.train, engine),
                target=stage.target,
            )
            with engine.metered() as meter:
                made = method.run(ctx).eval()
        if reference:  # the reference is loaded from the cache: its cost is that of its training
            return made, reference[0]
        trainable = sum(parameter.numel() for parameter in ctx.trainable.values())
        return made, replace(meter.cost(trainable), prepare_s=prepare_s)

    @contextmanager
    def _aside(self, *models: nn.Module) -> Iterator[None]:
        """Keep these models, and those of views, in the CPU's memory for the block.

        A GPU then holds no other model than the method does.
        """
        if self.engine.device.type == "cpu":
            yield
            return
        seen = {id(view.model): view.model for view in self._views.values()}
        held = seen | {id(model): model for model in models}
        for model in held.values():
            model.to("cpu")
        try:
            yield
        finally:
            for model in held.values():
                self.engine.place(model)

    def _prepared(
        self,
        bench: Bench,
        plan: Plan,
        method: UnlearningMethod[Any],
        model: nn.Module,
        splits: Splits,
        seed: int,
    ) -> tuple[dict[str, Tensor], float]:
        """Return what a method makes once for an original, from the cache, and its wall seconds."""
        engine = self.engine
        inputs = {
            "start": state_sha(model),
            "method": plan.method,
            "config": asdict(plan.sections["method"]),
            "seed": seed,
            "trainer": self.model_inputs(bench, plan, splits.train, seed),
        }
        with ExitStack() as stack:
            place = (
                stack.enter_context(self.cache.building("prepared", inputs))
                if engine.is_main
                else None
            )
            found = (place.ready, place.path, place.scratch) if place is not None else None
            ready, path, scratch = engine.share(found)
            if not ready:
                logger.info("preparing %s", plan.method)
                resume, method.resume = method.resume, scratch / "state"
                ctx = Context(
                    engine=engine,
                    adapter=bench.benchmark.adapter,
                    model=engine.place(copy.deepcopy(model)),
                    splits=splits,
                    reads=frozenset({"train"}),
                    label=f"{plan.method} (preparing)",
                    seed=seed,
                    fresh_model=bench.benchmark.build,
                    train=partial(bench.benchmark.train, engine),
                )
                with engine.metered() as meter, _memory_hint():
                    made = method.prepare(ctx)
                method.resume = resume
                if place is not None:
                    payload = place.scratch / "payload"
                    payload.mkdir(parents=True, exist_ok=True)
                    held = {k: v.detach().cpu().contiguous() for k, v in made.items()}
                    save_file(held, payload / "prepared.safetensors")
                    cost = json.dumps(asdict(meter.cost(0)))
                    (payload / "cost.json").write_text(cost)
                    place.commit()
            engine.barrier()
        tensors = {
            k: v.to(engine.device) for k, v in load_file(path / "prepared.safetensors").items()
        }
        return tensors, float(json.loads((path / "cost.json").read_text())["wall_s"])


class TrialLab:
    """Shadow models of one run: trained and unlearned by its own recipe, cached."""

    def __init__(self, workbench: Workbench, bench: Bench, plan: Plan) -> None:
        self.workbench = workbench
        self.bench = bench
        self.plan = plan
        self.adapter: Adapter = bench.benchmark.adapter
        self.engine = workbench.engine

    def view(self, model: nn.Module) -> ModelView:
        """Return a view of a model, put on the device, on the run's splits."""
        placed = self.engine.place(model)
        return self.workbench.view(self.bench, placed, self.plan.seeds.evaluate)

    def shadow(self, keep: Sequence[int], seed: int) -> nn.Module:
        """Return a model trained on these examples of `splits.train`."""
        data = subset(self.bench.splits.train, keep)
        return self.workbench.trained(self.bench, self.plan, data, seed, "shadow")[0]

    def unlearn(
        self, model: nn.Module, forget: Sequence[int], keep: Sequence[int], seed: int
    ) -> nn.Module:
        """Return `model` after the run's method forgot these examples of `splits.train`."""
        train = self.bench.splits.train
        splits = replace(
            self.bench.splits,
            forget=subset(train, forget),
            retain=subset(train, keep),
            train=subset(train, [*forget, *keep]),
        )
        inputs = {
            "start": state_sha(model),
            "method": self.plan.method,
            "config": asdict(self.plan.sections["method"]),
            "forget": ids_sha(splits.forget),
            "retain": ids_sha(splits.retain),
            "seed": seed,
            "trainer": self.workbench.model_inputs(self.bench, self.plan, splits.retain, seed),
        }
        engine = self.engine
        with ExitStack() as stack:
            cache = self.workbench.cache
            place = (
                stack.enter_context(cache.building("shadows", inputs)) if engine.is_main else None
            )
            found = (place.ready, place.path, place.scratch) if place is not None else None
            ready, path, scratch = engine.share(found)
            if not ready:
                made, _ = self.workbench.unlearn(
                    self.bench, self.plan, model, splits, seed, scratch / "state"
                )
                if place is not None:
                    payload = place.scratch / "payload"
                    payload.mkdir(parents=True, exist_ok=True)
                    self.bench.benchmark.save(made, payload, model)
                    place.commit()
            engine.barrier()
        result = self.bench.benchmark.rebuild(path / "model.safetensors", model)
        return engine.place(result).eval()


def ids_sha(data: Dataset) -> str:
    """Return the hash of a data set's ids, in order."""
    return hashlib.sha256("\n".join(data.ids).encode()).hexdigest()


@contextmanager
def _main_first(engine: Engine) -> Iterator[None]:
    """Let the main process do something first (decode data), the others after it."""
    if not engine.is_main:
        engine.barrier()
    yield
    if engine.is_main:
        engine.barrier()


@contextmanager
def _memory_hint() -> Iterator[None]:
    """Turn torch's out-of-memory errors into one that names the knobs."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ResourceError(
            "out of memory. Raise runtime.accumulation, lower method.batch_size or "
            "runtime.eval_batch_size, set runtime.precision=bf16, or train a smaller method.scope"
        ) from error
