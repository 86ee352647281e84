"""The mini Stable Diffusion: its tokenizer, networks, autoencoder and judges.

The weights in `assets/` are made by `mini_training`.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmforget.checkpoint import fit_state
from mmforget.diffusion import mini
from mmforget.diffusion.classifiers import Classifier
from mmforget.rng import derive

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    from mmforget.diffusion.models import DiffusionModel

ASSETS = Path(__file__).with_name("assets")
ORIGINAL = ASSETS / "original.safetensors"
PIXELS = 32  # side of the images that the model draws
WINDOW = 32  # tokens of a prompt, begin and end included
WIDTH = 64  # of the text encoder
LATENT = 8  # channels
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> "CLIPTokenizer":
    """Return a CLIP tokenizer for which every word of the mini world is one token.

    Byte-pair merges are learned from the list of words until each is whole; other words fall into
    pieces or bytes. Padding is the end token, as in Stable Diffusion 1.x.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(mini.words())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), START, END]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    found: Any = merges  # typed as lines of a file; pairs are taken too
    return CLIPTokenizer(vocab=vocab, merges=found, model_max_length=WINDOW)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, the most frequent pair first, until every word is whole.

    Ties go to the last pair in the order of strings. The trainer of `tokenizers` breaks them by
    chance, so token ids would differ from one process to the next.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    counts: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, pieces in enumerate(split):
        for pair in pairwise(pieces):
            counts[pair] += 1
            places[pair].add(index)
    merges = []
    while counts:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for index in tuple(places[best]):
            old, new = split[index], _joined(split[index], best)
            counts.subtract(pairwise(old))
            counts.update(pairwise(new))
            split[index] = new
            for pair in pairwise(old):
                places[pair].discard(index)
            for pair in pairwise(new):
                places[pair].add(index)
        counts = +counts  # drops pairs that are gone
    return merges


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def make_text_encoder(tokenizer: "CLIPTokenizer", trained: bool = True) -> "CLIPTextModel":
    """Return the CLIP text encoder, 2 layers of width 64.

    Args:
        tokenizer: Its tokenizer.
        trained: With the shipped weights, which know the words' meanings, else untrained.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    made: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=WINDOW,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if trained:
        made.load_state_dict(_shipped("text_encoder."))
    encoder: CLIPTextModel = made.eval()
    return encoder


def make_unet() -> "UNet2DConditionModel":
    """Return an untrained UNet for latents [8, 8, 8], blocks as in Stable Diffusion."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        in_channels=LATENT,
        out_channels=LATENT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(40, 80),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def make_autoencoder(trained: bool = True) -> "AutoencoderKL":
    """Return the autoencoder: 32 x 32 pixels to 8 x 8 x 8 numbers of standard deviation 1.

    Args:
        trained: With the shipped weights, else untrained.
    """
    from diffusers import AutoencoderKL

    made: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=8,
        sample_size=PIXELS,
        scaling_factor=1.0,
    )
    if trained:
        state = _shipped("autoencoder.")
        made.register_to_config(scaling_factor=float(state.pop("scaling_factor")))
        made.load_state_dict(state)
    made.eval()
    codec: AutoencoderKL = made
    return codec


def make_classifier(classes: int) -> nn.Module:
    """Return an untrained classifier of images, about 0.1 M weights."""
    import timm

    made: nn.Module = timm.create_model(
        "resnet10t",
        pretrained=False,
        num_classes=classes,
        stem_width=16,
        channels=(16, 32, 64, 96),
        output_stride=8,
    )
    return made


def load_classifiers(device: str | torch.device = "cpu") -> tuple[Classifier, Classifier]:
    """Return the shipped classifiers of styles (photos among them) and objects."""
    made = []
    for name, labels in (("style", mini.THEMES), ("object", mini.OBJECTS)):
        network = make_classifier(len(labels))
        network.load_state_dict(_shipped(f"{name}."))
        title = f"mini {name} classifier"
        made.append(Classifier(network, labels, PIXELS, title, 256, device=device))
    return made[0], made[1]


def load_original(model: "DiffusionModel", recipe: str) -> bool:
    """Load the shipped denoiser into a mini pipeline's model, if that very recipe made it.

    Args:
        model: The mini pipeline's model.
        recipe: What decides its weights, as `ship_original` was given it.

    Returns:
        Whether it was loaded; the model is as it was if not.
    """
    if not ORIGINAL.is_file():
        return False
    with safe_open(str(ORIGINAL), "pt") as opened:
        if (opened.metadata() or {}).get("recipe") != recipe:
            return False
    fit_state(model.denoiser, shipped_unet(), ORIGINAL)
    return True


def shipped_unet() -> dict[str, Tensor]:
    """Return the weights of the shipped original's UNet, float32."""
    return {name: value.float() for name, value in load_file(ORIGINAL).items()}


def ship_original(model: "DiffusionModel", recipe: str, path: Path) -> None:
    """Write a trained mini pipeline's denoiser, all that training changes, in half precision."""
    state = {
        name: value.half().detach().cpu().contiguous()
        for name, value in model.denoiser.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {"recipe": recipe})


def _shipped(prefix: str) -> dict[str, Tensor]:
    """Return the shipped weights below a prefix, as float32 (counters as they are)."""
    state = load_file(ASSETS / "mini.safetensors")
    return {
        name.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if name.startswith(prefix)
    }


def make_scheduler() -> "DDIMScheduler":
    """Return DDIM with the noise schedule of Stable Diffusion 1.x."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def make_pipeline(seed: int) -> "StableDiffusionPipeline":
    """Return a pipeline with the shipped autoencoder and text encoder; the UNet is untrained."""
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "mini", "pipeline"))
        tokenizer = make_tokenizer()
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": make_text_encoder(tokenizer),
            "unet": make_unet(),
            "vae": make_autoencoder(),
            "scheduler": make_scheduler(),
        }
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
