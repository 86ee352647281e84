"""SAeUron: erase by the features of a sparse autoencoder on one block of the UNet."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.diffusion import attention
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import Edit
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import denoise, start_latents
from mmforget.engine import epoch_order
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.progress import progress
from mmforget.rng import derive, generator
from mmforget.training import StepLog
from mmforget.types import UnlearningMethod, full

logger = logging.getLogger(__name__)

CITATION = "Cywiński and Deja, SAeUron, ICML 2025, arXiv 2501.18052"
PARTS = ("encoder", "bias", "decoder", "center")


@dataclass(frozen=True)
class SAeUronConfig:
    """Defaults of the published code; on objects its multiplier was tuned for each of them."""

    object_layer: str = option(
        "up_blocks.1.attentions.1", "block whose output is edited for objects, persons, pairs"
    )
    style_layer: str = option("up_blocks.1.attentions.2", "block whose output is edited for styles")
    expansion: int = option(16, "features for each channel of the block", low=1)
    k: int = option(32, "features that are active at a place", low=1)
    aux: float = option(1 / 32, "weight of dead features' reconstruction of the error", low=0)
    dead_after: int = option(
        10_000_000, "activations without firing after which a feature is dead", low=1
    )
    lr: float = option(4e-4, "learning rate (Adam), falling linearly to 0", low=0)
    batch_size: int = option(4096, "activations in a step of the autoencoder", low=1)
    prompts: int = option(800, "training captions whose images the autoencoder sees", low=1)
    rounds: int = option(5, "images made of each caption, with new seeds", low=0)
    places: int | None = option(
        None, "pixels kept of an image at a step, drawn at random; null keeps all", low=1
    )
    images: int = option(8, "images made together", low=1)
    steps: int = option(50, "denoising steps (DDIM), each with scores of its own", low=1)
    guidance: float = option(9.0, "classifier-free guidance", low=0)
    per_concept: int = option(8, "prompts of each concept whose features are measured", low=1)
    percentile: float = option(
        99.999, "features scoring above it, among all, are the concept's", low=0, high=100
    )
    multiplier: float = option(
        -1.0, "the concept's features are multiplied by it and their mean (objects: -1 to -30)"
    )
    reference: bool = option(
        False, "add the autoencoder's error with its sign flipped, as the published code does"
    )


class SparseCoder(nn.Module):
    """A TopK sparse autoencoder: z = TopK(relu(E(x - c) + b)), x̂ = zD + c.

    Args:
        width: Channels d.
        features: n.
        k: Features active in one activation.

    Attributes:
        encoder: E, [n, d].
        bias: b, [n].
        decoder: D, [n, d], rows of norm 1.
        center: c, [d].
    """

    def __init__(self, width: int, features: int, k: int) -> None:
        super().__init__()
        self.k = min(k, features)
        self.encoder = nn.Parameter(torch.zeros(features, width))
        self.bias = nn.Parameter(torch.zeros(features))
        self.decoder = nn.Parameter(torch.zeros(features, width))
        self.center = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def start(self, sample: Tensor, seed: int) -> None:
        """Draw unit directions, tied in encoder and decoder, around a sample's mean [N, d]."""
        drawn = torch.randn(self.decoder.shape, generator=generator(seed, "sae", "start"))
        self.decoder.copy_(F.normalize(drawn, dim=1))
        self.encoder.copy_(self.decoder)
        self.center.copy_(sample.mean(dim=0))

    def pre(self, x: Tensor) -> Tensor:
        """Return what features respond, [..., d] -> [..., n], not negative, at full precision."""
        with torch.autocast(x.device.type, enabled=False):
            return F.relu(F.linear(x.to(self.center.dtype) - self.center, self.encoder, self.bias))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k largest responses and their features, each [..., k]."""
        values, features = self.pre(x).topk(self.k, dim=-1, sorted=False)
        return values, features

    def loss(self, x: Tensor, dead: Tensor | None, aux: float) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss of activations [N, d] as named terms, and which features fired, [n].

        `error` is the share of variance left unexplained; `aux` the same of the error that the
        d/2 strongest dead features explain (Gao et al., arXiv 2406.04093, appendix A.2).

        Args:
            x: Activations.
            dead: Features that count as dead, booleans [n]; None or none: no such term.
            aux: Weight of the second term.
        """
        responses = self.pre(x)
        values, features = responses.topk(self.k, dim=-1, sorted=False)
        error = x - (decoded(values, features, self.decoder) + self.center)
        spread = (x - x.mean(dim=0)).square().sum().clamp_min(1e-12)
        terms = {"error": error.square().sum() / spread}
        count = 0 if dead is None or aux == 0 else int(dead.sum())
        if dead is not None and count:
            wanted = max(1, x.shape[1] // 2)
            idle, which = responses.masked_fill(~dead, -math.inf).topk(min(wanted, count), dim=-1)
            rest = error.detach() - decoded(idle, which, self.decoder)
            share = min(1.0, count / wanted)
            terms["aux"] = aux * share * rest.square().sum() / spread
        fired = torch.zeros_like(self.bias, dtype=torch.bool)
        fired[features[values > 0]] = True
        return terms, fired

    @torch.no_grad()
    def project(self) -> None:
        """Take out of the decoder's gradient what would only change its rows' norms."""
        if self.decoder.grad is not None:
            along = (self.decoder.grad * self.decoder).sum(dim=1, keepdim=True)
            self.decoder.grad.sub_(along * self.decoder)

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring the decoder's rows back to norm 1."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))


class FeatureEdit(Edit):
    """Turn a concept's features down in the output of one block.

    At every pixel, a feature of the concept that is among the k active ones and exceeds its mean
    over concepts is multiplied by (multiplier x its mean on the concept), both of the nearest
    time that was measured. What the autoencoder cannot express stays: x + (z' - z)D. With
    `reference` the published code's x̂' + (x̂ - x), where that part is mirrored. All rows are
    edited, the unconditional ones too.

    Args:
        layer: The block, by its name in the UNet.
        width: Its channels d.
        features: n.
        k: Active features.
        times: Number of times measured, S.
        reference: See above.
    """

    kind: ClassVar[str] = "sae"
    citation: ClassVar[str] = CITATION
    times: Tensor
    floor: Tensor
    scale: Tensor

    def __init__(
        self, layer: str, width: int, features: int, k: int, times: int, reference: bool
    ) -> None:
        super().__init__()
        self.layer, self.reference = layer, reference
        self.coder = SparseCoder(width, features, k).requires_grad_(False)
        self.register_buffer("times", torch.zeros(times))
        self.register_buffer("floor", torch.full((times, features), math.inf))
        self.register_buffer("scale", torch.ones(times, features))
        self.handles: list[Any] = []
        self.now: Tensor | None = None

    def config(self) -> dict[str, Any]:
        """Return the block and the sizes."""
        features, width = self.coder.decoder.shape
        return {
            "layer": self.layer,
            "width": width,
            "features": features,
            "k": self.coder.k,
            "times": len(self.times),
            "reference": self.reference,
        }

    def attach(self, model: DiffusionModel) -> None:
        """Hook the UNet, to see the time, and the block."""
        self.handles = [
            model.denoiser.register_forward_pre_hook(self._look, with_kwargs=True),
            block(model, self.layer).register_forward_hook(self._edit),
        ]

    def detach(self, model: DiffusionModel) -> None:
        """Remove both hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        gaps = (self.times - time.reshape(-1, 1).to(self.times)).abs()
        self.now = gaps.argmin(dim=1)

    def _edit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self.now is not None
        before = output[0]  # a tuple, or diffusers' output class
        x = pixels(before).to(self.coder.center.dtype)
        values, features = self.coder.codes(x)
        place = self.now.expand(len(x))[:, None, None]
        after = intervene(
            x,
            values,
            features,
            self.coder.decoder,
            self.coder.center,
            self.floor[place, features],
            self.scale[place, features],
            self.reference,
        )
        made = after.to(before.dtype).transpose(1, 2).reshape(before.shape)
        return (made, *output[1:]) if isinstance(output, tuple) else type(output)(sample=made)


class SAeUron(UnlearningMethod[SAeUronConfig]):
    """Train one autoencoder an original, then find and turn down the features of the concept.

    The autoencoder is trained once (`prepare`) on a block's output while images of training
    captions are made; every request shares it. A request measures features on the concept's own
    prompts and on retained ones. The score of a feature at a step is its share of all activation
    on the concept minus its share on the other concepts; features above the percentile of a step
    are edited at that step. Retained prompts are sorted into concepts by the words they have in the
    place of the erased concept's name; those that fit no prompt of it count as one more.
    """

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "suppression"
    trains: ClassVar[str] = "a sparse autoencoder, once an original; no weight of the pipeline"
    holds: ClassVar[str] = "the autoencoder: 2 x 16 x channels² numbers"
    citation: ClassVar[str] = CITATION
    config_type: ClassVar[type] = SAeUronConfig
    prepares: ClassVar[bool] = True

    def prepare(self, ctx: Context) -> Mapping[str, Tensor]:
        """Train an autoencoder for each of the two blocks, from the same images."""
        model = ctx.model
        assert isinstance(model, DiffusionModel)
        layers = list(dict.fromkeys((self.config.object_layer, self.config.style_layer)))
        for layer in layers:
            block(model, layer)
        coders = train_coders(ctx, model, layers, self.config)
        return {
            f"{layer}.{part}": getattr(coder, part).detach().cpu()
            for layer, coder in coders.items()
            for part in PARTS
        }

    def run(self, ctx: Context) -> nn.Module:
        """Measure, select, and add one edit for each block that is needed."""
        model, config = ctx.model, self.config
        assert isinstance(model, DiffusionModel)
        attention.layers(model)
        target: Erasure = ctx.target
        by_layer: dict[str, list[Concept]] = {}
        for concept in target.concepts:
            layer = config.style_layer if concept.kind == "style" else config.object_layer
            by_layer.setdefault(layer, []).append(concept)
        edits = {layer: self._edit(ctx, model, layer) for layer in by_layer}
        for layer, concepts in by_layer.items():
            others = sorted_prompts(concepts, target.retain)
            groups = {c.name: c.prompts for c in concepts} | others
            used = {name: prompts[: config.per_concept] for name, prompts in groups.items()}
            edit = edits[layer]
            means, counts = measure(ctx, model, edit, used, config)
            table = torch.stack(list(means.values()))
            weight = torch.tensor([counts[name] for name in means], device=table.device)
            for row, concept in enumerate(concepts):
                rest = torch.arange(len(table), device=table.device) != row
                if not rest.any():
                    raise ConfigError(
                        "sae compares the concept with others, and the request retains no prompts"
                    )
                apart = (table[rest] * weight[rest, None, None]).sum(dim=0) / weight[rest].sum()
                chosen = selected(table[row], apart, config.percentile)
                scale = config.multiplier * table[row]
                shared = chosen & torch.isfinite(edit.floor)  # by an earlier concept: the stronger
                scale = torch.where(shared, torch.minimum(scale, edit.scale), scale)
                edit.scale.copy_(torch.where(chosen, scale, edit.scale))
                edit.floor.copy_(torch.where(chosen, table.mean(dim=0), edit.floor))
                logger.info(
                    "%s: %.1f features a step are of %s",
                    layer,
                    chosen.float().sum(dim=1).mean().item(),
                    concept.name,
                )
            model.add_edit(f"sae_{len(model.edits)}", edit)
        return model

    def _edit(self, ctx: Context, model: DiffusionModel, layer: str) -> FeatureEdit:
        """Return an edit that does nothing yet, with the layer's autoencoder."""
        block(model, layer)
        parts = {part: self.prepared[f"{layer}.{part}"] for part in PARTS}
        features, width = parts["decoder"].shape
        config = self.config
        edit = FeatureEdit(layer, width, features, config.k, config.steps, config.reference)
        edit.coder.load_state_dict(parts)
        sampler = model.noising.sampler(sampling(config))
        edit.times.copy_(sampler.timesteps)
        return edit.to(model.device)


def train_coders(
    ctx: Context, model: DiffusionModel, layers: Sequence[str], config: SAeUronConfig
) -> dict[str, SparseCoder]:
    """Return an autoencoder for each block, trained while images of training captions are made.

    Activations are never stored beyond the images made together: these are shuffled, used for
    as many steps as they fill batches, and dropped.
    """
    prompts = captions(ctx, config.prompts)
    jobs = [
        (turn, prompts[first : first + config.images])
        for turn in range(config.rounds)
        for first in range(0, len(prompts), config.images)
    ]
    coders: dict[str, SparseCoder] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    idle: dict[str, Tensor] = {}
    log, step = StepLog(ctx.engine), 0
    shown = ctx.engine.is_main and ctx.engine.runtime.progress
    if not jobs:
        prompts = prompts[: config.images]
    with progress(ctx.label, len(jobs), shown=shown) as advance:
        for job, (turn, chosen) in enumerate(jobs or [(0, prompts)]):
            found = gathered(ctx, model, layers, chosen, (turn, job), config)
            rate = config.lr * (1.0 - job / max(1, len(jobs)))
            for layer, rows in found.items():
                if layer not in coders:
                    width = rows.shape[1]
                    coder = SparseCoder(width, config.expansion * width, config.k).to(rows.device)
                    coder.start(rows, ctx.seed)
                    coders[layer] = coder
                    optimizers[layer] = torch.optim.Adam(coder.parameters(), lr=config.lr)
                    idle[layer] = torch.zeros_like(coder.bias, dtype=torch.int64)
            if not jobs:
                break
            draw = generator(ctx.seed, "sae", "order", job)
            orders = {
                layer: torch.randperm(len(rows), generator=draw) for layer, rows in found.items()
            }
            count = max(1, min(len(rows) for rows in found.values()) // config.batch_size)
            for k in range(count):
                terms: dict[str, Tensor] = {}
                for layer, rows in found.items():
                    place = orders[layer][k * config.batch_size : (k + 1) * config.batch_size]
                    x, coder = rows[place.to(rows.device)], coders[layer]
                    with torch.enable_grad():
                        made, fired = coder.loss(x, idle[layer] >= config.dead_after, config.aux)
                        torch.stack(list(made.values())).sum().backward()  # type: ignore[no-untyped-call]
                    coder.project()
                    for group in optimizers[layer].param_groups:
                        group["lr"] = rate
                    optimizers[layer].step()
                    optimizers[layer].zero_grad()
                    coder.normalise()
                    idle[layer] = torch.where(fired, 0, idle[layer] + len(x))
                    terms |= {f"{layer}.{name}": value.detach() for name, value in made.items()}
                step += 1
                ctx.engine.meter.steps += 1
                last = job + 1 == len(jobs) and k + 1 == count
                note = log.add(step, terms, rate, last=last)
            ctx.engine.meter.examples_seen += len(chosen)
            advance(1, note)
    return coders


def captions(ctx: Context, count: int) -> list[str]:
    """Return distinct captions of training images, at most `count`, drawn by the seed."""
    train = ctx.split("train")
    order = epoch_order(len(train), ctx.seed, "sae", "captions")
    found: dict[str, None] = {}
    for first in range(0, len(order), 64):
        for texts in train.take(order[first : first + 64])["captions"]:
            found.setdefault(texts[0])
        if len(found) >= count:
            break
    return list(found)[:count]


@torch.no_grad()
def gathered(
    ctx: Context,
    model: DiffusionModel,
    layers: Sequence[str],
    prompts: Sequence[str],
    stream: tuple[int, int],
    config: SAeUronConfig,
) -> dict[str, Tensor]:
    """Return each block's activations, [N, d] float32, of all steps of images of these prompts."""
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    draw = generator(ctx.seed, "sae", "places", *stream)

    def keep(layer: str, x: Tensor) -> None:
        if config.places is not None and config.places < x.shape[1]:
            x = x[:, torch.randperm(x.shape[1], generator=draw)[: config.places].to(x.device)]
        rows[layer].append(full(x).flatten(0, 1).clone())

    with watched(model, layers, keep):
        _make(ctx, model, prompts, ("sae", "train", *stream), config)
    return {layer: torch.cat(parts) for layer, parts in rows.items()}


@torch.no_grad()
def measure(
    ctx: Context,
    model: DiffusionModel,
    edit: FeatureEdit,
    groups: Mapping[str, Sequence[str]],
    config: SAeUronConfig,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return each concept's mean features at every step, [S, n], and the images it is a mean of.

    Only the conditional rows of a guided pass count.

    Args:
        ctx: Seeds and precision.
        model: The model, without the edit.
        edit: Its autoencoder, times and block.
        groups: Concept -> prompts.
        config: Sampling.
    """
    features = edit.coder.decoder.shape[0]
    means: dict[str, Tensor] = {}
    shown = ctx.engine.is_main and ctx.engine.runtime.progress
    with progress(f"{ctx.label}: features", len(groups), shown=shown) as advance:
        for name, prompts in groups.items():
            total = torch.zeros(config.steps, features, device=model.device)
            for first in range(0, len(prompts), config.images):
                chosen = prompts[first : first + config.images]
                index = 0

                def add(
                    layer: str, x: Tensor, total: Tensor = total, count: int = len(chosen)
                ) -> None:
                    nonlocal index
                    seen = x[count : 2 * count] if len(x) > count else x
                    values, which = edit.coder.codes(full(seen))
                    share = values.flatten() / x.shape[1]
                    total[index].index_add_(0, which.flatten(), share)
                    index += 1

                with watched(model, [edit.layer], add):
                    _make(ctx, model, chosen, ("sae", "score", name, first), config)
            means[name] = total / len(prompts)
            ctx.engine.meter.examples_seen += len(prompts)
            advance()
    return means, {name: len(prompts) for name, prompts in groups.items()}


def _make(
    ctx: Context,
    model: DiffusionModel,
    prompts: Sequence[str],
    stream: tuple[str | int, ...],
    config: SAeUronConfig,
) -> None:
    """Denoise one image of each prompt, for what hooks see of it."""
    seeds = [derive(ctx.seed, *stream, k) for k in range(len(prompts))]
    text: Conditions = model.encode(list(prompts))
    empty = model.unconditional().repeat(len(prompts))
    with ctx.engine.autocast():
        denoise(model, start_latents(model, seeds), text, empty, sampling(config))


def sampling(config: SAeUronConfig) -> Sampling:
    """Return how images are made to be looked at."""
    return Sampling("ddim", config.steps, config.guidance)


def sorted_prompts(concepts: Sequence[Concept], retain: Sequence[str]) -> dict[str, list[str]]:
    """Return retained prompts by the words they have where a concept's prompts name it.

    Prompts that fit none of the concepts' prompts are together under "".
    """
    frames = {
        (before, after)
        for concept in concepts
        for prompt in concept.prompts
        for before, name, after in (prompt.partition(concept.name),)
        if name and (before or after)
    }
    ordered = sorted(frames, key=lambda frame: (-len(frame[0]) - len(frame[1]), frame))
    found: dict[str, list[str]] = {}
    for prompt in retain:
        words = ""
        for before, after in ordered:
            room = len(prompt) > len(before) + len(after)
            if room and prompt.startswith(before) and prompt.endswith(after):
                words = prompt[len(before) : len(prompt) - len(after)]
                break
        found.setdefault(words, []).append(prompt)
    return found


def scores(target: Tensor, others: Tensor) -> Tensor:
    """Return the share of a feature in the concept's activation minus its share in the others'.

    Args:
        target: Mean features on the concept, [..., n].
        others: Mean features on all other concepts, [..., n].
    """
    share = target / target.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return share - others / others.sum(dim=-1, keepdim=True).clamp_min(1e-12)


def selected(target: Tensor, others: Tensor, percentile: float) -> Tensor:
    """Return which features score above the percentile of their step, booleans [..., n]."""
    found = scores(target, others)
    return found > threshold(found, percentile)


def threshold(found: Tensor, percentile: float) -> Tensor:
    """Return the percentile of scores, interpolated linearly, [..., n] -> [..., 1]."""
    return torch.quantile(found, percentile / 100.0, dim=-1, keepdim=True)


def intervene(
    x: Tensor,
    values: Tensor,
    features: Tensor,
    decoder: Tensor,
    center: Tensor,
    floor: Tensor,
    scale: Tensor,
    reference: bool,
) -> Tensor:
    """Return activations whose features above `floor` are multiplied by `scale`, [..., d].

    Args:
        x: Activations, [..., d].
        values: Their active features' values, [..., k].
        features: Which these are, int64 [..., k].
        decoder: [n, d].
        center: [d].
        floor: Of each value, [..., k]; infinite leaves it.
        scale: Of each value, [..., k].
        reference: Mirror the autoencoder's error, as the published code.
    """
    changed = torch.where(values > floor, values * scale, values)
    change = decoded(changed - values, features, decoder)
    if not reference:
        return x + change
    known = decoded(values, features, decoder) + center
    return known + change + (known - x)


def decoded(values: Tensor, features: Tensor, decoder: Tensor) -> Tensor:
    """Return Σ_k values·decoder[features], [..., k] -> [..., d]."""
    k = values.shape[-1]
    made = F.embedding_bag(
        features.reshape(-1, k), decoder, per_sample_weights=values.reshape(-1, k), mode="sum"
    )
    return made.reshape(*values.shape[:-1], decoder.shape[1])


def pixels(output: Tensor) -> Tensor:
    """Return a block's output [B, d, h, w] as [B, h·w, d]."""
    return output.flatten(2).transpose(1, 2)


def block(model: DiffusionModel, layer: str) -> nn.Module:
    """Return a transformer block of the UNet by name.

    Raises:
        ConfigError: The denoiser is no UNet, or has no such block.
    """
    attention.layers(model)
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.denoiser.named_modules()
        if isinstance(module, Transformer2DModel)
    }
    if layer not in found:
        raise ConfigError(
            f"the UNet has no transformer block {layer!r}; it has {', '.join(found)}. Set "
            f"method.object_layer and method.style_layer"
        )
    return found[layer]


@contextmanager
def watched(
    model: DiffusionModel, layers: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see` with every output of these blocks, as [B, h·w, d]."""

    def hook(layer: str) -> Any:
        return lambda module, args, output: see(layer, pixels(output[0]))

    handles = [block(model, layer).register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
