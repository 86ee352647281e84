"""Classifiers that judge drawn images: UnlearnCanvas's published ViTs, or any of timm."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.checkpoint import load_model
from mmforget.diffusion.features import checked, normalised, parts, resized
from mmforget.errors import ConfigError, unknown
from mmforget.options import faults, option

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ClassifierConfig:
    """Defaults: what UnlearnCanvas publishes (`style50.pth`, `style50_cls.pth`)."""

    checkpoint: str = option("", "file with the weights, head included")
    arch: str = option(
        "vit_large_patch16_224.augreg_in21k",
        "a name of timm; inputs are resized to its own size, mean and std 0.5",
    )
    batch_size: int = option(64, "images in a forward pass", low=1)
    precision: str = option(
        "fp32", "weights and activations; bf16 can flip close calls", choices=tuple(PRECISIONS)
    )


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of B images, on the CPU.

    Attributes:
        probability: float32 [B, classes].
        index: Class of the largest, int64 [B].
        label: Its name, B.
    """

    probability: Tensor
    index: Tensor
    label: list[str]


class Classifier:
    """A network with labels, and the published preprocessing.

    Images are resized to exactly the network's square input without keeping their shape (Pillow's
    antialiased bilinear, as `transforms.Resize((s, s))` on PIL images), and scaled to [-1, 1].

    Args:
        network: Takes float [B, 3, s, s], returns logits [B, classes].
        labels: Class names in index order.
        size: Side s of the input, pixels.
        name: What it is, for records.
        batch_size: Images in a forward pass.
        precision: "fp32" or "bf16".
        device: Where it runs.
    """

    def __init__(
        self,
        network: nn.Module,
        labels: Sequence[str],
        size: int,
        name: str,
        batch_size: int = 64,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> None:
        self.dtype = PRECISIONS[precision]
        self.network = network.eval().requires_grad_(False).to(device, self.dtype)
        self.labels = tuple(labels)
        self.size, self.name = size, name
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    def predict(self, images: Tensor) -> Predictions:
        """Return probabilities and classes of images uint8 [B, 3, H, W].

        Raises:
            DataError: They are no such images.
        """
        batches = parts(checked(images), self.batch_size)
        logits = torch.cat([self.network(self.prepared(part)).float().cpu() for part in batches])
        index = logits.argmax(dim=1)
        return Predictions(logits.softmax(1), index, [self.labels[i] for i in index.tolist()])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the input of the last linear layer, float32 [B, D]."""
        layers = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        chosen = getattr(self.network, "get_classifier", lambda: None)()
        if not layers:
            raise ConfigError(f"{self.name} has no linear head, so no penultimate features")
        head = chosen if isinstance(chosen, nn.Linear) else layers[-1]
        kept: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, given: kept.append(given[0].float()))
        try:
            for part in parts(checked(images), self.batch_size):
                self.network(self.prepared(part))
        finally:
            handle.remove()
        return torch.cat(kept)

    def prepared(self, images: Tensor) -> Tensor:
        """Return inputs of the network [B, 3, s, s] for images uint8 [B, 3, H, W]."""
        small = resized(images, (self.size, self.size))
        ready = normalised(small, (0.5,) * 3, (0.5,) * 3, self.device)
        return ready.to(self.dtype)


def load_classifier(
    config: ClassifierConfig, labels: Sequence[str], device: str | torch.device = "cpu"
) -> Classifier:
    """Return a published classifier.

    Args:
        config: Architecture and weights.
        labels: Class names in index order, such as `canvas.THEMES` (51) or `canvas.OBJECTS` (20).
        device: Where it runs.

    Raises:
        ConfigError: A value that is not accepted, or no such architecture.
        CheckpointError: The weights cannot be read, or do not fit: another number of classes is
            named with the expected one.
    """
    import timm

    if found := faults(config, "classifier"):
        raise ConfigError(found)
    if not timm.is_model(config.arch):
        raise ConfigError(unknown("timm model", config.arch, timm.list_models(), "timm"))
    with torch.random.fork_rng(devices=[]):
        network: Any = timm.create_model(config.arch, pretrained=False, num_classes=len(labels))
    load_model(network, Path(config.checkpoint))
    return Classifier(
        network,
        labels,
        size=network.default_cfg["input_size"][-1],
        name=f"{config.arch} ({Path(config.checkpoint).name}, {config.precision})",
        batch_size=config.batch_size,
        precision=config.precision,
        device=device,
    )
