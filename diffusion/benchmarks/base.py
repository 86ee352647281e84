"""What the benchmarks of text-to-image models share: pipelines, checkpoints, evaluation models."""

import copy
import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from mmforget.checkpoint import state_sha
from mmforget.diffusion import checkpoints
from mmforget.diffusion.answers import Ordered
from mmforget.diffusion.attacks.arena import Aims
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.judges import Judge
from mmforget.diffusion.models import DiffusionModel, open_pipeline
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.zero_shot import JudgeConfig, Means, make_judge
from mmforget.engine import Engine
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.rng import derive
from mmforget.sources import mini_world
from mmforget.types import Benchmark, Dataset, Splits

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    """Which pipeline is trained, or taken as it is."""

    name: str = option(
        "mini",
        "mini: a small pipeline trained here in minutes; pipeline: a folder or hub id",
        choices=("mini", "pipeline"),
    )
    pipeline: str | None = option(None, "for name=pipeline: folder of save_pretrained, or hub id")
    checkpoint: str | None = option(
        None, "weights put into it: UNet or text-encoder file, CompVis .ckpt, LoRA, a result's file"
    )
    init: str = option(
        "pretrained",
        "where the denoiser's training starts: pretrained weights, or scratch (the mini: always)",
        choices=("pretrained", "scratch"),
    )
    dtype: str = option("float32", "weights when loaded", choices=tuple(DTYPES))


@dataclass(frozen=True)
class Judges:
    """Weights of evaluation models. None is downloaded; a metric without its weights says so."""

    style: str | None = option(None, "style classifier (UnlearnCanvas: style50.pth)")
    object: str | None = option(None, "object classifier (UnlearnCanvas: style50_cls.pth)")
    arch: str = option("vit_large_patch16_224.augreg_in21k", "timm name of both classifiers")
    inception: str | None = option(None, "torchvision's inception_v3_google file, for FID and KID")
    clip: str = option("ViT-L-14", "open_clip name, for CLIP score and CMMD")
    clip_weights: str | None = option(None, "its weights")
    lpips: str = option("alex", "LPIPS network", choices=("alex", "vgg", "squeeze"))
    lpips_weights: str | None = option(None, "its backbone's torchvision weights")
    q16: str | None = option(None, "Q16's two learned prompts, for inappropriate images")
    resnet: str | None = option(None, "torchvision's resnet50 file, for ImageNette objects")
    nudenet: float = option(0.6, "NudeNet 3.4.2: least score of a detection", low=0, high=1)


class DiffusionBenchmark(Benchmark):
    """A benchmark of a text-to-image pipeline.

    A subclass reads data and requests; its config has `training`, `sampling: Sampling` and
    `judges: Judges`.
    """

    model_type: ClassVar[type] = ModelConfig
    allow_shared_content: ClassVar[bool] = True

    @cached_property
    def base(self) -> DiffusionModel:
        """The pipeline as it is opened, before any training; copy it before changing it."""
        made = open_pipeline(self._source(), DTYPES[self.model.dtype])
        if self.model.checkpoint is not None:
            checkpoints.load_into(Path(self.model.checkpoint).expanduser(), made)
        return made if self.engine is None else _placed(self.engine, made)

    @property
    def sampling(self) -> Sampling:
        """How images are generated."""
        chosen: Sampling = self.config.sampling
        return chosen

    @abstractmethod
    def image_sets(self) -> Mapping[str, Sequence[Ordered]]:
        """Return the images that are generated of every model, in named groups.

        `forget` are pictures of what was to be forgotten, `retain` those of what was to stay; a
        benchmark may have more.
        """

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """Return the prompts that attacks start from: the original draws for them what was erased.

        An example's label says which of several targets it names.
        """

    @abstractmethod
    def judge_of(self, label: str | None) -> tuple[JudgeConfig, Means]:
        """Return the judge of pictures of a target, and what judges are made of."""

    def pairs(self) -> Sequence[tuple[str, str]]:
        """Return prompts with the erased concept and the same without it."""
        return ()

    @property
    def target_sampling(self) -> Sampling:
        """How the original draws the target pictures of attacks."""
        return self.sampling

    @property
    def target_pictures(self) -> Path | None:
        """Folder of target pictures in place of the original's."""
        return None

    def aims(self, judge: JudgeConfig) -> Aims:
        """Return what attacks on prompts aim at.

        Args:
            judge: The judge that the attack names; its kind is None: the benchmark's own.
        """
        made: dict[str | None, Judge] = {}

        def of(example: Example) -> Judge:
            label = example.label
            if label not in made:
                own, means = self.judge_of(label)
                made[label] = make_judge(own if judge.kind is None else judge, means)
            return made[label]

        return Aims(
            examples=self.examples(),
            judge=of,
            sampling=self.sampling,
            targets=self.target_sampling,
            pictures=self.target_pictures,
            pairs=self.pairs(),
            store=self.store,
        )

    def related(self, model: DiffusionModel) -> set[str]:
        """Return names of `retain` images whose concepts are nearest to the erased one.

        Args:
            model: The original, whose text encoder tells what is near.
        """
        return set()

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return torch.device("cpu") if self.engine is None else self.engine.device

    @property
    def judges(self) -> Judges:
        """Where evaluation models come from."""
        chosen: Judges = self.config.judges
        return chosen

    @property
    def scratch(self) -> bool:
        """Whether originals are trained from random weights."""
        return bool(self.model.name == "mini" or self.model.init == "scratch")

    def model_fingerprint(self) -> Mapping[str, Any]:
        """Return what of the pipeline decides trained weights."""
        return {
            "pipeline": "scratch" if self.scratch else state_sha(self.base),
            "config": {k: str(v) for k, v in sorted(self.base.denoiser.config.items())},
            "codec": state_sha(self.base.vae),
            "dtype": self.model.dtype,
        }

    def build(self, seed: int) -> nn.Module:
        """Return a copy of the pipeline; from scratch: with weights drawn from the seed."""
        made = copy.deepcopy(self.base)
        if self.scratch:
            reset(made, seed)
        return made.train(False)

    def train(
        self, engine: Engine, model: nn.Module, data: Dataset, seed: int, state: Path | None
    ) -> nn.Module:
        """Train by the recipe; the mini world's own original takes minutes, so it is shipped."""
        assert isinstance(model, DiffusionModel)
        if self.model.name == "mini":
            from mmforget.diffusion import mini_model

            if mini_model.load_original(model, self.recipe_text(data, seed)):
                logger.info("the mini original is shipped: mmforget.diffusion.train says how")
                return model
        made = super().train(engine, model, data, seed, state)
        return made.requires_grad_(False)

    def recipe_text(self, data: Dataset, seed: int) -> str:
        """Return what decides the weights of a mini model, as text."""
        from mmforget.diffusion import mini

        held = {
            "version": mini.VERSION,
            "world": self.data.seed,
            "training": self.training.recipe(),
            "caption_dropout": getattr(self.config, "caption_dropout", 0.0),
            "snr_gamma": getattr(self.config, "snr_gamma", None),
            "examples": hashlib.sha256("\n".join(data.ids).encode()).hexdigest(),
            "seed": seed,
        }
        return json.dumps(held, sort_keys=True)

    def observed(self, splits: Splits) -> Sequence[str]:
        """Record losses of forgotten and unseen images: what membership attacks read."""
        return ("forget", "holdout")

    def save(self, model: nn.Module, folder: Path, start: nn.Module) -> None:
        """Write what differs from the original; LoRA results also as a file for other tools."""
        assert isinstance(model, DiffusionModel) and isinstance(start, DiffusionModel)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save(model, folder / "model.safetensors", start)
        for edit in model.active_edits():
            edit.export(folder)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a whole diffusers pipeline folder."""
        assert isinstance(model, DiffusionModel)
        model.pipe.save_pretrained(str(folder))

    def rebuild(self, path: Path, start: nn.Module) -> nn.Module:
        """Return the original with a result's weights and edits; see `checkpoints.load`."""
        assert isinstance(start, DiffusionModel)
        return checkpoints.load(path, start)

    def _source(self) -> str:
        """Return the pipeline's folder or hub id; the mini one is made when first needed."""
        if self.model.name == "pipeline":
            if self.model.pipeline is None:
                raise ConfigError(
                    "model.name=pipeline needs model.pipeline: a folder written by "
                    "save_pretrained, or a hub id"
                )
            return str(self.model.pipeline)
        from mmforget.diffusion import mini

        folder = self.store / "mini" / f"diffusion-pipeline-v{mini.VERSION}"
        return str(mini_world(folder, mini.write_pipeline, 0))


def reset(model: DiffusionModel, seed: int) -> None:
    """Draw the denoiser's weights anew, as its library initialises them; text encoders stay."""
    denoiser = model.denoiser
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, model.denoiser_name) % 2**63)
        made = type(denoiser).from_config(denoiser.config)
    denoiser.load_state_dict(made.state_dict())


def _placed(engine: Engine, model: DiffusionModel) -> DiffusionModel:
    placed = engine.place(model)
    assert isinstance(placed, DiffusionModel)
    return placed
