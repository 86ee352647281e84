"""Run contract cases under a launcher, to compare several processes with one.

`torchrun --nproc_per_node 2 -m mmforget.testing.launched CASES.json FOLDER` writes
`FOLDER/<index>.safetensors` for each case `{"name", "settings", "world"}`, and how many processes
there were. A case may have `accumulation`, `fsdp`, `precision` and `resume`, as in `run_case`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from mmforget.checkpoint import save_model
from mmforget.testing.contract import Case, run_case
from mmforget.testing.toys import toy_world


def run_cases(cases: Sequence[Mapping[str, Any]], folder: Path) -> int:
    """Run each case and write its model from the main process; return the number of processes."""
    processes = 0
    for index, case in enumerate(cases):
        world = toy_world(case["world"])
        options: dict[str, Any] = {
            k: case[k] for k in ("accumulation", "fsdp", "precision") if k in case
        }
        if "resume" in case:
            options["resume"] = Path(case["resume"])
        outcome = run_case(Case(case["name"], case["settings"], world), **options)
        processes = outcome.ctx.engine.world
        if outcome.ctx.engine.is_main:
            save_model(outcome.model, folder / f"{index}.safetensors")
    return processes


def launch(module: str, *arguments: object) -> None:
    """Run a module on two processes of a CPU.

    Raises:
        AssertionError: It failed; with what it said last.
    """
    # Not `accelerate launch --cpu`, which starts one process whatever number it is given.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", module, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def leave() -> NoReturn:
    """End one of several processes: gloo at times aborts one that is torn down."""
    torch.distributed.barrier()
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    """Run the cases of a file."""
    torch.set_num_threads(1)
    cases, folder = Path(arguments[0]), Path(arguments[1])
    processes = run_cases(json.loads(cases.read_text()), folder)
    (folder / "processes").write_text(str(processes))  # the same from each of them


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
