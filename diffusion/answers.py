"""Generated image sets: batched, resumable, addressed by what decides their pixels.

A set is a folder with `manifest.json` (the model's hash, sampler, prompt and seed of every file)
and one file an image. An image is written under a temporary name and renamed, and its latent
comes from its own seed, so a killed run goes on with the next image and order does not matter.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image as Pillow
from torch import Tensor

from mmforget.checkpoint import state_sha
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, generate
from mmforget.errors import DataError
from mmforget.progress import progress
from mmforget.record import disk_error, write_text, writing

logger = logging.getLogger(__name__)

VERSION = 1  # raised when the same manifest gives other pixels
QUALITY = 95
MANIFEST = "manifest.json"
SHOWN = 5


class Ordered(NamedTuple):
    """One image of a set.

    Attributes:
        name: File name, with its ending.
        prompt: The prompt.
        seed: Seed of its latent.
    """

    name: str
    prompt: str
    seed: int


def fingerprint(model: DiffusionModel, sampling: Sampling, negative: str = "") -> dict[str, Any]:
    """Return what, besides prompt and seed, decides a model's pictures, as JSON values."""
    settings = asdict(sampling)
    del settings["batch_size"]  # does not change pictures
    noising = {k: v for k, v in model.noising.config.items() if not k.startswith("_")}
    made = {
        "version": VERSION,
        "model": state_sha(model),
        "codec": state_sha(model.vae),
        "edits": {
            name: [edit.kind, edit.config()]
            for name, edit in zip(model.edits, model.active_edits(), strict=True)
        },
        "sampling": settings,
        "scheduler": [model.noising.name, noising],
        "precision": str(model.dtype),
        "negative": negative,
    }
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))  # as a manifest gives it back
    return plain


def picture_name(prompt: str, seed: int) -> str:
    """Return the file name of a picture that any set may hold: it says its prompt and seed."""
    return f"{hashlib.sha256(prompt.encode()).hexdigest()[:12]}_seed{seed}.png"


def place_of(store: Path, made: dict[str, Any]) -> Path:
    """Return the folder below `store` for images of a fingerprint."""
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]
    return store / "answers" / key


def fill(
    folder: Path,
    model: DiffusionModel,
    orders: Sequence[Ordered],
    sampling: Sampling,
    negative: str = "",
    label: str = "generate",
    share: tuple[int, int] = (0, 1),
    made: dict[str, Any] | None = None,
) -> int:
    """Generate the images of a set that are not there yet; return how many were made.

    Args:
        folder: The set; made if needed.
        model: What generates.
        orders: The images.
        sampling: Sampler, steps, guidance, batch size.
        negative: Negative prompt.
        label: What the progress bar says.
        share: This process's rank and the number of processes: each makes every n-th image.
        made: `fingerprint` of the model, where it is known already.

    Raises:
        DataError: The folder holds another model's images, or files that are none of the set.
        ResourceError: The disk is full.
    """
    made = fingerprint(model, sampling, negative) if made is None else made
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        _claim(folder, made, orders)
    own = {order.name: order for order in orders[share[0] :: share[1]]}
    todo = [order for order in own.values() if not (folder / order.name).is_file()]
    count = 0
    with progress(label, len(todo), 0, share[0] == 0) as advance:
        images = [Image(order.prompt, order.seed) for order in todo]
        for rows, pixels in generate(model, images, sampling, negative):
            for i, image in zip(rows, pixels, strict=True):
                write_image(folder / todo[i].name, image)
            count += len(rows)
            advance(len(rows))
    return count


def read(folder: Path, names: Sequence[str]) -> Tensor:
    """Return images of a set, uint8 [N, 3, H, W], in the given order.

    Raises:
        DataError: Files are missing or cannot be read: how many, and which.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} images are missing in {folder}, such as "
            f"{', '.join(missing[:SHOWN])}; generate them (a missing image is never counted)"
        )
    found = []
    for name in names:
        try:
            with Pillow.open(folder / name) as opened:
                array = np.array(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{folder / name} cannot be read ({error}); remove it") from error
        found.append(torch.from_numpy(array.transpose(2, 0, 1).copy()))
    return torch.stack(found)


def _claim(folder: Path, made: dict[str, Any], orders: Sequence[Ordered]) -> None:
    """Write a set's manifest, or check that the folder's own agrees with it and add to it."""
    path = folder / MANIFEST
    images = {order.name: [order.prompt, order.seed] for order in orders}
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text())
            held, known = content["made"], content["images"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no manifest of an image set; name another folder"
            ) from error
        if held != made:
            differs = sorted(k for k in {*held, *made} if held.get(k) != made.get(k))
            raise DataError(
                f"{folder} holds images that differ in {', '.join(differs)}; name another folder"
            )
        changed = [name for name, row in images.items() if known.get(name, row) != row]
        if changed:
            raise DataError(
                f"{folder} holds {changed[0]} made from another prompt or seed: {known[changed[0]]}"
            )
    foreign = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in (".jpg", ".jpeg", ".png")
        and not entry.name.startswith(".")
        and entry.name not in images
        and entry.name not in known
    )
    if foreign:
        raise DataError(
            f"{folder} holds {len(foreign)} images that are none of the set, such as "
            f"{', '.join(foreign[:SHOWN])}; remove them or name another folder"
        )
    if images.keys() - known.keys():
        write_text(path, json.dumps({"made": made, "images": {**known, **images}}))


def write_image(path: Path, image: Tensor) -> None:
    """Write an image uint8 [3, H, W] as its ending says, whole or not at all."""
    try:
        with writing(path) as temporary:
            pixels = Pillow.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            if path.suffix == ".png":
                pixels.save(temporary, format="PNG")
            else:
                pixels.save(temporary, format="JPEG", quality=QUALITY, subsampling=0)
    except OSError as error:
        raise disk_error(error, path) from error
