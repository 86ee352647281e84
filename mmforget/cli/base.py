"""What every verb shares: the application, common options, and how errors end a command."""

import functools
import inspect
import io
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from mmforget.errors import ConfigError, MMForgetError

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    help="Make a trained model forget, then try hard to prove that it did not.",
    epilog="Example: mmforget run benchmark=vision/mufac method=scrub",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file that registers more; repeatable."),
]
ConfigDir = Annotated[
    Path | None,
    typer.Option("--config-dir", metavar="DIR", help="Your own configs/, looked up first."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A resolved config, such as a run's own."),
]
Runs = Annotated[
    Path,
    typer.Option("--runs", metavar="DIR", envvar="MMFORGET_RUNS", help="Root of the run folders."),
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", envvar="MMFORGET_CACHE", help="Models and data."),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Such as benchmark=vision/mufac method.lr=0.01."),
]
_COMMON = {
    "debug": typer.Option("--debug", help="Show the traceback of an error."),
    "verbose": typer.Option("--verbose", "-v", help="Log what is being done."),
    "quiet": typer.Option("--quiet", "-q", help="Log warnings and errors alone."),
}


def verb(
    name: str, example: str, group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that makes a function a verb, with the options all verbs have.

    Args:
        name: The verb.
        example: A command that works, shown in its help.
        group: Where it belongs.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def called(*, debug: bool, verbose: bool, quiet: bool, **given: Any) -> None:
            with _ended(debug), _logged(verbose, quiet):
                function(**given)

        own = inspect.signature(function)
        common = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, option],
            )
            for key, option in _COMMON.items()
        ]
        named = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in own.parameters.values()
        ]
        called.__signature__ = own.replace(parameters=[*named, *common])  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in [*named, *common]}
        group.command(name, epilog=f"Example: {example}")(called)
        return function

    return decorate


def is_main() -> bool:
    """Return whether this is the process that prints, of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a result on stdout."""
    typer.echo(text)


def say_json(value: Any) -> None:
    """Print a value as one line of JSON; what JSON has not becomes text."""
    typer.echo(json.dumps(value, default=str, ensure_ascii=False))


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Return rows of text as columns, each as wide as its widest entry, the last left ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        (indent + "  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


class Console(logging.Handler):
    """Writes the library's log to stderr; while runs go on, each line says which and how long."""

    def __init__(self) -> None:
        super().__init__()
        self.started = time.monotonic()
        self.place = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        text = record.getMessage()
        if record.levelno > logging.INFO:
            text = f"{record.levelname.lower()}: {text}"
        elif self.place:
            minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
            text = f"{self.place} {minutes}:{seconds:02d} {text}"
        sys.stderr.write(text + "\n")


def console() -> Console:
    """Return the handler of the running command."""
    return next(h for h in logging.getLogger("mmforget").handlers if isinstance(h, Console))


@contextmanager
def _logged(verbose: bool, quiet: bool) -> Iterator[None]:
    library, stages = logging.getLogger("mmforget"), logging.getLogger("mmforget.pipeline")
    handler = Console()
    levels = (library.level, stages.level)
    library.setLevel(logging.INFO if verbose else logging.WARNING)
    stages.setLevel(logging.WARNING if quiet else logging.INFO)
    if not is_main():
        handler.setLevel(logging.CRITICAL)
    library.addHandler(handler)
    with ExitStack() as stack:
        stack.callback(library.removeHandler, handler)
        stack.callback(library.setLevel, levels[0])
        stack.callback(stages.setLevel, levels[1])
        if not is_main():
            stack.enter_context(redirect_stdout(io.StringIO()))
        yield


@contextmanager
def _ended(debug: bool) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit status; any other exception is a bug."""
    try:
        yield
    except KeyboardInterrupt:
        _complain("interrupted. The same command goes on where this one stopped")
        raise typer.Exit(INTERRUPTED) from None
    except (MMForgetError, OSError) as caught:
        error: Exception = caught
        if isinstance(caught, OSError):
            from mmforget.record import disk_error

            error = disk_error(caught, Path(caught.filename or "a file"))
        if not isinstance(error, MMForgetError):
            raise
        if debug:
            traceback.print_exc()
        _complain(f"error: {error}")
        raise typer.Exit(USER_ERROR) from None


def _complain(message: str) -> None:
    rank = "" if is_main() else f"[process {os.environ['RANK']}] "
    typer.echo(f"{rank}{message}", err=True)


def part_of(text: str | None) -> tuple[int, int] | None:
    """Return `I/N` as two numbers; None stays None.

    Raises:
        ConfigError: It is not, or I is not within 1 to N.
    """
    if text is None:
        return None
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise ConfigError(f"--shard {text}: write I/N, such as 2/8, with I from 1 to N")
    return int(first), int(second)
