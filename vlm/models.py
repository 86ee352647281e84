"""Vision-language models: any `AutoModelForImageTextToText` with its processor, as one module.

Parts are found as module objects, never by a substring of parameter names: a CLIP tower has
`q_proj` and `fc1` like a decoder, and transformers renames modules between versions.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmforget.checkpoint import load_model
from mmforget.errors import CheckpointError, ConfigError
from mmforget.options import option
from mmforget.rng import derive
from mmforget.types import full

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Where families keep their parts, below `model`; the first that exists is taken.
VISION = ("vision_tower", "visual", "vision_model")
PROJECTORS = (
    "multi_modal_projector",
    "connector",
    "visual.merger",
    "visual.deepstack_merger_list",
)
# Projectors that lie inside the tower (Qwen-VL): trained with the projector, not frozen with it.
MERGERS = ("merger", "deepstack_merger_list")
LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
CROSS = "cross_attention_mask"
SHOWN = 5  # names listed in an error


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the decoder, and the projector in full beside them (FIUBench)."""

    rank: int = option(128, "rank r", low=1)
    alpha: float = option(256.0, "alpha; updates are scaled by alpha / rank", low=0)
    dropout: float = option(0.05, "dropout before the adapters", low=0, high=1)
    targets: str = option(LINEARS, "regex of the last part of names, below the decoder only")
    layers: list[int] = option([], "decoder layers that get adapters; empty: all")
    projector: bool = option(True, "train the projector in full, kept in the same file")
    experts: bool = option(False, "adapt stacked expert weights too (mixtures; needs dropout 0)")


class VLM(nn.Module):
    """A model with its processor; low-rank adapters are put in by `attach`.

    Args:
        net: A transformers model, or a peft model around one.
        processor: Its processor, with a chat template. Copies of the model share it.
        source: Folder or hub id it was opened from; peft writes it beside adapters.
        attention: transformers' attn_implementation it was opened with; None: its choice.

    Raises:
        ConfigError: The model has no decoder or vision tower where its family keeps it.
    """

    def __init__(
        self, net: nn.Module, processor: Any, source: str, attention: str | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.processor = processor
        self.source = source
        self.attention = attention
        self.training = net.training
        tower = self.vision
        if tower is None:
            raise ConfigError(
                f"{type(self.base).__name__} keeps its vision tower elsewhere than in "
                f"{', '.join(VISION)}: this family is not supported"
            )
        if tower in set(self.decoder.modules()):
            raise ConfigError(
                f"{type(self.base).__name__} has no decoder apart from its vision tower: this "
                f"family is not supported"
            )

    @property
    def base(self) -> Any:
        """The transformers model itself, adapters in its layers or not."""
        return self.net.get_base_model() if isinstance(self.net, PeftModel) else self.net

    @property
    def decoder(self) -> nn.Module:
        """The language model, without its head."""
        made: nn.Module = self.base.get_decoder()
        return made

    @property
    def vision(self) -> nn.Module | None:
        """The vision tower; a projector may lie inside."""
        core = getattr(self.base, "model", self.base)
        found = [getattr(core, name) for name in VISION if hasattr(core, name)]
        return found[0] if found else None

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, in order.

        Raises:
            ConfigError: It has none under the usual name.
        """
        found = getattr(self.decoder, "layers", None)
        if not isinstance(found, nn.ModuleList):
            raise ConfigError(
                f"{type(self.decoder).__name__} has no list `layers` of decoder layers"
            )
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def window(self) -> int:
        """Positions the decoder was made for."""
        text = self.base.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or 1 << 30)

    def forward(self, **inputs: Any) -> Any:
        """Run the transformers model."""
        return self.net(**inputs)

    def logits(self, inputs: Mapping[str, Tensor], keep: int = 0) -> Tensor:
        """Return logits of the last `keep` positions (0: of all), [B, keep, V], float32 or wider.

        The head runs on these alone: at 600 image tokens and a vocabulary of 32,000 the rest would
        be most of the memory.
        """

        def run(part: Mapping[str, Tensor]) -> Tensor:
            found: Tensor = self.net(**part, logits_to_keep=keep, use_cache=False).logits
            return full(found[:, -keep:] if keep else found)

        return _apart(inputs, run)

    def hidden(self, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
        """Return the output of decoder layer `layer` (from 0), [B, T, D].

        The forward pass is left there: layers above it and the head are not computed.

        Raises:
            ConfigError: There is no such layer.
        """
        layers = self.layers
        if not 0 <= layer < len(layers):
            raise ConfigError(f"layer {layer}: the decoder has layers 0 to {len(layers) - 1}")

        def run(part: Mapping[str, Tensor]) -> Tensor:
            found: list[Tensor] = []

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                found[:] = [output[0] if isinstance(output, tuple) else output]
                if module is layers[layer]:
                    for handle in handles:
                        handle.remove()
                    if not self.sharded:  # left half-way, gathered weights would stay so
                        raise _Reached

            # Layers below are heard too: one of cross-attention is left out where no image is.
            handles = [each.register_forward_hook(leave) for each in layers[: layer + 1]]
            try:
                self.net(**part, use_cache=False)
            except _Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            return found[0]

        return _apart(inputs, run)

    @property
    def sharded(self) -> bool:
        """Whether its weights are cut over processes."""
        return isinstance(self.net, FSDPModule)

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters by part: `vision`, `projector`, `language`, `head`.

        `projector` is all that is neither of the tower nor of the decoder. Tied weights appear
        once. With adapters attached these are the weights under them, and the adapters.
        """
        tower = self.vision
        assert tower is not None
        inside = [getattr(tower, name) for name in MERGERS if hasattr(tower, name)]
        merging = {id(p) for module in inside for p in module.parameters()}
        vision = {id(p) for p in tower.parameters()} - merging
        language = {id(p) for p in self.decoder.parameters()}
        head = {id(p) for p in self.base.get_output_embeddings().parameters()}
        found: dict[str, dict[str, nn.Parameter]] = {
            "vision": {},
            "projector": {},
            "language": {},
            "head": {},
        }
        for name, parameter in self.named_parameters():
            key = id(parameter)
            part = (
                "vision"
                if key in vision
                else "language"
                if key in language
                else "head"
                if key in head
                else "projector"
            )
            found[part][name] = parameter
        if not found["head"]:  # tied to the embeddings
            found["head"] = {n: p for n, p in found["language"].items() if id(p) in head}
        return found

    def scope(self, scope: str, lora: Lora) -> dict[str, nn.Parameter]:
        """Return the parameters of a scope; "lora" puts adapters in first.

        In any other scope adapters that are there already are merged into the weights, as those
        are what is trained then.

        Args:
            scope: "all" (everything but the vision tower, as published), "lora", "language",
                "projector", "head", "vision", or a regex of full names.
            lora: What "lora" means.

        Raises:
            ConfigError: It matches nothing, or a regex reaches into the vision tower.
        """
        if scope == "lora":
            return self.attach(lora)
        self.merge()
        parts = self.parts()
        if scope == "all":
            return {**parts["projector"], **parts["language"], **parts["head"]}
        if scope in parts:
            chosen = parts[scope]
        else:
            try:
                pattern = re.compile(scope)
            except re.error as error:
                raise ConfigError(f"scope={scope!r} is no regex: {error}") from error
            chosen = {n: p for n, p in self.named_parameters() if pattern.search(n)}
            inside = [name for name in chosen if name in parts["vision"]]
            if inside:
                raise ConfigError(
                    f"scope={scope!r} would train {len(inside)} tensors of the vision tower, such "
                    f"as {inside[0]}; it stays frozen. Name the decoder in the regex "
                    f"(language_model...), or say scope=vision if that is what is meant"
                )
        if not chosen:
            some = ", ".join(list(dict(self.named_parameters()))[:SHOWN])
            raise ConfigError(
                f"scope={scope!r} matches no parameter; accepted are all, lora, language, "
                f"projector, head, vision, and a regex of names such as {some}"
            )
        return chosen

    def attach(self, lora: Lora) -> dict[str, nn.Parameter]:
        """Put low-rank adapters into the decoder and return what is to be trained.

        The model computes what it did before, because B = 0. Adapters that are there already are
        merged into the weights first. A is drawn from a fixed seed.

        Raises:
            ConfigError: No module has such a name, there is no such layer, or stacked experts are
                asked for with dropout or where there are none.
        """
        self.merge()
        if lora.experts and lora.dropout > 0:
            raise ConfigError("lora.experts=true needs lora.dropout=0: peft cannot drop there")
        count = len(self.layers)
        if not all(0 <= layer < count for layer in lora.layers):
            raise ConfigError(f"lora.layers={lora.layers}: the decoder has layers 0 to {count - 1}")
        names = {id(module): name for name, module in self.base.named_modules()}
        place = names[id(self.decoder)]
        chosen = f"({'|'.join(map(str, lora.layers))})" if lora.layers else r"\d+"
        inside = rf"{re.escape(place)}\.layers\.{chosen}\."
        pattern = rf"{inside}.*\b({lora.targets})"
        try:
            matching = [name for name in names.values() if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"lora.targets={lora.targets!r} is no regex: {error}") from error
        if not matching:
            raise ConfigError(
                f"lora.targets={lora.targets!r} names no module of {place} (layers: "
                f"{lora.layers or 'all'}); its modules end in "
                f"{', '.join(sorted({n.rpartition('.')[2] for n in names.values() if n}))}"
            )
        stacked = rf"{inside}({'|'.join(map(re.escape, EXPERTS))})"
        experts = [name for name, _ in self.base.named_parameters() if re.fullmatch(stacked, name)]
        if lora.experts and not experts:
            raise ConfigError(
                f"lora.experts=true, but {place} has no stacked experts ({', '.join(EXPERTS)})"
            )
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works and is published
            lora_dropout=lora.dropout,
            target_modules=pattern,
            target_parameters=experts if lora.experts else None,
            modules_to_save=self._projectors() if lora.projector else None,
            base_model_name_or_path=self.source,
        )
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive(0, "lora"))
            known = set(self.base.modules())
            with warnings.catch_warnings():
                # peft asks transformers something by an old name.
                warnings.simplefilter("ignore", FutureWarning)
                self.net = get_peft_model(self.base, config)
        for module in set(self.net.modules()) - known:
            module.training = self.training
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        vision = self.parts()["vision"]
        assert not trained.keys() & vision.keys(), "adapters are put below the decoder only"
        return trained

    def merge(self) -> None:
        """Merge adapters, if there are any, into the weights they belong to."""
        if isinstance(self.net, PeftModel):
            self.net = self.net.merge_and_unload()

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Compute without adapters, as the model did before `attach`."""
        assert isinstance(self.net, PeftModel)
        tuner: Any = self.net.base_model
        flags = [(p, p.requires_grad) for p in self.parameters()]
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()
            for parameter, flag in flags:  # peft switches gradients on for all adapters
                parameter.requires_grad_(flag)

    def fresh_adapters(self, trainable: Mapping[str, nn.Parameter]) -> bool:
        """Return whether switching adapters off undoes all that training `trainable` can do now."""
        if not isinstance(self.net, PeftModel):
            return False
        held = {id(p) for name, p in self.named_parameters() if _of_adapter(name)}
        if any(id(p) not in held for p in trainable.values()):
            return False
        ups = [p for name, p in self.named_parameters() if "lora_B" in name]
        pairs = [
            (kept, was)
            for module in self.modules()
            if isinstance(module, ModulesToSaveWrapper)
            for copied in module.modules_to_save.values()
            for kept, was in zip(
                copied.parameters(), module.original_module.parameters(), strict=True
            )
        ]
        return not any(bool(up.any()) for up in ups) and all(
            torch.equal(kept, was) for kept, was in pairs
        )

    def _projectors(self) -> list[str]:
        """Return the full names of projector modules, which peft keeps whole beside adapters."""
        core = getattr(self.base, "model", self.base)
        below = "model." if core is not self.base else ""
        found = []
        for name in PROJECTORS:
            if name not in dict(core.named_modules()):
                continue
            module = core.get_submodule(name)
            lists = isinstance(module, nn.ModuleList)  # peft keeps no list whole
            found += [f"{name}.{k}" for k in range(len(module))] if lists else [name]
        return [below + name for name in found]

    def __deepcopy__(self, memo: dict[int, Any]) -> "VLM":
        net = copy.deepcopy(self.net, memo)
        return VLM(net, self.processor, self.source, self.attention)


class _Reached(Exception):
    """A forward pass came to the layer it was run for."""


def _apart(inputs: Mapping[str, Tensor], run: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
    """Return what `run` gives of a batch, [B, ...], in one forward pass where that is possible.

    Cross-attention models see an image in every row or in none: to a row that masks all images
    out they still add the mean of what it does not see. Such batches are run in two parts.
    """
    ids = inputs["input_ids"]
    if CROSS not in inputs or len(inputs["pixel_values"]) == len(ids):
        return run(inputs)
    seeing = inputs[CROSS].flatten(1).any(1)
    along = [name for name, value in inputs.items() if value.shape[:2] == ids.shape]
    seen = {name: value[seeing] if name in along else value for name, value in inputs.items()}
    bare = {name: inputs[name][~seeing] for name in along if name != CROSS}
    order = torch.cat([seeing.nonzero(), (~seeing).nonzero()]).squeeze(1).argsort()
    return torch.cat([run(seen), run(bare)])[order]


class Frozen(nn.Module):
    """What a model computed when this was made, without a second model where that is possible.

    Where only fresh adapters are trained they are switched off; otherwise the trained weights are
    kept, and put in for the time of a forward pass. Nothing else of the model is copied.

    Args:
        model: The model that is trained.
        trainable: Its parameters that will change.
    """

    def __init__(self, model: VLM, trainable: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._model = [model]  # in a list: its weights are not this module's own
        self._weights = list(trainable.values())
        self._kept: list[Tensor] | None = None
        if not model.fresh_adapters(trainable):
            self._kept = [weight.detach().clone() for weight in self._weights]

    @property
    def swaps(self) -> bool:
        """Whether weights are put in and out, for lack of adapters to switch off."""
        return self._kept is not None

    @contextmanager
    def as_was(self) -> Iterator[VLM]:
        """Give the model as it was, in evaluation mode; gradients are switched off."""
        (model,) = self._model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            if self._kept is None:
                with torch.no_grad(), model.without_adapters():
                    yield model
            else:
                now = [weight.data for weight in self._weights]
                try:
                    for weight, kept in zip(self._weights, self._kept, strict=True):
                        weight.data = kept
                    with torch.no_grad():
                        yield model
                finally:  # the very tensors that a recorded graph refers to
                    for weight, value in zip(self._weights, now, strict=True):
                        weight.data = value
        finally:
            for module, mode in modes:  # not model.train(): some may be held in evaluation mode
                module.training = mode


def open_model(
    source: str,
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
    attention: str | None = None,
) -> VLM:
    """Open a `save_pretrained` folder or hub id.

    Args:
        source: Folder or hub id.
        dtype: Of the weights.
        template: File with a chat template, for processors that have none.
        attention: transformers' attn_implementation; None: its choice.

    Raises:
        CheckpointError: It cannot be opened as a vision-language model, or lacks weights.
        ConfigError: Its processor has no chat template.
    """
    from transformers import AutoProcessor

    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    cause: Exception | None = None
    try:
        net, faults, _ = _opened(place, dtype, attention)
        processor: Any = AutoProcessor.from_pretrained(place)
        parts = ("tokenizer", "image_processor")
        faults += [f"its processor has no {part}" for part in parts if not hasattr(processor, part)]
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        faults, cause = [_first(error)], error
    if faults:
        raise CheckpointError(
            f"{source} is not opened as a vision-language model: {'; '.join(faults)}. Give a "
            f"folder written by save_pretrained (model and processor), or a hub id"
        ) from cause
    if template is not None:
        path = Path(template).expanduser()
        if not path.is_file():
            raise ConfigError(f"model.template={template}: there is no such file")
        processor.chat_template = path.read_text(encoding="utf-8")
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"the processor of {source} has no chat template; name a file with one: "
            f"model.template=FILE.jinja"
        )
    return VLM(net.eval(), processor, source, attention)


def save(model: VLM, folder: Path) -> None:
    """Write a model for plain transformers or peft.

    With adapters: peft's two files. Without: a `save_pretrained` folder with the processor.
    """
    _quiet()
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.net, PeftModel):
        # Adapters never lie on embeddings; peft would ask the hub to find that out.
        model.net.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        model.base.save_pretrained(str(folder))
        model.processor.save_pretrained(str(folder))


def load(path: Path, start: VLM) -> VLM:
    """Return the model that a path holds; `start` stays as it is.

    Args:
        path: A peft folder, a `save_pretrained` folder, `model.safetensors` in one of these
            (there or not), or a file of named tensors.
        start: The original.

    Raises:
        CheckpointError: It does not fit the original's architecture, or tensors are missing or left
            over.
    """
    folder = path.parent if path.name == "model.safetensors" else path
    if (folder / "adapter_config.json").is_file():
        return _load_adapters(folder, start)
    if (folder / "config.json").is_file():
        return _load_folder(folder, start)
    made = copy.deepcopy(start)
    made.merge()  # such files hold whole models
    load_model(made.base, path)
    return made


def _load_folder(folder: Path, start: VLM) -> VLM:
    """Return a whole model of the original's architecture, with the original's processor."""
    dtype = next(start.parameters()).dtype
    try:
        net, missing, spare = _opened(str(folder), dtype, start.attention)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not opened: {_first(error)}") from error
    if isinstance(start.net, PeftModel):
        start = copy.deepcopy(start)
        start.merge()
    found, wanted = ({k: v.shape for k, v in m.state_dict().items()} for m in (net, start.base))
    differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if type(net) is not type(start.base) or differing:
        raise CheckpointError(
            f"{folder} holds a {type(net).__name__}, the original is a "
            f"{type(start.base).__name__}; {len(differing)} tensors differ in name or shape"
            + (f", such as {differing[0]}" if differing else "")
        )
    if missing or spare:
        raise CheckpointError(f"{folder} is no whole model: {'; '.join(missing + spare)}")
    net = net.to(start.device)
    return VLM(net, start.processor, start.source, start.attention).eval()


def _load_adapters(folder: Path, start: VLM) -> VLM:
    """Return the original with a peft folder's adapters, every tensor of which is used."""
    file = folder / "adapter_model.safetensors"
    made = copy.deepcopy(start)
    made.merge()
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(file)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no adapter that peft reads: {error}") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise CheckpointError(f"{folder} holds adapters of the kind {kind}; accepted is LORA")
    try:
        net = get_peft_model(made.base, config)
        result: Any = set_peft_model_state_dict(net, tensors)
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}, which its config asks for") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file} does not fit the model: {_first(error)}") from error
    left = list(result.unexpected_keys)
    missing = [key for key in result.missing_keys if _of_adapter(key)]
    faults = []
    if left:
        named = ", ".join(left[:SHOWN])
        faults.append(f"{len(left)} of its {len(tensors)} tensors find no place ({named})")
    if missing:
        faults.append(f"{len(missing)} that its config asks for are missing, such as {missing[0]}")
    if faults:
        raise CheckpointError(
            f"{file} does not fit the model: {'; '.join(faults)}. Is it of another model, or were "
            "its tensors renamed?"
        )
    ups = [value for key, value in tensors.items() if "lora_B" in key]
    if ups and not any(bool(value.any()) for value in ups):
        logger.warning("%s: all B are zero, so these adapters change nothing", file)
    made.net = net
    return made.eval()


def _opened(
    place: str, dtype: torch.dtype, attention: str | None
) -> tuple[Any, list[str], list[str]]:
    """Return a transformers model, and what is said of tensors it lacks and of those left over.

    transformers itself draws at random what is missing, and only warns.

    Args:
        place: Folder or hub id.
        dtype: Of the weights.
        attention: transformers' attn_implementation; None: its choice.
    """
    from transformers import AutoModelForImageTextToText

    _quiet()
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        place, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    net, report = loaded

    def said(key: str, what: str) -> list[str]:
        names = sorted(report[key])
        return [f"{len(names)} tensors {what}, such as {names[0]}"] if names else []

    return net, said("missing_keys", "are missing"), said("unexpected_keys", "find no place in it")


def _quiet() -> None:
    """Turn off transformers' progress bars: among ours they say nothing."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def _first(error: Exception) -> str:
    """Return the beginning of a library's error, which may go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".,")


def _of_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name
