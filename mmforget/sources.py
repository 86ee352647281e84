"""Where a benchmark's folder comes from: named by the user, or generated once in the cache."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from mmforget.errors import ConfigError, DataError, MissingDependencyError
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


def hub_dataset(repo: str, revision: str | None, extra: str) -> Path:
    """Return the folder of a hub data set, downloaded on first use.

    Args:
        repo: Its id.
        revision: Its revision; None takes the newest.
        extra: The extra of this package that brings huggingface_hub.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        DataError: It cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise MissingDependencyError("huggingface_hub", extra) from error
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"data set {repo} cannot be downloaded ({reason}). Check the network and the id, or "
            f"download it elsewhere and say data.source=local data.root=FOLDER"
        ) from error


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
