"""A text-to-image pipeline as one module: SD 1.x/2.x, SDXL, SD3 and FLUX behind one interface.

A `DiffusionModel` holds what unlearning may change, the denoiser and the text encoders, under the
names diffusers gives them, and shares what it never changes (image codec, tokenizers, scheduler)
with its copies. Conditions are made by the pipeline's own `encode_prompt`; predictions are raw
model outputs (noise, velocity or flow: `noise.Noising` knows which).
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmforget.diffusion.conditions import Conditions, cat
from mmforget.diffusion.edits import Edit
from mmforget.diffusion.noise import Noising
from mmforget.errors import DataError

logger = logging.getLogger(__name__)

FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
FLUX_SIDE = 128  # latents of FluxPipeline.default_sample_size
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ZEROS = "force_zeros_for_empty_prompt"  # of SDXL pipelines
TOGETHER = 64  # prompts encoded in one pass


@dataclass(frozen=True)
class Shared:
    """What a pipeline's copies have in common.

    Attributes:
        pipeline: The diffusers pipeline class.
        family: "sd", "sdxl", "sd3" or "flux".
        vae: Image codec, frozen.
        parts: Other components and settings by name: tokenizers, scheduler.
        noising: The scheduler's training side.
        source: Folder or hub id it was opened from.
    """

    pipeline: type
    family: str
    vae: nn.Module
    parts: dict[str, Any]
    noising: Noising
    source: str


class DiffusionModel(nn.Module):
    """Denoiser and text encoders of a pipeline, with its edits.

    Args:
        shared: What copies have in common.
        components: `unet` or `transformer`, and the text encoders, by their diffusers names.
    """

    def __init__(self, shared: Shared, components: dict[str, nn.Module]) -> None:
        super().__init__()
        self.shared = shared
        for name, module in components.items():
            setattr(self, name, module)
        self.edits = nn.ModuleDict()
        self._pipe: Any = None
        self._memo: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}
        self._memo_of: tuple[Any, ...] = ()

    @property
    def family(self) -> str:
        """One of `FAMILIES`: sd, sdxl, sd3 or flux."""
        return self.shared.family

    @property
    def denoiser_name(self) -> str:
        """The name below which the denoiser's weights are saved: unet or transformer."""
        return "unet" if self.family in ("sd", "sdxl") else "transformer"

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return getattr(self, self.denoiser_name)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by name, in order."""
        return {name: getattr(self, name) for name in ENCODERS if hasattr(self, name)}

    @property
    def vae(self) -> Any:
        """The image codec, shared by all copies."""
        return self.shared.vae

    @property
    def noising(self) -> Noising:
        """How training noises latents."""
        return self.shared.noising

    @property
    def tokenizer(self) -> Any:
        """The first tokenizer."""
        return self.shared.parts["tokenizer"]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        found: torch.device = next(self.denoiser.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's dtype."""
        found: torch.dtype = next(self.denoiser.parameters()).dtype
        return found

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels and side of the pipeline's own latents: (C, h, w)."""
        config = self.denoiser.config
        if self.family == "flux":  # the transformer takes any size; the pipeline makes 1024 pixels
            return config.in_channels // 4, FLUX_SIDE, FLUX_SIDE
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    @property
    def scale_factor(self) -> int:
        """Pixels of an image a latent stands for, on a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def pipe(self) -> Any:
        """A diffusers pipeline over these very modules."""
        if self._pipe is None:
            held = {self.denoiser_name: self.denoiser, **self.text_encoders, **self.shared.parts}
            if self.family == "sd":
                held["requires_safety_checker"] = False
            self._pipe = self.shared.pipeline(vae=self.vae, **held)
            self._pipe.set_progress_bar_config(disable=True)
        return self._pipe

    # Copies and placement -----------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiffusionModel":
        """Copy weights and edits; share codec, tokenizers and scheduler."""
        edits = {name: edit for name, edit in self.edits.items() if isinstance(edit, Edit)}
        for edit in edits.values():  # hooks would go on pointing at the original's edits
            edit.detach(self._itself)
        try:
            made = DiffusionModel(
                self.shared,
                {
                    name: copy.deepcopy(module, memo)
                    for name, module in self.named_children()
                    if name != "edits"
                },
            )
            copied = {name: copy.deepcopy(edit, memo) for name, edit in edits.items()}
        finally:
            for edit in edits.values():
                edit.attach(self._itself)
        for name, edit in copied.items():
            made.add_edit(name, edit)
        return made.train(self.training)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "DiffusionModel":
        """Move the shared codec along: `nn.Module.to` ends here."""
        self._memo.clear()
        self.shared.vae._apply(fn)  # type: ignore[no-untyped-call]
        made: DiffusionModel = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_pipe": None, "_memo": {}}

    # Edits --------------------------------------------------------------------------------------

    def add_edit(self, name: str, edit: Edit) -> None:
        """Add an edit under a name of its own and let it set its hooks."""
        self.edits[name] = edit.to(self.device)
        edit.attach(self._itself)

    def remove_edit(self, name: str) -> Edit:
        """Take an edit away again and return it."""
        edit = self.edits[name]
        assert isinstance(edit, Edit)
        edit.detach(self._itself)
        del self.edits[name]
        return edit

    def active_edits(self) -> list[Edit]:
        """Return the edits in the order they were added."""
        return [edit for edit in self.edits.values() if isinstance(edit, Edit)]

    @contextmanager
    def without_edits(self) -> Iterator[None]:
        """Run without any edit: hooks are taken away and set again."""
        edits = dict(self.edits.items())
        for name in edits:
            self.remove_edit(name)
        try:
            yield
        finally:
            for name, edit in edits.items():
                assert isinstance(edit, Edit)
                self.add_edit(name, edit)

    # Text ---------------------------------------------------------------------------------------

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return token ids of the first tokenizer, padded to its window, int64 [B, T]."""
        window = self.tokenizer.model_max_length
        found = self.tokenizer(
            list(texts), padding="max_length", max_length=window, truncation=True
        )
        return torch.tensor(found["input_ids"], dtype=torch.int64)

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, without start, end and padding, however many they are."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def _itself(self) -> Any:
        """This model for edits; untyped, because a type checker meets this file by two names."""
        return self

    @property
    def window(self) -> int:
        """Tokens of text that fit between the start and end marks."""
        return int(self.tokenizer.model_max_length) - 2

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Return the conditions of prompts; each distinct prompt is encoded once.

        Without gradients, results are kept until a text encoder changes, so that a prompt costs
        one pass however often it is used. With gradients enabled and a text encoder in training
        they flow through it.
        """
        unique = list(dict.fromkeys(prompts))
        weights = [p for module in self.text_encoders.values() for p in module.parameters()]
        if torch.is_grad_enabled() and any(p.requires_grad for p in weights):
            embeds, pooled, ids = self._encode(unique)
        else:
            self._remember(unique, weights)
            kept = [self._memo[prompt] for prompt in unique]
            embeds = torch.stack([row[0] for row in kept])
            pools = [row[1] for row in kept if row[1] is not None]
            pooled = torch.stack(pools) if pools else None
            ids = torch.stack([row[2] for row in kept])
        place = {prompt: k for k, prompt in enumerate(unique)}
        made = Conditions(embeds, pooled, ids, tuple(unique))
        return made.rows([place[prompt] for prompt in prompts])

    def unconditional(self, negative: str = "") -> Conditions:
        """Return the conditions of the other half of classifier-free guidance, one row.

        SDXL pipelines say in their config whether the empty prompt stands for zeros.
        """
        made = self.encode([negative])
        if negative or not self.shared.parts.get(ZEROS, False):
            return made
        pooled = None if made.pooled is None else torch.zeros_like(made.pooled)
        return Conditions(torch.zeros_like(made.embeds), pooled, made.ids, made.prompts)

    def _remember(self, prompts: Sequence[str], weights: Sequence[Tensor]) -> None:
        state = tuple((id(p), p._version) for p in weights)
        if state != self._memo_of or len(self._memo) > 4096:
            self._memo.clear()
            self._memo_of = state
        new = [prompt for prompt in prompts if prompt not in self._memo]
        if not new:
            return
        for start in range(0, len(new), TOGETHER):
            part = new[start : start + TOGETHER]
            with self._plain():
                embeds, pooled, ids = self._encode(part)
            for k, prompt in enumerate(part):
                pool = None if pooled is None else pooled[k]
                self._memo[prompt] = (embeds[k], pool, ids[k])

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Encode without gradients, dropout or half precision: for all later uses."""
        modes = [(module, module.training) for module in self.text_encoders.values()]
        for module, _ in modes:
            module.eval()
        try:
            lower = torch.autocast(self.device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), lower:
                yield
        finally:
            for module, mode in modes:
                module.train(mode)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode by the pipeline's own rules: [B, T, D], [B, P] or None, ids [B, T1]."""
        device = self.device
        ids = self.tokens(prompts).to(device)
        if self.family == "sd":
            return self.pipe.encode_prompt(prompts, device, 1, False)[0], None, ids
        if self.family == "sdxl":
            found = self.pipe.encode_prompt(
                prompts, device=device, do_classifier_free_guidance=False
            )
            return found[0], found[2], ids
        if self.family == "sd3":
            found = self.pipe.encode_prompt(
                prompts, None, None, device=device, do_classifier_free_guidance=False
            )
            return found[0], found[2], ids
        found = self.pipe.encode_prompt(prompts, device=device)
        return found[0], found[1], ids

    # Predictions --------------------------------------------------------------------------------

    def predict(
        self,
        latents: Tensor,
        t: Tensor,
        text: Conditions,
        owner: Conditions | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Return the model's prediction of noise, velocity or flow.

        Args:
            latents: [B, C, h, w], scaled for the model's input.
            t: Time steps [B] or a scalar, in training units [0, 1000).
            text: Conditions, B rows.
            owner: The prompt whose image each row serves, for edits; None: `text` itself.
            guidance: Distilled guidance of FLUX.1-dev; others ignore it.
        """
        for edit in self.active_edits():
            edit.before_predict(self._itself, owner or text)
        t = t.to(latents.device).expand(len(latents))
        if self.family == "sd":
            out = self.denoiser(latents, t, encoder_hidden_states=text.embeds, return_dict=False)
        elif self.family == "sdxl":
            extra = {"text_embeds": text.pooled, "time_ids": self._time_ids(latents)}
            out = self.denoiser(
                latents,
                t,
                encoder_hidden_states=text.embeds,
                added_cond_kwargs=extra,
                return_dict=False,
            )
        elif self.family == "sd3":
            out = self.denoiser(
                hidden_states=latents,
                timestep=t,
                encoder_hidden_states=text.embeds,
                pooled_projections=text.pooled,
                return_dict=False,
            )
        else:
            return self._predict_flux(latents, t, text, guidance)
        prediction: Tensor = out[0]
        return prediction

    def guided(
        self,
        latents: Tensor,
        t: Tensor,
        text: Conditions,
        negative: Conditions,
        guidance: float,
    ) -> Tensor:
        """Return e0 + guidance · (e(text) - e0), both by ONE pass over 2B rows, [B, C, h, w].

        At guidance 1 the unconditional half is left out.
        """
        if guidance == 1.0:
            return self.predict(latents, t, text)
        both = self.predict(
            torch.cat([latents, latents]),
            t.to(latents.device).expand(len(latents)).repeat(2),
            cat([negative, text]),
            owner=cat([text, text]),
        )
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _time_ids(self, latents: Tensor) -> Tensor:
        height, width = (side * self.scale_factor for side in latents.shape[-2:])
        row = torch.tensor([height, width, 0, 0, height, width], dtype=latents.dtype)
        return row.to(latents.device).expand(len(latents), -1)

    def _predict_flux(
        self, latents: Tensor, t: Tensor, text: Conditions, guidance: float
    ) -> Tensor:
        count, channels, height, width = latents.shape
        tokens = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
        tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * 4)
        place = torch.zeros(height // 2, width // 2, 3, device=latents.device, dtype=latents.dtype)
        place[..., 1] = torch.arange(height // 2, device=latents.device)[:, None]
        place[..., 2] = torch.arange(width // 2, device=latents.device)
        strength = None
        if self.denoiser.config.guidance_embeds:
            strength = torch.full((count,), guidance, device=latents.device, dtype=latents.dtype)
        found = self.denoiser(
            hidden_states=tokens,
            timestep=t / self.noising.steps,
            guidance=strength,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embeds,
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=latents.device),
            img_ids=place.reshape(-1, 3),
            return_dict=False,
        )[0]
        grid: Tensor = found.reshape(count, height // 2, width // 2, channels, 2, 2)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    # Images -------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents [B, C, h, w] of images in [-1, 1].

        Args:
            images: [B, 3, H, W].
            noise: Standard normal of the latents' shape, to sample the posterior; None: its mean.
        """
        found = self.vae.encode(images).latent_dist
        latents = found.mean if noise is None else found.mean + found.std * noise
        return self.scale_latents(latents)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return codec latents in the model's scale."""
        config = self.vae.config
        scaled: Tensor = (latents - (getattr(config, "shift_factor", None) or 0.0)) * (
            config.scaling_factor
        )
        return scaled

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """Return uint8 images [B, 3, H, W] of scaled latents.

        Raises:
            DataError: Latents or images are not finite.
        """
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        images = self.vae.decode(unscaled.to(next(self.vae.parameters()).dtype)).sample.float()
        if not torch.isfinite(images).all():
            raise DataError(
                "generated images are not finite: the model is broken, or half precision "
                "overflowed (run in float32: runtime.precision=no)"
            )
        made: Tensor = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return made


def quiet() -> None:
    """Turn off the libraries' progress bars: among ours they say nothing."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def open_pipeline(source: str, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """Open a pipeline folder or hub id.

    Raises:
        DataError: It is no pipeline of a family known here, or a component is missing or wrong.
    """
    import diffusers

    quiet()
    place = Path(source).expanduser()
    if place.is_dir():
        _check_folder(place)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(place) if place.is_dir() else source, dtype=dtype
        )
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(
            f"model.pipeline={source} cannot be opened ({reason}). Give a folder written by "
            f"save_pretrained, or a hub id that can be downloaded"
        ) from error
    return from_pipe(pipe, source)


def from_pipe(pipe: Any, source: str = "") -> DiffusionModel:
    """Return the model of a diffusers pipeline that is already open; it keeps the very modules.

    Raises:
        DataError: Its class is of no family known here.
    """
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise DataError(f"a {name} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    denoiser = "unet" if family in ("sd", "sdxl") else "transformer"
    components = dict(pipe.components)
    trained = {denoiser: components.pop(denoiser)}
    for key in ENCODERS:
        if components.get(key) is not None:
            trained[key] = components.pop(key)
    vae = components.pop("vae").eval().requires_grad_(False)
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    parts = {k: (None if k in unused else v) for k, v in components.items()}
    if ZEROS in pipe.config:
        parts[ZEROS] = pipe.config[ZEROS]
    noising = Noising(components["scheduler"], even=family == "flux")
    shared = Shared(type(pipe), family, vae, parts, noising, source)
    return DiffusionModel(shared, trained).eval()


def _check_folder(folder: Path) -> None:
    """Check that a folder's index names a known pipeline and that its components are there."""
    index = folder / "model_index.json"
    if not index.is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise DataError(
            f"{folder} holds no model_index.json but {held}; give the folder that save_pretrained "
            f"wrote"
        )
    try:
        content = json.loads(index.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{index} is no JSON: {error}") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    if name not in FAMILIES:
        raise DataError(f"{index} names {name}; supported are {', '.join(FAMILIES)}")
    denoiser = "unet" if FAMILIES[name] in ("sd", "sdxl") else "transformer"
    for part in ("scheduler", "vae", "text_encoder", "tokenizer", denoiser):
        if not isinstance(content.get(part), list) or content[part][0] is None:
            raise DataError(f"{index} lists no {part}; the pipeline is not complete")
        if not (folder / part).is_dir():
            raise DataError(f"{folder} has no folder {part}; the pipeline is not complete")
