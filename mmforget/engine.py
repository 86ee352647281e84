"""Devices, precision, processes and passes over data: the only module that touches `accelerate`.

Results do not depend on how an effective batch is split: every loss is a sum divided by the global
count of examples (or units), gradients are summed over processes once per optimiser step, and
random numbers are drawn for the whole batch and cut (`mmforget.rng.Draws`).
"""

import atexit
import json
import logging
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.record import Cost, write_text
from mmforget.rng import BlockDraws, Draws, derive
from mmforget.types import Adapter, Batch, Dataset

logger = logging.getLogger(__name__)

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
)


@dataclass(frozen=True)
class Runtime:
    """How to run; nothing here changes results beyond rounding, so none of it enters a cache key.

    (Precision does change rounding; it is recorded with the environment.)
    """

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = option(
        "no",
        "mixed precision; fp64 computes all in float64, to see what rounding decides",
        choices=("no", "bf16", "fp16", "fp64"),
    )
    accumulation: int = option(1, "micro-batches an effective batch is split into", low=1)
    eval_batch_size: int = option(256, "examples in a batch of evaluation", low=1)
    threads: int | None = option(None, "CPU threads; null takes torch's choice", low=1)
    channels_last: bool = option(True, "store 4-d weights channels-last")
    compile: bool = option(False, "torch.compile the trained model")
    fsdp: str = option(
        "no",
        "cut weights, gradients and optimiser state over processes while training (FSDP2): full; "
        "gradients keeps weights whole between forward and backward pass",
        choices=("no", "full", "gradients"),
    )
    checkpoint_every_s: float = option(30.0, "seconds between step checkpoints", low=0)
    log_every: int = option(10, "optimiser steps between logged losses", low=1)
    progress: bool = option(True, "draw progress bars on a terminal's stderr")
    trackers: list[str] = option([], "accelerate trackers: tensorboard, trackio, wandb")


class Engine:
    """One device layer for a run: made once, passed to whoever computes.

    Args:
        runtime: How to run.
        log_dir: Folder for trackers that write files.

    Raises:
        ConfigError: The device does not exist here, or the launcher's mode is not supported.
    """

    def __init__(self, runtime: Runtime | None = None, log_dir: Path | None = None) -> None:
        self.runtime = runtime or Runtime()
        if self.runtime.threads is not None:
            torch.set_num_threads(self.runtime.threads)
        self.accelerator = _accelerator(self.runtime, log_dir)
        if self.accelerator.distributed_type not in SUPPORTED:
            raise ConfigError(
                f"launched as {self.accelerator.distributed_type.value}; supported are one process "
                f"and several on CPU or GPU (accelerate launch --multi_gpu --num_processes N, or "
                f"torchrun). Weights are cut over them by runtime=fsdp, not by the launcher"
            )
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        _check_shard(self.runtime, self.world)
        if self.world > 1:  # threads of a group that is left open can abort a finished process
            atexit.unregister(_leave)
            atexit.register(_leave)
        self.events: Path | None = None
        self.meter = Meter(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.rank == 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def agree(self, asked: bool) -> bool:
        """Return whether any process asks for it, on every process."""
        if self.world == 1:
            return asked
        count = torch.tensor([float(asked)], device=self.device)
        self.reduce_sum([count])
        return bool(count.item())

    def share(self, value: Any) -> Any:
        """Return the main process's value on every process."""
        return broadcast_object_list([value])[0] if self.world > 1 else value

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step's losses to the event file and the trackers."""
        if self.events is not None and self.is_main:
            with self.events.open("a") as lines:
                lines.write(json.dumps({"step": step, **values}) + "\n")
        if self.runtime.trackers:
            self.accelerator.log(dict(values), step=step)

    def rewind_log(self, step: int) -> None:
        """Drop events after a step, when a killed run goes on from it."""
        if self.events is not None and self.is_main and self.events.is_file():
            lines = self.events.read_text().splitlines()
            kept = [
                line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            write_text(self.events, "".join(line + "\n" for line in kept))

    @contextmanager
    def metered(self) -> Iterator["Meter"]:
        """Measure the block; training loops inside add their steps to the yielded meter."""
        outer, self.meter = self.meter, Meter(self.device)
        try:
            with self.meter.running():
                yield self.meter
        finally:
            self.meter = outer

    @contextmanager
    def recording(self, name: str, config: Mapping[str, Any], events: Path) -> Iterator[None]:
        """Send losses of the block to `events` and to the trackers, as one tracked run."""
        self.events = events
        if self.runtime.trackers:
            self.accelerator.init_trackers(name.replace("/", "-"), config=dict(_flat(config)))
        try:
            yield
        finally:
            self.events = None
            if self.runtime.trackers:
                self.accelerator.end_training()

    def place(self, model: nn.Module) -> nn.Module:
        """Put a model on the device, in the memory layout and width that the runtime asks for."""
        if self.runtime.precision == "fp64":
            model = model.double()
        if self.runtime.channels_last and any(p.dim() == 4 for p in model.parameters()):
            return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
        return model.to(self.device)

    def widen(self, data: Any) -> Any:
        """Return prepared data with its floats as wide as the weights: for precision=fp64."""
        if self.runtime.precision != "fp64":
            return data
        return tree_map(
            lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, data
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context of one forward pass."""
        if self.runtime.precision in ("no", "fp64"):
            return nullcontext()
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    @contextmanager
    def seeded(self, seed: int, *stream: str | int) -> Iterator[None]:
        """Seed what a model draws by itself (dropout); global generators are put back afterwards.

        Each process draws its own numbers.
        """
        number = derive(seed, *stream, self.rank)
        if self.device.type == "cpu":  # torch.manual_seed visits every backend, which is slow
            state = torch.get_rng_state()
            torch.default_generator.manual_seed(number)
            try:
                yield
            finally:
                torch.set_rng_state(state)
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(number)
            yield

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Wrap an optimiser for mixed precision.

        Unlike `Accelerator.prepare` this keeps no reference, so models are freed after training.
        """
        scaler = self.accelerator.scaler
        return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)  # type: ignore[no-any-return]

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: float
    ) -> None:
        """Clip the global norm of gradients, scaled back first in fp16."""
        self.accelerator.unscale_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over processes in place, in one message per dtype."""
        if self.world == 1:
            return
        for dtype in {tensor.dtype for tensor in tensors}:
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            flat = self.accelerator.reduce(flat, reduction="sum")
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def load(
        self,
        adapter: Adapter,
        parts: Mapping[str, tuple[Dataset, Sequence[int]]],
        *,
        seed: int,
        stream: Sequence[str | int],
        train: bool,
        together: Collection[str] = (),
        relabel: Collection[str] = (),
        accumulation: int | None = None,
        raw: "Mapping[tuple[str, int], Any] | None" = None,
    ) -> list[dict[str, Batch]]:
        """Prepare one effective batch: a list of micro-batches, each `split -> Batch`.

        Args:
            adapter: The modality.
            parts: For each split its data set and the examples of the effective batch.
            seed: Seed of the draws.
            stream: Names the draws of this step.
            train: Which transform.
            together: Splits that count as one batch, so that means run over all of them.
            relabel: Splits that get wrong targets.
            accumulation: Micro-batches; None takes the runtime's.
            raw: Raw batches already taken, by (split, micro-batch).
        """
        count = accumulation or self.runtime.accumulation
        micro: list[dict[str, Batch]] = [{} for _ in range(count)]
        for split, (dataset, indices) in parts.items():
            if not indices:
                continue
            cuts = self.cuts(len(indices), count)
            draw = partial(Draws, seed, *stream, split, total=len(indices), device=self.device)
            for m, (rows, weight) in enumerate(cuts):
                if not len(rows):
                    continue
                taken = raw.get((split, m)) if raw else None
                if taken is None:
                    taken = dataset.take([indices[r] for r in rows])
                data = adapter.prepare(taken, draw("prepare", rows=rows), train)
                if split in relabel:
                    data = adapter.relabel(data, draw("relabel", rows=rows))
                data = self.widen(data)
                micro[m][split] = Batch(
                    split=split,
                    ids=_Chosen(dataset.ids, [indices[r] for r in rows]),
                    data=data,
                    units=adapter.units(data),
                    total=len(indices),
                    total_units=0.0,
                    weight=weight,
                    draws=partial(_draws, draw, rows),
                )
        return self._totalled([m for m in micro if m], together)

    def _totalled(
        self, micro: list[dict[str, Batch]], together: Collection[str]
    ) -> list[dict[str, Batch]]:
        """Fill in the counts of the effective batch, over micro-batches and processes."""
        splits = sorted({split for part in micro for split in part})
        units = torch.zeros(len(splits), dtype=torch.float64, device=self.device)
        totals = dict.fromkeys(splits, 0)
        for part in micro:
            for split, batch in part.items():
                units[splits.index(split)] += batch.units.double().sum() * batch.weight
                totals[split] = batch.total
        self.reduce_sum([units])
        sums = dict(zip(splits, units.tolist(), strict=True))
        joined = [split for split in splits if split in together]
        totals |= dict.fromkeys(joined, sum(totals[split] for split in joined))
        sums |= dict.fromkeys(joined, sum(sums[split] for split in joined))
        return [
            {
                split: replace(batch, total=totals[split], total_units=sums[split])
                for split, batch in part.items()
            }
            for part in micro
        ]

    def cuts(self, total: int, accumulation: int) -> list[tuple[range, float]]:
        """Return this process's rows of an effective batch, one range a micro-batch, and a weight.

        A batch with fewer rows than processes is computed whole by each of them at weight
        1/processes: no process may stay out of a collective operation.
        """
        if total < self.world * accumulation:
            whole = [(range(total), 1.0 / self.world)]
            return whole + [(range(0), 0.0)] * (accumulation - 1)
        edges = np.linspace(0, total, self.world * accumulation + 1).round().astype(int).tolist()
        pieces = [range(a, b) for a, b in pairwise(edges)]
        return [(pieces[m * self.world + self.rank], 1.0) for m in range(accumulation)]

    def predict(
        self, model: nn.Module, adapter: Adapter, dataset: Dataset, seed: int
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return `Adapter.record` of every example, in the data set's order, on every process.

        Args:
            model: Put into evaluation mode for the pass and back afterwards.
            adapter: The modality.
            dataset: The examples.
            seed: Seed of what the evaluation draws (noise), the same for every model.

        Returns:
            Name -> array [N, ...]; `ids` among them.
        """
        size = self.runtime.eval_batch_size
        starts = list(range(0, len(dataset), size))
        local: list[tuple[int, dict[str, np.ndarray[Any, Any]]]] = []
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        mine = starts[self.rank :: self.world]
        cut = self.world > 1 and self.runtime.fsdp != "no"
        idle = -(-len(starts) // self.world) - len(mine) if cut else 0
        mine += starts[:1] * idle  # where weights are cut, all processes go on together
        # What inference mode gathers of them could not be trained on.
        with torch.no_grad() if cut else torch.inference_mode():
            rows = [list(range(s, min(s + size, len(dataset)))) for s in mine]
            for start, chunk, raw in zip(mine, rows, ahead(dataset, rows), strict=True):
                stop = start + len(chunk)
                draws = BlockDraws(seed, "evaluate", start=start, stop=stop, device=self.device)
                data = self.widen(adapter.prepare(raw, draws, train=False))
                with self.autocast():
                    numbers = adapter.record(model, data)
                local.append((start, {k: v.cpu().numpy() for k, v in numbers.items()}))
        local = local[: len(mine) - idle]
        for module, mode in modes:  # not model.train(): it would wake frozen batch norms
            module.training = mode
        parts = gather_object(local) if self.world > 1 else local
        parts.sort(key=lambda part: part[0])
        found = {
            name: np.concatenate([part[name] for _, part in parts])
            for name in (parts[0][1] if parts else {})
        }
        found["ids"] = np.array(list(dataset.ids), dtype=np.str_)
        return found


class _Chosen(Sequence[str]):
    """Ids of a batch, looked up when asked for: few methods look, and a batch may be large."""

    def __init__(self, ids: Sequence[str], rows: Sequence[int]) -> None:
        self._ids = ids
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return _Chosen(self._ids, self._rows[index])
        return self._ids[self._rows[index]]


def ahead(dataset: Dataset, chunks: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Yield raw batches, taking the next one in a thread while the current one is computed on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dataset.take, chunks[0]) if chunks else None
        for k in range(len(chunks)):
            assert waiting is not None
            raw = waiting.result()
            if k + 1 < len(chunks):
                waiting = pool.submit(dataset.take, chunks[k + 1])
            yield raw


def epoch_order(size: int, seed: int, *stream: str | int) -> list[int]:
    """Return a shuffled order of `size` examples for one named pass."""
    rng = torch.Generator().manual_seed(derive(seed, "order", *stream))
    return torch.randperm(size, generator=rng).tolist()


class Meter:
    """What a block of work costs; a resumed block adds to what its killed part had cost."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall_s = 0.0
        self.device_s = 0.0
        self.peak_bytes = 0
        self.steps = 0
        self.examples_seen = 0
        self._since: tuple[float, float] | None = None

    def cost(self, trainable: int) -> Cost:
        """Return what was measured, for a method that trains this many parameters."""
        return Cost(
            wall_s=self.wall_s,
            device_s=self.device_s,
            peak_bytes=self.peak_bytes,
            steps=self.steps,
            examples_seen=self.examples_seen,
            trainable=trainable,
        )

    def state(self) -> dict[str, float]:
        """Return the cost so far, for a step checkpoint written while running."""
        wall, busy = self._since or (time.perf_counter(), time.process_time())
        return {
            "wall_s": self.wall_s + time.perf_counter() - wall,
            "device_s": self.device_s + time.process_time() - busy,
            "steps": self.steps,
            "examples_seen": self.examples_seen,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Add the cost that a killed process had stored."""
        self.wall_s += state["wall_s"]
        self.device_s += state["device_s"]
        self.steps = int(state["steps"])
        self.examples_seen = int(state["examples_seen"])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
        else:
            base = _resident(reset=True)
        wall, busy = self._since = (time.perf_counter(), time.process_time())
        try:
            yield
        finally:
            self._since = None
            if cuda:
                end.record()
                torch.cuda.synchronize(self.device)
                self.device_s += begin.elapsed_time(end) / 1000.0
                peak = torch.cuda.max_memory_allocated(self.device)
            else:
                self.device_s += time.process_time() - busy
                peak = max(0, _resident() - base)
            self.wall_s += time.perf_counter() - wall
            self.peak_bytes = max(self.peak_bytes, peak)


def _resident(reset: bool = False) -> int:
    """Return resident bytes now (with `reset`, which restarts the peak) or the peak since then."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as handle:
                handle.write("5")
        wanted = "VmRSS" if reset else "VmHWM"
        with open("/proc/self/status") as handle:
            for line in handle:
                if line.startswith(wanted):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux, or a kernel that keeps this closed: only the peak of the process
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _leave() -> None:
    """Close the group of processes."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_shard(runtime: Runtime, world: int) -> None:
    given = f"runtime.fsdp={runtime.fsdp}"
    if runtime.fsdp == "no":
        return
    if world == 1:
        raise ConfigError(
            f"{given} with one process: there is nothing to cut. Start several "
            f"(torchrun --nproc_per_node N -m mmforget run ...), or set runtime.fsdp=no"
        )
    if runtime.precision == "fp16":
        raise ConfigError(f"{given} with fp16: its loss scaling needs whole gradients; take bf16")
    if runtime.compile:
        raise ConfigError(f"{given} with runtime.compile=true: set one of them to its default")


def _accelerator(runtime: Runtime, log_dir: Path | None) -> Accelerator:
    kind = runtime.device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"runtime.device={runtime.device!r}: auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device=cuda, but torch sees no GPU here. See: mmforget doctor")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("runtime.device=mps, but torch sees none here. See: mmforget doctor")
    if runtime.device.startswith("cuda:"):
        torch.cuda.set_device(runtime.device)
    # accelerate keeps one state a process; a second engine may differ in precision and device.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    return Accelerator(
        cpu=kind == "cpu" or (kind == "auto" and _on_cpu()),
        mixed_precision="no" if runtime.precision == "fp64" else runtime.precision,
        log_with=list(runtime.trackers) or None,
        project_dir=str(log_dir) if log_dir else None,
    )


def _on_cpu() -> bool:
    """Return whether to compute on the CPU unasked: accelerate was told so, or there is no GPU.

    Left to itself, accelerate ignores a launcher's processes on a machine without a GPU: each of
    them would do the whole run alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    asked = os.environ.get("ACCELERATE_USE_CPU") == "true"
    return asked or (launched and not torch.cuda.is_available())


def _flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with plain values: trackers take no others."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value if isinstance(value, (bool, int, float)) else str(value)


def _draws(make: Any, rows: Sequence[int], *stream: str | int) -> Draws:
    """Return draws of a batch's rows under a further stream name."""
    partial_draws: Draws = make(*stream, rows=rows)
    return partial_draws
