"""SPM: rank-1 membranes on the denoiser, let through as far as a prompt names a concept."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.diffusion.concepts import Concept
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import Edit
from mmforget.diffusion.methods.distill import (
    ROWS,
    Pairs,
    Prompted,
    PromptTraining,
    Turns,
    draw_stops,
    model_of,
    points,
    predictions,
    squared,
    step_rng,
)
from mmforget.diffusion.methods.low_rank import adapted
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import start_latents
from mmforget.errors import CheckpointError, ConfigError
from mmforget.options import option
from mmforget.rng import derive, generator
from mmforget.types import Batch, full

CITATION = "Lyu et al., One-Dimensional Adapter to Rule Them All, CVPR 2024, arXiv 2312.16145"
MATCHES = ("clipcos_tokenuni", "clipcos", "tokenuni", "allone")


@dataclass(frozen=True)
class SPMConfig(PromptTraining):
    """Defaults of Lyu et al. for SD 1.4; `steps` are those of each concept."""

    steps: int = option(3000, "optimiser steps for each concept", low=0)
    lr: float = option(1e-4, "learning rate at the top of each cycle", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    weight_decay: float = option(0.01, "weight decay (decoupled for adamw)", low=0)
    scope: str = option(
        "blocks",
        "layers with an adapter: every Linear and Conv2d of the transformer blocks (`blocks`), or "
        "those of a scope's name or a regex",
    )
    restarts: int = option(3, "cycles of the cosine schedule", low=1)
    warmup_steps: int = option(500, "steps of linear warm-up", low=0)
    rank: int = option(1, "rank of the adapters", low=1)
    alpha: float = option(1.0, "adapters are scaled by alpha/rank", low=0)
    eta: float = option(1.0, "negative guidance: the target is e_n - eta·(e_c - e_n)", low=0)
    neutral: str = option(
        "empty",
        "what e_n is of: the empty prompt, or the concept's anchor",
        choices=("empty", "anchor"),
    )
    anchor_weight: float = option(1000.0, "weight of latent anchoring; 0 leaves it out", low=0)
    anchors: int = option(4, "random text embeddings of a step", low=1)
    denoise_steps: int = option(30, "DDIM steps, a random number of which makes x_t", low=1)
    guidance: float = option(3.0, "classifier-free guidance on the way to x_t", low=0)
    prompt: str = option(
        "name",
        "erased prompts, trained on and matched at the gate: the bare `name`, the short prompt "
        "(`text`), or all full `prompts`",
        choices=("name", "text", "prompts"),
    )
    gate: str = option(
        "once",
        "the gate acts on the adapter (once), or on both of its factors and so is squared "
        "(reference: the published code)",
        choices=("once", "reference"),
    )
    match: str = option(
        "clipcos_tokenuni",
        "gate: the larger of the cosine of text embeddings and the share of erased tokens in the "
        "prompt, one of the two, or always 1 (allone)",
        choices=MATCHES,
    )


class Membrane(Edit):
    """Low-rank adapters of one concept, y = Wx + γ(prompt)·(α/r)·UDx (Lyu et al., eq. 1, 9).

    γ is, for each row of a pass, the largest match of the prompt it serves with an erased prompt:
    max(cosine of the flattened text embeddings, share of the erased prompt's tokens it holds).

    Args:
        layers: The adapted Linear and Conv2d layers by their names in the denoiser; only their
            shapes are read.
        prompts: Erased prompts.
        rank: r.
        alpha: α.
        gate: "once" or "reference".
        match: See `SPMConfig`.
    """

    kind: ClassVar[str] = "spm"
    citation: ClassVar[str] = CITATION

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        prompts: Sequence[str],
        rank: int,
        alpha: float,
        gate: str,
        match: str,
    ) -> None:
        super().__init__()
        self.prompts = list(prompts)
        self.rank, self.alpha, self.gate, self.match = rank, alpha, gate, match
        self.names = list(layers)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in layers.items():
            down, up = shapes(layer, rank)
            self.down[_key(name)] = nn.Parameter(torch.zeros(down))
            self.up[_key(name)] = nn.Parameter(torch.zeros(up))
        self.fixed: float | None = None
        self.rows: Tensor | None = None
        self.handles: list[Any] = []

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Draw the factors D (Kaiming); U stays zero, so that nothing changes yet."""
        for name in self.names:
            draw = generator(seed, "spm", "start", name)
            nn.init.kaiming_uniform_(self.down[_key(name)], a=1.0, generator=draw)

    def config(self) -> dict[str, Any]:
        """Return the layers' names, the erased prompts and the settings."""
        return {
            "layers": self.names,
            "prompts": self.prompts,
            "rank": self.rank,
            "alpha": self.alpha,
            "gate": self.gate,
            "match": self.match,
        }

    @classmethod
    def build(cls, config: dict[str, Any], model: DiffusionModel) -> "Membrane":
        """Make it for a model's layers.

        Raises:
            CheckpointError: The model has no such layers.
        """
        found = dict(model.denoiser.named_modules())
        missing = [name for name in config["layers"] if name not in found]
        if missing:
            raise CheckpointError(
                f"the membrane is of another model: this {model.family} denoiser has no layer "
                f"{missing[0]!r} ({len(missing)} of {len(config['layers'])} are missing)"
            )
        return cls(**{**config, "layers": {name: found[name] for name in config["layers"]}})

    def attach(self, model: DiffusionModel) -> None:
        """Hook the layers."""
        modules = dict(model.denoiser.named_modules())
        self.handles = [
            modules[name].register_forward_hook(self._hook(_key(name))) for name in self.names
        ]

    def detach(self, model: DiffusionModel) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def before_predict(self, model: DiffusionModel, owner: Conditions) -> None:
        """Measure γ for every row."""
        if self.fixed is not None:
            return
        with torch.no_grad():
            erased = model.encode(self.prompts)
        found = gates(
            similarity(
                owner.ids,
                owner.embeds,
                erased.ids,
                erased.embeds,
                model.tokenizer.all_special_ids,
                self.match,
            )
        )
        self.rows = found.square() if self.gate == "reference" else found

    @contextmanager
    def held(self, gate: float) -> Iterator[None]:
        """Hold the gate at one value for all prompts."""
        before, self.fixed = self.fixed, gate
        try:
            yield
        finally:
            self.fixed = before

    def lora_layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (D, (α/r)·U) by layer name: a plain LoRA, whose gate is always 1."""
        scale = self.alpha / self.rank
        return {
            name: (self.down[_key(name)].detach(), scale * self.up[_key(name)].detach())
            for name in self.names
        }

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            scale: float | Tensor = self.alpha / self.rank
            if self.fixed == 0.0:
                return output
            if self.fixed is None:
                assert self.rows is not None, "the denoiser was called past DiffusionModel.predict"
                gate = self.rows.reshape(-1, *[1] * (output.dim() - 1))
                scale = scale * gate.to(output.dtype)
            else:
                scale = scale * self.fixed
            return output + scale * low_rank(layer, args[0], self.down[key], self.up[key])

        return add


class SPM(Prompted[SPMConfig]):
    """Train a membrane for each concept by itself, with latent anchoring.

    A step makes x_t with the membrane on, and minimises MSE(e_spm(c), e_n - η·(e_c - e_n)) plus
    `anchor_weight` times the MSE between predictions with and without the membrane at random text
    embeddings (Lyu et al., section 3.2-3.3). Besides x_t (15 guided passes on average) a row costs
    2 + `anchors` predictions and 1 + `anchors` with gradients. Membranes of several concepts are
    added up. On SD3 and FLUX adapters are on the Linear layers of the transformer blocks: ours.
    """

    intent: ClassVar[str] = "suppression"
    trains: ClassVar[str] = "rank-1 adapters on the denoiser's transformer blocks"
    holds: ClassVar[str] = "nothing"
    citation: ClassVar[str] = CITATION
    config_type: ClassVar[type] = SPMConfig

    def run(self, ctx: Context) -> nn.Module:
        """Train the membranes one after the other, then add them all."""
        model, resume = model_of(ctx), self.resume
        first, made = len(model.edits), dict[str, Edit]()
        for k, concept in enumerate(ctx.target.concepts):
            inner = ctx.within(model, Turns(0, 1))
            inner.target = replace(ctx.target, concepts=(concept,))
            self.place = f"spm_{first + k}"
            self.resume = _below(resume, self.place)
            super().run(inner)
            made[self.place] = model.remove_edit(self.place)
        self.resume = resume
        for name, edit in made.items():
            model.add_edit(name, edit)
        ctx.scope(rf"edits\.({'|'.join(made)})\..*")
        return model

    def setup(self, ctx: Context) -> None:
        """Add the concept's membrane and train it alone."""
        config, model, (concept,) = self.config, model_of(ctx), ctx.target.concepts
        self.membrane = Membrane(
            adapted_layers(model, config.scope),
            _erased(concept, config.prompt),
            config.rank,
            config.alpha,
            config.gate,
            config.match,
        )
        self.membrane.start(derive(ctx.seed, concept.name))
        model.add_edit(self.place, self.membrane)
        self.weights = list(ctx.scope(rf"edits\.{self.place}\..*").values())
        self.before = [weight.detach().clone() for weight in self.weights]

    def loss(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """Return the terms `forget` and, with anchoring, `retain`."""
        config, model, pairs, membrane = self.config, model_of(ctx), batch.data, self.membrane
        assert isinstance(pairs, Pairs)
        (concept,), count = ctx.target.concepts, len(pairs.turn)
        erased = [membrane.prompts[turn % len(membrane.prompts)] for turn in pairs.turn]
        text = model.encode(erased)
        neutral = model.unconditional(concept.anchor if config.neutral == "anchor" else "")
        anchors: list[Conditions] = []
        if config.anchor_weight > 0:
            drawn = random_texts(text.rows([0]), config.anchors, step_rng(ctx, "spm anchors"))
            anchors = [drawn.rows([k]).repeat(count) for k in range(config.anchors)]
        settings = Sampling("ddim", config.denoise_steps, config.guidance, ROWS)
        noise = start_latents(model, batch.draws("noise").integers(2**62).tolist())
        stops = draw_stops(count, 1, settings, step_rng(ctx, "spm time"))
        with ctx.engine.autocast():
            with membrane.held(1.0):
                at = points(model, text, noise, stops, settings, "step")
            with membrane.held(0.0), torch.no_grad():
                asked = [text, neutral.repeat(count), *anchors]
                e_c, e_n, *wanted = map(full, predictions(model, at, asked))
            with membrane.held(1.0):
                pred, *held = predictions(model, at, [text, *anchors])
        terms = {"forget": ctx.mean(squared(pred, e_n - config.eta * (e_c - e_n)), batch)}
        if anchors:
            errors = [squared(a, b) for a, b in zip(held, wanted, strict=True)]
            strayed = torch.stack(errors).mean(dim=0)
            terms["retain"] = config.anchor_weight * ctx.mean(strayed, batch)
        return terms

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Shorten the step to that of the schedule's rate: an optimiser's step is linear in it."""
        config = self.config
        factor = restarts(ctx.step, config.steps, config.warmup_steps, config.restarts)
        for weight, before in zip(self.weights, self.before, strict=True):
            weight.lerp_(before, 1.0 - factor)
            before.copy_(weight)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the weights of the step checkpoint."""
        self.before = [weight.detach().clone() for weight in self.weights]


def restarts(step: int, total: int, warmup: int, cycles: int) -> float:
    """Return the share of the learning rate at a step (0-based): warm-up, then cosine cycles."""
    if step < warmup:
        return step / warmup
    progressed = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * ((cycles * progressed) % 1.0)))


def adapted_layers(model: DiffusionModel, scope: str = "blocks") -> dict[str, nn.Module]:
    """Return the Linear and Conv2d layers of the denoiser that a scope takes, by name.

    Args:
        model: The model.
        scope: "blocks": all inside `Transformer2DModel` of a UNet, or inside the transformer
            blocks of SD3 and FLUX; or what `scopes.parameters` takes.

    Raises:
        ConfigError: There are none.
    """
    found = dict(model.denoiser.named_modules())
    if scope != "blocks":
        return {name: found[name] for name in adapted(model, scope)}
    roots = ["transformer_blocks", "single_transformer_blocks"]
    if model.denoiser_name == "unet":
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        roots = [name for name, module in found.items() if isinstance(module, Transformer2DModel)]
    inside = tuple(f"{root}." for root in roots)
    chosen: dict[str, nn.Module] = {
        name: layer
        for name, layer in found.items()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.startswith(inside)
    }
    if not chosen:
        raise ConfigError("the denoiser has no transformer blocks for scope=blocks; name a scope")
    return chosen


def shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a layer's factors D and U."""
    if isinstance(layer, nn.Conv2d):
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    assert isinstance(layer, nn.Linear)
    return (rank, layer.in_features), (layer.out_features, rank)


def low_rank(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return UDx in the shape of the layer's output."""
    down, up = down.to(x.dtype), up.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
    return F.linear(F.linear(x, down), up)


def similarity(
    ids: Tensor,
    embeds: Tensor,
    erased_ids: Tensor,
    erased_embeds: Tensor,
    special: Sequence[int],
    match: str,
) -> Tensor:
    """Return how far prompts match erased prompts, [B, E].

    Args:
        ids: Token ids of the prompts, int64 [B, T].
        embeds: Their text embeddings, [B, L, D].
        erased_ids: Token ids of the erased prompts, int64 [E, T'].
        erased_embeds: Their embeddings, [E, L, D].
        special: Ids that stand for no text.
        match: One of `MATCHES`.
    """
    found = []
    if match == "allone":
        found.append(full(embeds.new_ones(len(embeds), len(erased_embeds))))
    if "clipcos" in match:
        one, other = embeds.flatten(1), erased_embeds.flatten(1)
        with torch.autocast(embeds.device.type, enabled=False):
            found.append(F.normalize(full(one), dim=1) @ F.normalize(full(other), dim=1).T)
    if "tokenuni" in match:
        marks = torch.tensor(special, device=erased_ids.device)
        earlier = torch.ones(2 * [erased_ids.shape[1]], device=erased_ids.device).tril(-1).bool()
        again = ((erased_ids[:, :, None] == erased_ids[:, None]) & earlier).any(dim=2)
        counted = ~torch.isin(erased_ids, marks) & ~again  # each distinct token once
        held = (ids[:, None, :, None] == erased_ids[None, :, None]).any(dim=2) & counted
        share = held.sum(dim=2) / counted.sum(dim=1).clamp_min(1)
        found.append(full(share.to(embeds.dtype)))
    return torch.stack(found).amax(dim=0)


def gates(matches: Tensor) -> Tensor:
    """Return γ of each prompt: its largest match, [B, E] -> [B]; not clamped."""
    return matches.amax(dim=1)


def random_texts(text: Conditions, count: int, draw: torch.Generator) -> Conditions:
    """Return `count` random text embeddings for latent anchoring (Lyu et al., section 3.3).

    Directions are Gaussian and kept with probability 1 - cos to the target's; norms are 0.8 to 1.2
    times the target's. Pooled embeddings are drawn likewise.

    Args:
        text: Conditions of the target, one row.
        count: Rows to draw.
        draw: Source of the numbers.
    """
    pooled = None if text.pooled is None else _around(text.pooled[0], count, draw)
    ids = text.ids.expand(count, -1)
    return Conditions(_around(text.embeds[0], count, draw), pooled, ids, ("",) * count)


def _around(vector: Tensor, count: int, draw: torch.Generator) -> Tensor:
    flat = full(vector).flatten()
    kept: list[Tensor] = []
    while len(kept) < count:
        drawn = F.normalize(torch.randn(flat.numel(), generator=draw), dim=0).to(flat.device)
        chance = 1.0 - F.cosine_similarity(drawn, flat, dim=0).item()
        if torch.rand((), generator=draw).item() < chance:
            kept.append(drawn)
    norms = flat.norm() * (0.8 + 0.4 * torch.rand(count, generator=draw)).to(flat.device)
    made: Tensor = torch.stack(kept) * norms[:, None]
    return made.reshape(count, *vector.shape).to(vector.dtype)


def _erased(concept: Concept, prompt: str) -> Sequence[str]:
    return concept.prompts if prompt == "prompts" else (getattr(concept, prompt),)


def _below(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _key(name: str) -> str:
    return name.replace(".", "-")  # parameter names hold no dots
