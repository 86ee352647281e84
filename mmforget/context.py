"""What an unlearning method sees: its model, the splits it declared, and nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.engine import Engine, epoch_order
from mmforget.errors import SplitError
from mmforget.types import Adapter, Batch, Dataset, Outputs, Splits, frozen_copy


class Context:
    """A method's view of one unlearning run.

    Args:
        engine: Device, precision, processes.
        adapter: The modality.
        model: The model to change.
        splits: All splits; only those in `reads` can be opened.
        reads: What the method declared.
        label: The method's name, for messages.
        seed: The unlearning seed.
        fresh_model: Returns a freshly initialised model for a seed.
        retrain: Returns the model trained from scratch on the retain set, for a seed.
        train: Trains a model on a data set by the benchmark's recipe: `Benchmark.train`.
        target: What the request means to methods of its modality; see `types.Stage`.

    Attributes:
        phase: Name of the running pass (`Pass.name`).
        epoch: Index of the running epoch, from 0.
        epochs: Number of epochs.
        step: Index of the running optimiser step, from 0.
        steps: Number of optimiser steps of the run.
        trainable: Parameters in scope, by name.
        references: What `frozen_copy` returned so far.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        adapter: Adapter,
        model: nn.Module,
        splits: Splits,
        reads: frozenset[str],
        label: str,
        seed: int,
        fresh_model: Callable[[int], nn.Module] | None = None,
        retrain: Callable[[int | None], nn.Module] | None = None,
        train: Callable[[nn.Module, Dataset, int, Path | None], nn.Module] | None = None,
        target: Any = None,
    ) -> None:
        self.engine = engine
        self.adapter = adapter
        self.model = model
        self.seed = seed
        self.phase = "setup"
        self.epoch = 0
        self.epochs = 0
        self.step = 0
        self.steps = 0
        self.trainable: dict[str, nn.Parameter] = {}
        self.references: list[nn.Module] = []
        self._stand_ins: Mapping[int, nn.Module] = {}
        self._called: nn.Module = model
        if engine.runtime.compile:
            self._called = torch.compile(model)  # type: ignore[assignment]
        self._splits = splits
        self._reads = reads
        self.label = label
        self.target = target
        self._fresh_model = fresh_model
        self._retrain = retrain
        self._train = train

    def split(self, name: str) -> Dataset:
        """Return a split the method declared in `reads`.

        Raises:
            SplitError: It did not, or there is no such split.
        """
        if name not in self._reads:
            raise SplitError(
                f"method {self.label} opened the {name} split, but declares to read only "
                f"{', '.join(sorted(self._reads)) or 'none'}. A method that needs it says so in "
                f"`reads`, where every user sees it"
            )
        return self._splits.get(name)

    def has_split(self, name: str) -> bool:
        """Return whether the benchmark has this split."""
        return name in self._splits.names()

    def scope(self, scope: str) -> dict[str, nn.Parameter]:
        """Make the parameters of a scope trainable, all others not, and return them."""
        chosen = self.adapter.parameters(self.model, scope)
        kept = {id(parameter) for parameter in chosen.values()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
        self.trainable = chosen
        return chosen

    def forward(self, batch: Batch, model: nn.Module | None = None) -> Outputs:
        """Run the model, or another one without gradients, on a prepared batch.

        Every model sees the same crops, noise, time steps and negatives, because those were drawn
        when the batch was made.
        """
        with self.engine.autocast():
            if model is None:
                return self.adapter.forward(self._called, batch.data)
            with torch.no_grad():
                return self.adapter.forward(self.actual(model), batch.data)

    def actual(self, model: nn.Module | None) -> nn.Module:
        """Return the module to run for a model: the trained one for None; see `use`."""
        return self.model if model is None else self._stand_ins.get(id(model), model)

    def mean(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the mean over the examples of the effective batch, [B] -> scalar.

        It is this part's share of that mean: parts add up over micro-batches and processes.
        """
        return values.sum() * (batch.weight / batch.total)

    def unit_mean(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the mean over all units (tokens, pixels) of the effective batch, [B] -> scalar."""
        return values.sum() * (batch.weight / batch.total_units)

    def once(self, value: Tensor, batch: Batch) -> Tensor:
        """Scale a term that belongs to a step, not to examples, so that parts add up to it."""
        return value * (batch.weight * len(batch) / batch.total)

    def frozen_copy(self) -> nn.Module:
        """Return what computes as the model does now, without gradients: for `forward`.

        A copy, or less where the modality can do with less (`Adapter.frozen`).
        """
        made = self.adapter.frozen(self.model, self.trainable)
        if self.engine.runtime.fsdp != "no" and self.adapter.shards(made) is None:
            made = frozen_copy(self.model)
        self.references.append(made)
        return made

    def use(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        stand_ins: Mapping[int, nn.Module],
    ) -> None:
        """Work on another form of the model: one whose weights are cut over processes, or back.

        Args:
            model: Takes the model's place.
            trainable: Its parameters in scope.
            stand_ins: What takes the place of a reference, by its `id`.
        """
        self.model = self._called = model
        self.trainable = trainable
        self._stand_ins = stand_ins

    def start_losses(self, split: str) -> Mapping[str, float] | None:
        """Return the loss of every example under the model as it is now, by id.

        Computed in one pass, so that a method needs no second model for them. None where the loss
        of an example depends on what is drawn for it (`Adapter.random`).
        """
        if self.adapter.random:
            return None
        numbers = self.evaluate(split)
        return dict(zip(numbers["ids"].tolist(), numbers["loss"].tolist(), strict=True))

    def fresh_model(self, seed: int) -> nn.Module:
        """Return a freshly initialised model of the same architecture, on the device."""
        assert self._fresh_model is not None, "this context was made without a model builder"
        return self.engine.place(self._fresh_model(seed))

    def retrain(self, seed: int | None = None) -> nn.Module:
        """Return the model trained from scratch on the retain set.

        Args:
            seed: Training seed; None takes the original's, which gives the reference of all runs.
        """
        assert self._retrain is not None, "this context was made without a trainer"
        return self._retrain(seed)

    def train(
        self, model: nn.Module, dataset: Dataset, seed: int, state: Path | None = None
    ) -> nn.Module:
        """Train a model on a part of a split the method reads, by the benchmark's own recipe.

        Args:
            model: The model to train, such as one from `fresh_model`; it is changed.
            dataset: A split from `split`, or a `types.subset` of one.
            seed: Seed of order and draws.
            state: Folder for step checkpoints, so that a killed training goes on; None: none.
        """
        assert self._train is not None, "this context was made without a trainer"
        return self._train(model, dataset, seed, state)

    def within(self, model: nn.Module, data: Dataset) -> "Context":
        """Return the context of an optimisation inside this one: another model, `retain` = data."""
        return Context(
            engine=self.engine,
            adapter=self.adapter,
            model=model,
            splits=Splits(forget=data, retain=data, train=data, holdout=data, test=data),
            reads=frozenset({"retain"}),
            label=self.label,
            seed=self.seed,
            target=self.target,
        )

    def batches(
        self, split: str, batch_size: int, *, train: bool = False, shuffle: bool = False
    ) -> Iterator[Batch]:
        """Walk a split once, outside the training loop (saliency, importance).

        Args:
            split: A split the method reads.
            batch_size: Effective batch size.
            train: Use the training transform.
            shuffle: Shuffled by the run's seed; otherwise in stored order.
        """
        dataset = self.split(split)
        size = len(dataset)
        order = epoch_order(size, self.seed, self.phase, split) if shuffle else list(range(size))
        for k, start in enumerate(range(0, size, batch_size)):
            rows = order[start : start + batch_size]
            (parts,) = self.engine.load(
                self.adapter,
                {split: (dataset, rows)},
                seed=self.seed,
                stream=(self.phase, k),
                train=train,
                accumulation=1,
            )
            self.engine.meter.examples_seen += len(rows)
            yield parts[split]

    def gradients(self, value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return d value / d parameters, summed over processes; zeros where there is none."""
        found = torch.autograd.grad(value, list(parameters), allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g.detach()
            for p, g in zip(parameters, found, strict=True)
        ]
        self.engine.reduce_sum(grads)
        return grads

    def evaluate(self, split: str) -> dict[str, Any]:
        """Return per-example numbers of the current model on a split the method reads."""
        return self.engine.predict(self.model, self.adapter, self.split(split), self.seed)
