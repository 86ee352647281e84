"""Tiny random pipelines of each family, made in a second, and data for tests of methods."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from mmforget.context import Context
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.models import DiffusionModel, from_pipe
from mmforget.engine import Engine, Runtime
from mmforget.types import Splits, Subset, UnlearningMethod

WORDS = [
    "a",
    "an",
    "image",
    "photo",
    "of",
    "in",
    "style",
    "the",
    "dog",
    "cat",
    "bird",
    "tree",
    "monet",
    "crayon",
    "winter",
    "painting",
    "art",
]
SIDE = 8  # latents; the codec halves once: images are 16 pixels
DIM = 32  # of text embeddings


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """A CLIP tokenizer whose words are one token each."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocab = {t: i for i, t in enumerate(letters + [f"{t}</w>" for t in letters])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
            parts = ["".join(pair), *parts[2:]]
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocab[mark] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def text_encoder(seed: int, projection: bool = False) -> nn.Module:
    """A CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=DIM,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_factor=4.0,  # so that prompts differ in an untrained encoder
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def codec(channels: int, shift: float | None = None) -> nn.Module:
    """A random AutoencoderKL of factor 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=16,
        shift_factor=shift,
    ).eval()


def unet(seed: int, **extra: Any) -> nn.Module:
    """A random UNet with cross-attention at sides 8 and 4."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": DIM,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    made = UNet2DConditionModel(**{**settings, **extra}).eval()
    with torch.no_grad():  # an untrained output layer of zeros would hide differences
        made.conv_out.weight.normal_(0, 0.2)
    return made


def pipeline(family: str = "sd", seed: int = 0) -> Any:
    """A diffusers pipeline of a family: "sd", "sdxl", "sd3" or "flux"."""
    import diffusers

    if family == "sd":
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=False,
        )
        return diffusers.StableDiffusionPipeline(
            vae=codec(4),
            text_encoder=text_encoder(seed),
            tokenizer=tokenizer(),
            unet=unet(seed),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            vae=codec(4),
            text_encoder=text_encoder(seed),
            text_encoder_2=text_encoder(seed + 1, projection=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(
                seed,
                cross_attention_dim=2 * DIM,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + DIM,
            ),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
        )
    torch.manual_seed(seed)
    if family == "sd3":
        transformer: nn.Module = diffusers.SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * DIM,
            caption_projection_dim=32,
            pooled_projection_dim=2 * DIM,
            out_channels=4,
            pos_embed_max_size=16,
        )
        return diffusers.StableDiffusion3Pipeline(
            transformer=_awake(transformer),
            vae=codec(4, shift=0.1),
            text_encoder=text_encoder(seed, projection=True),
            text_encoder_2=text_encoder(seed + 1, projection=True),
            text_encoder_3=None,
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            tokenizer_3=None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        pooled_projection_dim=DIM,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        transformer=_awake(transformer),
        vae=codec(4, shift=0.1),
        text_encoder=text_encoder(seed),
        text_encoder_2=_t5(seed),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
    )


def model(family: str = "sd", seed: int = 0) -> DiffusionModel:
    """The model of a tiny random pipeline."""
    return from_pipe(pipeline(family, seed))


def _awake(transformer: nn.Module) -> nn.Module:
    """Give zero-initialised layers random weights, so that text and time matter."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return transformer.eval()


def _t5(seed: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed + 2)
    config = T5Config(
        vocab_size=len(tokenizer()), d_model=DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    return T5EncoderModel(config).eval()


class Pictures:
    """A data set of random latents with captions.

    Args:
        captions: One an image.
        anchors: Their anchor captions.
        seed: Seed of the latents.
    """

    def __init__(self, captions: Sequence[str], anchors: Sequence[str], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.captions = list(captions)
        self.anchors = list(anchors)
        shape = (len(captions), 4, SIDE, SIDE)
        mean = rng.normal(size=shape) * 4.0
        logvar = np.full(shape, -6.0)
        self.moments = torch.from_numpy(np.concatenate([mean, logvar], axis=1)).float()
        self.ids = [f"s{seed}-{k}" for k in range(len(captions))]
        self.digests = self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return moments [B, 8, 8, 8] and captions."""
        return {
            "moments": self.moments[list(indices)],
            "captions": [[self.captions[i]] for i in indices],
            "anchors": [[self.anchors[i]] for i in indices],
        }


def erasure() -> Erasure:
    """The request: erase the style monet; keep crayon, and all objects."""
    objects = ("dog", "cat", "bird")
    concept = Concept(
        name="monet",
        kind="style",
        text="monet style",
        anchor="photo style",
        prompts=tuple(f"a {o} image in monet style" for o in objects),
        anchors=tuple(f"a {o} image in photo style" for o in objects),
    )
    return Erasure(
        concepts=(concept,),
        preserve=("crayon style", "winter style"),
        retain=tuple(f"a {o} image in crayon style" for o in objects),
    )


def splits(count: int = 8) -> Splits:
    """Forget: monet; retain: crayon; unseen ones of both."""
    objects = ("dog", "cat", "bird", "tree")
    monet = [f"a {objects[k % 4]} image in monet style" for k in range(count)]
    photo = [f"a {objects[k % 4]} image in photo style" for k in range(count)]
    crayon = [f"a {objects[k % 4]} image in crayon style" for k in range(count)]
    train = Pictures(monet + crayon, photo + crayon, seed=1)
    return Splits(
        forget=Subset(train, range(count)),
        retain=Subset(train, range(count, 2 * count)),
        train=train,
        holdout=Pictures(monet, photo, seed=2),
        test=Pictures(crayon, crayon, seed=3),
    )


def context(
    made: DiffusionModel,
    method: UnlearningMethod[Any],
    target: Erasure | None = None,
    data: Splits | None = None,
    seed: int = 0,
) -> Context:
    """The context in which a pipeline runs a method."""
    return Context(
        engine=Engine(Runtime(device="cpu", threads=1, progress=False)),
        adapter=DiffusionAdapter(made.noising, made.scale_latents),
        model=made,
        splits=data or splits(),
        reads=method.reads,
        label="test",
        seed=seed,
        target=target or erasure(),
    )


def changed(before: DiffusionModel, after: DiffusionModel) -> set[str]:
    """Return the names of the parameters that differ."""
    old = dict(before.named_parameters())
    return {n for n, p in after.named_parameters() if n not in old or not torch.equal(p, old[n])}
