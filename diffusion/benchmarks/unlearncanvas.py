"""UnlearnCanvas: erase a style, an object or a pair from a pipeline that paints 50 by 20 of them.

Zhang et al., UnlearnCanvas, NeurIPS 2024 Datasets and Benchmarks, arXiv 2402.11846. One request is
one target, or several that arrive one after the other (`request.sequence`).
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmforget.diffusion import canvas, page
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.answers import Ordered
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.benchmarks.base import DiffusionBenchmark, Judges
from mmforget.diffusion.canvas import PHOTOS, CanvasRow, answer_name, spaced
from mmforget.diffusion.classifiers import Classifier, ClassifierConfig, load_classifier
from mmforget.diffusion.concepts import Concept, Erasure, check_texts
from mmforget.diffusion.data import CaptionedLatents, encode_table
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.scores import nearest
from mmforget.diffusion.zero_shot import JudgeConfig, Means
from mmforget.errors import ConfigError, SplitError, unknown
from mmforget.images import ImageFile, open_images
from mmforget.options import option
from mmforget.record import MetricValue, RunResult
from mmforget.report.section import Section
from mmforget.sources import local_folder, mini_world
from mmforget.types import Dataset, Splits, Stage, Subset, Training, Trial

logger = logging.getLogger(__name__)

REPO = "OPTML-Group/UnlearnCanvas"
NEAREST = 2  # neighbours of a target that are looked at
PHOTO_STYLE = "Photo"  # what captions call the style of photographs


@dataclass(frozen=True)
class CanvasData:
    """Where the images come from."""

    source: str = option(
        "mini",
        "mini: 6 styles of 8 objects drawn here; local: a folder; hub: the published data set",
        choices=("mini", "local", "hub"),
    )
    root: str | None = option(None, "folder {Style}/{Object}/{k}.jpg, for source=local")
    seed: int = option(0, "which mini world is drawn", low=0)
    repo: str = option(REPO, "data set id, for source=hub")
    revision: str | None = option(None, "its revision; null takes the newest")
    images: int = option(20, "images of a style and object that must be there", low=1)
    trained: int = option(18, "of these, images 1 to N are trained on, the rest is unseen", low=1)


@dataclass(frozen=True)
class CanvasRequest:
    """What is to be forgotten: exactly one of style, object, pair and sequence."""

    style: str | None = option(None, "a style, such as Van_Gogh")
    object: str | None = option(None, "an object, such as Dogs")
    pair: list[str] = option([], "a style and an object: the finer-scale setting")
    sequence: list[str] = option([], "styles and objects, forgotten one after the other")
    anchor: str | None = option(
        None, "what stands in its place; null: Photo for a style, the next object for an object"
    )


@dataclass(frozen=True)
class CanvasConfig:
    """Protocol and training; defaults are the published ones, with one sampler for all methods."""

    styles: list[str] = option([], "styles of the benchmark; empty: the 50 (mini: all)")
    objects: list[str] = option([], "its objects; empty: the 20 (mini: all)")
    seeds: list[int] = option(list(canvas.SEEDS), "seeds of an answer set")
    photos: bool = option(False, "count the photos as one more style in IRA and CRA")
    real_images: int = option(5, "real images of a style and object on FID's other side", low=2)
    image_size: int | None = option(None, "pixels of training images; null: the pipeline's own")
    caption_dropout: float = option(
        0.1, "share of training captions replaced by the empty prompt", low=0, high=1
    )
    snr_gamma: float | None = option(None, "min-SNR weights of training; null: none", low=0)
    sampling: Sampling = option(Sampling(), "how answers are generated")
    judges: Judges = option(Judges(), "classifiers and other evaluation models")
    judge: JudgeConfig = option(
        JudgeConfig(), "who judges attacked pictures; kind null: the target's classifier"
    )
    training: Training = option(
        Training(epochs=0, lr=1e-6, optimizer="adamw", batch_size=64, scope="all"),
        "how originals and retrained models are trained; 0 epochs: the pipeline is the original",
    )


@dataclass(frozen=True)
class Target:
    """One thing to forget.

    Attributes:
        style: Its style; None: every style.
        object: Its object; None: every object.
    """

    style: str | None = None
    object: str | None = None

    @property
    def kind(self) -> str:
        """Return "style", "object" or "pair"."""
        return "pair" if self.style and self.object else "style" if self.style else "object"

    @property
    def name(self) -> str:
        """Return it as file names and tables write it."""
        return "/".join(part for part in (self.style, self.object) if part)

    def holds(self, style: str, object_name: str) -> bool:
        """Return whether an image of this style and object is of the target."""
        return self.style in (None, style) and self.object in (None, object_name)

    def scored(self) -> canvas.Target:
        """Return it as `canvas` writes targets."""
        return (self.style, self.object) if self.style and self.object else self.name


class UnlearnCanvas(DiffusionBenchmark):
    """UnlearnCanvas (arXiv 2402.11846)."""

    name: ClassVar[str] = "diffusion/unlearncanvas"
    citation: ClassVar[str] = "Zhang et al., UnlearnCanvas, NeurIPS 2024 D&B, arXiv 2402.11846"
    config_type: ClassVar[type] = CanvasConfig
    data_type: ClassVar[type] = CanvasData
    request_type: ClassVar[type] = CanvasRequest
    metrics: ClassVar[tuple[str, ...]] = (
        "diffusion/unlearncanvas",
        "diffusion/distances",
        "diffusion/drift",
        "diffusion/neighbours",
        "diffusion/storage",
        "cost",
    )
    attacks: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = (
        "canvas/UA",
        "canvas/IRA",
        "canvas/CRA",
        "distance/fid",
        "canvas/gap",
    )
    distance: ClassVar[str] = "canvas/gap"

    @cached_property
    def styles(self) -> tuple[str, ...]:
        """Styles of the benchmark, in the classifier's order, without the photos."""
        return self._chosen("styles", self.config.styles, self._known()[0])

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """Objects of the benchmark, in the classifier's order."""
        return self._chosen("objects", self.config.objects, self._known()[1])

    @property
    def themes(self) -> tuple[str, ...]:
        """Styles and the photos, in the classifier's order."""
        every = set(self.styles)
        return tuple(t for t in canvas.THEMES if t in every or t == PHOTOS) or (PHOTOS,)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """What the request names, in order.

        Raises:
            ConfigError: It names none, or more than one thing at once.
            SplitError: A name is not in the list.
        """
        request = self.request
        given = {
            name: value
            for name in ("style", "object", "pair", "sequence")
            if (value := getattr(request, name))
        }
        if len(given) != 1:
            raise ConfigError(
                f"the request names {', '.join(given) or 'nothing'}; give exactly one of style, "
                f"object, pair and sequence, such as 'request={{style: {self.styles[0]}}}'"
            )
        if request.pair:
            if len(request.pair) != 2:
                raise ConfigError(f"request.pair={request.pair}: a style and an object are needed")
            style, object_name = request.pair
            return (Target(self._style(style), self._object(object_name)),)
        names = request.sequence or [request.style or request.object]
        found = []
        for name in names:
            if request.style or (not request.object and name in self.styles):
                found.append(Target(style=self._style(name)))
            elif request.object or name in self.objects:
                found.append(Target(object=self._object(name)))
            else:
                known = (*self.styles, *self.objects)
                raise SplitError(unknown("style or object", name, known, "the benchmark's lists"))
        if len(set(found)) < len(found):
            raise ConfigError(f"request.sequence={names} names a target twice")
        return tuple(found)

    def splits(self) -> Splits:
        """Read, encode and split the images; see `Benchmark.splits`."""
        targets, base = self.targets, self.base  # faults of the request before any image is read
        rows = canvas.read_canvas(
            self._root(), self.themes, self.objects, self.data.images, photos=True
        )
        self.rows = rows
        size = self.config.image_size or base.latent_shape[1] * base.scale_factor
        files = [
            ImageFile(f"{row.style}/{row.object}/{row.k}", row.path, f"{row.style}/{row.object}")
            for row in rows
        ]
        table = open_images(files, size, self.store)
        moments = encode_table(base, table, self.store)
        self._revision = hashlib.sha256("\n".join(table.digests).encode()).hexdigest()
        captions = [self.captions(row) for row in rows]
        anchors = [self._anchored(row, texts) for row, texts in zip(rows, captions, strict=True)]
        data = CaptionedLatents(table.ids, table.digests, moments, captions, anchors)
        self.adapter = DiffusionAdapter(
            base.noising, base.scale_latents, self.config.caption_dropout, self.config.snr_gamma
        )
        gone = [any(target.holds(row.style, row.object) for target in targets) for row in rows]
        seen = [row.k <= self.data.trained for row in rows]
        if all(seen):
            raise ConfigError(
                f"data.trained={self.data.trained} of data.images={self.data.images} leaves no "
                f"unseen image; lower it"
            )

        def chosen(forget: bool, train: bool) -> Dataset:
            pairs = zip(gone, seen, strict=True)
            return Subset(data, [i for i, pair in enumerate(pairs) if pair == (forget, train)])

        splits = Splits(
            forget=chosen(True, True),
            retain=chosen(False, True),
            train=Subset(data, [i for i, yes in enumerate(seen) if yes]),
            holdout=chosen(True, False),
            test=chosen(False, False),
        )
        for erasure in (stage.target for stage in self.stages(splits)):
            for concept in erasure.concepts:
                texts = (concept.name, concept.text, *concept.prompts)
                check_texts(texts, base.count_tokens, base.window)
        return splits

    def stages(self, splits: Splits) -> Sequence[Stage]:
        """Return one stage a target: it forgets that one and keeps what none so far named."""
        if len(self.targets) == 1:
            return (Stage(splits, self._erasure(self.targets), self.targets[0].name),)
        found = []
        for k, target in enumerate(self.targets):
            so_far = self.targets[: k + 1]
            forget = _part(splits.forget, (target,))
            # What a later target names is still kept: nobody has asked to forget it yet.
            later = _part(splits.forget, self.targets[k + 1 :], without=so_far)
            holdout = _part(splits.holdout, (target,))
            retain = splits.retain if later is None else _union(splits.retain, later)
            assert forget is not None and holdout is not None
            part = replace(splits, forget=forget, retain=retain, holdout=holdout)
            found.append(Stage(part, self._erasure(so_far), target.name))
        return found

    def fingerprint(self) -> Mapping[str, Any]:
        """Return data revision, lists, image size, captions and pipeline; after `splits`."""
        return {
            "data": self._revision,
            "styles": list(self.styles),
            "objects": list(self.objects),
            "trained": self.data.trained,
            "caption_dropout": self.config.caption_dropout,
            "snr_gamma": self.config.snr_gamma,
            "model": dict(self.model_fingerprint()),
        }

    def captions(self, row: CanvasRow) -> list[str]:
        """Return an image's captions, the official one first."""
        official = self.prompt(row.style, row.object)
        if self.data.source != "mini":
            return [official]
        from mmforget.diffusion import mini

        others = mini.captions(row.style, row.object)
        return [official, *(text for text in others if text != official)]

    def prompt(self, style: str, object_name: str) -> str:
        """Return the official prompt of a style and object; photos are called Photo style."""
        shown = PHOTO_STYLE if style == PHOTOS else spaced(style)
        return f"A {object_name} image in {shown} style."

    def orders(self) -> list[Ordered]:
        """Return the answer set: every theme, object and seed."""
        return [
            Ordered(answer_name(style, name, seed), self.prompt(style, name), seed)
            for seed, style, name in product(self.config.seeds, self.themes, self.objects)
        ]

    def image_sets(self) -> Mapping[str, Sequence[Ordered]]:
        """Return the answer set in two groups: of any target, and of none."""
        groups: dict[str, list[Ordered]] = {"forget": [], "retain": []}
        for order in self.orders():
            style, name, _ = canvas.parse_answer_name(order.name)
            gone = any(target.holds(style, name) for target in self.targets)
            groups["forget" if gone else "retain"].append(order)
        return groups

    def examples(self) -> Sequence[Example]:
        """Return the answers of all targets as prompts to attack, the first seed's first."""
        found: list[Example] = []
        for order in self.image_sets()["forget"]:
            style, name, _ = canvas.parse_answer_name(order.name)
            target = next(t for t in self.targets if t.holds(style, name))
            stem = order.name.rpartition(".")[0]
            row = len(found)
            found.append(Example(stem, order.prompt, order.seed, None, row, target.name))
        return found

    def judge_of(self, label: str | None) -> tuple[JudgeConfig, Means]:
        """Return the classifier of the target's kind; of a pair, that of its style.

        Raises:
            ConfigError: The label is no target of the request.
        """
        named = {target.name: target for target in self.targets}
        target = named.get(label or self.targets[-1].name)
        if target is None:
            raise ConfigError(unknown("target", str(label), named, "request"))
        kind = "object" if target.style is None else "style"
        classifiers = dict(zip(("style", "object"), self.classifiers, strict=True))
        others = [text for text in self._erasure([target]).preserve if "style" in text]
        means = Means(self.judges, classifiers, target.style or target.name, others, self.device)
        own: JudgeConfig = self.config.judge
        if own.kind is None:
            own = replace(own, kind=kind, label=target.style or target.object)
        return own, means

    def pairs(self) -> Sequence[tuple[str, str]]:
        """Return every target's prompts and the same with its anchor."""
        concepts = [self._concept(target) for target in self.targets]
        return [pair for c in concepts for pair in zip(c.prompts, c.anchors, strict=True)]

    @cached_property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """The style and the object classifier.

        Raises:
            ConfigError: They are not named, and the data are not the mini world.
        """
        device = self.engine.device if self.engine is not None else torch.device("cpu")
        judges = self.judges
        if judges.style is None or judges.object is None:
            if self.data.source == "mini":
                from mmforget.diffusion import mini_model

                return mini_model.load_classifiers(device)
            raise ConfigError(
                "UA, IRA and CRA need benchmark.judges.style and benchmark.judges.object: the "
                "published style50.pth and style50_cls.pth (cls_model/ of UnlearnCanvas)"
            )
        made = [
            load_classifier(ClassifierConfig(checkpoint=path, arch=judges.arch), labels, device)
            for path, labels in ((judges.style, canvas.THEMES), (judges.object, canvas.OBJECTS))
        ]
        return made[0], made[1]

    def nearest(self, model: DiffusionModel) -> list[str]:
        """Return the classes nearest to the last target, by cosine of mean text embeddings.

        Classes are those of its kind that no request names; none for a pair.

        Args:
            model: The original.
        """
        target = self.targets[-1]
        if target.kind == "pair":
            return []
        every = self.styles if target.kind == "style" else self.objects
        named = {one.name for one in self.targets}
        texts = {self._short(target.kind, name): name for name in every if name not in named}

        @torch.no_grad()
        def encode(chosen: Sequence[str]) -> torch.Tensor:
            return model.encode(chosen).embeds.mean(dim=1)

        count = min(NEAREST, len(texts))
        if count == 0:
            return []
        found = nearest(list(texts), self._short(target.kind, target.name), encode, count)
        return [texts[one.text] for one in found]

    def related(self, model: DiffusionModel) -> set[str]:
        """Return the retained images of the nearest classes; see `DiffusionBenchmark.related`."""
        near = set(self.nearest(model))
        place = 0 if self.targets[-1].kind == "style" else 1
        return {
            order.name
            for order in self.image_sets()["retain"]
            if canvas.parse_answer_name(order.name)[place] in near
        }

    def collapsed(self, metrics: Mapping[str, MetricValue]) -> str | None:
        """Return why the model is of no use: the rest is recognised no better than by chance."""
        kept = metrics.get("canvas/IRA") or metrics.get("canvas/OC")
        if kept is None:
            return None
        kind = self.targets[-1].kind
        chance = 1.0 / len(self.themes if kind == "style" else self.objects)
        if kind == "pair" or kept.value > chance:
            return None
        return f"IRA {kept.value:.3f} is no better than chance ({chance:.3f})"

    def samples(self, trial: Trial, folder: Path) -> None:
        """Write pictures at equal seeds: target, related and unrelated concepts."""
        page.write(trial, folder)

    @classmethod
    def sections(cls, runs: Sequence[RunResult]) -> Sequence[Section]:
        """Return pictures, scores by target and curves of sequences."""
        return page.sections(runs)

    # ------------------------------------------------------------------------------------------

    def _erasure(self, targets: Sequence[Target]) -> Erasure:
        """Return what methods read: the last target as the concept, the rest to be kept."""
        last = targets[-1]

        def kept(style: str, name: str) -> bool:
            return not any(target.holds(style, name) for target in targets)

        pairs = list(product(self.styles, self.objects))
        styles = [s for s in self.styles if any(kept(s, o) for o in self.objects)]
        objects = [o for o in self.objects if any(kept(s, o) for s in self.styles)]
        retain = [self.prompt(s, o) for s, o in pairs if kept(s, o)]
        retain += [self.prompt(PHOTOS, o) for o in objects]
        preserve = [f"{spaced(s)} style" for s in styles] + [f"An image of {o}" for o in objects]
        return Erasure((self._concept(last),), tuple(preserve), tuple(retain))

    def _concept(self, target: Target) -> Concept:
        styles = [target.style] if target.style else [*self.styles, PHOTOS]
        objects = [target.object] if target.object else list(self.objects)
        pairs = list(product(styles, objects))
        prompts = [self.prompt(s, o) for s, o in pairs]
        if target.kind == "object":
            anchor = f"An image of {self._next_object(target)}"
            text = f"An image of {target.object}"
            anchors = [self.prompt(s, self._next_object(target)) for s, _ in pairs]
        else:
            instead = self.request.anchor or PHOTO_STYLE
            anchors = [f"A {o} image in {instead} style." for _, o in pairs]
            anchor, text = f"{instead} style", f"{spaced(target.style or '')} style"
            if target.kind == "pair":
                anchor, text = anchors[0], prompts[0]
        name = spaced(target.name.replace("/", " "))
        return Concept(name, target.kind, text, anchor, tuple(prompts), tuple(anchors))

    @staticmethod
    def _short(kind: str, name: str) -> str:
        """Return the short prompt of a style or object."""
        return f"{spaced(name)} style" if kind == "style" else f"An image of {name}"

    def _next_object(self, target: Target) -> str:
        if self.request.anchor:
            return str(self.request.anchor)
        assert target.object is not None
        return self.objects[(self.objects.index(target.object) + 1) % len(self.objects)]

    def _anchored(self, row: CanvasRow, captions: Sequence[str]) -> list[str]:
        """Return the anchor captions of an image that the request names; none for others."""
        for target in self.targets:
            if target.holds(row.style, row.object):
                if target.kind == "object":
                    return [self.prompt(row.style, self._next_object(target))] * len(captions)
                instead = self.request.anchor or PHOTO_STYLE
                return [f"A {row.object} image in {instead} style."] * len(captions)
        return []

    def _style(self, name: str) -> str:
        if name not in self.styles:
            raise SplitError(unknown("style", name, self.styles, "benchmark.styles"))
        return name

    def _object(self, name: str) -> str:
        if name not in self.objects:
            raise SplitError(unknown("object", name, self.objects, "benchmark.objects"))
        return name

    def _known(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if self.data.source == "mini":
            from mmforget.diffusion import mini

            return tuple(mini.STYLES), tuple(mini.OBJECTS)
        return canvas.STYLES, canvas.OBJECTS

    @staticmethod
    def _chosen(what: str, given: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name not in known:
                raise ConfigError(unknown(what[:-1], name, known, f"benchmark.{what}"))
        return tuple(name for name in known if name in given) if given else known

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world of a seed into `folder`, in the published layout."""
        from mmforget.diffusion import mini

        mini.write_canvas(folder, seed)

    def _root(self) -> Path:
        """Return the folder copy, drawn or downloaded when it is not there yet."""
        if self.data.source == "local":
            return local_folder(self.data.root, self.name)
        if self.data.source == "mini":
            from mmforget.diffusion import mini

            world = f"unlearncanvas-v{mini.VERSION}-s{self.data.seed}"
            return mini_world(self.store / "mini" / world, self.write_mini, self.data.seed)
        from mmforget.diffusion.hub import snapshot

        return snapshot(self.data.repo, self.data.revision, self.store)


def _part(
    data: Dataset, targets: Sequence[Target], without: Sequence[Target] = ()
) -> Dataset | None:
    """Return the images of some targets, or None if there are none."""
    rows = []
    for i, name in enumerate(data.ids):
        style, object_name, _ = name.split("/")
        wanted = any(target.holds(style, object_name) for target in targets)
        if wanted and not any(target.holds(style, object_name) for target in without):
            rows.append(i)
    return Subset(data, rows) if rows else None


def _union(first: Dataset, second: Dataset) -> Dataset:
    """Return two subsets of one data set as one, in stored order."""
    assert isinstance(first, Subset) and isinstance(second, Subset)
    base: Any = first.dataset
    inner = second.dataset
    assert isinstance(inner, Subset) and inner.dataset is base
    return Subset(base, sorted([*first.indices, *(inner.indices[i] for i in second.indices)]))
