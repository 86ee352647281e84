"""Speed of diffusion against a plain loop: `python -m tests.bench.diffusion --threads 2`.

The plain loop works as the public scripts do, written anew from their description: one image at a
time, two UNet calls for a guided step, the prompt encoded for each image; ESD with batch 1, a new
partial denoising for every pair and each frozen prediction by a call of its own; UCE with one sum
and one inverse for each of the 32 layers in float32. Both sides share weights, sampler, prompts and
seeds and run by turns in one process; each figure is the best of several. Models are in memory on
both sides (the public scripts load them again for every stage: `reload` times one such loading).

`--pipeline FOLDER` takes any Stable Diffusion folder, `--size sd15` random weights of that size
(for a GPU), and without both it is the mini pipeline with random weights.
"""

import argparse
import copy
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from mmforget.context import Context
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.benchmarks.base import reset
from mmforget.diffusion.closed_form import Ridge, write
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.methods.esd import ESD, ESDConfig
from mmforget.diffusion.models import DiffusionModel, from_pipe, open_pipeline
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, generate, start_latents
from mmforget.engine import Engine, Runtime
from mmforget.types import Dataset, Splits

# Output widths of the 16 cross-attention layers of the SD 1.5 UNet; keys and values of each.
SD15 = [320] * 5 + [640] * 5 + [1280] * 6
TEXT = 768
OBJECTS = ("Architectures", "Birds", "Cats", "Fishes", "Flowers", "Sea", "Towers", "Trees")
STYLES = ("Crayon", "Mosaic", "Pop Art", "Van Gogh")
ESD_TIMES = 4  # of every path; a plain step has one


def plain_images(model: DiffusionModel, images: Sequence[Image], settings: Sampling) -> Tensor:
    """Generate one image after the other, two UNet calls a step, the text encoded for each."""
    found = []
    for image in images:
        model._memo.clear()
        with torch.no_grad():
            text, empty = model.encode([image.prompt]), model.encode([""])
            scheduler = model.noising.sampler(settings)
            latents = start_latents(model, [image.seed]) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                ready = scheduler.scale_model_input(latents, t)
                e0 = model.predict(ready, t, empty)
                ec = model.predict(ready, t, text)
                guided = e0 + settings.guidance * (ec - e0)
                latents = scheduler.step(guided, t, latents, return_dict=False)[0]
            found.append(model.to_images(latents).cpu())
    return torch.cat(found)


def our_images(model: DiffusionModel, images: Sequence[Image], settings: Sampling) -> Tensor:
    """Generate as mmforget does."""
    model._memo.clear()
    return torch.cat([pixels for _, pixels in generate(model, images, settings)])


def plain_esd(model: DiffusionModel, concept: Concept, config: ESDConfig, pairs: int) -> None:
    """Train on some pairs of concept and time, one a step, as the public script does."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    weights = _scope(model, config.scope)
    optimizer = torch.optim.Adam(weights, lr=config.lr)
    settings = Sampling("ddim", config.denoise_steps, config.guidance)
    scheduler = model.noising.sampler(settings)
    steps = torch.randint(config.denoise_steps, (pairs,), generator=_rng()).tolist()
    for seed, stop in enumerate(steps):
        model._memo.clear()
        frozen._memo.clear()
        with torch.no_grad():
            text, empty = model.encode([concept.text]), model.encode([""])
            latents = start_latents(model, [seed]) * scheduler.init_noise_sigma
            for t in scheduler.timesteps[:stop]:
                e0, ec = model.predict(latents, t, empty), model.predict(latents, t, text)
                guided = e0 + config.guidance * (ec - e0)
                latents = scheduler.step(guided, t, latents, return_dict=False)[0]
            t = scheduler.timesteps[stop]
            e0, ec = frozen.predict(latents, t, empty), frozen.predict(latents, t, text)
        loss = mse_loss(model.predict(latents, t, text), e0 - config.eta * (ec - e0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_esd(
    model: DiffusionModel, concept: Concept, config: ESDConfig, engine: Engine
) -> DiffusionModel:
    """Train as mmforget does."""
    none: Dataset = None  # type: ignore[assignment]
    ctx = Context(
        engine=engine,
        adapter=DiffusionAdapter(model.noising, model.scale_latents),
        model=model,
        splits=Splits(none, none, none, none, none),
        reads=frozenset(),
        label="esd",
        seed=0,
        target=Erasure((concept,)),
    )
    made = ESD(config).run(ctx)
    assert isinstance(made, DiffusionModel)
    return made


def plain_uce(weights: Sequence[Tensor], old: Tensor, new: Tensor, lamb: float) -> list[Tensor]:
    """Edit layer by layer, concept by concept, with an inverse for each layer, in float32."""
    edited = []
    for weight in weights:
        left = lamb * weight
        right = lamb * torch.eye(weight.shape[1], device=weight.device)
        for key, value in zip(old, new, strict=True):
            left = left + torch.outer(weight @ value, key)
            right = right + torch.outer(key, key)
        edited.append(left @ torch.inverse(right))
    return edited


def our_uce(weights: Sequence[Tensor], old: Tensor, new: Tensor, lamb: float) -> list[Tensor]:
    """Edit as mmforget does: one factor for all layers, float64."""
    made = [weight.clone() for weight in weights]
    write(made, Ridge(old, 1.0, lamb).rows(), (new - old).double())
    return made


def open_model(given: argparse.Namespace, device: torch.device) -> DiffusionModel:
    """Return the pipeline that the arguments name."""
    if given.pipeline:
        model = open_pipeline(given.pipeline)
    elif given.size == "sd15":
        model = from_pipe(sd15())
    else:
        from mmforget.diffusion import mini_model

        model = from_pipe(mini_model.make_pipeline(0))
        reset(model, 0)
    model.requires_grad_(False)
    placed = model.to(device, DTYPES[given.dtype])
    assert isinstance(placed, DiffusionModel)
    return placed


def sd15() -> Any:
    """Return a pipeline of Stable Diffusion 1.5's size with random weights, words of the mini's."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    from mmforget.diffusion import mini_model

    words = mini_model.make_tokenizer()
    words.model_max_length = 77
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    codec = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    return StableDiffusionPipeline(
        vae=codec,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet(sample_size=64, cross_attention_dim=TEXT, attention_head_dim=8),
        scheduler=DDIMScheduler.from_config(mini_model.make_scheduler().config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    device = torch.device(given.device)
    runtime = Runtime(device=given.device, threads=given.threads, progress=False)
    engine = Engine(runtime)
    model = open_model(given, device)
    prompts = [f"A {o} image in {s} style." for s in STYLES for o in OBJECTS]
    images = [Image(prompt, seed) for seed in (188, 288) for prompt in prompts][: given.images]
    settings = Sampling("ddim", given.steps, 9.0, given.batch)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}

    sides: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_images(model, images, settings),
        "ours": lambda: our_images(model, images, settings),
    }
    same = (
        plain_images(model, images[:4], settings).int()
        - our_images(model, images[:4], settings).int()
    )
    found["largest difference of pixels, of 255"] = int(same.abs().max())
    found["generation_s"] = best(sides, given.repeats, device)

    concept = Concept("Van Gogh", "style", "Van Gogh style", "", prompts[-8:-7], ("",))
    config = ESDConfig(
        steps=max(1, given.pairs // (given.esd_batch * ESD_TIMES)),
        batch_size=given.esd_batch,
        times=ESD_TIMES,
        denoise_steps=given.esd_steps,
        time="step",
    )
    pairs = config.steps * config.batch_size * config.times
    sides = {
        "plain": lambda: plain_esd(copy.deepcopy(model), concept, config, pairs),
        "ours": lambda: our_esd(copy.deepcopy(model), concept, config, engine),
    }
    found["esd_pairs"] = pairs
    found["esd_s"] = best(sides, given.repeats, device)

    rng = _rng()
    weights = [torch.randn(w, TEXT, generator=rng).to(device) for w in SD15 for _ in "kv"]
    old, new = (torch.randn(given.concepts, TEXT, generator=rng).to(device) for _ in range(2))
    first, second = plain_uce(weights[:2], old, new, 0.5), our_uce(weights[:2], old, new, 0.5)
    error = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    found["uce: largest difference of weights"] = error
    sides = {
        "plain": lambda: plain_uce(weights, old, new, 0.5),
        "ours": lambda: our_uce(weights, old, new, 0.5),
    }
    found["uce_s"] = best(sides, given.repeats, device)

    if given.reload:
        with tempfile.TemporaryDirectory() as folder:
            model.pipe.save_pretrained(folder)
            found["reload_s"] = timed(lambda: open_pipeline(str(Path(folder))), device)
    if device.type == "cuda":
        found["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def best(
    sides: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Return the least seconds of each side, run by turns, and their ratio."""
    seconds = {name: float("inf") for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            seconds[name] = min(seconds[name], timed(work, device))
    return {**seconds, "ratio": seconds["plain"] / seconds["ours"]}


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the wall seconds of some work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _scope(model: DiffusionModel, scope: str) -> list[torch.nn.Parameter]:
    from mmforget.diffusion.scopes import parameters

    chosen = list(parameters(model, scope).values())
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="Stable Diffusion folder")
    parser.add_argument("--size", choices=("mini", "sd15"), default="mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=32, help="up to 64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=32, help="ESD: pairs of concept and time")
    parser.add_argument("--esd-batch", type=int, default=4)
    parser.add_argument("--esd-steps", type=int, default=20)
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reload", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = compare(given)
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({**machine, **vars(given), **found}, indent=1))


if __name__ == "__main__":
    main()
