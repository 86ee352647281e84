"""Weights on disk: safetensors, or tensors alone out of a pickle; never anything that runs code.

Loading checks everything first and copies last, so a model is changed wholly or not at all.
"""

import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmforget.errors import CheckpointError
from mmforget.record import write_text, writing

logger = logging.getLogger(__name__)

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
ACCEPTED = (
    "a .safetensors file, a .pt, .pth, .bin or .ckpt file of tensors, a folder written by "
    "save_pretrained, or the folder of a finished run"
)
FOLDER_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
NESTS = ("state_dict", "model_state_dict", "model", "net")
SHOWN = 4


def save_model(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model's weights and persistent buffers as safetensors, atomically.

    Tensors that the model holds under several names are stored once.

    Args:
        model: The model, not wrapped.
        path: The file.
        metadata: Text to keep in the file's header.

    Raises:
        ResourceError: The disk is full.
    """
    header = {"format": "pt", **(metadata or {})}
    _write(path, lambda file: safetensors.torch.save_model(model, file, header))


def load_model(model: nn.Module, path: Path, strict: bool = True) -> None:
    """Copy a checkpoint's weights into a model, or raise and leave it as it was.

    Args:
        model: The model that the weights must fit.
        path: What `read_state` reads.
        strict: Whether missing and unexpected tensors are errors; shapes must agree in any case.

    Raises:
        CheckpointError: It cannot be read or does not fit; the message lists what differs.
    """
    fit_state(model, read_state(path), path, strict)


def fit_state(
    model: nn.Module, state: Mapping[str, Tensor], path: Path, strict: bool = True
) -> None:
    """Copy named tensors into a model, or raise and leave it as it was; see `load_model`.

    Args:
        model: The model that the tensors must fit.
        state: The tensors.
        path: Where they come from, for the message.
        strict: Whether missing and unexpected tensors are errors.

    Raises:
        CheckpointError: They do not fit; the message lists what differs.
    """
    wanted = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    found = _renamed(dict(state), wanted)
    shared = {_place(wanted[name]) for name in found.keys() & wanted.keys()}
    missing = [name for name in wanted if name not in found and _place(wanted[name]) not in shared]
    unexpected = [name for name in found if name not in wanted]
    fitting = [name for name in wanted if name in found]
    differing = [name for name in fitting if not _fits(found[name], wanted[name])]
    if differing or not fitting or (strict and (missing or unexpected)):
        raise CheckpointError(
            f"{path} does not fit the model: "
            + _differences(missing, unexpected, differing, found, wanted)
        )
    with torch.no_grad():
        for name in fitting:
            wanted[name].copy_(found[name])


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a checkpoint onto the CPU, out of whatever they are wrapped in.

    Args:
        path: A .safetensors file; a .pt, .pth, .bin or .ckpt file, of which nothing but tensors
            and plain values is read; a folder with `model.safetensors` (save_pretrained, also in
            shards; a finished run).

    Raises:
        CheckpointError: It is none of these, is damaged, or could run code when opened.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. Give {ACCEPTED}")
    if path.suffix == ".safetensors":
        return _unprefixed(_read_safetensors(path))
    if path.suffix in PICKLES:
        return _unprefixed(_unnested(_read_pickle(path), path))
    raise CheckpointError(f"{path} is not a checkpoint by its name. Give {ACCEPTED}")


def state_sha(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and persistent buffers: names, types, shapes, bytes.

    Device and memory layout (channels-last) do not matter.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{list(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def save_state(folder: Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write a step checkpoint; a kill at any moment leaves the previous one or this one.

    `state.json` names the numbered tensor file that belongs to it and is replaced last.

    Args:
        folder: The folder of the checkpoint.
        tensors: None may share memory with another; `pack` sees to that.
        scalars: JSON values.

    Raises:
        ResourceError: The disk is full.
    """
    numbers = [int(file.stem.rpartition("-")[2]) for file in folder.glob("state-*.safetensors")]
    file = folder / f"state-{max(numbers, default=0) + 1}.safetensors"
    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _write(file, lambda target: safetensors.torch.save_file(held, target))
    content = {"file": file.name, "scalars": dict(scalars)}
    write_text(folder / "state.json", json.dumps(content))
    for old in folder.glob("state-*.safetensors"):
        if old != file:
            old.unlink()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the last step checkpoint of a folder; None if there is none or it is damaged."""
    mark = folder / "state.json"
    if not mark.is_file():
        return None
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
        file = folder / content["file"]
        # Copies, because the file would otherwise stay mapped into memory after it is replaced.
        tensors = {k: v.clone() for k, v in safetensors.torch.load_file(file).items()}
        return tensors, dict(content["scalars"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        logger.warning("the step checkpoint in %s is damaged (%s): starting anew", folder, error)
        return None


def pack(value: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into their tensors and a skeleton of JSON values.

    Keys of dicts may be text, integers, booleans or None and keep their type, as in the state of
    an optimiser. A tensor met twice is stored once.

    Raises:
        CheckpointError: There is a value of another type in it.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[Any, str] = {}
    storages: set[tuple[torch.device, int]] = set()

    def walk(item: Any, path: str) -> Any:
        if isinstance(item, Tensor):
            place = _place(item)
            if place not in places:
                places[place] = str(len(tensors))
                storage = (item.device, item.untyped_storage().data_ptr())
                # Another view of a storage that is stored already: safetensors wants its own copy.
                again = storage in storages and item.numel() > 0
                tensors[places[place]] = item.detach().clone() if again else item.detach()
                storages.add(storage)
            return {"tensor": places[place]}
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, (list, tuple)):
            kind = "list" if isinstance(item, list) else "tuple"
            return {kind: [walk(part, f"{path}[{i}]") for i, part in enumerate(item)]}
        if isinstance(item, Mapping):
            if not all(key is None or isinstance(key, (bool, int, str)) for key in item):
                raise CheckpointError(f"a checkpoint cannot hold the keys of {path or 'its top'}")
            return {"dict": [[key, walk(part, f"{path}.{key}")] for key, part in item.items()]}
        raise CheckpointError(
            f"a checkpoint cannot hold a {type(item).__name__} (at {path or 'its top'}): it takes "
            f"tensors, numbers, text, None, and dicts, lists and tuples of these"
        )

    return tensors, walk(value, "")


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Return the value that `pack` split."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(tensors, part) for key, part in content}
    parts = [unpack(tensors, part) for part in content]
    return parts if kind == "list" else tuple(parts)


def _write(path: Path, write: Callable[[str], None]) -> None:
    with writing(path) as temporary:
        try:
            write(str(temporary))
        except SafetensorError as error:  # it hides the system's error number in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error)) from error


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common exactly if they are the same memory."""
    place = tensor.data_ptr() if tensor.numel() else id(tensor)
    return tensor.device, place, tensor.dtype, tensor.shape, tensor.stride()


def _fits(found: Tensor, wanted: Tensor) -> bool:
    same_kind = found.is_floating_point() == wanted.is_floating_point()
    return found.shape == wanted.shape and same_kind


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return read_state(folder / name)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of shards: {error}") from error
        state: dict[str, Tensor] = {}
        for shard in shards:
            state.update(read_state(folder / Path(shard).name))
        return state
    names = sorted(file.name for file in folder.iterdir())
    held = ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
    raise CheckpointError(
        f"{folder} holds no model.safetensors but {held or 'nothing'}. {ACCEPTED}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        state = safetensors.torch.load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    # `save_model` stores a shared tensor once and notes its other names in the header.
    aliases = {name: state[kept] for name, kept in header.items() if kept in state}
    return {**aliases, **state}


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as handle:
        start = handle.read(2)
    if start != b"PK" and not start.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is not a checkpoint: it begins with {start!r} (an empty file, a text or a "
            f"pointer to a file that was not downloaded?). Give {ACCEPTED}"
        )
    if start == b"PK" and not zipfile.is_zipfile(path):
        raise _damaged(path, "the end of the archive is missing")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe(path, str(error)) from error
    except Exception as error:  # torch raises nearly any type on bytes that are no checkpoint
        if "TorchScript" in str(error):
            raise _unsafe(path, str(error)) from error
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(
        f"{path} is truncated or damaged ({size} bytes; {reason}). Copy or download it again"
    )


def _unsafe(path: Path, reason: str) -> CheckpointError:
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    what = f"asks for {named[1]}" if named else "holds more than tensors and plain values"
    return CheckpointError(
        f"{path} {what}: opening it could run code, so it was not opened. If you trust its source, "
        f'convert it where that does no harm: python -c "import torch; '
        f"s = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        f"s = s.state_dict() if hasattr(s, 'state_dict') else s.get('state_dict', s); "
        f"torch.save(s, '{path.stem}-weights.pt')\" and give that file"
    )


def _unnested(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors out of a training script's checkpoint."""
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): value for name, value in content.items()}
        inner = [name for name in NESTS if isinstance(content.get(name), Mapping)]
        if len(inner) != 1:
            break
        content = content[inner[0]]
    held = type(content).__name__
    if isinstance(content, Mapping):
        held = f"{', '.join(str(name) for name in list(content)[:SHOWN]) or 'nothing'}"
    raise CheckpointError(
        f"{path} holds no state dict: found {held}. Accepted are named tensors alone, or below "
        f"one of {', '.join(NESTS)}"
    )


def _unprefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that torch.compile and distributed wrappers put before names."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _renamed(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the model's names where a wrapper module put a prefix before them.

    A prefix common to all goes first. Then a left-over name takes the one left-over name of the
    model that it ends with (`fc.fc.weight` -> `fc.weight`), if no other could be meant.
    """
    common = {name.partition(".")[0] for name in found}
    if len(common) == 1 and not found.keys() & wanted.keys():
        stripped = {name.partition(".")[2]: value for name, value in found.items()}
        if stripped.keys() & wanted.keys():
            found = stripped
    lost = [name for name in wanted if name not in found]
    spare = [name for name in found if name not in wanted]
    meant = {name: [w for w in lost if name.endswith(f".{w}")] for name in spare}
    claims = [names[0] for names in meant.values() if len(names) == 1]
    names = {
        name: fits[0]
        for name, fits in meant.items()
        if len(fits) == 1 and claims.count(fits[0]) == 1
    }
    return {names.get(name, name): value for name, value in found.items()}


def _differences(
    missing: list[str],
    unexpected: list[str],
    differing: list[str],
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> str:
    shapes = [
        f"{name} {list(found[name].shape)}, the model's {list(wanted[name].shape)}"
        if found[name].shape != wanted[name].shape
        else f"{name} {found[name].dtype}, the model's {wanted[name].dtype}"
        for name in differing
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    parts = [
        f"{len(names)} {what} ({'; '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''})"
        for what, names in groups
        if names
    ]
    heads = {(found[n].shape[:1], wanted[n].shape[:1]) for n in differing}
    rest_agrees = all(found[n].shape[1:] == wanted[n].shape[1:] for n in differing)
    modules = {n.rpartition(".")[0] for n in differing}
    last = list(wanted)[-1].rpartition(".")[0]
    if len(heads) == 1 and modules == {last} and rest_agrees:
        ((theirs, ours),) = heads
        if len(theirs) == len(ours) == 1:
            parts.append(f"the head has {theirs[0]} classes, the benchmark {ours[0]}")
    return "; ".join(parts)
