"""Classifiers by name: any of timm or torchvision with a new head, and a small one for CPUs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.checkpoint import load_model
from mmforget.errors import ConfigError, unknown
from mmforget.options import option

MINI = "mini/resnet"
# Containers whose children are the blocks of a model, in the names timm and torchvision use.
STACKS = frozenset({"blocks", "stages", "features", "layers", "encoder", "trunk"})


@dataclass(frozen=True)
class ModelConfig:
    """Which classifier, and what it starts from."""

    name: str = option(
        "torchvision/resnet18",
        "timm/NAME, torchvision/NAME, a bare timm name, or mini/resnet (published: resnet18)",
    )
    pretrained: bool = option(False, "start from the library's published weights (downloads)")
    checkpoint: str | None = option(None, "start from this file or folder of weights")
    options: dict[str, Any] = option({}, "further arguments of the model's constructor")


@dataclass(frozen=True)
class Block:
    """One of the consecutive parts of a model, from input to head.

    Attributes:
        name: Such as "stem", "layer3", "blocks.11", "fc".
        members: Names of its modules, and of parameters that belong to no module of their own.
    """

    name: str
    members: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Return whether a parameter or buffer of this name is part of the block."""
        return any(name == member or name.startswith(f"{member}.") for member in self.members)


def build_model(config: ModelConfig, classes: int, seed: int) -> nn.Module:
    """Return a classifier with `classes` outputs, initialised by `seed` alone.

    Args:
        config: Architecture and starting weights.
        classes: Outputs of the new head.
        seed: Seed of the initial weights; the global random state is left as it was.

    Raises:
        ConfigError: No such model, or constructor arguments it does not take.
        CheckpointError: The checkpoint cannot be read or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = _construct(config, classes)
        except TypeError as error:
            raise ConfigError(f"model.options={config.options}: {config.name}: {error}") from error
    if config.checkpoint is not None:
        load_model(model, Path(config.checkpoint))
    return model


def _construct(config: ModelConfig, classes: int) -> nn.Module:
    source, _, short = config.name.rpartition("/")
    if config.name == MINI:
        if config.pretrained:
            raise ConfigError(f"{MINI} has no published weights: leave model.pretrained=false")
        return _mini_resnet(classes, config.options)
    if source == "torchvision":
        return _torchvision(short, classes, config.pretrained, config.options)
    if source in ("timm", ""):
        return _timm(short, classes, config.pretrained, config.options)
    raise ConfigError(
        f"unknown model {config.name!r}: give timm/NAME, torchvision/NAME or {MINI}, such as "
        f"torchvision/resnet18"
    )


def _mini_resnet(classes: int, options: dict[str, Any]) -> nn.Module:
    """Return timm's ResNet class at one basic block a stage, for inputs of 32 to 64 pixels."""
    from timm.models.resnet import BasicBlock, ResNet

    shape: dict[str, Any] = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 64, 128),
        "stem_width": 8,
        "stem_type": "deep",
        "num_classes": classes,
    }
    model: nn.Module = ResNet(**(shape | options))
    return model


def _torchvision(name: str, classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    from torchvision.models import get_model, list_models

    names = [entry for entry in list_models() if "/" not in entry]
    if name not in names:
        raise ConfigError(unknown("torchvision model", name, names, "mmforget show vision/mufac"))
    if not pretrained:
        model: nn.Module = get_model(name, weights=None, num_classes=classes, **options)
        return model
    model = get_model(name, weights="DEFAULT", **options)
    place, old = head(model)
    model.set_submodule(place, nn.Linear(old.in_features, classes))
    return model


def _timm(name: str, classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        names = timm.list_models()
        raise ConfigError(unknown("timm model", name, names, "mmforget show vision/mufac"))
    model: nn.Module = timm.create_model(
        name, pretrained=pretrained, num_classes=classes, **options
    )
    return model


def head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the last linear layer: what makes logits out of features.

    Raises:
        ConfigError: The model has no linear layer.
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = getattr(model, "get_classifier", lambda: None)()
    for name, module in linear:
        if module is chosen:
            return name, module
    if not linear:
        raise ConfigError(f"{type(model).__name__} has no linear head; give a classifier")
    return linear[-1]


def features_and_logits(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model once; return the input of its head [B, D] and its logits [B, C]."""
    kept: list[Tensor] = []
    handle = head(model)[1].register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        logits = model(image)
    finally:
        handle.remove()
    return kept[0].flatten(1), logits


def blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a model from input to head; every parameter is in exactly one.

    A ResNet has stem, layer1 to layer4, fc; a transformer stem, its layers, head. Children of
    stacks (`blocks`, `stages`, `features`, ...) are blocks of their own; what holds only vectors
    (a normalisation) belongs to the block before it; parameters of the model itself to the stem.
    """
    loose: list[str] = []
    pieces: list[tuple[str, list[str], bool]] = []  # name, members, holds a matrix
    _collect(model, "", loose, pieces)
    merged: list[Block] = []
    for name, members, matrix in pieces:
        if matrix or not merged:
            merged.append(Block(name, tuple(members)))
        else:
            merged[-1] = Block(merged[-1].name, merged[-1].members + tuple(members))
    return [Block("stem", merged[0].members + tuple(loose)), *merged[1:]]


def _collect(
    module: nn.Module, prefix: str, loose: list[str], pieces: list[tuple[str, list[str], bool]]
) -> None:
    loose += [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        shapes = [p.dim() for p in child.parameters()]
        if not shapes:
            continue
        if name in STACKS:
            _collect(child, f"{full}.", loose, pieces)
        else:
            pieces.append((full, [full], max(shapes) > 1))
