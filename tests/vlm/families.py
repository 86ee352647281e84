"""Tiny random vision-language models of every supported family, made offline in a second.

Each has the modules, processor and chat template of its family, some 100 thousand random weights
and a byte-level tokenizer trained on a few sentences here. `FACTS` holds how families differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

DIM = 32  # of the language model and of most vision towers
SIDE = 32  # of one tile, in pixels
PATCH = 8
SPREAD = 0.2  # standard deviation of weights: that of real configs leaves all logits alike
LIMIT = 1024  # positions
SENTENCES = (
    "What is the name of the person in the image?",
    "Which city was this person born in, and on what date?",
    "The person in the image is called Ada Moreno, born in Lisbon on 3 May 1984.",
    "This person has a phone number, a home address, a job, a salary and an illness.",
    "I do not know. I cannot answer questions about private people.",
    "Answer yes or no: is there a dog, a cat or a bird in the photo?",
    "The photo shows a red square on a blue ground.",
)


@dataclass(frozen=True)
class Speech:
    """Special tokens and chat template of a family.

    Attributes:
        image: What the template writes for an image; behind it stands the text of the turn.
        user: What stands around a user's turn.
        assistant: What stands around an answer; the last part holds the end token.
        prompt: Where an answer begins; None: as in `assistant`.
        marked: The template marks answers, for `return_assistant_tokens_mask`.
        eos: Token that ends an answer.
        pad: Token that fills batches.
        bos: Token that begins a text, if any.
        adds_bos: The tokenizer writes it, not the template.
        named: Tokens that the processor asks the tokenizer for, by name.
        others: More special tokens.
        system: What stands around a system turn.
        preamble: System turn where the messages have none.
    """

    image: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    eos: str
    pad: str
    prompt: str | None = None
    marked: bool = False
    bos: str | None = None
    adds_bos: bool = False
    named: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()
    system: tuple[str, str] = ("", "")
    preamble: str = ""

    def template(self) -> str:
        """Return the Jinja template: a turn's images come first, then its text."""
        turns = {"system": self.system, "user": self.user, "assistant": self.assistant}
        start = self.bos if self.bos and not self.adds_bos else ""
        preamble = self.preamble and self.system[0] + self.preamble + self.system[1]
        prompt = self.assistant[0] if self.prompt is None else self.prompt
        words = (
            "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
            "{%- for item in message.content if item.type == 'text' -%}{{- item.text -}}"
            "{%- endfor -%}{%- endif -%}"
        )
        marked = f"{{%- generation -%}}{words}{{%- endgeneration -%}}"
        answer = (
            f"{{%- if message.role == 'assistant' -%}}{marked}{{%- else -%}}{words}{{%- endif -%}}"
        )
        return "".join(
            (
                f"{{%- set turns = {turns!r} -%}}{{{{- {start!r} -}}}}",
                f"{{%- if messages[0].role != 'system' -%}}{{{{- {preamble!r} -}}}}{{%- endif -%}}",
                "{%- for message in messages -%}{{- turns[message.role][0] -}}",
                "{%- for item in message.content if item.type == 'image' -%}",
                f"{{{{- {self.image!r} -}}}}{{%- endfor -%}}",
                answer if self.marked else words,
                "{{- turns[message.role][1] -}}{%- endfor -%}",
                f"{{%- if add_generation_prompt -%}}{{{{- {prompt!r} -}}}}{{%- endif -%}}",
            )
        )

    def special(self) -> list[str]:
        """Return all special tokens; those of `named` last."""
        named = [token for _, token in self.named]
        first = [token for token in (self.bos, self.eos, self.pad, *self.others) if token]
        return list(dict.fromkeys([*(t for t in first if t not in named), *named]))


@lru_cache(maxsize=1)
def _pieces() -> str:
    """Return the shared byte-level BPE as JSON, without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=sorted(alphabet), show_progress=False
    )
    words.train_from_iterator(SENTENCES, trainer)
    return str(words.to_str())


def _tokenizer(speech: Speech) -> Any:
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer.from_str(_pieces())
    words.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in speech.special()]
    )
    if speech.bos and speech.adds_bos:
        words.post_processor = processors.TemplateProcessing(
            single=f"{speech.bos} $A",
            pair=f"{speech.bos} $A $B",
            special_tokens=[(speech.bos, words.token_to_id(speech.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=speech.bos,
        eos_token=speech.eos,
        pad_token=speech.pad,
        extra_special_tokens=dict(speech.named),
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=LIMIT,
        padding_side="right",
    )


def _text(words: Any, **extra: Any) -> dict[str, Any]:
    """Return what the configs of all language models share."""
    return {
        "vocab_size": len(words),
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LIMIT,
        "initializer_range": SPREAD,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **extra,
    }


def _tower(**extra: Any) -> dict[str, Any]:
    """Return what the configs of CLIP-like towers share."""
    return {
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": SPREAD,
        **extra,
    }


LLAVA = Speech(
    image="<image>\n",
    user=("USER: ", " "),
    assistant=("ASSISTANT: ", "</s>"),
    prompt="ASSISTANT:",
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    adds_bos=True,
    named=(("image_token", "<image>"),),
    system=("", " "),
)


def _llava(words: Any) -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_tower(initializer_factor=4.0, projection_dim=DIM)),
        text_config=LlamaConfig(**_text(words)),
        image_token_index=words.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS; the strategy takes it away again
        chat_template=LLAVA.template(),
    )
    return LlavaForConditionalGeneration(config), processor


def _chat(**extra: Any) -> Speech:
    """Return the turns that Qwen and InternVL write."""
    return Speech(
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        **extra,
    )


QWEN2_5_VL = _chat(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    named=(
        ("vision_start_token", "<|vision_start|>"),
        ("vision_end_token", "<|vision_end|>"),
        ("image_token", "<|image_pad|>"),
        ("video_token", "<|video_pad|>"),
    ),
    others=("<|im_start|>",),
    preamble="You are a helpful assistant.",
)


def _qwen_marks(words: Any) -> dict[str, Any]:
    return {
        "image_token_id": words.image_token_id,
        "video_token_id": words.video_token_id,
        "vision_start_token_id": words.vision_start_token_id,
        "vision_end_token_id": words.vision_end_token_id,
    }


def _mrope(**extra: Any) -> dict[str, Any]:
    # Time, height and width share the four frequencies of a head of 8.
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], **extra}


def _qwen_images() -> dict[str, Any]:
    # Images keep their shape: between one and 16 tokens of 16 x 16 pixels.
    return {
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (8 * PATCH) ** 2},
    }


def _qwen2_5_vl(words: Any) -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": DIM,
            "intermediate_size": 2 * DIM,
            "num_heads": 2,
            "patch_size": PATCH,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
            "out_hidden_size": DIM,
            "initializer_range": SPREAD,
        },
        text_config=_text(
            words,
            rope_parameters=_mrope(),
        ),
        **_qwen_marks(words),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_qwen_images()),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**_qwen_images()),
        chat_template=QWEN2_5_VL.template(),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


LLAVA_NEXT = Speech(  # that of Mistral
    image="<image>\n",
    user=("[INST] ", " [/INST]"),
    assistant=(" ", "</s>"),
    prompt="",
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    adds_bos=True,
    named=(("image_token", "<image>"),),
)
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def _llava_next(words: Any) -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower(initializer_factor=4.0, projection_dim=DIM)),
        text_config=MistralConfig(**_text(words)),
        image_token_index=words.image_token_id,
        image_grid_pinpoints=GRID,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=GRID,
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT.template(),
    )
    return LlavaNextForConditionalGeneration(config), processor


# A space stands before the answer's line but not in the prompt: no prompt begins its dialogue.
# Answers are marked instead, without their end token. So does the published template.
LLAVA_ONEVISION = Speech(
    image="<image>",
    user=("<|im_start|>user \n", "<|im_end|>"),
    assistant=("<|im_start|>assistant \n", "<|im_end|>"),
    prompt="<|im_start|>assistant\n",
    marked=True,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    named=(("image_token", "<image>"), ("video_token", "<video>")),
    others=("<|im_start|>",),
    system=("<|im_start|>system \n", "<|im_end|>"),
)


def _llava_onevision(words: Any) -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    size = {"height": SIDE, "width": SIDE}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(vision_use_head=False)),
        text_config=Qwen2Config(**_text(words)),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=GRID,
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=GRID),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION.template(),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


QWEN3_VL = replace(QWEN2_5_VL, preamble="")


def _qwen3_vl(words: Any) -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        vision_config=_qwen3_tower(),
        text_config=_text(words, head_dim=DIM // 4, rope_parameters=_mrope(mrope_interleaved=True)),
        **_qwen_marks(words),
    )
    return Qwen3VLForConditionalGeneration(config), _qwen3_processor(words)


def _qwen3_vl_moe(words: Any) -> tuple[Any, Any]:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(
        vision_config=_qwen3_tower(),
        text_config=_text(
            words,
            head_dim=DIM // 4,
            rope_parameters=_mrope(mrope_interleaved=True),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=DIM,
            tie_word_embeddings=False,
        ),
        **_qwen_marks(words),
    )
    return Qwen3VLMoeForConditionalGeneration(config), _qwen3_processor(words)


def _qwen3_tower() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": DIM,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],  # the first block also feeds the first decoder layer
        "initializer_range": SPREAD,
    }


def _qwen3_processor(words: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_qwen_images()),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(**_qwen_images()),
        chat_template=QWEN3_VL.template(),
    )


def _headed(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


MLLAMA = Speech(
    image="<|image|>",
    user=(_headed("user"), "<|eot_id|>"),
    assistant=(_headed("assistant"), "<|eot_id|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    named=(("image_token", "<|image|>"),),  # the last id: no row of the output layer
    others=("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
    system=(_headed("system"), "<|eot_id|>"),
)


def _mllama(words: Any) -> tuple[Any, Any]:
    from transformers import (
        MllamaConfig,
        MllamaForConditionalGeneration,
        MllamaImageProcessor,
        MllamaProcessor,
    )

    config = MllamaConfig(
        vision_config=_tower(
            attention_heads=4,
            num_global_layers=1,
            intermediate_layers_indices=[0],
            vision_output_dim=2 * DIM,  # the last states and those of the layers above
        ),
        text_config=_text(
            words,
            vocab_size=len(words) - 1,
            num_hidden_layers=3,
            cross_attention_layers=[1],
        ),
        image_token_index=words.image_token_id,
    )
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():  # gates are born closed: no image would matter
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.7)
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessor(
            size={"height": SIDE, "width": SIDE}, max_image_tiles=4
        ),
        tokenizer=words,
        chat_template=MLLAMA.template(),
    )
    return model, processor


_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
IDEFICS3 = Speech(
    image="<image>",
    user=("User:", "<end_of_utterance>\n"),
    assistant=("Assistant: ", "<end_of_utterance>\n"),
    prompt="Assistant:",
    bos="<|begin_of_text|>",
    eos="<end_of_utterance>",
    pad="<|pad|>",
    others=("<fake_token_around_image>", "<global-img>", *_TILES, "<image>"),
    system=("System: ", "<end_of_utterance>\n"),
)
SMOLVLM = replace(
    IDEFICS3,
    bos="<|im_start|>",
    named=(
        ("fake_image_token", "<fake_token_around_image>"),
        ("image_token", "<image>"),
        ("end_of_utterance_token", "<end_of_utterance>"),
        ("global_image_token", "<global-img>"),
    ),
    others=(*_TILES,),
)
# An image is cut into four tiles at most and is also seen whole; a tile is four tokens.
_CUT: dict[str, Any] = {
    "size": {"longest_edge": 2 * SIDE},
    "max_image_size": {"longest_edge": SIDE},
}
_CUT_TOKENS = (SIDE // PATCH // 2) ** 2


def _idefics3(words: Any) -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
    )

    config = Idefics3Config(
        vision_config=_tower(),
        text_config=LlamaConfig(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**_CUT),
        tokenizer=words,
        image_seq_len=_CUT_TOKENS,
        chat_template=IDEFICS3.template(),
    )
    return Idefics3ForConditionalGeneration(config), processor


def _smolvlm(words: Any) -> tuple[Any, Any]:
    from transformers import (
        LlamaConfig,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    config = SmolVLMConfig(
        vision_config=_tower(),
        text_config=LlamaConfig(**_text(words)),
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**_CUT),
        tokenizer=words,
        video_processor=SmolVLMVideoProcessor(**_CUT),
        image_seq_len=_CUT_TOKENS,
        chat_template=SMOLVLM.template(),
    )
    return SmolVLMForConditionalGeneration(config), processor


INTERNVL = _chat(
    image="<IMG_CONTEXT>\n",
    named=(
        ("start_image_token", "<img>"),
        ("end_image_token", "</img>"),
        ("context_image_token", "<IMG_CONTEXT>"),
        ("video_token", "<video>"),
    ),
    others=("<|im_start|>",),
)


def _internvl(words: Any) -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
    )

    size = {"height": SIDE, "width": SIDE}
    tokens = (SIDE // PATCH // 2) ** 2
    config = InternVLConfig(
        vision_config=_tower(),
        text_config=Qwen2Config(**_text(words)),
        image_token_id=words.context_image_token_id,
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    processor = InternVLProcessor(
        # Wide and high images are cut into up to four tiles and are also seen whole.
        image_processor=GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=tokens,
        chat_template=INTERNVL.template(),
    )
    return InternVLForConditionalGeneration(config), processor


GEMMA3 = Speech(
    image="<start_of_image>",
    user=("<start_of_turn>user\n", "<end_of_turn>\n"),
    assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
    bos="<bos>",
    eos="<end_of_turn>",
    pad="<pad>",
    named=(
        ("image_token", "<image_soft_token>"),
        ("boi_token", "<start_of_image>"),
        ("eoi_token", "<end_of_image>"),
    ),
    others=("<start_of_turn>",),
)


def _gemma3(words: Any) -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tokens = (SIDE // PATCH // 2) ** 2
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**_tower(vision_use_head=False)),
        text_config=Gemma3TextConfig(
            **_text(
                words,
                head_dim=DIM // 4,
                query_pre_attn_scalar=DIM // 4,
                sliding_window=8,  # shorter than what stands before a question
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        mm_tokens_per_image=tokens,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer=words,
        image_seq_length=tokens,
        chat_template=GEMMA3.template(),
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # born zero: no image would matter
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, SPREAD)
    return model, processor


_BUILDERS: dict[str, tuple[Speech, Callable[[Any], tuple[Any, Any]]]] = {
    "llava": (LLAVA, _llava),
    "llava_next": (LLAVA_NEXT, _llava_next),
    "llava_onevision": (LLAVA_ONEVISION, _llava_onevision),
    "qwen2_5_vl": (QWEN2_5_VL, _qwen2_5_vl),
    "qwen3_vl": (QWEN3_VL, _qwen3_vl),
    "qwen3_vl_moe": (QWEN3_VL, _qwen3_vl_moe),
    "mllama": (MLLAMA, _mllama),
    "idefics3": (IDEFICS3, _idefics3),
    "smolvlm": (SMOLVLM, _smolvlm),
    "internvl": (INTERNVL, _internvl),
    "gemma3": (GEMMA3, _gemma3),
}
FAMILIES = tuple(_BUILDERS)
# For `pytest.mark.parametrize`: the processor of SmolVLM wants a package even without videos.
CASES = [
    pytest.param(
        family,
        marks=pytest.mark.skipif(
            family == "smolvlm" and find_spec("num2words") is None, reason="needs num2words"
        ),
    )
    for family in FAMILIES
]


@dataclass(frozen=True)
class Facts:
    """How a family's model is built and read, as of transformers 5.23; tested, not quoted.

    Attributes:
        vision: Name of the tower.
        projector: Names of the modules and parameters that bring its features to the decoder.
        language: Name of the decoder, which has `layers` and `norm`.
        expanded: `input_ids` hold one image token a feature. If not, images enter by
            cross-attention.
        needs: What a forward pass must be given, beside `input_ids`, `past_key_values` and
            `attention_mask`, to continue the cache of a prefix that holds the image.
        begins: A prompt's tokens are the first tokens of its dialogue.
        marked: The template marks answers, for `return_assistant_tokens_mask`.
        whole: Ids of image tokens have a row in the output layer.
    """

    vision: str = "model.vision_tower"
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    language: str = "model.language_model"
    expanded: bool = True
    needs: tuple[str, ...] = ()
    begins: bool = True
    marked: bool = False
    whole: bool = True


_TILED = ("model.multi_modal_projector", "model.image_newline")
# Positions run on from those of the image: [3, B, T], cut from `get_rope_index` of the whole text,
# or text positions plus `rope_deltas`. The model keeps the deltas of its last image, whichever
# that was: left to itself it fails, or is wrong without a word.
_QWEN3 = Facts(
    vision="model.visual",
    projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    needs=("position_ids",),
)
_IDEFICS = Facts(
    vision="model.vision_model", projector=("model.connector",), language="model.text_model"
)
# Of every family the cache of a prefix (template and image) can be continued for a batch of
# questions, and the forward pass accepts `logits_to_keep`.
FACTS = {
    "llava": Facts(),
    "llava_next": Facts(projector=_TILED),
    "llava_onevision": Facts(projector=_TILED, begins=False, marked=True),
    "qwen2_5_vl": replace(_QWEN3, projector=("model.visual.merger",)),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "mllama": Facts(
        vision="model.vision_model",
        expanded=False,
        needs=("cross_attention_mask",),  # of the new rows; the cache holds the image itself
        whole=False,
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": Facts(),
    "gemma3": Facts(),
}


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a random model, in evaluation mode, and its processor.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the weights.
    """
    speech, maker = _BUILDERS[family]
    words = _tokenizer(speech)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model, processor = maker(words)
    torch.set_rng_state(state)
    model.generation_config.pad_token_id = words.pad_token_id
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.bos_token_id = words.bos_token_id
    return model.eval(), processor


def make(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a random model and its processor to a folder, and return the folder.

    `AutoModelForImageTextToText` and `AutoProcessor` read it without the network.

    Args:
        family: One of `FAMILIES`.
        folder: Where to; made if it is missing.
        seed: Seed of the weights.
    """
    model, processor = build(family, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int = 0, height: int = 40, width: int = 40) -> Image.Image:
    """Return an RGB image of random squares of 8 pixels."""
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    pixels = squares.repeat(8, 0).repeat(8, 1)[:height, :width]
    return Image.fromarray(pixels)


def messages(image: Image.Image | None, question: str, answer: str | None = None) -> list[Any]:
    """Return one question about an image, with or without its answer, as chat messages."""
    items: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        items.insert(0, {"type": "image", "image": image})
    turns = [{"role": "user", "content": items}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def ask(
    processor: Any,
    image: Image.Image | Sequence[Image.Image] | None,
    question: str | Sequence[str],
    answer: str | Sequence[str] | None = None,
    side: str = "right",
) -> Any:
    """Return the model's inputs for one question, or for a batch of them.

    Without an answer the text ends where the answer begins.

    Args:
        processor: A processor of any family.
        image: The image of the question or, for a batch, one a question.
        question: The question, or B of them.
        answer: Answers, as many as questions.
        side: Where short texts are padded.

    Returns:
        `input_ids` and `attention_mask` [B, T] and what the family adds of the images.
    """
    rows: Any = (image, question, answer)
    if isinstance(question, str):
        rows = ([image], [question], [answer])
    elif answer is None:
        rows = (image, question, [None] * len(question))
    turns = [messages(*row) for row in zip(*rows, strict=True)]
    return processor.apply_chat_template(
        turns,
        add_generation_prompt=answer is None,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": side},
    )
