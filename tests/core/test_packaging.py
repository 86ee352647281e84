"""What an installed copy holds: every package and config folder, and nothing imported too early."""

import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_and_config_folder_is_listed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = set()
    for top in ("mmforget", "vision", "diffusion", "vlm", "recsys"):
        name = "mmforget" if top == "mmforget" else f"mmforget.{top}"
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *parts)))
    found.add("mmforget.configs")
    for path in (ROOT / "configs").rglob("*.yaml"):
        found.add(".".join(("mmforget.configs", *path.parent.relative_to(ROOT / "configs").parts)))
    assert listed == found


def test_importing_the_package_loads_neither_torch_nor_hydra() -> None:
    code = (
        "import sys, mmforget, mmforget.registry, mmforget.cli\n"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
