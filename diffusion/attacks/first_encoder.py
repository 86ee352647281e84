"""The first text encoder alone, for attacks that search a text by its embedding."""

from typing import Any

import torch
from torch import Tensor

from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError

TOGETHER = 256  # sequences in one pass; does not change results


def ordinary_ids(model: DiffusionModel) -> Tensor:
    """Return the ids of the first tokenizer that are no special tokens, ascending, int64 [N]."""
    special = set(model.tokenizer.all_special_ids)
    return torch.tensor([i for i in range(len(model.tokenizer)) if i not in special])


def require_room(model: DiffusionModel, count: int, name: str) -> None:
    """Check that so many tokens fit the window.

    Raises:
        ConfigError: They do not; `name` is the option to lower.
    """
    if count > model.window:
        raise ConfigError(
            f"{name}={count}: the tokenizer's window holds {model.window} tokens; give at most that"
        )


def windows(model: DiffusionModel, ids: Tensor) -> Tensor:
    """Return whole sequences: start mark, ids, end mark, the tokenizer's padding; int64 [B, T].

    Args:
        model: The model.
        ids: Tokens without marks, int64 [B, L], L at most `model.window`.
    """
    empty = model.tokens([""]).to(ids.device).expand(len(ids), -1)
    return torch.cat([empty[:, :1], ids, empty[:, 1 : empty.shape[1] - ids.shape[1]]], dim=1)


def last_states(model: DiffusionModel, sequences: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the encoder's last hidden states, behind its final norm, [B, T, D].

    For SD these are the conditions of `DiffusionModel.encode`; SDXL, SD3 and FLUX read others of
    this encoder's outputs, so that this is one definition for all.

    Args:
        model: The model.
        sequences: Whole sequences, int64 [B, T].
        rows: Token embeddings in place of the table's, [B, T, D]; then one pass, with gradients.
    """
    encoder: Any = next(iter(model.text_encoders.values()))
    sequences = sequences.to(model.device)
    if rows is None:
        with torch.no_grad():
            starts = range(0, len(sequences), TOGETHER)
            parts = [encoder(input_ids=sequences[k : k + TOGETHER]) for k in starts]
            return torch.cat([part.last_hidden_state for part in parts])

    def put(*_: Any) -> Tensor:
        return rows

    hook = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        with torch.enable_grad():
            states: Tensor = encoder(input_ids=sequences).last_hidden_state
            return states
    finally:
        hook.remove()


def pooled(model: DiffusionModel, states: Tensor, sequences: Tensor) -> Tensor:
    """Return the last hidden state at each sequence's first end mark, [B, D].

    What transformers' `pooler_output` is, for encoders that return a projection instead too.
    """
    ends = sequences.to(states.device) == int(model.tokenizer.eos_token_id)
    place = ends.to(torch.uint8).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), place]
