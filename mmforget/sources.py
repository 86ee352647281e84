"""Where a benchmark's folder comes from: named by the user, or generated once in the cache."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from mmforget.errors import ConfigError, DataError
from mmforget.record import disk_error


def local_folder(root: str | None, benchmark: str) -> Path:
    """Return the folder that `data.root` names.

    Raises:
        ConfigError: None is named.
        DataError: There is no such folder.
    """
    if root is None:
        raise ConfigError(
            f"data.source=local needs data.root: the folder of {benchmark} in its published layout"
        )
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={folder}: there is no such folder")
    return folder


def mini_world(folder: Path, write: Callable[[Path, int], None], seed: int) -> Path:
    """Return a generated folder, written by `write(folder, seed)` if it is not there yet.

    Written beside it and renamed, under a lock: nobody finds half a world.

    Raises:
        ResourceError: The disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return folder
        temporary = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            write(temporary, seed)
            temporary.rename(folder)
        except OSError as error:
            raise disk_error(error, folder) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
