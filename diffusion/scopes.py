"""Which weights of a pipeline a method trains, by name."""

import re
from collections.abc import Callable

from torch import nn

from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError

# Joint attention of SD3 and FLUX has no attn2: text enters by the `add_` projections.
TEXT_KV = re.compile(r"\.attn\.add_[kv]_proj\.")
JOINT = re.compile(
    r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\.|\.single_transformer_blocks\.\d+\.proj_out\."
)


def parameters(model: DiffusionModel, scope: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a scope, by their names in the model.

    Scopes: `all` (the denoiser, what the literature calls full), `pipeline` (denoiser and text
    encoders), `text` (text encoders), `text:N` (the first N layers of the first text encoder and
    its final norm), `esd-x` or `xattn` (Linear layers of cross-attention), `esd-x-strict` or `kv`
    (its keys and values), `esd-u` or `noxattn` (Linear and Conv2d outside cross-attention),
    `esd-all`, `selfattn`, `head` (the output layer), `edits`, or a regular expression for whole
    names. On SD3 and FLUX cross-attention is joint attention: `esd-x` takes its Linear layers,
    `kv` the keys and values of the text side, where FLUX's single blocks have none.

    Raises:
        ConfigError: The scope matches nothing.
    """
    prefix = f"{model.denoiser_name}."
    named = dict(model.named_parameters())
    inner = {n: p for n, p in named.items() if n.startswith(prefix)}
    if scope in ("all", "full"):
        return inner
    if scope == "pipeline":
        return {n: p for n, p in named.items() if not n.startswith("edits.")}
    if scope == "edits":
        chosen = {n: p for n, p in named.items() if n.startswith("edits.")}
    elif scope == "text":
        chosen = {n: p for n, p in named.items() if n.startswith("text_encoder")}
    elif scope.startswith("text:"):
        chosen = _text_layers(named, scope)
    elif scope == "head":
        last = ("conv_out.", "proj_out.", "norm_out.", "conv_norm_out.")
        chosen = {n: p for n, p in inner.items() if n.removeprefix(prefix).startswith(last)}
    elif scope in RULES:
        owned = _modules(model.denoiser, RULES[scope](model))
        chosen = {n: p for n, p in inner.items() if n.removeprefix(prefix) in owned}
    else:
        try:
            chosen = {n: p for n, p in named.items() if re.fullmatch(scope, n)}
        except re.error as error:
            raise ConfigError(f"scope {scope!r} is no regular expression: {error}") from error
    if not chosen:
        raise ConfigError(
            f"scope {scope!r} matches no parameter. Accepted: all, pipeline, text, text:N, "
            f"{', '.join(sorted(RULES))}, head, edits, or a regular expression for whole names, "
            f"such as {next(iter(inner))}"
        )
    return chosen


Rule = Callable[[str, nn.Module], bool]


def _attn(model: DiffusionModel, name: str) -> bool:
    """Return whether a layer belongs to attention between image and text."""
    if model.denoiser_name == "unet":
        return "attn2" in name
    return JOINT.search(f".{name}.") is not None


def _esd_x(model: DiffusionModel) -> Rule:
    return lambda name, layer: isinstance(layer, nn.Linear) and _attn(model, name)


def _kv(model: DiffusionModel) -> Rule:
    if model.denoiser_name == "unet":
        return lambda name, layer: name.endswith(("attn2.to_k", "attn2.to_v"))
    return lambda name, layer: TEXT_KV.search(f".{name}.") is not None


def _esd_u(model: DiffusionModel) -> Rule:
    wide = (nn.Linear, nn.Conv2d)
    return lambda name, layer: (
        isinstance(layer, wide) and not _attn(model, name) and _sdxl(model, name)
    )


def _esd_all(model: DiffusionModel) -> Rule:
    wide = (nn.Linear, nn.Conv2d)
    return lambda name, layer: isinstance(layer, wide) and _sdxl(model, name)


def _sdxl(model: DiffusionModel, name: str) -> bool:
    """Return whether ESD trains a layer: for SDXL it leaves time, text and outer layers alone."""
    return model.family != "sdxl" or ("block" in name and "emb" not in name)


def _selfattn(model: DiffusionModel) -> Rule:
    return lambda name, layer: isinstance(layer, nn.Linear) and "attn1" in name


RULES: dict[str, Callable[[DiffusionModel], Rule]] = {
    "esd-x": _esd_x,
    "xattn": _esd_x,
    "esd-x-strict": _kv,
    "kv": _kv,
    "esd-u": _esd_u,
    "noxattn": _esd_u,
    "esd-all": _esd_all,
    "selfattn": _selfattn,
}


def _modules(root: nn.Module, rule: Rule) -> set[str]:
    """Return the names of the parameters of the layers a rule takes, in the root's naming."""
    return {
        f"{name}.{inner}"
        for name, layer in root.named_modules()
        if rule(name, layer)
        for inner, _ in layer.named_parameters(recurse=False)
    }


def _text_layers(named: dict[str, nn.Parameter], scope: str) -> dict[str, nn.Parameter]:
    count = scope.partition(":")[2]
    if not count.isdecimal():
        raise ConfigError(f"scope {scope!r}: text:N takes a number of layers, such as text:12")
    layer = re.compile(r"text_encoder\.(?:.*\.)?encoder\.layers\.(\d+)\.")
    final = re.compile(r"text_encoder\.(?:.*\.)?final_layer_norm\.")
    return {
        n: p
        for n, p in named.items()
        if final.search(n) or ((m := layer.search(n)) and int(m.group(1)) < int(count))
    }
