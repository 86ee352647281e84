"""Low-rank adapters on layers of the denoiser (LoRA), as an edit that can be merged and undone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.diffusion import scopes
from mmforget.diffusion.edits import Edit
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import CheckpointError, ConfigError
from mmforget.rng import generator


class LowRank(Edit):
    """Adds scale·(alpha/rank)·B·A·x to what Linear and Conv2d layers of the denoiser return.

    A convolution's A has the kernel, stride and padding of its layer, B is 1x1, as in PEFT.

    Args:
        shapes: Shape of each adapted weight by its layer's name in the denoiser.
        rank: Rank of every pair.
        alpha: LoRA's α; the product is scaled by α/rank.
        scale: Strength; 0 switches the adapters off.

    Attributes:
        down: A of each layer, [rank, in] or [rank, in, kh, kw].
        up: B of each layer, [out, rank] or [out, rank, 1, 1]; zeros to begin with.
    """

    kind: ClassVar[str] = "lora"
    citation: ClassVar[str] = "Hu et al., LoRA, ICLR 2022, arXiv 2106.09685"

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        rank: int,
        alpha: float,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layers = tuple(shapes)
        self.rank = rank
        self.alpha = alpha
        self.scale = scale
        self.on = True
        down = [torch.zeros(rank, *shape[1:], dtype=dtype) for shape in shapes.values()]
        up = [
            torch.zeros(shape[0], rank, *(1 for _ in shape[2:]), dtype=dtype)
            for shape in shapes.values()
        ]
        self.down = nn.ParameterList(down)
        self.up = nn.ParameterList(up)
        self._hooks: list[Any] = []
        self._merged: tuple[str, dict[str, Tensor]] | None = None

    @classmethod
    def fresh(
        cls,
        model: DiffusionModel,
        layers: Sequence[str],
        rank: int,
        seed: int,
        alpha: float | None = None,
    ) -> "LowRank":
        """Return adapters that change nothing yet: A uniform in ±1/√fan-in, B zero.

        Args:
            model: The model they are for.
            layers: Names of Linear and Conv2d layers in its denoiser.
            rank: Rank.
            seed: Seed of A.
            alpha: α; None: the rank, so that the product counts once.
        """
        made = cls(
            _shapes(model, layers), rank, rank if alpha is None else alpha, 1.0, _wide(model)
        )
        with torch.no_grad():
            for name, down in zip(made.layers, made.down, strict=True):
                bound = down[0].numel() ** -0.5
                down.uniform_(-bound, bound, generator=generator(seed, "lora", name))
        return made

    def config(self) -> dict[str, Any]:
        """Return layers, rank, alpha and scale."""
        return {
            "layers": list(self.layers),
            "rank": self.rank,
            "alpha": self.alpha,
            "scale": self.scale,
        }

    @classmethod
    def build(cls, config: dict[str, Any], model: DiffusionModel) -> "LowRank":
        """Make the adapters of a saved config, all zero.

        Raises:
            CheckpointError: The model has no such layers.
        """
        try:
            shapes = _shapes(model, config["layers"])
        except ConfigError as error:
            raise CheckpointError(f"the low-rank adapters are of another model: {error}") from error
        return cls(shapes, config["rank"], config["alpha"], config["scale"], _wide(model))

    def attach(self, model: DiffusionModel) -> None:
        """Hook the layers' outputs."""
        found = dict(model.denoiser.named_modules())
        for place, name in enumerate(self.layers):
            self._hooks.append(found[name].register_forward_hook(self._added(place)))

    def detach(self, model: DiffusionModel) -> None:
        """Take the hooks away."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the block as if the adapters were not there: the model they were added to."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def product(self, place: int) -> Tensor:
        """Return scale·(alpha/rank)·B·A of one layer, in its weight's shape."""
        down, up = self.down[place], self.up[place]
        flat: Tensor = (up.flatten(1) @ down.flatten(1)) * self._factor
        return flat.reshape(-1, *down.shape[1:])

    @torch.no_grad()
    def merge(self, model: DiffusionModel) -> None:
        """Add the products to the weights and leave the model's edits.

        Raises:
            ConfigError: The model does not hold this edit.
        """
        name = next((name for name, edit in model.edits.items() if edit is self), None)
        if name is None:
            raise ConfigError("these adapters are no edit of the model; add them first: add_edit")
        model.remove_edit(name)
        found = dict(model.denoiser.named_modules())
        weights = {layer: _weight(found[layer]) for layer in self.layers}
        self._merged = (name, {layer: weight.clone() for layer, weight in weights.items()})
        for place, weight in enumerate(weights.values()):
            weight.add_(self.product(place).to(weight))

    @torch.no_grad()
    def unmerge(self, model: DiffusionModel) -> None:
        """Undo `merge`: the weights are those of before, bit for bit, and the edit acts again.

        Raises:
            ConfigError: It was not merged.
        """
        if self._merged is None:
            raise ConfigError("the adapters are not merged; there is nothing to undo")
        name, weights = self._merged
        found = dict(model.denoiser.named_modules())
        for layer, weight in weights.items():
            _weight(found[layer]).copy_(weight)
        self._merged = None
        model.add_edit(name, self)

    def to_peft(self) -> dict[str, Tensor]:
        """Return the factors under PEFT's names, on the CPU.

        `{layer}.lora_A.weight` and `{layer}.lora_B.weight`, the whole factor scale·alpha/rank in B:
        readers that know no alpha take it to be the rank.
        """
        named: dict[str, Tensor] = {}
        for name, down, up in zip(self.layers, self.down, self.up, strict=True):
            named[f"{name}.lora_A.weight"] = down.detach().cpu().contiguous().clone()
            named[f"{name}.lora_B.weight"] = (up.detach() * self._factor).cpu().contiguous()
        return named

    def save(self, model: DiffusionModel, folder: Path) -> Path:
        """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` reads.

        Args:
            model: The model the adapters are for.
            folder: Made if it is not there.
        """
        layers = {f"{model.denoiser_name}_lora_layers": self.to_peft()}
        model.shared.pipeline.save_lora_weights(str(folder), **layers)  # type: ignore[attr-defined]
        return folder / "pytorch_lora_weights.safetensors"

    @property
    def _factor(self) -> float:
        return self.scale * self.alpha / self.rank

    def _added(self, place: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.on or self._factor == 0.0:
                return None
            down, up = self.down[place], self.up[place]
            x = args[0].to(down.dtype)
            if isinstance(layer, nn.Conv2d):
                inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
                found = F.conv2d(inner, up)
            else:
                found = F.linear(F.linear(x, down), up)
            return output + (found * self._factor).to(output.dtype)

        return hook


def adapted(model: DiffusionModel, scope: str) -> list[str]:
    """Return the Linear and Conv2d layers of the denoiser whose weights a scope takes.

    Raises:
        ConfigError: There are none.
    """
    chosen = {id(parameter) for parameter in scopes.parameters(model, scope).values()}
    found = [
        name
        for name, layer in model.denoiser.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer.weight) in chosen
    ]
    if not found:
        raise ConfigError(
            f"scope {scope!r} holds no weight of a Linear or Conv2d layer of the denoiser, which "
            f"is what low-rank adapters change; try esd-x, kv or all, or leave lora_rank out"
        )
    return found


def _shapes(model: DiffusionModel, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of layers' weights.

    Raises:
        ConfigError: A layer is not there, or is none that takes low-rank adapters.
    """
    found = dict(model.denoiser.named_modules())
    for name in layers:
        layer = found.get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or getattr(layer, "groups", 1) != 1:
            raise ConfigError(
                f"{name!r} is no Linear layer and no Conv2d of one group in the {model.family} "
                f"denoiser, and low-rank adapters go on no others"
            )
    return {name: tuple(_weight(found[name]).shape) for name in layers}


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _wide(model: DiffusionModel) -> torch.dtype:
    """Return the dtype of factors: float32 even where weights are half as wide."""
    return torch.float64 if model.dtype == torch.float64 else torch.float32
