"""`data` and `cache`: what lies on disk."""

from pathlib import Path
from typing import Annotated

import typer

from mmforget.cli.base import CacheDir, Json, Plugins, aligned, app, say, say_json, verb
from mmforget.errors import ConfigError, DataError
from mmforget.registry import BENCHMARKS, load_plugins

data = typer.Typer(help="Write data sets.", no_args_is_help=True)
cache = typer.Typer(help="List, verify and prune trained models.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(cache, name="cache")

DAY = 86400.0


@data.callback()
@cache.callback()
def _group() -> None:
    """Keep a group a group, however few verbs it has."""


@verb("mini", "mmforget data mini vision/mufac mufac-mini", data)
def mini(
    benchmark: Annotated[str, typer.Argument(help="Such as vision/mufac.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    seed: Annotated[int, typer.Option(help="Seed of the generated world.")] = 0,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Write a benchmark's generated data set, in its published layout."""
    load_plugins(tuple(plugin or ()))
    name = BENCHMARKS.resolve(benchmark)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty. Give a new folder: nothing is overwritten")
    write = getattr(BENCHMARKS.get(name), "write_mini", None)
    if write is None:
        raise ConfigError(f"{name} generates no data set")
    write(folder, seed)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if json:
        say_json({"folder": str(folder), "files": len(files), "bytes": size})
    else:
        say(f"{folder}: {len(files)} files, {_size(size)}")


@verb("list", "mmforget cache list", cache)
def list_entries(cache: CacheDir = None, json: Json = False) -> None:
    """List what was trained and kept."""
    from mmforget.cache import Cache

    store = Cache(cache)
    entries = store.entries()
    if json:
        for entry in entries:
            say_json(
                {
                    "kind": entry.kind,
                    "key": entry.key,
                    "path": str(entry.path),
                    "bytes": entry.bytes,
                    "created": entry.created,
                    "inputs": entry.inputs,
                }
            )
        return
    head = ("kind", "key", "size", "created", "benchmark")
    rows = [
        (e.kind, e.key[:12], _size(e.bytes), e.created, str(e.inputs.get("benchmark", "")))
        for e in entries
    ]
    if rows:
        say(aligned([head, *rows]))
    say(f"{len(rows)} entries, {_size(sum(e.bytes for e in entries))} in {store.root}")


@verb("verify", "mmforget cache verify", cache)
def verify(cache: CacheDir = None, json: Json = False) -> None:
    """Hash every file again; set damaged entries aside, to be made anew when needed."""
    from mmforget.cache import Cache

    store = Cache(cache)
    faults = store.verify()
    if json:
        say_json({"root": str(store.root), "faults": faults})
    else:
        say("\n".join(faults) if faults else f"every file in {store.root} is as it was written")
    if faults:
        raise DataError(f"{len(faults)} damaged entries were set aside; runs make them anew")


@verb("prune", "mmforget cache prune --older-than 30", cache)
def prune(
    cache: CacheDir = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only entries of this kind; repeatable.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Not used for so many days.")
    ] = None,
    keep_gib: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="Until the rest fits into N GiB.")
    ] = None,
    json: Json = False,
) -> None:
    """Remove entries; without options only what killed processes left behind."""
    from mmforget.cache import Cache

    store = Cache(cache)
    freed = store.prune(
        kinds=kind or None,
        older_than_s=None if older_than is None else older_than * DAY,
        keep_bytes=None if keep_gib is None else int(keep_gib * 2**30),
    )
    if json:
        say_json({"root": str(store.root), "freed": freed})
    else:
        say(f"freed {_size(freed)} in {store.root}")


def _size(count: float) -> str:
    """Return bytes as text."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
