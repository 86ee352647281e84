"""The demo, killed at ten random moments and then finished, against the unbroken demo."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmforget.record import MetricValue, RunResult, find_runs

TIMES = ("cost/", "gap/rte_minutes")  # what a repeated run need not give again


def start(place: Path) -> "subprocess.Popen[bytes]":
    """Start the demo in a process group of its own."""
    command = [sys.executable, "-m", "mmforget", "run", "suite=vision/demo", "-q"]
    command += ["--runs", str(place / "runs"), "--cache", str(place / "cache")]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


def numbers(run: RunResult) -> dict[str, MetricValue]:
    found = {k: v for k, v in run.metrics.items() if not k.startswith(TIMES)}
    for name, attack in run.attacks.items():
        found |= {f"{name}/{k}": v for k, v in attack.values.items()}
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_change_no_metric(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == 0
    rng = random.Random(int(os.environ.get("MMFORGET_KILL_SEED", "0")))
    killed = 0
    while killed < 10:
        process = start(broken)
        time.sleep(rng.uniform(6, 24))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed == 10, "the demo was over before the tenth kill"
    assert start(broken).wait() == 0
    expected = {run.id: run for run in find_runs([whole / "runs"])}
    found = {run.id: run for run in find_runs([broken / "runs"])}
    assert found.keys() == expected.keys() and len(found) == 8
    for name, run in expected.items():
        assert found[name].status == run.status == "finished", name
        assert repr(numbers(found[name])) == repr(numbers(run)), name
