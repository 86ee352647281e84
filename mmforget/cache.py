"""A content-addressed cache for what is dear to make: originals, retrained and shadow models.

An entry is `<root>/<kind>/<key[:2]>/<key>/`, where the key hashes only what changes its content.
Its files are written in a working folder beside it, `entry.json` last, and the whole is renamed
into place: an entry is finished or is not there, whenever its builder is killed.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout

from mmforget.environment import version
from mmforget.errors import ConfigError, DataError
from mmforget.record import disk_error, write_text

logger = logging.getLogger(__name__)

MARK = "entry.json"
PATIENCE_S = 2.0
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: keys sorted, no spaces, tuples as lists, paths as text.

    Raises:
        ConfigError: It holds what JSON has not: NaN, infinities, keys that are no text, objects.
    """
    return json.dumps(_plain(value, ""), sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(inputs: Mapping[str, Any]) -> str:
    """Return the key of an entry: SHA-256 of its canonical inputs, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(inputs).encode()).hexdigest()


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{place}.{key}".lstrip(".")) for key, item in value.items()}
    shown = f"{value}" if isinstance(value, float) else f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        shown += " with keys that are no text"
    raise ConfigError(
        f"a cache key cannot hold {shown} (at {place or 'its top'}); it takes what JSON has: "
        f"finite numbers, text, true, false, null, lists, and mappings with text as keys"
    )


@dataclass(frozen=True)
class FileMark:
    """Size and content hash of one file of an entry."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One finished entry.

    Attributes:
        kind: What it is, such as "original".
        key: Hash of `inputs`.
        path: Its folder.
        inputs: What decided its content.
        created: When, as ISO 8601 in UTC.
        mmforget: The version that made it; None for a checkout that is not installed.
        files: Every file in it but `entry.json`, by its path within the folder.
    """

    kind: str
    key: str
    path: Path
    inputs: dict[str, Any]
    created: str
    mmforget: str | None
    files: dict[str, FileMark]

    @property
    def bytes(self) -> int:
        """Size of its files together."""
        return sum(mark.bytes for mark in self.files.values())

    @property
    def used(self) -> float:
        """When it was last looked up or made, in seconds since 1970."""
        return _touched(self.path / MARK)

    def faults(self, rehash: bool = False) -> list[str]:
        """Return what is wrong with its files: missing, of another size, or (rehash) content."""
        found = []
        for name, mark in self.files.items():
            file = self.path / name
            if not file.is_file():
                found.append(f"{name} is missing")
            elif file.stat().st_size != mark.bytes:
                found.append(f"{name} has {file.stat().st_size} bytes instead of {mark.bytes}")
            elif rehash and _sha256(file) != mark.sha256:
                found.append(f"{name} has other content than was written")
        return found


def read_entry(path: Path) -> Entry:
    """Read the finished mark of an entry's folder.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    try:
        content = json.loads((path / MARK).read_text(encoding="utf-8"))
        content["files"] = {name: FileMark(**mark) for name, mark in content["files"].items()}
        return Entry(path=path, **content)
    except FileNotFoundError as error:
        raise DataError(f"{MARK} is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{MARK} cannot be read: {error}") from error


@dataclass
class Building:
    """An entry whose lock this process holds.

    Attributes:
        kind: What is built.
        key: Its key.
        inputs: What decides its content.
        path: The folder it will have, or has if `ready`.
        scratch: Working folder of this key. A sub-folder `state` survives a kill, so that the
            next process goes on from there; the rest of the folder may be gone.
        ready: Whether the entry is finished; then there is nothing left to do.
    """

    kind: str
    key: str
    inputs: Mapping[str, Any]
    path: Path
    scratch: Path
    ready: bool

    @property
    def payload(self) -> Path:
        """Where the files of the entry are to be written; empty at the start."""
        return self.scratch / "payload"

    @property
    def state(self) -> Path:
        """Where step checkpoints of the work go."""
        return self.scratch / "state"

    def commit(self) -> Path:
        """Finish the entry with what `payload` holds; return its folder.

        Raises:
            ResourceError: The disk is full.
        """
        files = {}
        folders = [self.payload]
        for found in sorted(self.payload.rglob("*")):
            if found.is_dir():
                folders.append(found)
                continue
            _sync(found)
            name = found.relative_to(self.payload).as_posix()
            files[name] = {"bytes": found.stat().st_size, "sha256": _sha256(found)}
        content = {
            "kind": self.kind,
            "key": self.key,
            "inputs": json.loads(canonical(self.inputs)),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "mmforget": version("mmforget"),
            "files": files,
        }
        write_text(self.payload / MARK, json.dumps(content, indent=1, sort_keys=True))
        for folder in folders:
            _sync(folder)
        self.payload.rename(self.path)
        _sync(self.path.parent)
        self.ready = True
        return self.path


class Cache:
    """Finished work on disk, shared by all runs and processes of a user.

    Args:
        root: Its folder; None takes `$MMFORGET_CACHE`, or else `~/.cache/mmforget`.
    """

    def __init__(self, root: Path | None = None) -> None:
        chosen = root or os.environ.get("MMFORGET_CACHE") or Path.home() / ".cache" / "mmforget"
        self.root = Path(chosen).expanduser().absolute()

    def path(self, kind: str, key: str) -> Path:
        """Return the folder an entry has once it is finished.

        Raises:
            ConfigError: The kind is no plain name.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind) or kind == "locks":
            raise ConfigError(f"{kind!r} cannot be a kind of cache entry: give a snake_case name")
        return self.root / kind / key[:2] / key

    def lookup(self, kind: str, inputs: Mapping[str, Any]) -> Path | None:
        """Return the folder of a finished entry, or None.

        An entry with a missing file or one of another size is set aside with a warning.

        Raises:
            ConfigError: The inputs hold what JSON has not.
        """
        path = self.path(kind, key_of(inputs))
        fault = _fault(path)
        if fault is None:
            with suppress(OSError):  # a shared cache may be read-only; then its ages stand still
                os.utime(path / MARK)
            return path
        if path.is_dir():
            self._set_aside(path)
        return None

    @contextmanager
    def building(self, kind: str, inputs: Mapping[str, Any]) -> Iterator[Building]:
        """Hold an entry's lock; wait for another process that is building it.

        The block looks at `ready`, and if that is false writes into `payload` and calls `commit`.
        Left without `commit`, the working folder is kept only if it holds step checkpoints.

        Raises:
            ConfigError: The root cannot be written to.
            ResourceError: The disk is full.
        """
        key = key_of(inputs)
        path = self.path(kind, key)
        scratch = path.with_name(f".work-{key}")
        try:
            for folder in (self.root / "locks", path.parent):
                self._make(folder)
            with self._waiting(kind, key):
                if path.is_dir():
                    _discard_if_broken(path)
                place = Building(kind, key, inputs, path, scratch, ready=path.is_dir())
                try:
                    if not place.ready:
                        shutil.rmtree(place.payload, ignore_errors=True)
                        place.payload.mkdir(parents=True)
                    yield place
                finally:
                    resumable = place.state.is_dir() and any(place.state.iterdir())
                    if place.ready or not resumable:
                        shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            clear = disk_error(error, path)
            if clear is error:
                raise
            raise clear from error

    def discard(self, kind: str, inputs: Mapping[str, Any]) -> None:
        """Remove one entry, if it is there and nobody is building it, so that it is made anew."""
        path = self.path(kind, key_of(inputs))
        if path.is_dir():
            self._remove(path)

    def entries(self) -> list[Entry]:
        """Return all finished entries that can be read, by kind and key."""
        found = []
        for path in self._folders("[0-9a-f]*"):
            with suppress(DataError):
                found.append(read_entry(path))
        return found

    def verify(self) -> list[str]:
        """Hash every file again; return the faults, one line each.

        A damaged entry is set aside, so that the next run that needs it makes it again.
        """
        found = []
        for path in self._folders("[0-9a-f]*"):
            fault = _fault(path, rehash=True)
            if fault is not None:
                found.append(f"{path}: {fault}")
                self._set_aside(path, rehash=True)
        return found

    def prune(
        self,
        kinds: Collection[str] | None = None,
        older_than_s: float | None = None,
        keep_bytes: int | None = None,
    ) -> int:
        """Remove entries, and what killed or damaged ones left behind; return the bytes freed.

        With no argument only left-overs go; `keep_bytes=0` empties the cache. What a process is
        building at the moment stays.

        Args:
            kinds: Look at these kinds alone; given alone, all their entries go.
            older_than_s: Remove what was not used for so many seconds (left-overs likewise).
            keep_bytes: Remove the longest unused entries until the rest fits.
        """
        now, age = time.time(), older_than_s or 0.0
        freed = 0
        for path in [*self._folders(".work-*"), *self._folders(".broken-*")]:
            idle = now - max(map(_touched, (path, *path.glob("*"))))
            if (kinds is None or _kind(path) in kinds) and idle >= age:
                freed += self._remove(path)
        entries = [entry for entry in self.entries() if kinds is None or entry.kind in kinds]
        left = sum(entry.bytes for entry in entries)
        alone = kinds is not None and older_than_s is None and keep_bytes is None
        for entry in sorted(entries, key=lambda entry: entry.used):
            old = older_than_s is not None and now - entry.used >= older_than_s
            if alone or old or (keep_bytes is not None and left > keep_bytes):
                freed += self._remove(entry.path)
                left -= entry.bytes
        return freed

    def _folders(self, pattern: str) -> Iterator[Path]:
        """Yield entry folders, or those beside them, of every kind."""
        for path in sorted(self.root.glob(f"*/[0-9a-f][0-9a-f]/{pattern}")):
            if re.search(r"[0-9a-f]{64}", path.name) and path.is_dir():
                yield path

    def _lock(self, kind: str, key: str) -> FileLock:
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{kind}-{key}.lock")

    @contextmanager
    def _waiting(self, kind: str, key: str) -> Iterator[None]:
        """Hold the lock of a key, saying whom it waits for."""
        lock = self._lock(kind, key)
        holder = Path(lock.lock_file).with_suffix(".pid")
        try:
            lock.acquire(timeout=PATIENCE_S)
        except Timeout:
            pid = holder.read_text() if holder.is_file() else "unknown"
            logger.warning(
                "waiting for another process (pid %s) that is building %s %s", pid, kind, key[:12]
            )
            lock.acquire()
        try:
            holder.write_text(str(os.getpid()))
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise ConfigError(
                f"cannot write to the cache at {self.root}: {error.strerror}. Set MMFORGET_CACHE "
                f"to a folder that you may write to"
            ) from error

    def _set_aside(self, path: Path, rehash: bool = False) -> None:
        """Set a damaged entry aside, unless another process is already making it anew."""
        try:
            with self._lock(_kind(path), path.name).acquire(timeout=0):
                _discard_if_broken(path, rehash)
        except Timeout:
            return
        except OSError as error:
            logger.warning("cache entry %s is damaged and cannot be moved: %s", path, error)

    def _remove(self, path: Path) -> int:
        """Remove a folder unless its key is locked; return the bytes freed."""
        key = re.search(r"[0-9a-f]{64}", path.name)
        assert key is not None  # _folders yields no other names
        try:
            with self._lock(_kind(path), key[0]).acquire(timeout=0):
                if not path.is_dir():
                    return 0
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                shutil.rmtree(_aside(path))
                return size
        except Timeout:
            return 0


def _touched(path: Path) -> float:
    """Return when a file or folder was last changed; now, if it is just being removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _kind(path: Path) -> str:
    return path.parent.parent.name


def _fault(path: Path, rehash: bool = False) -> str | None:
    """Return what is wrong with an entry's folder, or None."""
    try:
        return "; ".join(read_entry(path).faults(rehash)) or None
    except DataError as error:
        return str(error)


def _discard_if_broken(path: Path, rehash: bool = False) -> None:
    """Look again, now under the lock, and rename a damaged entry out of the way."""
    fault = _fault(path, rehash)
    if fault is not None and path.is_dir():
        target = _aside(path)
        logger.warning(
            "cache entry %s is damaged (%s); it was set aside as %s and will be made again",
            path,
            fault,
            target.name,
        )


def _aside(path: Path) -> Path:
    """Rename a folder in one step, so that a kill leaves no half-removed entry behind."""
    if path.name.startswith(".broken-"):
        return path
    return path.rename(path.with_name(f".broken-{path.name.lstrip('.')}-{time.time_ns()}"))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
