"""Token embeddings put into a prompt: continuous attacks on the first text encoder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmforget.diffusion.attacks.encoding import encode_attacked
from mmforget.diffusion.attacks.layouts import layout, prompt_tokens
from mmforget.diffusion.attacks.relaxed import RowAdam
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError
from mmforget.types import full

FIRST = "text_encoder"


@contextmanager
def injected(
    model: DiffusionModel, embeds: Tensor, positions: Sequence[int], insert: bool = True
) -> Iterator[None]:
    """Give the first text encoder some token embeddings of our own, whatever it is asked to read.

    Other encoders read the prompt as it is. Gradients flow to `embeds`.

    Args:
        model: The model.
        embeds: [k, D] for every row alike, or [B, k, D].
        positions: Where they stand in the sequence in the end; 0 is the start mark.
        insert: Move the prompt's tokens aside, so that the last k of the sequence (padding, unless
            the prompt fills it) drop out; its last place keeps its mark. False: take their place.

    Raises:
        ConfigError: There are not as many positions as embeddings, or one is outside the sequence.
    """
    encoder: Any = getattr(model, FIRST)
    table = encoder.get_input_embeddings()
    window = int(model.tokenizer.model_max_length)
    if len(positions) != embeds.shape[-2] or not all(0 < p < window for p in positions):
        raise ConfigError(
            f"{embeds.shape[-2]} token embeddings for the positions {list(positions)}: give each "
            f"its own, from 1 to {window - 1}"
        )
    place = torch.tensor(list(positions), device=embeds.device)
    rest = [p for p in range(window) if p not in set(positions)]

    def moved(row: Tensor, value: Tensor) -> Tensor:
        """Insert `value` [B, 1] into rows [B, T] at the positions."""
        made = value.expand(-1, row.shape[1]).clone()
        made[:, rest] = row[:, : len(rest)]
        if rest and rest[-1] == window - 1:
            made[:, -1] = row[:, -1]
        return made

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The start mark stands in for ours: no pooling by the end mark's place can take it for one.
        ids = args[0] if args else kwargs["input_ids"]
        ids = moved(ids, ids[:, :1])
        if kwargs.get("attention_mask") is not None:
            mask = kwargs["attention_mask"]
            kwargs = {**kwargs, "attention_mask": moved(mask, torch.ones_like(mask[:, :1]))}
        if args:
            return (ids, *args[1:]), kwargs
        return args, {**kwargs, "input_ids": ids}

    def after(_: Any, __: Any, output: Tensor) -> Tensor:
        ours = embeds.to(output.dtype).expand(len(output), -1, -1)
        return output.index_copy(1, place, ours)

    hooks = [table.register_forward_hook(after)]
    if insert:
        hooks.append(encoder.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def encode_injected(
    model: DiffusionModel,
    prompts: Sequence[str],
    embeds: Tensor,
    positions: Sequence[int],
    insert: bool = True,
) -> Conditions:
    """Return the conditions of prompts with embeddings put into them; nothing is remembered.

    Args:
        model: The model.
        prompts: B texts.
        embeds: See `injected`.
        positions: See `injected`.
        insert: See `injected`.

    Raises:
        ConfigError: See `injected`.
    """
    with injected(model, embeds, positions, insert):
        found, pooled, ids = model._encode(list(prompts))
    return Conditions(found, pooled, ids, tuple(prompts))


def random_tokens(model: DiffusionModel, count: int, rng: torch.Generator) -> Tensor:
    """Return the first encoder's embeddings of tokens drawn from its vocabulary, [count, D]."""
    table: Tensor = getattr(model, FIRST).get_input_embeddings().weight
    chosen = torch.randint(len(model.tokenizer), (count,), generator=rng)
    return table.detach()[chosen.to(table.device)].clone()


def encode_placed(
    model: DiffusionModel, prompts: Sequence[str], embeds: Tensor, location: str = "prefix_k"
) -> Conditions:
    """Return the conditions of prompts with embeddings put in for the first encoder.

    Args:
        model: The model.
        prompts: B texts.
        embeds: [k, D], the same for all.
        location: Where they stand; one of `attacks.layouts.LOCATIONS`.

    Raises:
        ConfigError: They do not fit beside a prompt.
    """
    ids = model.tokens(prompts)
    window, eos = ids.shape[1], int(model.tokenizer.eos_token_id)
    layouts = [layout(location, n, len(embeds), window) for n in prompt_tokens(ids, eos).tolist()]
    # The start mark stands in for ours: no pooling by the end mark's place can take it for one.
    stand_in = ids[:, :1].expand(-1, len(embeds))
    rows = {FIRST: embeds.expand(len(prompts), -1, -1)}
    return encode_attacked(model, prompts, layouts, ids, stand_in, rows)


def adversarial_prefix(
    model: DiffusionModel,
    prompts: Sequence[str],
    start: Tensor,
    objective: Callable[[int, Conditions], Tensor],
    *,
    steps: int = 30,
    lr: float = 1e-3,
    sign: bool = False,
    reference: bool = False,
    location: str = "prefix_k",
) -> Tensor:
    """Return the k token embeddings that Adam finds to minimise an objective, [k, D].

    They stand beside every prompt (AdvUnlearn's `prefix_k` and its kin); only they are moved, the
    model gets no gradient.

    Args:
        model: The attacked model.
        prompts: B prompts.
        start: [k, D].
        objective: Given the step and the conditions of the attacked prompts (B rows), a scalar.
        steps: Steps of Adam.
        lr: Its learning rate.
        sign: Take the gradient's sign before each step (`fast_at`).
        reference: As the published code does: gradients add up over the steps instead of being
            cleared, and the last step is not in the result.
        location: Where they stand; see `encode_placed`.
    """
    rows = full(start.detach()).clone()[None]
    adam = RowAdam(rows, lr)
    last, before = rows, torch.zeros_like(rows)
    for step in range(steps):
        with torch.enable_grad():
            tokens = rows[0].requires_grad_(True)
            text = encode_placed(model, prompts, tokens, location)
            (found,) = torch.autograd.grad(objective(step, text), [tokens])
        slope = found[None] + before if reference else found[None]
        slope = slope.sign() if sign else slope
        before, last = slope, rows.detach()
        rows = adam.step(rows.detach(), slope)
    return (last if reference and steps else rows)[0].detach()
