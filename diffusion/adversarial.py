"""Token embeddings put into a prompt: continuous attacks on the first text encoder."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmforget.diffusion.attacks.encoding import encode_attacked
from mmforget.diffusion.attacks.layouts import layout, prompt_tokens
from mmforget.diffusion.attacks.relaxed import RowAdam
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.models import DiffusionModel
from mmforget.types import full

FIRST = "text_encoder"


def random_tokens(model: DiffusionModel, count: int, rng: torch.Generator) -> Tensor:
    """Return the first encoder's embeddings of tokens drawn from its vocabulary, [count, D]."""
    table: Tensor = getattr(model, FIRST).get_input_embeddings().weight
    chosen = torch.randint(len(model.tokenizer), (count,), generator=rng)
    return table.detach()[chosen.to(table.device)].clone()


def encode_placed(
    model: DiffusionModel, prompts: Sequence[str], embeds: Tensor, location: str = "prefix_k"
) -> Conditions:
    """Return the conditions of prompts with embeddings put in for the first encoder alone.

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
    return encode_attacked(model, prompts, layouts, ids, stand_in, rows, every=False)


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
