"""Where a run took place, and whether this machine is fit for one. Imports torch when called."""

import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "scikit-learn",
    "safetensors",
    "hydra-core",
    "mmforget",
)
OLDEST_PYTHON = (3, 10)
NEEDED_MEMORY = 4 << 30
NEEDED_DISK = 2 << 30


def version(package: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """Return what a record says of the machine and software of a run; JSON values only.

    Args:
        device: The device in use, such as "cpu" or "cuda:0".
    """
    commit, dirty = _checkout()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "packages": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "device": device,
        "device_name": _device_name(device),
        "commit": commit,
        "dirty": dirty,
    }


def cpu_name() -> str:
    """Return the processor's model name."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def _checkout() -> tuple[str | None, bool | None]:
    """Return commit and whether tracked files were changed, if mmforget runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an install may lie inside a user's own repository
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changed is None else bool(changed)


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class Check:
    """One thing `mmforget doctor` looked at.

    Attributes:
        name: What was looked at.
        ok: Whether mmforget works with it as it is.
        detail: What was found.
        hint: What to do: needed when not `ok`, otherwise advice; empty for none.
    """

    name: str
    ok: bool
    detail: str
    hint: str = ""


def doctor(cache: Path | None = None, runs: Path = Path("runs")) -> list[Check]:
    """Look at everything a run needs from this machine.

    Args:
        cache: Folder of the cache; None takes the default one.
        runs: Folder of the runs.
    """
    from mmforget.cache import Cache

    root = Cache(cache).root
    return [
        _check_python(),
        _check_torch(),
        _check_threads(),
        _check_memory(),
        _check_disk("disk of the cache", root, "MMFORGET_CACHE"),
        _check_disk("disk of the runs", runs, "--runs"),
        _check_writable(root),
        *_check_extras(),
        _check_plugins(),
    ]


def _check_python() -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    ok = sys.version_info >= OLDEST_PYTHON
    return Check("python", ok, platform.python_version(), "" if ok else f"install Python {oldest}")


def _check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it does not load
        return Check("torch", False, f"cannot be imported: {error}", "pip install torch")
    found = f"torch {torch.__version__}"
    if torch.backends.mps.is_available():
        return Check("torch", True, f"{found}, mps")
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            hint = "install a torch build that matches the driver (see nvidia-smi)"
            return Check("torch", False, f"{found} cannot use the GPU of this machine", hint)
        return Check("torch", True, f"{found}, cpu only: no accelerator is visible")
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        hint = "free the GPU, or run on the CPU: runtime.device=cpu"
        return Check("torch", False, f"{found}, but CUDA fails: {error}", hint)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("torch", True, f"{found}, cuda {torch.version.cuda}: {', '.join(names)}")


def _check_threads() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("threads", False, "unknown without torch", "pip install torch")
    threads, available = torch.get_num_threads(), cores()
    detail = f"torch uses {threads} threads on {available} cores"
    slow = threads > available
    hint = f"set runtime.threads={available}: more threads than cores are slower" if slow else ""
    return Check("threads", True, detail, hint)


def _check_memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Check("memory", True, "unknown on this system")
    ok = total >= NEEDED_MEMORY
    hint = "" if ok else "lower runtime.eval_batch_size, raise runtime.accumulation"
    return Check("memory", ok, f"{total / 2**30:.1f} GiB", hint)


def _check_disk(name: str, folder: Path, knob: str) -> Check:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    ok = free >= NEEDED_DISK
    hint = "" if ok else f"free space, or point {knob} to another disk"
    return Check(name, ok, f"{free / 2**30:.1f} GiB free at {folder}", hint)


def _check_writable(root: Path) -> Check:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        reason = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
        hint = "set MMFORGET_CACHE to a folder that you may write to"
        return Check("cache", False, f"cannot write to {root}: {reason}", hint)
    return Check("cache", True, f"{root} can be written to")


def _check_extras() -> list[Check]:
    from mmforget.registry import EXTRAS

    found = []
    for extra in sorted(set(EXTRAS.values())):
        names = [name for name, brought_by in EXTRAS.items() if brought_by == extra]
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        detail = f"missing: {', '.join(missing)}" if missing else "all installed"
        hint = f"pip install 'mmforget[{extra}]'" if missing else ""
        found.append(Check(f"extra {extra}", True, detail, hint))
    return found


def _check_plugins() -> Check:
    from mmforget.registry import load_plugins

    installed = [entry.name for entry in importlib.metadata.entry_points(group="mmforget.plugins")]
    if not installed:
        return Check("plugins", True, "none installed")
    broken = sorted(set(installed) - set(load_plugins()))
    if broken:
        hint = "the warning of each names its cause; update or uninstall it"
        return Check("plugins", False, f"broken: {', '.join(broken)}", hint)
    return Check("plugins", True, ", ".join(installed))
