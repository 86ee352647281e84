"""Greedy coordinate gradient (GCG), as MMA-Diffusion searches prompts by their pooled embedding.

Zou et al., Universal and Transferable Adversarial Attacks on Aligned Language Models, arXiv
2307.15043, algorithm 1; Yang et al., MMA-Diffusion, CVPR 2024, section 3.2. Published: L = 20
tokens, k = 256, 512 candidates a step, 1000 steps, 10 restarts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mmforget.errors import ConfigError, DataError
from mmforget.types import full


def control_rows(grad: Tensor, length: int, reference: bool = False) -> Tensor:
    """Return the rows of a sequence's gradient that belong to its control tokens, [L, V].

    Args:
        grad: Gradient of the loss by the one-hot rows of a sequence that begins with the start
            mark, then the control tokens, [S, V].
        length: L, control tokens.
        reference: Begin at the start mark, as MMA-Diffusion's code does: the token before then
            proposes what replaces a control token.

    Raises:
        DataError: The sequence is shorter.
    """
    first = 0 if reference else 1
    if not 1 <= length <= len(grad) - first:
        raise DataError(
            f"{length} control tokens in a sequence of {len(grad)} that begins with the start mark"
        )
    return grad[first : first + length]


def blocked_topk(grad: Tensor, blocked: Sequence[int] | Tensor, k: int) -> Tensor:
    """Return for each position the k ids that promise the greatest decrease of the loss.

    Each position's gradient is divided by its L2 norm, so that those of several prompts weigh the
    same if they are added.

    Args:
        grad: Gradient of the loss by the one-hot rows, [L, V].
        blocked: Ids that are never proposed: those of sensitive words, special tokens.
        k: Ids for each position.

    Returns:
        Ids, best first, int64 [L, k].

    Raises:
        ConfigError: k is below 1 or above the number of ids that are not blocked, or a blocked id
            is outside the vocabulary.
    """
    closed = sorted(set(torch.as_tensor(blocked).tolist()))
    size = grad.shape[1]
    if closed and not 0 <= closed[0] <= closed[-1] < size:
        raise ConfigError(
            f"blocked ids from {closed[0]} to {closed[-1]}: the vocabulary ends at {size - 1}. "
            f"Take the ids from this encoder's tokenizer"
        )
    if not 1 <= k <= size - len(closed):
        raise ConfigError(
            f"k={k}: {size} ids, {len(closed)} of them blocked, leave 1 to {size - len(closed)}"
        )
    places = torch.tensor(closed, dtype=torch.long, device=grad.device)
    normal = functional.normalize(full(grad), dim=1).index_fill(1, places, torch.inf)
    return (-normal).topk(k, dim=1).indices


def replaced_positions(batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the position that each candidate changes, floor(i·L/B), int64 [B].

    Every position gets its share of candidates, or some get none if there are fewer than positions.
    """
    return torch.arange(batch, device=device) * length // batch


def candidates(control: Tensor, topk: Tensor, batch: int, rng: torch.Generator) -> Tensor:
    """Return copies of the control tokens with one id replaced in each.

    Args:
        control: Ids, int64 [L].
        topk: Ids that each position may take, [L, k]; see `blocked_topk`.
        batch: B, how many; see `replaced_positions`.
        rng: Draws uniformly from the k ids of a position.

    Returns:
        int64 [B, L].

    Raises:
        DataError: There are not as many rows of ids as control tokens.
        ConfigError: `batch` is below 1.
    """
    if control.ndim != 1 or len(topk) != len(control):
        raise DataError(
            f"control tokens {list(control.shape)} and ids to take {list(topk.shape)}: [L] and "
            f"[L, k] are needed"
        )
    if batch < 1:
        raise ConfigError(f"batch={batch}: at least 1 candidate is needed")
    device = control.device
    places = replaced_positions(batch, len(control), device)
    drawn = torch.randint(topk.shape[1], (batch,), generator=rng, device=rng.device).to(device)
    made = control.repeat(batch, 1)
    made[torch.arange(batch, device=device), places] = topk.to(control)[places, drawn]
    return made


def cosine_loss(found: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine of pooled text embeddings with the target's, in [0, 2].

    Args:
        found: [B, D].
        target: [1, D], or [B, D].

    Returns:
        [B], float32 or wider.

    Raises:
        DataError: The shapes do not pair up.
    """
    pairs = found.ndim == target.ndim == 2 and len(target) in (1, len(found))
    if not pairs or found.shape[1] != target.shape[1]:
        raise DataError(
            f"embeddings {list(found.shape)} and the target's {list(target.shape)} do not pair up: "
            f"[B, D] and [1, D] are needed, of the same encoder"
        )
    return 1.0 - functional.cosine_similarity(full(found), full(target), dim=1)
