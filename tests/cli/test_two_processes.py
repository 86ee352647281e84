"""A whole run of the command line on one and on two processes: originals, unlearning, attacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmforget.record import RunResult, find_runs

WORDS = ["benchmark=vision/mufac", "data=mini", "method=npo", "runtime.precision=fp64"]
WORDS += ["benchmark.training.epochs=4", "method.epochs=2"]
MEASURED = ("cost/", "gap/rte")  # seconds and bytes


@pytest.mark.slow  # two runs of a minute
@pytest.mark.timeout(1200)
def test_metrics_agree_within_rounding_of_float64(tmp_path: Path) -> None:
    one = launched(tmp_path / "one", [sys.executable, "-m"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    two = launched(tmp_path / "two", [sys.executable, *torchrun])
    assert one.keys() == two.keys() == {"original", "retrain", "npo"}
    for method, alone in one.items():
        assert alone.environment["processes"] == 1
        assert two[method].environment["processes"] == 2
        mine, theirs = values(alone), values(two[method])
        assert mine.keys() == theirs.keys() and len(mine) > 40
        for name, value in mine.items():
            same = value == pytest.approx(theirs[name], abs=1e-5, nan_ok=True)
            assert same, f"{method} {name}: {value} on one process, {theirs[name]} on two"


def launched(folder: Path, start: list[str]) -> dict[str, RunResult]:
    command = [*start, "mmforget", "run", *WORDS, "--runs", str(folder), "--quiet"]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MMFORGET_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {run.method: run for run in find_runs([folder])}


def values(run: RunResult) -> dict[str, float]:
    found = {name: metric.value for name, metric in run.metrics.items()}
    for attack, result in run.attacks.items():
        found |= {f"{attack}/{name}": metric.value for name, metric in result.values.items()}
    return {name: v for name, v in found.items() if not name.startswith(MEASURED)}
