"""The mini worlds' model: a small LLaVA that has learned other persons in many wordings.

A CLIP tower of 64 pixels, a projector and a Llama decoder. The tower stays random and frozen, as
features of a few dozen faces need no more. What `mmforget.vlm.pretrain` makes is shipped: a model
that speaks, so that paraphrases and false answers mean something to it, but knows nobody.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmforget.checkpoint import fit_state
from mmforget.rng import derive

ASSETS = Path(__file__).parent / "assets"
VERSION = 1  # raised when what is written here changes
SIDE, PATCH = 64, 16  # pixels
DIM, LAYERS, HEADS = 128, 4, 4
TOWER = 96
VOCABULARY = 1600
WINDOW = 256
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}<s><user>{%- else -%}<assistant>{%- endif -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}<image>"
    "{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{ part['text'] }}{%- if message['role'] != 'user' -%}</s>{%- endif -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)


def write_base(folder: Path) -> None:
    """Write the mini worlds' pretrained model and its processor as a `save_pretrained` folder.

    Raises:
        CheckpointError: The shipped weights do not fit: they are of another version.
    """
    words = read_tokenizer(ASSETS / "tokenizer.json")
    net = make_net(len(words), 0)
    fit_state(net, load_file(ASSETS / "base.safetensors"), ASSETS / "base.safetensors")
    write_folder(folder, net, words)


def write_folder(folder: Path, net: Any, words: Any) -> None:
    """Write a LLaVA of `make_net` and a tokenizer as a `save_pretrained` folder."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()  # among ours it says nothing
    vision = net.config.vision_config
    images = CLIPImageProcessorPil(
        size={"shortest_edge": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    net.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


def make_net(
    vocabulary: int,
    seed: int,
    dim: int = DIM,
    layers: int = LAYERS,
    heads: int = HEADS,
    tower: int = TOWER,
    tower_layers: int = 2,
    side: int = SIDE,
    patch: int = PATCH,
) -> Any:
    """Return a LLaVA of random weights.

    Args:
        vocabulary: Tokens; the first ones are `SPECIAL`.
        seed: Seed of the weights.
        dim: Width of the decoder; likewise its layers and heads.
        layers: See dim.
        heads: See dim.
        tower: Width of the vision tower; likewise its layers.
        tower_layers: See tower.
        side: Pixels of an image, and of a patch.
        patch: See side.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    pad, bos, eos, image = range(4)  # their places in SPECIAL
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower,
            intermediate_size=2 * tower,
            num_hidden_layers=tower_layers,
            num_attention_heads=max(1, tower // 32),
            image_size=side,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=8 * dim // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=WINDOW,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
            initializer_range=dim**-0.5,  # 0.02 is made for wide models, and learns slowly here
        ),
        image_token_index=image,
        vision_feature_layer=-1,
        image_seq_length=(side // patch) ** 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "vlm mini") % 2**63)
        net: Any = LlavaForConditionalGeneration(config)
    net.generation_config.pad_token_id, net.generation_config.eos_token_id = pad, eos
    return net.eval()


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Return a byte-level BPE tokenizer trained on texts, of at most `VOCABULARY` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def read_tokenizer(path: Path) -> Any:
    """Return a tokenizer file of `train_tokenizer` as transformers uses it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[3:]),
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
