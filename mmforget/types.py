"""The contracts between core, modalities, methods, metrics and attacks.

Core knows no modality and a modality knows no method: they meet in `Adapter` (what one forward
pass is), `Dataset` and `Splits` (what is forgotten, kept, unseen), `Benchmark` (data, model,
training, protocol), `UnlearningMethod`, `Metric` and `Attack`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mmforget.errors import SplitError
from mmforget.options import option
from mmforget.record import AttackResult, Cost, MetricValue
from mmforget.rng import Draws

if TYPE_CHECKING:
    from mmforget.context import Context
    from mmforget.engine import Engine
    from mmforget.record import RunResult
    from mmforget.report.section import Section

ConfigT = TypeVar("ConfigT")
T = TypeVar("T")


def full(values: Tensor) -> Tensor:
    """Return half-precision values as float32, for losses and records; wider ones as they are."""
    return values if values.dtype == torch.float64 else values.float()


class Outputs(NamedTuple):
    """One forward pass, whatever the modality.

    Attributes:
        loss: [B], summed over an example's own units (tokens, pixels; one for a class label).
        pred: Class logits [B, C], token logits [B, T, V], predicted noise [B, ...] or item
            scores [B, ...]; `mask` says which entries count.
        mask: Booleans over the leading dimensions of `pred` ([B, T] for tokens); None: all count.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor | None = None


class Dataset(Protocol):
    """Examples that are read a batch at a time, each with a stable string id."""

    @property
    def ids(self) -> Sequence[str]:
        """Stable ids, unique within the data set."""
        ...

    @property
    def digests(self) -> Sequence[str]:
        """Content hashes, one an example; splits are checked to share none."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Any:
        """Return the raw batch of these examples, in this order, on the CPU."""
        ...


class Subset:
    """A choice of examples of another data set, in the given order."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = [int(i) for i in indices]
        self.ids = [dataset.ids[i] for i in self.indices]

    @property
    def digests(self) -> list[str]:
        """Content hashes of the chosen examples."""
        digests = self.dataset.digests
        return [digests[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Sequence[int]) -> Any:
        """Return the raw batch of these examples, counted within the subset."""
        return self.dataset.take([self.indices[i] for i in indices])


def subset(dataset: Dataset, indices: Sequence[int]) -> Dataset:
    """Return some examples of a data set, in the given order, as a data set.

    A data set that must know what it was cut from or to (negatives of a recommender) has a method
    `select(indices)` of its own; any other becomes a `Subset`.
    """
    select: Callable[[Sequence[int]], Dataset] | None = getattr(dataset, "select", None)
    return Subset(dataset, indices) if select is None else select(indices)


class Adapter(Protocol):
    """All that a loss method may ask of a modality; `data` is whatever `prepare` returned."""

    @property
    def random(self) -> bool:
        """Whether `prepare` draws anything in training: crops, noise, negatives.

        Where it does not, an example's loss depends on the weights alone, and what the original
        model makes of the forget set is computed once.
        """
        ...

    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        """Put a raw batch on `draws.device`; draw crops, time steps, noise, negatives ONCE.

        With `train` false the evaluation transform is used; any noise still comes from `draws`.
        """
        ...

    def units(self, data: Any) -> Tensor:
        """Return how many entries each example's loss sums over, [B], float32 (classes: ones)."""
        ...

    def forward(self, model: nn.Module, data: Any) -> Outputs:
        """Run the model once; nothing is drawn and nothing cached."""
        ...

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return [B], summed over units: KL(teacher || student)·T², or squared distance of noise.

        KL is over softmax(pred / T). Where predictions are no distribution T is ignored.
        """
        ...

    def relabel(self, data: Any, draws: Draws, exclude_true: bool = True) -> Any:
        """Return a copy with a wrong target: other class, refusal, anchor prompt, flipped item.

        Args:
            data: What `prepare` returned.
            draws: Source of the choice; equal draws give equal targets.
            exclude_true: Whether the drawn target must differ from the true one.
        """
        ...

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return what computes as `model` does now, whatever is done to `trainable` afterwards.

        It is passed to `forward` in a model's place, without gradients. `frozen_copy` where nothing
        cheaper than a copy will do.
        """
        ...

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        """Return the modules whose weights may be cut over processes: `Runtime.fsdp`.

        Each is run by calling it, as often on every process, and together they hold all weights.
        None: `forward` reaches into the model, or puts its weights in and out; none at all: what
        `frozen` returned has no weights of its own.
        """
        ...

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a scope: "all", "head", a modality's own name, or a regex.

        It may add what the scope is made of to the model (low-rank adapters), which then computes
        what it did before.

        Raises:
            ConfigError: The scope matches nothing.
        """
        ...

    def apply_request(self, model: nn.Module, splits: "Splits") -> None:
        """Take the forget set out of what the model holds besides weights (edges of a graph)."""
        ...

    def record(self, model: nn.Module, data: Any) -> dict[str, Tensor]:
        """Return the numbers to keep of each example, [B, ...]: `loss` always, in float32.

        Classifiers add `logits`, `label` and `features`, by which core metrics know what they can
        compute. Called without gradients on a model in evaluation mode.
        """
        ...


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model as it is now, in evaluation mode, without gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@dataclass(frozen=True)
class Splits:
    """Who is forgotten, who is kept, who was never seen.

    Attributes:
        forget: What the request names.
        retain: The rest of the training data.
        train: All training data: forget and retain in their stored order.
        holdout: Never trained on and matched to forget: the non-members of privacy attacks.
        test: Never trained on: utility.
        val: Never trained on, apart from test: what tuning may look at. None if there is none.
        probes: Further evaluation sets by name: paraphrases, neighbours, prompts.
        streams: Further training sets by name, for methods that read them beside forget and
            retain (`Pass.extra`). Nothing is evaluated on them.
    """

    forget: Dataset
    retain: Dataset
    train: Dataset
    holdout: Dataset
    test: Dataset
    val: Dataset | None = None
    probes: Mapping[str, Dataset] = field(default_factory=dict)
    streams: Mapping[str, Dataset] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names of the splits that exist, `train` left out: it holds no others."""
        fixed = ["forget", "retain", "holdout", "test"] + (["val"] if self.val is not None else [])
        return fixed + list(self.probes)

    def get(self, name: str) -> Dataset:
        """Return a split by name.

        Raises:
            SplitError: There is no such split.
        """
        found = self.probes.get(name) or self.streams.get(name) or getattr(self, name, None)
        if found is None:
            known = ", ".join([*self.names(), "train", *self.streams])
            raise SplitError(f"no split {name!r} here; there are: {known}")
        return found

    def check(self, allow_shared_content: bool = False) -> list[str]:
        """Check that splits are usable and disjoint, by id and by content.

        Args:
            allow_shared_content: Report equal content under different ids instead of refusing it
                (published data sets hold duplicates).

        Returns:
            Warnings, one a pair of splits that share content.

        Raises:
            SplitError: A split is empty, or two splits share an id (or content, unless allowed).
        """
        for name in ("forget", "retain", "holdout", "test"):
            if len(self.get(name)) == 0:
                raise SplitError(f"the {name} set is empty; check the request and the data folder")
        warnings = []
        main = {name: self.get(name) for name in self.names() if name not in self.probes}
        ids = {name: set(split.ids) for name, split in main.items()}
        digests = {
            name: ids[name] if split.digests is split.ids else set(split.digests)
            for name, split in main.items()
        }
        for i, name in enumerate(main):
            for other in list(main)[i + 1 :]:
                if name in ("holdout", "test") and other in ("holdout", "test"):
                    continue  # a benchmark may publish one unseen set for both uses
                shared = ids[name] & ids[other]
                if shared:
                    raise SplitError(
                        f"{len(shared)} examples are in both {name} and {other}, such as "
                        f"{min(shared)!r}; an example belongs to one split"
                    )
                same = digests[name] & digests[other]
                if same:
                    message = f"{name} and {other} share {len(same)} examples of equal content"
                    if not allow_shared_content:
                        raise SplitError(f"{message}; remove the duplicates")
                    warnings.append(message)
        return warnings


@dataclass(frozen=True)
class Stage:
    """One of the requests that are served one after the other; most benchmarks have a single one.

    Attributes:
        splits: What this stage forgets, and what it keeps: nothing that an earlier one forgot.
        target: What the request means to methods of its modality (concepts to erase, and what
            stands for them), which read it as `ctx.target`; None where the splits say it all.
        name: For reports.
    """

    splits: Splits
    target: Any = None
    name: str = ""


@dataclass(frozen=True)
class Batch:
    """The part of one effective batch that this process and micro-batch hold.

    Attributes:
        split: The split it was drawn from.
        ids: Ids of the examples held here.
        data: What the adapter's `prepare` returned.
        units: Loss-bearing entries of each example held here, [B].
        total: Examples in the effective batch, over all processes and micro-batches.
        total_units: Loss-bearing entries in the effective batch.
        weight: 1, or less when several processes hold the same rows of a tiny batch.
        draws: The batch's own random numbers, for methods that draw (relabelling).
    """

    split: str
    ids: Sequence[str]
    data: Any
    units: Tensor
    total: int
    total_units: float
    weight: float
    draws: Callable[..., Draws]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Training:
    """One optimisation: how long, how fast, of which weights.

    `batch_size` is the effective batch over all processes and micro-batches; splitting it
    (`runtime.accumulation`, processes) does not change results.
    """

    epochs: int = option(1, "passes over the anchor split", low=0)
    max_steps: int | None = option(None, "stop after this many optimiser steps", low=0)
    lr: float = option(1e-3, "learning rate", low=0)
    optimizer: str = option("sgd", "optimiser", choices=("sgd", "adam", "adamw"))
    momentum: float = option(0.0, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(0.0, "weight decay (decoupled for adamw)", low=0)
    batch_size: int = option(64, "examples in an effective batch", low=1)
    schedule: str = option(
        "constant", "learning-rate schedule", choices=("constant", "cosine", "linear", "step")
    )
    milestones: list[int] = option([], "epochs at which the step schedule decays")
    decay: float = option(0.1, "factor of the step schedule", low=0)
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    clip_norm: float | None = option(None, "clip the global gradient norm", low=0)
    stop_below: float | None = option(
        None, "stop after the step whose forget terms sum to less than this; null: never"
    )
    scope: str = option("all", "parameters to train: all, head, a modality's name, or a regex")
    norm: str = option(
        "frozen",
        "batch-norm statistics: `frozen` keeps them, `train` updates them",
        choices=("frozen", "train"),
    )

    def recipe(self) -> dict[str, Any]:
        """Return what decides trained weights: all but `stop_below`, a rule of forget terms."""
        values = asdict(self)
        del values["stop_below"]
        return values


class Pass(NamedTuple):
    """One pass of an epoch: which split is walked through once, and what comes beside it.

    Attributes:
        name: What `ctx.phase` says during the pass.
        anchor: The split walked through once in shuffled order; "union" walks forget and retain
            shuffled together, each batch split into its two parts.
        partner: A second split, drawn in step, cycled as needed; None for none.
        batch_size: Effective batch of the anchor; None takes the config's.
        partner_batch_size: Effective batch of the partner; None equals the anchor's.
        fraction: The share of the retain set used, a fixed choice per run.
        relabel: Whether the forget part gets wrong targets (`Adapter.relabel`) when it is prepared,
            so that its units are those of the targets that are learnt.
        together: Whether anchor and partner count as one batch, so that means run over both. With
            the anchor "union" they always do.
        extra: A third split drawn in step, as many as the anchor's examples; None for none.
        aligned: Whether the extra examples are those at the anchor's own places; else it is
            shuffled and cycled like a partner.
    """

    name: str
    anchor: str
    partner: str | None = None
    batch_size: int | None = None
    partner_batch_size: int | None = None
    fraction: float = 1.0
    relabel: bool = False
    together: bool = False
    extra: str | None = None
    aligned: bool = False


class Benchmark(ABC):
    """Data, model, training recipe and published protocol of one benchmark.

    A subclass names its schemas (frozen dataclasses made with `option`), its protocol and its
    citation as class variables, and is made with one instance of each schema.

    Attributes:
        recipe: Raised when the training code changes what the weights become.
        metrics: Registry names of the published metrics, in the order of the report.
        attacks: Registry names of the attacks of the protocol.
        headline: Names of metric values that the report's first table shows.
        distance: The metric value that ranks runs by distance to the retrained model (0 is best).
        allow_shared_content: Whether the published data holds duplicates across splits.
        notes: What a reader must know of the data; known once splits are read.
        engine: Set before `splits` is called, for data that depend on a trained model.
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    recipe: ClassVar[int] = 1
    config_type: ClassVar[type]
    data_type: ClassVar[type]
    model_type: ClassVar[type]
    request_type: ClassVar[type]
    metrics: ClassVar[tuple[str, ...]]
    attacks: ClassVar[tuple[str, ...]]
    headline: ClassVar[tuple[str, ...]]
    distance: ClassVar[str]
    allow_shared_content: ClassVar[bool] = False

    adapter: Adapter
    notes: Sequence[str] = ()
    engine: "Engine | None" = None

    def __init__(self, config: Any, data: Any, model: Any, request: Any, store: Path) -> None:
        """Keep the configs; open nothing yet.

        Args:
            config: Instance of `config_type`; has a field `training: Training`.
            data: Instance of `data_type`; has fields `source` and `root`.
            model: Instance of `model_type`.
            request: Instance of `request_type`.
            store: Folder for decoded data shared by all runs (inside the cache).
        """
        self.config = config
        self.data = data
        self.model = model
        self.request = request
        self.store = store

    @property
    def training(self) -> Training:
        """The training recipe of originals, references and shadow models."""
        chosen: Training = self.config.training
        return chosen

    @abstractmethod
    def splits(self) -> Splits:
        """Read the data and apply the request; called once, cached by the caller.

        Raises:
            DataError: The folder is not in the published layout.
            SplitError: The request names what is not there, or leaves a split empty.
        """

    @abstractmethod
    def fingerprint(self) -> Mapping[str, Any]:
        """Return what of data and model decides the weights: revision, architecture, transforms.

        JSON values only. Training config, seed and forget ids are added by the core.
        """

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """Return a freshly initialised model (pretrained weights loaded if the config says so)."""

    def train(
        self, engine: "Engine", model: nn.Module, data: Dataset, seed: int, state: Path | None
    ) -> nn.Module:
        """Train `model` on `data` by the published recipe; serves original, retrained, shadows.

        Args:
            engine: Devices, precision, processes.
            model: A model from `build`.
            data: What to train on.
            seed: Seed of order and augmentation.
            state: Folder for step checkpoints, so that a killed training goes on; None: none.
        """
        from mmforget.training import fit

        return fit(engine, model, self.adapter, data, self.training, seed, state)

    def stages(self, splits: Splits) -> Sequence[Stage]:
        """Return what a method is run on, one after the other, each from the last one's result.

        Args:
            splits: The benchmark's own, or those of a shadow experiment.
        """
        return (Stage(splits),)

    def observed(self, splits: Splits) -> Sequence[str]:
        """Return the splits whose per-example numbers are recorded with every run."""
        return splits.names()

    def save(self, model: nn.Module, folder: Path, start: nn.Module) -> None:
        """Write an unlearned model as `folder/model.safetensors`, which `rebuild` reads.

        To override where only what changed is worth keeping, or other tools read other files.

        Args:
            model: What a method returned.
            folder: Where to.
            start: The model it was unlearned from.
        """
        from mmforget.checkpoint import save_model

        save_model(model, folder / "model.safetensors")

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a trained model whole, in the form that its `model.checkpoint` or the like reads.

        To override where the field has a folder format of its own.
        """
        from mmforget.checkpoint import save_model

        save_model(model, folder / "model.safetensors")

    def rebuild(self, path: Path, start: nn.Module) -> nn.Module:
        """Return the model that a checkpoint holds.

        To override where methods return models of another structure than `build` gives.

        Args:
            path: What `save` wrote, or a user's own file or folder.
            start: The original model; it stays as it is.

        Raises:
            CheckpointError: It is no checkpoint of this benchmark's model.
        """
        from mmforget.checkpoint import load_model

        model = self.build(0)
        load_model(model, path)
        return model

    def collapsed(self, metrics: Mapping[str, MetricValue]) -> str | None:
        """Return why a model with these metrics is of no use (utility at chance), or None."""
        return None

    def samples(self, trial: "Trial", folder: Path) -> None:
        """Write what a report wants to show of single examples into `folder`, if anything."""
        return None

    @classmethod
    def sections(cls, runs: "Sequence[RunResult]") -> "Sequence[Section]":
        """Return report sections only this modality can draw, from records and their samples."""
        return ()


class UnlearningMethod(ABC, Generic[ConfigT]):
    """Turns the original model into one that has forgotten.

    Attributes:
        reads: Splits it may open; the context refuses any other.
        modalities: Modalities it works for; None: every one.
        intent: "removal" of knowledge, "suppression" of behaviour, or "reference".
        trains: Which weights it changes, in words.
        holds: What it keeps in memory besides the model, in words.
        citation: Where it comes from.
        config_type: Its frozen dataclass.
        prepares: Whether it makes something once for an original model, before any request is
            known (`prepare`); its cost is recorded apart.
        prepared: What `prepare` returned, when `run` is called.
    """

    reads: frozenset[str]
    modalities: ClassVar[frozenset[str] | None] = None
    intent: ClassVar[str]
    trains: ClassVar[str] = "weights in `scope`"
    holds: ClassVar[str] = "nothing"
    citation: ClassVar[str]
    config_type: ClassVar[type]
    prepares: ClassVar[bool] = False

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.resume: Path | None = None  # folder of step checkpoints; set by the pipeline
        self.prepared: Mapping[str, Tensor] = {}

    def prepare(self, ctx: "Context") -> Mapping[str, Tensor]:
        """Return what is made once for an original model: shards, an encoder, statistics.

        Called if `prepares`, with a context that reads `train` only, whose model is the original:
        no request is known yet. Kept in the cache, so that every request on this original shares
        it; time and steps are recorded as the cost of preparing, not of the request.
        """
        return {}

    @abstractmethod
    def run(self, ctx: "Context") -> nn.Module:
        """Return the unlearned model; may change and return `ctx.model` itself."""


@dataclass(frozen=True)
class Budget:
    """What an attacker may spend; None leaves one kind of effort unlimited, never all of them.

    Attributes:
        queries: Forward passes of single examples through the attacked model.
        steps: Gradient steps.
        models: Shadow models trained.
        seconds: Wall time.
    """

    queries: int | None = None
    steps: int | None = None
    models: int | None = None
    seconds: float | None = None


class ModelView:
    """A model seen from outside: its per-example numbers on each split, each computed once.

    Args:
        load: Returns the model; called when first needed.
        predict: Returns per-example arrays of a model on a data set.
        splits: The data.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        predict: Callable[[nn.Module, Dataset], dict[str, np.ndarray[Any, Any]]],
        splits: Splits,
    ) -> None:
        self._load = load
        self._predict = predict
        self._splits = splits
        self._model: nn.Module | None = None
        self._numbers: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        self._memo: dict[Any, Any] = {}

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode; copy it before changing it."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def numbers(self, split: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return per-example arrays of a split in its own order, as `Adapter.record` names them."""
        if split not in self._numbers:
            self._numbers[split] = self._predict(self.model, self._splits.get(split))
        return self._numbers[split]

    def memo(self, key: Hashable, compute: Callable[["ModelView"], T]) -> T:
        """Return `compute(self)`, computed once: derived numbers that several metrics share."""
        if key not in self._memo:
            self._memo[key] = compute(self)
        found: T = self._memo[key]
        return found

    def on(self, dataset: Dataset) -> dict[str, np.ndarray[Any, Any]]:
        """Return per-example arrays of any data set; not kept."""
        return self._predict(self.model, dataset)


class Lab(Protocol):
    """What attacks may train: shadow models by the benchmark's recipe, cached across runs."""

    adapter: Adapter
    engine: "Engine"

    def view(self, model: nn.Module) -> ModelView:
        """Return a view of a model on the trial's splits."""
        ...

    def shadow(self, keep: Sequence[int], seed: int) -> nn.Module:
        """Return a model trained on these indices of `splits.train`."""
        ...

    def unlearn(
        self, model: nn.Module, forget: Sequence[int], keep: Sequence[int], seed: int
    ) -> nn.Module:
        """Run the trial's own method on `model`: forget and retain are indices of `splits.train`.

        Cached like `shadow`.
        """
        ...


@dataclass(frozen=True)
class Trial:
    """Everything a metric or attack may look at.

    Attributes:
        view: The model under test.
        original: The model before unlearning.
        retrained: The reference trained without the forget set; None if it was not made.
        splits: The data.
        seed: Seed of evaluation.
        cost: What the unlearning cost.
        cost_reference: What retraining cost; None if there is no reference.
        trainable: Parameters the method changed.
        benchmark: The benchmark, for what only it can compute.
        lab: Shadow models and the device.
        steps: Views of the model after each stage of a sequence of requests, the last one being
            `view`; empty where there is only one.
        folder: Where an attack keeps what it found and what resuming needs; None: nowhere.
    """

    view: ModelView
    original: ModelView
    retrained: ModelView | None
    splits: Splits
    seed: int
    cost: Cost
    cost_reference: Cost | None
    benchmark: Benchmark
    lab: Lab
    steps: Sequence[ModelView] = ()
    folder: Path | None = None


class Metric(ABC):
    """One family of numbers about an unlearned model.

    Attributes:
        needs: Per-example numbers it reads ("logits", "features"); it is left out, with a note in
            the record, where the adapter records none.
        citation: Where the definition comes from.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    citation: ClassVar[str]

    @abstractmethod
    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return named values, such as `accuracy/forget`, each with its direction.

        `reference` may stay None: the pipeline fills in the retrained run's value of that name,
        if there is such a run. A value that cannot be defined without it is left out.
        """


class Attack(ABC, Generic[ConfigT]):
    """An attempt to show that the model did not forget.

    Attributes:
        access: "black" (outputs), "grey" (losses, logits) or "white" (weights).
        needs: Per-example numbers it reads; empty: any modality.
        citation: Where it comes from.
        config_type: Its frozen dataclass.
    """

    access: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    citation: ClassVar[str]
    config_type: ClassVar[type]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def budget(self) -> Budget:
        """Return what this configuration may spend; stated in the record."""

    @abstractmethod
    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Attack within the budget; return outcomes per target and what was found."""


class Opened(NamedTuple):
    """How a path is attacked that a modality knows without a benchmark being named.

    Attributes:
        words: Override words in full, those that name the benchmark and the model among them.
        checkpoint: What is attacked, if it is not the model of the words itself.
    """

    words: list[str]
    checkpoint: Path | None


def require_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite."""
    return bool(torch.isfinite(tensor).all())
