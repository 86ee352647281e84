"""What answers at once must load neither torch nor Hydra; the command works as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

LIGHT = """
import contextlib, io, sys, time
started = time.perf_counter()
import mmforget
assert "run" in dir(mmforget) and mmforget.__version__
from mmforget.cli import application
seen = []
for words in (["list"], ["list", "methods", "vision/*", "--json"], ["--help"], *VERBS):
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        application()(words, prog_name="mmforget")
    seen.append(written.getvalue())
took = time.perf_counter() - started
heavy = sorted({m.partition(".")[0] for m in sys.modules} & {"torch", "hydra", "matplotlib"})
import json
print(json.dumps({"heavy": heavy, "seen": seen, "took": took}))
"""
VERBS = [
    ["list", "--help"],
    ["show", "--help"],
    ["check", "--help"],
    ["run", "--help"],
    ["eval", "--help"],
    ["attack", "--help"],
    ["report", "--help"],
    ["data", "mini", "--help"],
    ["cache", "list", "--help"],
    ["cache", "verify", "--help"],
    ["cache", "prune", "--help"],
    ["doctor", "--help"],
]


def test_listing_and_help_load_neither_torch_nor_hydra() -> None:
    code = f"VERBS = {VERBS!r}\n{LIGHT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["took"] < 5
    everything, methods, top, *helps = found["seen"]
    for part in ("methods", "benchmarks", "metrics", "attacks", "suites", "  npo ", "vision/mufac"):
        assert part in everything
    listed = json.loads(methods)["methods"]
    assert {"name", "summary"} == set(listed[0])
    assert all(entry["name"].startswith("vision/") and entry["summary"] for entry in listed)
    assert "Commands:" in top
    for words, text in zip(VERBS, helps, strict=True):
        assert "Example: mmforget " in text, words
        assert "--debug" in text, words
        assert "--json" in text, words


def test_the_command_is_a_process_with_an_exit_status(tmp_path: Path) -> None:
    environment = {**os.environ, "MMFORGET_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "mmforget", "run", "benchmark=vision/mufak", "method=npo"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown benchmark 'vision/mufak'. Close: vision/mufac")
    assert len(done.stderr.splitlines()) == 1
