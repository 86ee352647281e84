"""How much cross-attention a concept's tokens draw: the losses of Forget-Me-Not and MACE."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from mmforget.types import full


def joint_norm(probs: Iterable[Tensor], tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the norm of the attention to some tokens over all layers together, [B].

    Zhang et al., Forget-Me-Not, arXiv 2303.17591, eq. 2.

    Args:
        probs: For each layer attention probabilities [B, heads, Q, K].
        tokens: Which text tokens count, bool [K] or [B, K].
        mask: Where in the image, [B, H, W] in [0, 1]; None counts all of it.
    """
    norm: Tensor = torch.linalg.vector_norm(_norms(probs, tokens, mask), dim=0)
    return norm


def summed_norms(probs: Iterable[Tensor], tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the sum of each layer's norm of the attention to some tokens, [B].

    Lu et al., MACE, CVPR 2024, arXiv 2403.06135, eq. 5. Arguments as in `joint_norm`.
    """
    return _norms(probs, tokens, mask).sum(dim=0)


def _norms(probs: Iterable[Tensor], tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return each layer's norm over heads, pixels and chosen tokens, [L, B]."""
    norms = []
    for layer in probs:
        chosen = full(layer) * tokens.to(layer.device).expand(len(layer), -1)[:, None, None, :]
        if mask is not None:
            chosen = chosen * on_grid(mask, layer.shape[2])[:, None, :, None]
        norms.append(torch.linalg.vector_norm(chosen, dim=(1, 2, 3)))
    return torch.stack(norms)


def on_grid(mask: Tensor, pixels: int) -> Tensor:
    """Return masks [B, H, W] averaged down to a layer's grid of so many pixels, [B, pixels]."""
    height, width = mask.shape[1:]
    scale = (height * width / pixels) ** 0.5
    grid = round(height / scale), round(width / scale)
    return functional.adaptive_avg_pool2d(mask[:, None], grid).flatten(1)
