"""mmforget: a workbench for multimodal machine unlearning.

The names below are imported when first used: importing mmforget loads neither torch nor Hydra.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmforget.api import attack, evaluate, run, sweep, unlearn, write_report
    from mmforget.record import RunResult, load_run

    __version__: str

# A wheel holds the modality packages inside this folder; a checkout keeps them beside it.
_here = Path(__file__).resolve().parent
if not (_here / "vision").is_dir():
    __path__[:] = [str(_here), str(_here.parent)]

__all__ = [
    "RunResult",
    "__version__",
    "attack",
    "evaluate",
    "load_run",
    "run",
    "sweep",
    "unlearn",
    "write_report",
]

_RECORD = ("RunResult", "load_run")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("mmforget")
        except PackageNotFoundError:  # a checkout that was never installed
            return "0+checkout"
    if name not in __all__:
        raise AttributeError(f"module 'mmforget' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mmforget.{'record' if name in _RECORD else 'api'}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
