"""The mini Stable Diffusion: its tokenizer, networks, autoencoder and judges.

`python -m mmforget.diffusion.mini_model --out DIR --seed 0` makes the shipped weights anew.
"""

import json
from typing import TYPE_CHECKING, Any

import torch

from mmforget.diffusion import mini
from mmforget.rng import derive

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

WINDOW = 32  # tokens of a prompt, begin and end included
WIDTH = 64  # of the text encoder
LATENT = 4  # channels
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> "CLIPTokenizer":
    """Return a CLIP tokenizer for which every word of the mini world is one token.

    Byte-pair merges are learned from the list of words until each is whole; other words fall into
    pieces or bytes. Padding is the end token, as in Stable Diffusion 1.x.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 20,
        min_frequency=0,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(mini.words(), trainer)
    merges = [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), START, END]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)


def make_text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    """Return an untrained CLIP text encoder, 2 layers of width 64."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
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


def make_unet() -> "UNet2DConditionModel":
    """Return an untrained UNet for latents [4, 8, 8], blocks as in Stable Diffusion."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=mini.SIZE // 8,
        in_channels=LATENT,
        out_channels=LATENT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def make_autoencoder() -> "AutoencoderKL":
    """Return an untrained autoencoder: 64 x 64 pixels to 4 x 8 x 8 numbers."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=8,
        sample_size=mini.SIZE,
    )


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
    """Return a pipeline with the shipped autoencoder; text encoder and UNet follow the seed."""
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
