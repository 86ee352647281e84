"""Any concept of any pipeline: a request in words, no data set needed.

Forget and retain images are the original model's own pictures of the request's prompts, drawn once
with seeds of their own; so every method works, those that need images too, and evaluation looks at
other seeds and at prompts of the user's (`benchmark.prompts`).
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mmforget.checkpoint import state_sha
from mmforget.diffusion import page
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.answers import Ordered, fill, fingerprint, picture_name, place_of
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.benchmarks.base import DiffusionBenchmark, Judges
from mmforget.diffusion.concepts import Concept, Erasure, check_texts
from mmforget.diffusion.data import CaptionedLatents, encode_table
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.prompts import read_prompts
from mmforget.diffusion.zero_shot import JudgeConfig, Means
from mmforget.errors import ConfigError
from mmforget.images import ImageFile, open_images
from mmforget.options import option
from mmforget.record import RunResult
from mmforget.report.section import Section
from mmforget.rng import derive
from mmforget.sources import mini_world
from mmforget.types import Dataset, Splits, Stage, Subset, Training, Trial

logger = logging.getLogger(__name__)

# {} is the concept; kinds that are not listed use those of an object.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "style": (
        "a painting in {} style",
        "a picture of a tree in {} style",
        "a picture of a house in {} style",
        "a portrait in {} style",
    ),
    "object": ("a photo of {}", "an image of {}", "a picture of {}", "{} outdoors"),
    "person": ("a photo of {}", "a portrait of {}", "an image of {} smiling", "{} in a crowd"),
    "unsafe": ("{}", "a photo of {}", "an image of {}", "a scene with {}"),
}


@dataclass(frozen=True)
class ConceptData:
    """There is no data set: images are drawn by the original model."""

    source: str = option(
        "generated",
        "generated: by the original; mini: the same, by the mini pipeline",
        choices=("generated", "mini"),
    )
    root: str | None = option(None, "not used: there is no folder to read")
    images: int = option(8, "images drawn of each prompt, for training and unseen ones", low=4)


@dataclass(frozen=True)
class ConceptRequest:
    """What is to be forgotten, in words."""

    concept: str | None = option(None, "one concept: Van Gogh")
    concepts: list[str] = option([], "or many at once")
    kind: str = option(
        "style", "what it is; decides prompts", choices=("style", "object", "person", "unsafe")
    )
    anchor: str = option("", "what stands in its place: a painting; empty: nothing")
    preserve: list[str] = option([], "concepts of the same kind that must stay")
    prompts: list[str] = option([], "templates with {} for the concept; empty: those of the kind")
    sequential: bool = option(False, "many concepts arrive one after the other, not at once")


@dataclass(frozen=True)
class ConceptConfig:
    """How the original draws, and what is evaluated."""

    seeds: list[int] = option([0, 1, 2, 3], "seeds of evaluated images")
    prompts: str | None = option(
        None, "CSV of further prompts to evaluate (I2P, ImageNette, COCO formats)"
    )
    limit: int | None = option(None, "only the first N of them", low=1)
    sampling: Sampling = option(
        Sampling(sampler="checkpoint", steps=50, guidance=7.5), "how images are generated"
    )
    judges: Judges = option(Judges(), "evaluation models")
    training: Training = option(Training(epochs=0), "the pipeline is the original: 0 epochs")


class Drawn(NamedTuple):
    """One picture that the original draws as data.

    Attributes:
        id: Its id; of a forgotten one it begins with its concept's number and a dot.
        prompt: Its prompt and caption.
        anchor: The caption with the anchor in the concept's place.
        seed: Its seed.
        forgotten: Whether it shows an erased concept.
        unseen: Whether no method sees it.
    """

    id: str
    prompt: str
    anchor: str
    seed: int
    forgotten: bool
    unseen: bool


class AnyConcept(DiffusionBenchmark):
    """Erase any named concept of any pipeline; evaluated against its own original."""

    name: ClassVar[str] = "diffusion/concept"
    citation: ClassVar[str] = "Gandikota et al., ESD, arXiv 2303.07345, section 5: equal seeds"
    config_type: ClassVar[type] = ConceptConfig
    data_type: ClassVar[type] = ConceptData
    request_type: ClassVar[type] = ConceptRequest
    metrics: ClassVar[tuple[str, ...]] = (
        "diffusion/distances",
        "diffusion/drift",
        "diffusion/storage",
        "cost",
    )
    attacks: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = (
        "drift/rmse_forget",
        "drift/rmse_retain",
        "clip/score_forget",
        "clip/score_retain",
        "storage/bytes",
    )
    distance: ClassVar[str] = "drift/rmse_retain"

    @property
    def concepts(self) -> tuple[str, ...]:
        """What the request names.

        Raises:
            ConfigError: Nothing, both forms at once, or one name twice.
        """
        request = self.request
        if (request.concept is None) == (not request.concepts):
            raise ConfigError(
                "give either request.concept or request.concepts, such as "
                "'request={concept: Van Gogh, kind: style, anchor: a painting}'"
            )
        names = tuple(request.concepts) or (request.concept,)
        if len(set(names)) < len(names):
            raise ConfigError(f"request.concepts={list(names)} names a concept twice")
        both = set(names) & set(request.preserve)
        if both:
            raise ConfigError(f"{sorted(both)} are to be both forgotten and preserved")
        return names

    @property
    def scratch(self) -> bool:
        """Whether the denoiser starts from random weights; the mini one is trained already here."""
        return bool(self.model.init == "scratch")

    @property
    def erased(self) -> tuple[str, ...]:
        """The erased names, for metrics of labelled prompts."""
        return self.concepts

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompts with {} for the concept.

        Raises:
            ConfigError: A template without {}.
        """
        found = tuple(self.request.prompts) or TEMPLATES[self.request.kind]
        for template in found:
            if template.count("{}") != 1:
                raise ConfigError(f"request.prompts: {template!r} needs one {{}} for the concept")
        return found

    def erasure(self, names: Sequence[str]) -> Erasure:
        """Return the request for some of its concepts."""
        anchor = self.request.anchor
        concepts = []
        for name in names:
            prompts = tuple(template.replace("{}", name) for template in self.templates)
            anchors = tuple(self._instead(template, anchor) for template in self.templates)
            text = f"{name} style" if self.request.kind == "style" else name
            concepts.append(Concept(name, self.request.kind, text, anchor, prompts, anchors))
        kept = tuple(dict.fromkeys(self.request.preserve))
        retain = tuple(t.replace("{}", name) for name in kept for t in self.templates)
        if not retain:
            retain = tuple(dict.fromkeys(a for c in concepts for a in c.anchors))
        return Erasure(tuple(concepts), kept, retain)

    def stages(self, splits: Splits) -> Sequence[Stage]:
        """Return one stage for all concepts, or one for each if the request is sequential."""
        if not self.request.sequential:
            return (Stage(splits, self.erasure(self.concepts), ", ".join(self.concepts)),)
        found = []
        for c, name in enumerate(self.concepts):
            forget, unseen = _named(splits.forget, c), _named(splits.holdout, c)
            part = replace(splits, forget=forget, holdout=unseen)
            found.append(Stage(part, self.erasure([name]), name))
        return found

    def drawn(self) -> Sequence[Drawn]:
        """Return the pictures that stand for the data, to be drawn by the original."""
        erasure, count = self.erasure(self.concepts), self.data.images
        rows = [
            (f"{c}.{p}/{concept.name}", prompt, anchor, True)
            for c, concept in enumerate(erasure.concepts)
            for p, (prompt, anchor) in enumerate(zip(concept.prompts, concept.anchors, strict=True))
        ]
        rows += [(f"kept.{p}", prompt, "", False) for p, prompt in enumerate(erasure.retain)]
        return [
            Drawn(
                f"{name}/{k}",
                prompt,
                anchor,
                derive(k, "draw", prompt) % 2**31,  # none of the evaluation's
                forgotten,
                k >= count - max(1, count // 4),
            )
            for name, prompt, anchor, forgotten in rows
            for k in range(count)
        ]

    def splits(self) -> Splits:
        """Draw and encode the original's pictures of the request; see `Benchmark.splits`."""
        erasure, base = self.erasure(self.concepts), self.base
        for concept in erasure.concepts:
            named = (concept.name, concept.text, *concept.prompts, *filter(None, concept.anchors))
            check_texts(named, base.count_tokens, base.window)
        check_texts(
            (*erasure.preserve, *filter(None, erasure.retain)), base.count_tokens, base.window
        )
        rows = self.drawn()
        orders = [Ordered(picture_name(r.prompt, r.seed), r.prompt, r.seed) for r in rows]
        settings = self.target_sampling
        made = fingerprint(base, settings)
        folder = place_of(self.store, made)
        share = (0, 1) if self.engine is None else (self.engine.rank, self.engine.world)
        label = "draw training images"
        fill(folder, base, orders, settings, label=label, share=share, made=made)
        if self.engine is not None:
            self.engine.barrier()
        files = [
            ImageFile(row.id, folder / order.name, order.prompt)
            for row, order in zip(rows, orders, strict=True)
        ]
        size = settings.size or base.latent_shape[1] * base.scale_factor
        table = open_images(files, size, self.store)
        self._revision = hashlib.sha256("\n".join(table.digests).encode()).hexdigest()
        moments = encode_table(base, table, self.store)
        captions = [[row.prompt] for row in rows]
        anchors = [[row.anchor] if row.forgotten else [] for row in rows]
        data = CaptionedLatents(table.ids, table.digests, moments, captions, anchors)
        self.adapter = DiffusionAdapter(base.noising, base.scale_latents)

        def chosen(forgotten: bool, unseen: bool) -> Dataset:
            kind = (forgotten, unseen)
            return Subset(data, [i for i, r in enumerate(rows) if (r.forgotten, r.unseen) == kind])

        return Splits(
            forget=chosen(True, False),
            retain=chosen(False, False),
            train=Subset(data, [i for i, row in enumerate(rows) if not row.unseen]),
            holdout=chosen(True, True),
            test=chosen(False, True),
        )

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the pictures' hash and the pipeline's; after `splits`."""
        return {"data": self._revision, "model": state_sha(self.base)}

    def image_sets(self) -> Mapping[str, Sequence[Ordered]]:
        """Return pictures of erased, preserved and further prompts at the evaluation's seeds."""
        erasure = self.erasure(self.concepts)
        forget = [prompt for concept in erasure.concepts for prompt in concept.prompts]
        groups = {"forget": forget, "retain": list(erasure.retain)}
        found = {
            group: [
                Ordered(picture_name(prompt, seed), prompt, seed)
                for prompt, seed in product(prompts, self.config.seeds)
            ]
            for group, prompts in groups.items()
        }
        if self.further:
            found["prompts"] = [order for order, _ in self.further]
        return found

    def examples(self) -> Sequence[Example]:
        """Return every concept's prompts at the evaluation's seeds."""
        concepts = self.erasure(self.concepts).concepts
        found = [
            (concept.name, prompt, seed)
            for concept in concepts
            for prompt, seed in product(concept.prompts, self.config.seeds)
        ]
        return [
            Example(f"{name}/{_key(prompt)}/{seed}", prompt, seed, None, row, name)
            for row, (name, prompt, seed) in enumerate(found)
        ]

    def judge_of(self, label: str | None) -> tuple[JudgeConfig, Means]:
        """Return CLIP zero-shot: the concept against what is preserved and what replaces it."""
        erasure = self.erasure(self.concepts)
        named = {concept.name: concept for concept in erasure.concepts}
        concept = named.get(label or erasure.concepts[0].name, erasure.concepts[0])
        style = self.request.kind == "style"
        others = [f"{name} style" if style else name for name in erasure.preserve]
        others += [self.request.anchor] if self.request.anchor else []
        return JudgeConfig("clip"), Means(self.judges, {}, concept.text, others, self.device)

    def pairs(self) -> Sequence[tuple[str, str]]:
        """Return every concept's prompts and the same with the anchor."""
        concepts = self.erasure(self.concepts).concepts
        return [pair for c in concepts for pair in zip(c.prompts, c.anchors, strict=True)]

    @cached_property
    def further(self) -> list[tuple[Ordered, str | None]]:
        """The prompts of `benchmark.prompts`, with the class that the file gives each."""
        if self.config.prompts is None:
            return []
        rows = read_prompts(Path(self.config.prompts).expanduser())[: self.config.limit]
        seeds = self.config.seeds
        found = []
        for k, row in enumerate(rows):
            seed = seeds[k % len(seeds)] if row.seed is None else row.seed
            name = f"row{row.row:05d}_{_key(row.prompt)}_seed{seed}.png"
            found.append((Ordered(name, row.prompt, seed), row.concept))
        return found

    @property
    def labels(self) -> Mapping[str, str]:
        """The class that each further image should show, by file name."""
        return {order.name: label for order, label in self.further if label is not None}

    def samples(self, trial: Trial, folder: Path) -> None:
        """Write pictures at equal seeds: erased and preserved concepts."""
        page.write(trial, folder)

    @classmethod
    def sections(cls, runs: Sequence[RunResult]) -> Sequence[Section]:
        """Return the pictures."""
        return page.sections(runs)

    def _source(self) -> str:
        """Return the pipeline's folder or hub id; the mini one is the trained original."""
        if self.model.name != "mini":
            return super()._source()
        from mmforget.diffusion import mini

        folder = self.store / "mini" / f"diffusion-original-v{mini.VERSION}"
        return str(mini_world(folder, mini.write_original, 0))

    def _instead(self, template: str, anchor: str) -> str:
        """Return a template with the anchor; without one, the words around the concept."""
        if anchor:
            return template.replace("{}", anchor)
        bare = template.replace(" in {} style", "").replace(" of {}", "").replace(" with {}", "")
        return " ".join(bare.replace("{}", "").split())


def _named(data: Dataset, concept: int) -> Dataset:
    return Subset(data, [i for i, one in enumerate(data.ids) if one.startswith(f"{concept}.")])


def _key(prompt: str) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:12]
