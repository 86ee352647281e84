"""Seeing and changing attention maps of a UNet: a context that records them, layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError


@dataclass
class Maps:
    """Attention probabilities of forward passes, by layer.

    Attributes:
        probs: Layer name -> [B, heads, Q, K]; Q are pixels of the layer's grid, row by row, K text
            tokens (cross-attention) or pixels (self-attention). With gradients if those are on.
    """

    probs: dict[str, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the maps of earlier passes."""
        self.probs.clear()

    def mean(self, side: int) -> Tensor:
        """Return the mean over heads and over the layers of a grid of side x side, [B, Q, K].

        Raises:
            ConfigError: No recorded layer has this grid.
        """
        chosen = [p.mean(dim=1) for p in self.probs.values() if p.shape[2] == side * side]
        if not chosen:
            sides = sorted({int(p.shape[2] ** 0.5) for p in self.probs.values()})
            raise ConfigError(f"no attention layer has a grid of {side}; there are {sides}")
        return torch.stack(chosen).mean(dim=0)


class Recorder:
    """An attention processor that computes as the fused one does, and keeps the probabilities."""

    def __init__(self, name: str, maps: Maps, keep: Callable[[str], bool]) -> None:
        self.name = name
        self.maps = maps
        self.keep = keep

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output, [B, Q, D]; a transformer block passes 3-dimensional states."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(text))
        value = attn.head_to_batch_dim(attn.to_v(text))
        probs = attn.get_attention_scores(query, key, attention_mask)
        if self.keep(self.name):
            self.maps.probs[self.name] = probs.unflatten(0, (-1, attn.heads))
        out = attn.batch_to_head_dim(torch.bmm(probs, value))
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        result: Tensor = out / attn.rescale_output_factor
        return result


def layers(model: DiffusionModel, kind: str = "attn2") -> dict[str, nn.Module]:
    """Return the attention layers of the UNet's transformer blocks by name.

    Args:
        model: The model.
        kind: "attn2" (cross-attention) or "attn1" (self-attention).

    Raises:
        ConfigError: The denoiser is no cross-attention UNet.
    """
    if model.denoiser_name != "unet":
        raise ConfigError(
            f"a {model.family} transformer has joint attention and no separate cross-attention "
            f"maps; this method needs a UNet (SD 1.x, 2.x, SDXL)"
        )
    return {n: m for n, m in model.denoiser.named_modules() if n.endswith(f".{kind}")}


@contextmanager
def recorded(
    model: DiffusionModel, kind: str = "attn2", keep: Callable[[str], bool] = lambda name: True
) -> Iterator[Maps]:
    """Record the attention maps of every forward pass inside the block.

    Args:
        model: A UNet model.
        kind: "attn2", "attn1", or "both".
        keep: Which layers, by name; others are computed and not kept.
    """
    maps = Maps()
    kinds = ("attn1", "attn2") if kind == "both" else (kind,)
    found = {name: layer for one in kinds for name, layer in layers(model, one).items()}
    before = {name: layer.processor for name, layer in found.items()}
    for name, layer in found.items():
        layer.processor = Recorder(name, maps, keep)  # type: ignore[assignment]
    try:
        yield maps
    finally:
        for name, layer in found.items():
            layer.processor = before[name]
