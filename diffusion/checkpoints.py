"""What a method leaves on disk, and weights made elsewhere.

`save` writes what differs from the start: the denoiser's tensors under their own diffusers names,
so that `unet.load_state_dict(load_file("model.safetensors"), strict=False)` takes them in plain
diffusers; tensors of text encoders and edits under their component's name. `load` reads that file
and, besides, pipeline folders, UNet and text-encoder state dicts, CompVis checkpoints and LoRA
files.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmforget.checkpoint import read_state
from mmforget.diffusion.edits import build_edit
from mmforget.diffusion.models import DiffusionModel, open_pipeline
from mmforget.errors import CheckpointError
from mmforget.record import disk_error, writing

HEADER = "mmforget_diffusion"
COMPVIS = "model.diffusion_model."
COMPVIS_TEXT = "cond_stage_model."
COMPVIS_REST = ("first_stage_model.", "model_ema.", "betas", "alphas", "sqrt_", "log_", "posterior")
SHOWN = 4


def save(model: DiffusionModel, path: Path, start: DiffusionModel) -> None:
    """Write the tensors of `model` that differ from `start`, and its edits.

    Raises:
        ResourceError: The disk is full.
    """
    prefix = f"{model.denoiser_name}."
    kept = {
        name.removeprefix(prefix): value.detach().cpu().contiguous().clone()
        for name, value in changed(model, start).items()
    }
    edits = [
        {"name": name, "kind": edit.kind, "config": edit.config()}
        for name, edit in zip(model.edits, model.active_edits(), strict=True)
    ]
    header = {"format": "pt", HEADER: json.dumps({"family": model.family, "edits": edits})}
    try:
        with writing(path) as temporary:
            save_file(kept, temporary, header)
    except OSError as error:
        raise disk_error(error, path) from error


def changed(model: DiffusionModel, start: DiffusionModel) -> dict[str, Tensor]:
    """Return the tensors of `model` that differ from `start`, those of edits among them."""
    before = start.state_dict()
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith("edits.") or not _equal(value, before.get(name))
    }


def changed_bytes(model: DiffusionModel, start: DiffusionModel) -> int:
    """Return the bytes of the tensors that differ."""
    return sum(value.numel() * value.element_size() for value in changed(model, start).values())


def load(path: Path, start: DiffusionModel) -> DiffusionModel:
    """Return a copy of `start` with a checkpoint's weights and edits.

    Raises:
        CheckpointError: It cannot be read, or tensors in it are none of this model's: which.
    """
    model = copy.deepcopy(start)
    load_into(path, model)
    return model.eval()


def load_into(path: Path, model: DiffusionModel) -> None:
    """Copy a checkpoint's weights into a model and add its edits.

    Raises:
        CheckpointError: It cannot be read, or tensors in it are none of this model's: which.
    """
    if (path / "model_index.json").is_file():
        other = open_pipeline(str(path), model.dtype)
        if other.family != model.family:
            raise CheckpointError(f"{path} is a {other.family} pipeline, the model {model.family}")
        _take(model, dict(other.state_dict()), path)
        return
    added = []
    try:
        for edit in _header(path).get("edits", []):
            model.add_edit(edit["name"], build_edit(edit["kind"], edit["config"], model))
            added.append(edit["name"])
        state = read_state(path)
        if any("lora" in name for name in state):
            _take_lora(model, path, state)
        else:
            _take(model, _named(model, state, path), path)
    except CheckpointError:
        for name in added:
            model.remove_edit(name)
        raise


def _header(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(str(path), "pt") as opened:
            found: dict[str, Any] = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
            return found
    except Exception as error:  # safetensors raises its own type for a broken file
        raise CheckpointError(f"{path} is damaged ({error}); make it again") from error


def _named(model: DiffusionModel, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a state dict under the model's own names."""
    own, prefix = model.state_dict(), f"{model.denoiser_name}."
    if any(name.startswith(COMPVIS) for name in state):
        return _from_compvis(model, state, path)
    named = {}
    for name, value in state.items():
        text = f"text_encoder.{name.removeprefix('text_model.')}"  # its prefix in older releases
        places = (name, prefix + name, f"text_encoder.{name}", text)
        named[next((place for place in places if place in own), name)] = value
    return named


def _from_compvis(model: DiffusionModel, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert a CompVis state dict by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    known = (COMPVIS, COMPVIS_TEXT, *COMPVIS_REST)
    foreign = [name for name in state if not name.startswith(known)]
    if foreign:
        raise CheckpointError(
            f"{path} holds {len(foreign)} tensors of no Stable Diffusion, such as "
            f"{', '.join(foreign[:SHOWN])}"
        )
    try:
        made = convert_ldm_unet_checkpoint(dict(state), dict(model.denoiser.config))
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its UNet does not fit this pipeline's ({error!r}); give the pipeline it was "
            f"made from as model.pipeline"
        ) from error
    named = {f"{model.denoiser_name}.{name}": value for name, value in made.items()}
    inner = f"{COMPVIS_TEXT}transformer."
    own = model.state_dict()
    for name, value in state.items():
        if name.startswith(inner):
            short = name.removeprefix(inner)
            places = (f"text_encoder.{short}", f"text_encoder.{short.removeprefix('text_model.')}")
            found = next((place for place in places if place in own), None)
            if found is not None:
                named[found] = value
    return named


def _take(model: DiffusionModel, named: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into a model, all or none."""
    own = model.state_dict()
    unknown = sorted(name for name in named if name not in own)
    if unknown:
        raise CheckpointError(
            f"{path} holds {len(unknown)} tensors that this {model.family} pipeline has not, such "
            f"as {', '.join(unknown[:SHOWN])}; check model.pipeline"
        )
    wrong = [name for name, value in named.items() if value.shape != own[name].shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors have another shape, such as {name}: "
            f"{list(named[name].shape)} instead of {list(own[name].shape)}"
        )
    if not named and not model.edits:
        return  # a result that changed nothing (a method of zero steps)
    with torch.no_grad():
        for name, value in named.items():
            own[name].copy_(value)


def _take_lora(model: DiffusionModel, path: Path, state: dict[str, Tensor]) -> None:
    """Merge a LoRA file into the weights by diffusers' own loader."""
    if any(name.startswith("edits.") for name in state):
        _take(model, _named(model, state, path), path)
        return
    pipe = model.pipe
    try:
        pipe.load_lora_weights(dict(state))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} is no LoRA file of this pipeline ({reason})") from error


def _equal(value: Tensor, other: Tensor | None) -> bool:
    if other is None or value.shape != other.shape:
        return False
    return torch.equal(value, other.to(value.device))
