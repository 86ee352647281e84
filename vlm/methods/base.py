"""What loss methods of vision-language models have in common: a recipe, and logits of answers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.options import option
from mmforget.types import Training
from mmforget.vlm.adapter import Tokens, VLMAdapter
from mmforget.vlm.chat import IGNORED


@dataclass(frozen=True)
class LoraTraining(Training):
    """What FIUBench's second stage has in common (arXiv 2411.03554): AdamW on adapters, cosine."""

    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    weight_decay: float = option(0.01, "weight decay (decoupled for adamw)", low=0)
    schedule: str = option(
        "cosine", "learning-rate schedule", choices=("constant", "cosine", "linear", "step")
    )
    clip_norm: float | None = option(1.0, "clip the global gradient norm", low=0)
    scope: str = option("lora", "parameters to train: all, lora, a part's name, or a regex")


def adapter_of(ctx: Context) -> VLMAdapter:
    """Return the adapter, which methods of this modality ask for more than the core knows."""
    assert isinstance(ctx.adapter, VLMAdapter)
    return ctx.adapter


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Return the cross-entropy of softmax(logits) to a distribution, over the last dimension.

    Args:
        target: Probabilities, [..., V].
        logits: [..., V].
    """
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


def shifted_labels(data: Tokens, length: int) -> Tensor:
    """Return what each of the first `length` positions predicts, [B, length]; -100: no answer.

    For batches whose logits of all positions are kept (`VLMAdapter.everywhere`).
    """
    targets = data.targets
    labels = targets.new_full((len(targets), length), IGNORED)
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    counts = targets != IGNORED
    labels[rows[counts], data.at[counts]] = targets[counts]
    return labels
