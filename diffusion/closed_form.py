"""The closed form of UCE, RECE and MACE: linear layers that read text, fitted to new outputs.

Layers y = W·x + b that read the same text embeddings share the matrix of their normal equations,
A = λI + Σ w·k·kᵀ (d x d). It is factored once, in float64, and every layer moves by
W' = W + Σ w·(v* - W·k)·kᵀ·A⁻¹, which leaves W exactly as it is where nothing is asked for. Biases
cancel: v* and W·k are meant without them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmforget.diffusion.models import DiffusionModel

# Which layers read text, by the denoiser's name; and which of them read the pooled text.
READERS = {
    "unet": r"unet\..*\.attn2\.to_[kv]\.weight",
    "transformer": r"transformer\.(context_embedder|.*\.text_embedder\.linear_1)\.weight",
}
POOLED = "text_embedder.linear_1.weight"
CHUNK = 64  # prompts encoded at once


def wide(values: Tensor) -> Tensor:
    """Return values in float64, detached; on the CPU where the device has no float64."""
    if values.device.type == "mps":
        values = values.cpu()
    return values.detach().double()


class Ridge:
    """Weighted equations W'·k = v* with λ·‖W' - W‖², for all layers that read the keys k.

    With no more equations than dimensions the system is solved in the space of equations
    (K·(λI + KᵀK)⁻¹ = (λI + KKᵀ)⁻¹·K), which is cheaper and exact for small λ. With λ = 0 and a
    singular system the smallest change of W is taken.

    Args:
        keys: Inputs whose outputs change, [n, d].
        weight: Weight of these equations, at least 0.
        lamb: λ, at least 0.
    """

    def __init__(self, keys: Tensor, weight: float, lamb: float) -> None:
        self.lamb = lamb
        self._weight = weight
        self._keys = wide(keys)
        self._rows = [self._keys * math.sqrt(weight)]
        self._gram: Tensor | None = None
        self._inverse: Inverse | None = None

    def hold(self, keys: Tensor, weight: float) -> None:
        """Add equations that W fulfils already: inputs [m, d] whose outputs must stay."""
        rows = wide(keys) * math.sqrt(weight)
        self._inverse = None
        if self._gram is not None:
            self._gram.addmm_(rows.T, rows)
            return
        self._rows.append(rows)
        if sum(map(len, self._rows)) > rows.shape[1]:
            self._collapse()

    def hold_gram(self, gram: Tensor) -> None:
        """Add the same by its sum Σ w·k·kᵀ, [d, d]."""
        self._inverse = None
        self._collapse().add_(wide(gram))

    def rows(self) -> Tensor:
        """Return w·K·A⁻¹, float64 [n, d]: an error R [out, n] at the keys moves W by R·rows."""
        count = len(self._keys)
        if self._gram is not None or count > self._keys.shape[1]:
            return self._weight * self.right(self._keys)
        stacked = torch.cat(self._rows)
        inverse = Inverse(stacked @ stacked.T, self.lamb)
        return inverse.solve(stacked)[:count] * math.sqrt(self._weight)

    def right(self, rows: Tensor) -> Tensor:
        """Return rows·A⁻¹, float64 [m, d]."""
        if self._inverse is None:
            self._inverse = Inverse(self._collapse(), self.lamb)
        return self._inverse.solve(wide(rows).T).T

    def _collapse(self) -> Tensor:
        """Return the sum Σ w·k·kᵀ of all equations, [d, d], which from now on stands for them."""
        if self._gram is None:
            dim = self._keys.shape[1]
            self._gram = self._keys.new_zeros(dim, dim)
            for rows in self._rows:
                self._gram.addmm_(rows.T, rows)
            self._rows = []
        return self._gram


class Inverse:
    """(G + λI)⁻¹ of a positive semi-definite G; its pseudo-inverse where λ is lost in rounding."""

    def __init__(self, gram: Tensor, lamb: float) -> None:
        self._factor: Tensor | None = None
        size = len(gram)
        noise = size * torch.finfo(gram.dtype).eps
        if size and lamb > noise * float(gram.diagonal().max()):
            shifted = gram.clone()
            shifted.diagonal().add_(lamb)
            self._factor = torch.linalg.cholesky(shifted)
            return
        values, self._vectors = torch.linalg.eigh(gram)
        kept = values > noise * values.max() if size else values > 0
        self._scales = torch.where(kept, 1.0 / torch.where(kept, values + lamb, 1.0), 0.0)

    def solve(self, right: Tensor) -> Tensor:
        """Return the inverse times `right` [d, m]."""
        if self._factor is not None:
            solved: Tensor = torch.cholesky_solve(right, self._factor)
        else:
            solved = self._vectors @ (self._scales[:, None] * (self._vectors.T @ right))
        return solved


@torch.no_grad()
def write(
    weights: Sequence[Tensor],
    rows: Tensor,
    shifts: Tensor,
    start: Sequence[Tensor] | None = None,
) -> None:
    """Move every layer so that a key gets what the shifted key got: v* = W·(k + shift).

    Args:
        weights: [out, d] each, changed in place.
        rows: `Ridge.rows`, [n, d].
        shifts: [n, d].
        start: The W of each layer, if not what it holds now.
    """
    low_rank = 2 * len(rows) < rows.shape[1]
    change = None if low_rank else shifts.T @ rows
    for weight, begun in zip(weights, start or weights, strict=True):
        old = wide(begun)
        moved = (old @ shifts.T) @ rows if change is None else old @ change
        weight.copy_(old + moved)


@torch.no_grad()
def projected(weight: Tensor, keys: Tensor, guides: Tensor, group: Tensor) -> Tensor:
    """Return shifts of one layer, float64 [n, d], whose targets lack what the old output had.

    v* = W·g - ⟨u, W·g⟩·u with u = W·k/‖W·k‖, products and norms running over all rows of a group:
    the published `tensor` technique. It depends on W, unlike v* = W·g.

    Args:
        weight: W, [out, d].
        keys: k, float64 [n, d].
        guides: g, float64 [n, d].
        group: Group of each row, int64 [n].
    """
    old = wide(weight)
    few = 2 * len(keys) < keys.shape[1]
    images = (keys @ old.T) @ old if few else keys @ (old.T @ old)
    groups = int(group.max()) + 1
    inner = keys.new_zeros(groups).index_add_(0, group, (images * guides).sum(dim=1))
    square = keys.new_zeros(groups).index_add_(0, group, (images * keys).sum(dim=1))
    share = torch.where(square > 0, inner / square, 0.0)
    return guides - (1.0 + share[group])[:, None] * keys


@dataclass(frozen=True)
class Rows:
    """Embeddings of texts that a group of layers reads, some positions of each text.

    Attributes:
        found: Text -> [T, d], float64.
        last: Text -> place of its last real token in each part.
        parts: First place of each part and the one after its last; a part is what one text
            encoder gave.
    """

    found: Mapping[str, Tensor]
    last: Mapping[str, tuple[int, ...]]
    parts: tuple[tuple[int, int], ...]

    def aligned(self, group: Sequence[str]) -> list[Tensor]:
        """Return for each text of a group its rows from the last real token on, [n, d] each.

        The rows of all texts are equally many in each part, as many as the text that ends last has.
        """
        out: list[list[Tensor]] = [[] for _ in group]
        for part, (_, stop) in enumerate(self.parts):
            starts = [self.last[text][part] for text in group]
            length = stop - max(starts)
            for rows, text, start in zip(out, group, starts, strict=True):
                rows.append(self.found[text][start : start + length])
        return [torch.cat(rows) for rows in out]

    def whole(self, text: str) -> Tensor:
        """Return all rows of a text, [T, d]."""
        return self.found[text]


@dataclass(frozen=True)
class Site:
    """Layers that read the same embeddings.

    Attributes:
        weights: Their weights, [out, d] each.
        rows: What they read of each text.
    """

    weights: tuple[nn.Parameter, ...]
    rows: Rows


def sites(
    model: DiffusionModel, weights: Mapping[str, nn.Parameter], texts: Sequence[str], scope: str
) -> list[Site]:
    """Return the layers of a scope by what they read, with the embeddings of all texts.

    Args:
        model: The model.
        weights: What the scope `READERS[model.denoiser_name]` gave.
        texts: All texts that will be asked for.
        scope: "last_token" keeps of each text the embedding at its last real token (of the empty
            text the first one: begin mark of CLIP, end mark of T5); "sequence" keeps all.
    """
    pooled = tuple(p for name, p in weights.items() if name.endswith(POOLED))
    others = tuple(p for name, p in weights.items() if not name.endswith(POOLED))
    unique = list(dict.fromkeys(texts))
    found: dict[str, Tensor] = {}
    pools: dict[str, Tensor] = {}
    last: dict[str, tuple[int, ...]] = {}
    parts: tuple[tuple[int, int], ...] = ()
    for first in range(0, len(unique), CHUNK):
        chunk = unique[first : first + CHUNK]
        with torch.no_grad():
            made = model.encode(chunk)
        parts, ends = _ends(model, chunk, made.embeds.shape[1])
        for k, text in enumerate(chunk):
            kept = list(ends[k]) if scope == "last_token" else slice(parts[0][0], parts[-1][1])
            found[text], last[text] = wide(made.embeds[k][kept]), ends[k]
            if made.pooled is not None:
                pools[text] = wide(made.pooled[k][None])
    if scope == "last_token":
        last = {text: tuple(range(len(parts))) for text in unique}
        parts = tuple((k, k + 1) for k in range(len(parts)))
    out = [Site(others, Rows(found, last, parts))]
    if pooled:
        out.append(Site(pooled, Rows(pools, dict.fromkeys(unique, (0,)), ((0, 1),))))
    return out


def _ends(
    model: DiffusionModel, texts: Sequence[str], length: int
) -> tuple[tuple[tuple[int, int], ...], list[tuple[int, ...]]]:
    """Return the parts of a sequence and for each text the places of its last real tokens."""
    window = int(model.tokenizer.model_max_length)
    parts = [(0, length, "tokenizer_2" if model.family == "flux" else "tokenizer")]
    if model.family == "sd3":  # CLIP's tokens, then T5's, or zeros where there is no T5
        parts = [(0, window, "tokenizer")]
        if "text_encoder_3" in model.text_encoders:
            parts.append((window, length, "tokenizer_3"))
    ends: list[list[int]] = [[] for _ in texts]
    for first, stop, name in parts:
        tokenizer = model.shared.parts[name]
        ids = tokenizer(list(texts), truncation=True, max_length=stop - first)["input_ids"]
        for places, row in zip(ends, ids, strict=True):
            places.append(first + max(len(row) - 2, 0))  # the end mark comes last
    return tuple((first, stop) for first, stop, _ in parts), [tuple(places) for places in ends]
