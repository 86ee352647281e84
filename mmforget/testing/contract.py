"""What every loss method must keep to, in every modality; each check raises AssertionError.

A modality calls `check_loss_method` with its own adapter and a tiny model, and so does anyone who
adds a method.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.errors import SplitError
from mmforget.methods.base import LossMethod, Wrapper, make_loss_method
from mmforget.rng import derive
from mmforget.schema import instantiate
from mmforget.testing.toys import ToyWorld
from mmforget.types import Batch, Dataset, Splits

INTENTS = ("removal", "suppression", "reference")


@dataclass(frozen=True)
class Case:
    """A loss method with its settings, in one world.

    Attributes:
        name: The method's registry name.
        settings: Its config section; should make it move within a few steps of plain SGD, whose
            rounding is not magnified as that of Adam is.
        world: Adapter, data and model.
        partial: Whether some tensors in scope may stay as they are (a mask chooses).
    """

    name: str
    settings: Mapping[str, Any]
    world: ToyWorld
    partial: bool = False

    def method(self, **training: Any) -> LossMethod[Any]:
        """Return the method, with other training settings (those of the inner one in a wrapper)."""
        return make_loss_method(self.name, _changed(self.name, self.settings, training), "method")


@dataclass
class Outcome:
    """A finished run.

    Attributes:
        model: What the method returned.
        method: The method.
        ctx: Its context.
        opened: Names of the splits that were read.
    """

    model: nn.Module
    method: LossMethod[Any]
    ctx: Context
    opened: set[str] = field(default_factory=set)


def run_case(
    case: Case,
    method: LossMethod[Any] | None = None,
    *,
    accumulation: int = 1,
    seed: int = 0,
    resume: Path | None = None,
    model: nn.Module | None = None,
    fsdp: str = "no",
    precision: str = "no",
) -> Outcome:
    """Run a method from the world's model of seed 0.

    Args:
        case: What to run.
        method: The method if it is not the case's as it stands.
        accumulation: Micro-batches.
        seed: The unlearning seed.
        resume: Folder of step checkpoints; one is written after every step.
        model: What to start from; a copy of it is changed.
        fsdp: See `Runtime`.
        precision: See there.
    """
    method = method or case.method()
    method.resume = resume
    ctx, opened = _context(case, method, accumulation, seed, model, fsdp, precision)
    made = method.run(ctx)
    return Outcome(made, method, ctx, opened)


def check_loss_method(case: Case, folder: Path) -> None:
    """Run every check.

    Args:
        case: The method in its world.
        folder: An empty folder for checkpoints.

    Raises:
        AssertionError: The method breaks the contract; the message says which part.
    """
    check_metadata(case)
    first = run_case(case)
    check_moves(case, first)
    check_same(run_case(case).model, first.model, f"{case.name}: a second run of one seed")
    check_scope(case)
    check_zero_rate(case)
    check_accumulation(case, first)
    check_terms(case)
    check_resume(case, first, folder)


def check_metadata(case: Case) -> None:
    """The method says what it is, and its config can be made from nothing."""
    method = make_loss_method(case.name, {}, "method")
    assert method.intent in INTENTS, f"{case.name}: intent {method.intent!r}"
    for text in (method.citation, method.trains, method.holds, type(method).__doc__):
        assert text, f"{case.name}: citation, trains, holds and docstring say what it is"
    config: Any = instantiate(type(method).config_type, {}, "method")
    for item in fields(config):
        assert item.metadata.get("help"), f"{case.name}: no help for {item.name}"


def check_moves(case: Case, outcome: Outcome) -> None:
    """The result is finite, moved where it should, and came from the declared splits alone."""
    start = case.world.build(0).state_dict()
    state = outcome.model.state_dict()
    for name, value in state.items():
        assert torch.isfinite(value).all(), f"{case.name}: {name} is not finite"
    moved = [not torch.equal(state[name], start[name]) for name in outcome.ctx.trainable]
    assert any(moved) if case.partial else all(moved), f"{case.name}: weights in scope stayed"
    reads, opened = set(outcome.method.reads), outcome.opened
    assert opened == reads, f"{case.name}: declares {sorted(reads)}, opened {sorted(opened)}"
    for split in {"holdout", "test"} - reads:
        try:
            outcome.ctx.split(split)
        except SplitError:
            continue
        raise AssertionError(f"{case.name}: opened {split}, which it does not declare")


def check_scope(case: Case) -> None:
    """With the head in scope, all other weights and all buffers stay as they are, bit for bit."""
    outcome = run_case(case, case.method(scope="head", norm="frozen"))
    start, state = case.world.build(0).state_dict(), outcome.model.state_dict()
    for name in state.keys() - outcome.ctx.trainable.keys():
        assert torch.equal(state[name], start[name]), f"{case.name}: {name} is out of scope"


def check_zero_rate(case: Case) -> None:
    """At a learning rate of zero nothing changes, global random numbers included."""
    before = torch.get_rng_state()
    outcome = run_case(case, case.method(lr=0.0))
    after = torch.get_rng_state()
    assert torch.equal(before, after), f"{case.name}: used the global random generator"
    check_same(outcome.model, case.world.build(0), f"{case.name}: a learning rate of 0")
    nothing = run_case(case, case.method(epochs=0))
    check_same(nothing.model, case.world.build(0), f"{case.name}: no epochs")


def check_accumulation(case: Case, whole: Outcome) -> None:
    """Splitting the effective batch into four changes nothing but rounding."""
    split = run_case(case, accumulation=4)
    check_close(split.model, whole.model, f"{case.name}: accumulation of 4")


def check_terms(case: Case) -> None:
    """Terms split by forget and retain: together they are what each gives alone."""
    method = case.method()
    ctx, _ = _context(case, method, 1, 0, None)
    ctx.epochs = method.training.epochs
    ctx.scope(method.training.scope)
    ctx.model.eval()
    method.setup(ctx)
    _nudge(ctx.trainable.values())  # away from θ0, where divergences from it vanish
    forget, retain = (_batch(ctx, case.world.splits, name) for name in ("forget", "retain"))
    both = method.loss(ctx, forget, retain)
    alone = [method.loss(ctx, forget, None), method.loss(ctx, None, retain)]
    names = [name for part in alone for name in part]
    assert sorted(names) == sorted(both), f"{case.name}: terms {sorted(both)}, alone {names}"
    for name, value in both.items():
        single = next(part[name] for part in alone if name in part)
        assert value.dim() == 0, f"{case.name}: term {name} is no scalar"
        assert torch.isfinite(value), f"{case.name}: term {name} is {value}"
        assert torch.equal(value, single), f"{case.name}: term {name} depends on the other split"
    wrong = [n for n in alone[0] if n.startswith("retain")]
    wrong += [n for n in alone[1] if n.startswith("forget")]
    assert not wrong, f"{case.name}: terms {wrong} are named after the other split"


def check_resume(case: Case, whole: Outcome, folder: Path) -> None:
    """Killed in its second, middle and last step, the run goes on to the same bits."""
    steps = whole.ctx.steps
    for at in sorted({2, steps // 2 + 1, steps}):
        place = folder / f"killed-{at}"
        killed = case.method()
        killed.after_step = _killing(killed.after_step, at)  # type: ignore[method-assign,assignment]
        try:
            run_case(case, killed, resume=place)
        except _Killed:
            pass
        else:
            raise AssertionError(f"{case.name}: was not killed in step {at} of {steps}")
        rest = run_case(case, resume=place)
        check_same(rest.model, whole.model, f"{case.name}: killed in step {at} of {steps}")
        counted, expected = rest.ctx.engine.meter, whole.ctx.engine.meter
        assert counted.steps == expected.steps, f"{case.name}: {counted.steps} steps counted"
        assert counted.examples_seen == expected.examples_seen, f"{case.name}: examples miscounted"


def check_same(found: nn.Module, wanted: nn.Module, what: str) -> None:
    """Weights and buffers are equal bit for bit."""
    state = found.state_dict()
    for name, value in wanted.state_dict().items():
        assert torch.equal(state[name], value), f"{what} changes {name}"


def check_close(found: nn.Module, wanted: nn.Module, what: str, tolerance: float = 1e-5) -> None:
    """Weights and buffers are equal but for rounding."""
    state = found.state_dict()
    for name, value in wanted.state_dict().items():
        far = float((state[name].double() - value.double()).abs().max())
        assert far <= tolerance, f"{what} changes {name} by {far:.2g}"


class _Killed(Exception):
    pass


def _killing(hook: Callable[[Context, Any], None], at: int) -> Callable[[Context, Any], None]:
    def after_step(ctx: Context, optimizer: Any) -> None:
        hook(ctx, optimizer)
        if ctx.step + 1 == at:
            raise _Killed

    return after_step


class _Watched:
    """A data set that notes when it is read."""

    def __init__(self, name: str, dataset: Dataset, opened: set[str]) -> None:
        self.name = name
        self.dataset = dataset
        self.opened = opened

    @property
    def ids(self) -> Sequence[str]:
        return self.dataset.ids

    @property
    def digests(self) -> Sequence[str]:
        return self.dataset.digests

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Sequence[int]) -> Any:
        self.opened.add(self.name)
        return self.dataset.take(indices)


def _context(
    case: Case,
    method: LossMethod[Any],
    accumulation: int,
    seed: int,
    model: nn.Module | None,
    fsdp: str = "no",
    precision: str = "no",
) -> tuple[Context, set[str]]:
    world, opened = case.world, set[str]()
    names = [*world.splits.names(), "train"]
    names += world.splits.streams
    watched: dict[str, Any] = {
        name: _Watched(name, world.splits.get(name), opened) for name in names
    }
    probes = {name: watched.pop(name) for name in world.splits.probes}
    streams = {name: watched.pop(name) for name in world.splits.streams}
    runtime = Runtime(
        device="cpu",
        accumulation=accumulation,
        checkpoint_every_s=0.0,
        log_every=1,
        progress=False,
        fsdp=fsdp,
        precision=precision,
    )
    engine = Engine(runtime)
    ctx = Context(
        engine=engine,
        adapter=world.adapter,
        model=engine.place(copy.deepcopy(model) if model is not None else world.build(0)),
        splits=replace(world.splits, probes=probes, streams=streams, **watched),
        reads=method.reads,
        label=case.name,
        seed=seed,
        fresh_model=world.build,
    )
    return ctx, opened


def _changed(name: str, settings: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    if not training:
        return dict(settings)
    method = make_loss_method(name, settings, "method")
    if isinstance(method, Wrapper):
        inner = dict(settings.get("inner", {}))
        inner.setdefault("name", method.inner_default)
        return {**settings, "inner": {"name": inner["name"], **_inner(inner, training)}}
    return {**settings, **training}


def _inner(section: dict[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    name = section.pop("name")
    return _changed(name, section, training)


def _nudge(weights: Any) -> None:
    rng = torch.Generator().manual_seed(derive(0, "nudge"))
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn(weight.shape, generator=rng))


def _batch(ctx: Context, splits: Splits, name: str) -> Batch:
    rows = list(range(8))
    parts = {name: (splits.get(name), rows)}
    (made,) = ctx.engine.load(
        ctx.adapter, parts, seed=0, stream=("contract",), train=True, accumulation=1
    )
    return made[name]
