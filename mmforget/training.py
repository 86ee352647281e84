"""The one training loop: originals, retrained references and every loss method run through it."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmforget.checkpoint import load_state, pack, save_state, unpack
from mmforget.context import Context
from mmforget.distributed import synchronised_norm
from mmforget.engine import Engine, epoch_order
from mmforget.errors import CollapsedError, ConfigError
from mmforget.methods.base import LossMethod, Part
from mmforget.progress import progress
from mmforget.sharding import Calls, check_sharding, gathered, like, sharded
from mmforget.types import Adapter, Batch, Dataset, Pass, Splits, Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One optimiser step before any data is read.

    Attributes:
        run: The pass it belongs to.
        index: Its place in the epoch.
        rows: The examples of each split.
    """

    run: Pass
    index: int
    rows: dict[str, list[int]]


class Supervised(LossMethod[Training]):
    """Minimise the mean loss on the retain set: trains originals and references, and fine-tunes."""

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "reference"
    citation: ClassVar[str] = "empirical risk minimisation"
    config_type: ClassVar[type] = Training

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the retain set."""
        return (Pass("retain", anchor="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean loss over units of the retain batch."""
        if retain is None:
            return {}
        return {"retain": ctx.unit_mean(ctx.forward(retain).loss, retain)}


def fit(
    engine: Engine,
    model: nn.Module,
    adapter: Adapter,
    data: Dataset,
    training: Training,
    seed: int,
    state: Path | None = None,
    label: str = "train",
    method: "LossMethod[Any] | None" = None,
) -> nn.Module:
    """Train a model on a data set by supervised learning; returns it, in evaluation mode.

    Args:
        engine: Device, precision, processes.
        model: The model to train.
        adapter: The modality.
        data: All of it is used.
        training: The recipe.
        seed: Seed of order and augmentation.
        state: Folder for step checkpoints.
        label: What the progress bar says.
        method: What is minimised on the retain split; None: `Supervised(training)`.

    Raises:
        CollapsedError: The loss became NaN or infinite.
    """
    splits = Splits(forget=data, retain=data, train=data, holdout=data, test=data)
    method = method or Supervised(training)
    method.resume = state
    ctx = Context(
        engine=engine,
        adapter=adapter,
        model=engine.place(model),
        splits=splits,
        reads=method.reads,
        label=label,
        seed=seed,
    )
    return optimise(ctx, method).eval()


def optimise(ctx: Context, method: LossMethod[Any]) -> nn.Module:
    """Run a loss method's passes with its optimiser, resuming from its step checkpoint.

    The state after step k is a function of the seed and k alone: orders and draws are re-derived
    from them, so a killed run that goes on ends with the weights of an unbroken one.

    Raises:
        CollapsedError: The loss became NaN or infinite.
    """
    config = method.training
    check_sharding(ctx, method)
    ctx.epochs = config.epochs
    ctx.phase = "setup"
    ctx.model.eval()
    ctx.scope(config.scope)
    method.setup(ctx)
    counts = [count_steps(ctx, method, epoch) for epoch in range(config.epochs)]
    total = sum(counts)
    if config.max_steps is not None:
        total = min(total, config.max_steps)
    ctx.steps = total
    if total == 0:
        return method.finish(ctx)
    found = _found(ctx, method)
    with sharded(ctx) as calls:
        _steps(ctx, method, counts, total, found, calls)
    ctx.model.eval()
    return method.finish(ctx)


def _steps(
    ctx: Context,
    method: LossMethod[Any],
    counts: Sequence[int],
    total: int,
    found: dict[str, Any] | None,
    calls: Calls | None,
) -> None:
    """Take the steps of a run.

    Args:
        ctx: The run.
        method: The method.
        counts: Steps of each epoch.
        total: Steps of the run.
        found: State of its step checkpoint, if it has one.
        calls: Hears which weights are called, where they are cut.
    """
    config, engine = method.training, ctx.engine
    parameters = list(ctx.trainable.values())
    optimizer = engine.prepare(make_optimizer(config, parameters))
    done = _resume(ctx, method, optimizer, found)
    log = StepLog(engine)
    saved = time.monotonic()
    shown = engine.is_main and engine.runtime.progress
    sync = synchronised_norm(ctx.model, engine) if config.norm == "train" else nullcontext()
    with sync, progress(ctx.label, total, done, shown) as advance:
        first = 0
        for ctx.epoch, count in enumerate(counts):
            ctx.step = max(first, done)
            if ctx.step >= min(first + count, total):  # done before a kill, or beyond max_steps
                first += count
                continue
            plan = plan_epoch(ctx, method, ctx.epoch)[ctx.step - first : total - first]
            for step, parts in _loaded(ctx, plan):
                set_mode(ctx.model, config.norm)
                ctx.phase = step.run.name
                rate = learning_rate(config, ctx.step, total, ctx.epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                with engine.seeded(ctx.seed, "forward", ctx.step):
                    terms = method.backward(ctx, parts)
                _reduce(engine, parameters, calls)
                method.after_backward(ctx)
                if config.clip_norm is not None:
                    engine.clip(optimizer, parameters, config.clip_norm)
                optimizer.step()
                method.after_step(ctx, optimizer)
                ctx.step += 1
                if _stops(config.stop_below, terms, engine):
                    total = ctx.step
                engine.meter.steps += 1
                engine.meter.examples_seen += sum(len(rows) for rows in step.rows.values())
                advance(1, log.add(ctx.step, terms, rate, last=ctx.step == total))
                stopped = ctx.step == total < ctx.steps
                if stopped or ctx.step == first + count:
                    method.after_epoch(ctx)
                if stopped:
                    logger.info("stopped after step %d: method.stop_below", total)
                    engine.log(total, {"stopped": 1.0})
                    break
                # Only once all losses so far were written, and found finite.
                if method.resume is not None and not log.waiting:
                    due = time.monotonic() - saved > engine.runtime.checkpoint_every_s
                    if due if calls is None else engine.agree(due):  # to gather takes all
                        _save(ctx, method, optimizer)
                        saved = time.monotonic()
            if total < ctx.steps:
                break
            first += count


def _stops(below: float | None, terms: dict[str, Tensor], engine: Engine) -> bool:
    """Return whether the forget terms of a step, over all processes, sum to less than `below`."""
    if below is None:
        return False
    held = [v.detach().float().reshape(()) for n, v in terms.items() if n.startswith("forget")]
    if not held:
        return False
    value = torch.stack(held).sum()[None]
    engine.reduce_sum([value])
    return value.item() < below


def count_steps(ctx: Context, method: LossMethod[Any], epoch: int) -> int:
    """Return the number of optimiser steps of an epoch.

    Raises:
        ConfigError: A pass of a fraction so small that nothing is left.
    """
    count = 0
    for run in method.passes(epoch):
        splits = ("forget", "retain") if run.anchor == "union" else (run.anchor,)
        examples = sum(len(_share(ctx, split, run)) for split in splits)
        count += math.ceil(examples / (run.batch_size or method.training.batch_size))
    return count


def plan_epoch(ctx: Context, method: LossMethod[Any], epoch: int) -> list[Step]:
    """Return the steps of an epoch: for each the examples of each split, by the seed alone.

    Raises:
        ConfigError: A pass of a fraction so small that nothing is left.
    """
    steps: list[Step] = []
    for run in method.passes(epoch):
        size = run.batch_size or method.training.batch_size
        if run.anchor == "union":
            steps += _union_steps(ctx, run, epoch, size)
            continue
        anchor = _share(ctx, run.anchor, run)
        order = epoch_order(len(anchor), ctx.seed, run.name, run.anchor, epoch)
        chunks = [[anchor[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
        partner = iter(()) if run.partner is None else _cycle(ctx, run, run.partner, epoch)
        extra = iter(()) if run.extra is None else _cycle(ctx, run, run.extra, epoch)
        for chunk in chunks:
            rows = {run.anchor: chunk}
            if run.partner is not None:
                count = run.partner_batch_size or len(chunk)
                rows[run.partner] = [next(partner) for _ in range(count)]
            if run.extra is not None:
                rows[run.extra] = chunk if run.aligned else [next(extra) for _ in chunk]
            steps.append(Step(run, len(steps), rows))
    return [replace(step, index=index) for index, step in enumerate(steps)]


def _union_steps(ctx: Context, run: Pass, epoch: int, size: int) -> list[Step]:
    tagged = [("forget", i) for i in range(len(ctx.split("forget")))]
    tagged += [("retain", i) for i in _share(ctx, "retain", run)]
    order = epoch_order(len(tagged), ctx.seed, run.name, "union", epoch)
    steps = []
    for k in range(0, len(order), size):
        chunk = [tagged[i] for i in order[k : k + size]]
        rows = {name: [i for split, i in chunk if split == name] for name in ("forget", "retain")}
        steps.append(Step(run, 0, {name: part for name, part in rows.items() if part}))
    return steps


def _share(ctx: Context, split: str, run: Pass) -> list[int]:
    """Return the examples of a split that a pass uses: all, or a choice fixed for the run."""
    size = len(ctx.split(split))
    if split != "retain" or run.fraction >= 1.0:
        return list(range(size))
    count = round(size * run.fraction)
    if count == 0:
        raise ConfigError(f"a fraction of {run.fraction} of {size} retain examples leaves none")
    return sorted(epoch_order(size, ctx.seed, run.name, "fraction")[:count])


def _cycle(ctx: Context, run: Pass, split: str, epoch: int) -> Iterator[int]:
    """Yield the examples of a split beside the anchor in shuffled order, over and over."""
    pool = _share(ctx, split, run)
    turn = 0
    while True:
        for i in epoch_order(len(pool), ctx.seed, run.name, split, epoch, turn):
            yield pool[i]
        turn += 1


def _loaded(ctx: Context, todo: Sequence[Step]) -> Iterator[tuple[Step, list[Part]]]:
    """Yield steps with their batches; the next step's raw data is read while one computes."""
    engine = ctx.engine
    count = engine.runtime.accumulation

    def read(step: Step) -> dict[tuple[str, int], Any]:
        return {
            (split, m): ctx.split(split).take([rows[r] for r in cut])
            for split, rows in step.rows.items()
            for m, (cut, _) in enumerate(engine.cuts(len(rows), count))
            if len(cut)
        }

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[dict[tuple[str, int], Any]] | None = None
        for k, step in enumerate(todo):
            raw = waiting.result() if waiting is not None else read(step)
            waiting = pool.submit(read, todo[k + 1]) if k + 1 < len(todo) else None
            run = step.run
            joined = run.together or run.anchor == "union"
            micro = engine.load(
                ctx.adapter,
                {split: (ctx.split(split), rows) for split, rows in step.rows.items()},
                seed=ctx.seed,
                stream=("train", ctx.epoch, step.index),
                train=True,
                together=("forget", "retain") if joined else (),
                relabel=("forget",) if run.relabel else (),
                raw=raw,
            )
            names = ("forget", "retain", run.extra or "")
            yield step, [Part(*(part.get(name) for name in names)) for part in micro]


def make_optimizer(config: Training, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of a config, in its fused form where the device has one."""
    fused = {p.device.type for p in parameters} <= {"cpu", "cuda"}
    if config.optimizer == "sgd":  # torch has no fused one for weights that are cut
        fused = fused and not any(isinstance(p, DTensor) for p in parameters)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **common)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **common)


def learning_rate(config: Training, step: int, total: int, epoch: int) -> float:
    """Return the learning rate of a step (0-based) of `total`, in an epoch (0-based)."""
    rate = config.lr
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    progressed = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "cosine":
        return rate * 0.5 * (1.0 + math.cos(math.pi * progressed))
    if config.schedule == "linear":
        return rate * (1.0 - progressed)
    if config.schedule == "step":
        return rate * config.decay ** sum(epoch >= milestone for milestone in config.milestones)
    return rate


def set_mode(model: nn.Module, norm: str) -> None:
    """Put a model into training mode, its batch-norm statistics frozen if the config says so."""
    if not model.training:
        model.train()
        if norm == "frozen":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()


class StepLog:
    """Collects losses on the device and writes them out every few steps, checking they are finite.

    Looking at a loss waits for the device, so it is done once in `runtime.log_every` steps.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: list[tuple[int, float, dict[str, Tensor]]] = []
        self.note = ""

    def add(self, step: int, terms: dict[str, Tensor], rate: float, last: bool) -> str:
        """Take one step's terms; return the latest loss as text.

        Raises:
            CollapsedError: A loss is not finite.
        """
        self.waiting.append((step, rate, terms))
        if last or len(self.waiting) >= self.engine.runtime.log_every:
            self._flush()
        return self.note

    def _flush(self) -> None:
        for step, rate, terms in self.waiting:
            values = torch.stack([value.reshape(()) for value in terms.values()])
            self.engine.reduce_sum([values])
            named = dict(zip(terms, values.tolist(), strict=True))
            loss = sum(named.values())
            if not math.isfinite(loss):
                raise CollapsedError(
                    f"the loss is {loss} at step {step} ({named}); lower method.lr, set "
                    f"method.clip_norm, or train in float32 (runtime.precision=no)"
                )
            self.note = f"loss {loss:.4g}"
            self.engine.log(step, {"loss": loss, "lr": rate, **named})
        self.waiting.clear()


def _reduce(engine: Engine, parameters: Sequence[nn.Parameter], calls: Calls | None) -> None:
    if engine.world == 1:
        return
    # A collective needs the same tensors on every process; weights that none of them used stay
    # without a gradient, as on one process, or weight decay and momentum would move them.
    mine = [p.grad is not None for p in parameters] if calls is None else calls.take(parameters)
    used = torch.tensor([float(each) for each in mine], device=engine.device)
    engine.reduce_sum([used])
    if calls is not None:  # cut gradients are summed already
        for parameter, count in zip(parameters, used.tolist(), strict=True):
            if not count:
                parameter.grad = None
        return
    shared = [p for p, count in zip(parameters, used.tolist(), strict=True) if count]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    engine.reduce_sum([p.grad for p in shared if p.grad is not None])


def _save(ctx: Context, method: LossMethod[Any], optimizer: torch.optim.Optimizer) -> None:
    assert method.resume is not None
    state = {"model": ctx.model.state_dict(), "optimizer": optimizer.state_dict()}
    weights = gathered(state, keep=ctx.engine.is_main)
    if not ctx.engine.is_main:
        return
    rest = {"method": method.state(), "step": ctx.step, "cost": ctx.engine.meter.state()}
    tensors, skeleton = pack({**weights, **rest})
    save_state(method.resume, tensors, {"skeleton": skeleton})


def _found(ctx: Context, method: LossMethod[Any]) -> dict[str, Any] | None:
    """Return the state of the step checkpoint, if there is one; the model gets its weights back."""
    found = load_state(method.resume) if method.resume is not None else None
    if found is None:
        return None
    tensors, scalars = found
    state: dict[str, Any] = unpack(tensors, scalars["skeleton"])
    ctx.model.load_state_dict(state.pop("model"))
    return state


def _resume(
    ctx: Context,
    method: LossMethod[Any],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any] | None,
) -> int:
    """Take back the rest of a step checkpoint; return the steps already done."""
    if state is None:
        return 0
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, kept in state["optimizer"]["state"].items():
        if isinstance(weights[index], DTensor):  # one at a time, or whole ones would not fit
            for key, value in kept.items():
                if isinstance(value, Tensor) and value.shape == weights[index].shape:
                    kept[key] = like(value, weights[index])
    optimizer.load_state_dict(state["optimizer"])
    for weight, kept in optimizer.state.items():  # an update needs the memory layout of its weight
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                kept[key] = value if isinstance(value, DTensor) else like(value, weight)
    method.load_state(state["method"])
    ctx.engine.meter.load_state(state["cost"])
    ctx.engine.rewind_log(state["step"])
    logger.info("%s goes on from step %d", ctx.label, state["step"])
    return int(state["step"])
