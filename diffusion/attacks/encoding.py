"""Attacked prompts through the text encoders: token ids, and embeddings that carry gradients.

Every encoder that reads the first tokenizer's ids (the CLIP encoders of SD, SDXL, SD3 and FLUX)
gets the same adversarial ids, each with embeddings of its own table and padded in its own way;
others (T5) read the prompt as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmforget.diffusion.attacks.layouts import Layout, adversarial_embeds, adversarial_ids
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import DataError


def tables(model: DiffusionModel) -> dict[str, Tensor]:
    """Return the token embeddings [V, D] of every encoder that reads the first tokenizer's ids.

    Raises:
        DataError: An encoder has fewer embeddings than the tokenizer has tokens.
    """
    words = len(model.tokenizer)
    found = {}
    for name in _tokenizers(model):
        table: Tensor = getattr(model, name).get_input_embeddings().weight
        if len(table) < words:
            raise DataError(
                f"{name} has embeddings of {len(table)} tokens and the tokenizer {words} tokens: "
                f"they belong to different pipelines. Give the tokenizer of this encoder"
            )
        found[name] = table.detach()
    return found


def encode_attacked(
    model: DiffusionModel,
    prompts: Sequence[str],
    layouts: Sequence[Layout],
    ids: Tensor,
    adversarial: Tensor,
    embeds: Mapping[str, Tensor],
    every: bool = True,
) -> Conditions:
    """Return the conditions of prompts with adversarial tokens put in; nothing is remembered.

    Gradients flow to the embeddings, and to an encoder's own weights if it is in training.

    Args:
        model: The model.
        prompts: B texts, for encoders that do not read these ids.
        layouts: Where the tokens of each prompt stand.
        ids: The prompts' own ids, whole windows, int64 [B, T].
        adversarial: Ids put in, int64 [B, K]; a layout may use fewer of them.
        embeds: For encoders of `tables` their embeddings, [B, K, D].
        every: Encoders without embeddings read those of the ids; False: the prompt as it is.
    """
    ids, adversarial = ids.to(model.device), adversarial.to(model.device)
    plan = {}
    for name, tokenizer in _tokenizers(model).items():
        if not every and name not in embeds:
            continue
        own = _padded(ids, model.tokenizer.eos_token_id, tokenizer.pad_token_id)
        rows = None
        if name in embeds:
            table = getattr(model, name).get_input_embeddings().weight
            rows = adversarial_embeds(layouts, table[own], embeds[name].to(table.dtype))
        plan[name] = (adversarial_ids(layouts, own, adversarial), rows)
    first = next(iter(plan.values()))[0]
    with _reading(model, plan):
        if model.family == "sd":
            found, pooled = _last_states(model, first), None
        else:
            found, pooled, _ = model._encode(list(prompts))
    return Conditions(found, pooled, first, tuple(prompts))


def _last_states(model: DiffusionModel, ids: Tensor) -> Tensor:
    """Return what SD's `encode_prompt` does; that one tokenises the prompts again at every step."""
    encoder: Any = model.text_encoders["text_encoder"]
    masked = getattr(encoder.config, "use_attention_mask", False)
    found: Tensor = encoder(ids, attention_mask=torch.ones_like(ids) if masked else None)[0]
    return found.to(encoder.dtype)


@contextmanager
def _reading(
    model: DiffusionModel, plan: Mapping[str, tuple[Tensor, Tensor | None]]
) -> Iterator[None]:
    """Let encoders read these ids, and these embeddings [B, T, D] in place of their table's."""
    hooks = []
    for name, (ids, rows) in plan.items():
        encoder: Any = getattr(model, name)
        hooks.append(encoder.register_forward_pre_hook(partial(_swap, ids), with_kwargs=True))
        if rows is not None:
            table = encoder.get_input_embeddings()
            hooks.append(table.register_forward_hook(partial(_put, rows)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tokenizers(model: DiffusionModel) -> dict[str, Any]:
    """Return the tokenizer of each encoder that reads the first one's ids."""
    found = {}
    for k, name in enumerate(model.text_encoders):
        kind = str(getattr(getattr(model, name).config, "model_type", ""))
        if kind.startswith("clip"):  # T5 reads ids of its own
            found[name] = model.shared.parts["tokenizer" if k == 0 else f"tokenizer_{k + 1}"]
    return found


def _padded(ids: Tensor, end: int, pad: int) -> Tensor:
    """Return ids whose places after the first end mark hold an encoder's own padding."""
    if pad == end:
        return ids
    ends = (ids == end).cumsum(dim=1)
    return ids.masked_fill(ends.cumsum(dim=1) > 1, pad)


def _swap(ids: Tensor, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("attention_mask") is not None:
        kwargs = {**kwargs, "attention_mask": torch.ones_like(ids)}
    if args:
        return (ids, *args[1:]), kwargs
    return args, {**kwargs, "input_ids": ids}


def _put(rows: Tensor, _: Any, __: Any, output: Tensor) -> Tensor:
    return rows.to(output.dtype)
