"""Four toy worlds, one for each kind of prediction, to test methods, metrics and attacks on.

Class logits, token logits with a mask, predicted noise, and item scores on a graph: models of a few
hundred weights that train in milliseconds, behind the same `Adapter` as real modalities. Data and
weights depend on seeds alone, so every process makes the same.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.rng import Draws, generator
from mmforget.types import Adapter, Outputs, Splits, Subset, frozen_copy, full

SIZES = {"forget": 24, "retain": 72, "holdout": 24, "test": 24, "val": 24}
CLASSES, FEATURES = 4, 10
WORDS, LENGTH, PROMPT = 12, 8, 3
PIXELS, TIMES = 6, 10
USERS, ITEMS = 16, 24
IGNORED = -100  # label of positions that no loss is taken at

Data = Mapping[str, Tensor]


class ToyData:
    """A data set of named tensors, [N, ...] each."""

    def __init__(self, name: str, values: Data) -> None:
        self.values = dict(values)
        self.size = len(next(iter(self.values.values())))
        self.ids = [f"{name}-{i:03d}" for i in range(self.size)]
        rows = zip(*(value.tolist() for value in self.values.values()), strict=True)
        self.digests = [hashlib.sha256(repr(row).encode()).hexdigest() for row in rows]

    def __len__(self) -> int:
        return self.size

    def take(self, indices: Sequence[int]) -> Data:
        """Return the chosen rows of every tensor."""
        return {name: value[list(indices)] for name, value in self.values.items()}


@dataclass(frozen=True)
class ToyWorld:
    """A toy modality: its adapter, its data, and a builder of fresh models by seed."""

    name: str
    adapter: Adapter
    splits: Splits
    build: Callable[[int], nn.Module]


def toy_world(name: str) -> ToyWorld:
    """Return a toy world by the name of its kind of prediction.

    Args:
        name: One of `WORLDS`: "classes", "tokens", "noise" or "graph".
    """
    return WORLDS[name]()


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(teacher / T) ‖ softmax(student / T))·T² over the last dimension."""
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2


class ToyAdapter(ABC):
    """What the four adapters have in common."""

    random: bool = True

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return a copy."""
        return frozen_copy(model)

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        """Return the model: it is called as a whole."""
        return (model,)

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Return all parameters, those of `model.head`, or those whose name a regex finds."""
        pattern = {"all": "", "head": r"^head\."}.get(scope, scope)
        found = {n: p for n, p in model.named_parameters() if re.search(pattern, n)}
        if not found:
            raise ConfigError(f"scope={scope!r} matches no parameter; accepted: all, head, a regex")
        return found

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        """Do nothing: such a model holds nothing of the data besides weights."""
        return None

    def units(self, data: Data) -> Tensor:
        """Return ones: a loss of one unit."""
        first = next(iter(data.values()))
        return torch.ones(len(first), device=first.device)

    @abstractmethod
    def forward(self, model: nn.Module, data: Data) -> Outputs:
        """Run the model; each adapter says how."""

    def record(self, model: nn.Module, data: Data) -> dict[str, Tensor]:
        """Return the loss of each example."""
        return {"loss": full(self.forward(model, data).loss)}


class ClassAdapter(ToyAdapter):
    """Class logits [B, C]; training adds noise to the features, as a crop would.

    Args:
        noise: Standard deviation of that noise.
    """

    def __init__(self, noise: float = 0.05) -> None:
        self.noise = noise

    def prepare(self, raw: Data, draws: Draws, train: bool) -> Data:
        """Put features and label on the device, with noise in training."""
        x, y = raw["x"].to(draws.device), raw["y"].to(draws.device)
        return {"x": x + self.noise * draws.normal(*x.shape[1:]) if train else x, "y": y}

    def forward(self, model: nn.Module, data: Data) -> Outputs:
        """Return cross-entropy and logits."""
        logits = model(data["x"])
        return Outputs(F.cross_entropy(logits, data["y"], reduction="none"), logits)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return KL over classes, [B]."""
        return softened_kl(student.pred, teacher.pred, temperature)

    def relabel(self, data: Data, draws: Draws, exclude_true: bool = True) -> Data:
        """Return the data with classes drawn at random."""
        if exclude_true:
            return {**data, "y": (data["y"] + 1 + draws.integers(CLASSES - 1)) % CLASSES}
        return {**data, "y": draws.integers(CLASSES)}

    def record(self, model: nn.Module, data: Data) -> dict[str, Tensor]:
        """Return loss, logits, label and features."""
        loss, logits, _ = self.forward(model, data)
        features = model.body(data["x"]).float()  # type: ignore[operator]
        return {"loss": loss.float(), "logits": logits, "label": data["y"], "features": features}


class TokenAdapter(ToyAdapter):
    """Token logits [B, T, V]; those at t predict the label at t + 1, where that is not ignored."""

    random = False

    def prepare(self, raw: Data, draws: Draws, train: bool) -> Data:
        """Put tokens and labels on the device."""
        return {name: value.to(draws.device) for name, value in raw.items()}

    def units(self, data: Data) -> Tensor:
        """Return the number of answer tokens, [B]."""
        return (data["labels"][:, 1:] != IGNORED).sum(1).float()

    def forward(self, model: nn.Module, data: Data) -> Outputs:
        """Return the negative log-likelihood of the answer, all logits, and where they count."""
        logits, labels = model(data["tokens"]), data["labels"]
        nll = F.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        counts = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        return Outputs(nll.view(len(labels), -1).sum(1), logits, counts)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return KL over words, summed over the positions that count, [B]."""
        kl = softened_kl(student.pred, teacher.pred, temperature)
        return (kl if student.mask is None else kl * student.mask).sum(1)

    def relabel(self, data: Data, draws: Draws, exclude_true: bool = True) -> Data:
        """Return the data with answer words drawn at random."""
        labels = data["labels"]
        if exclude_true:
            drawn = (labels + 1 + draws.integers(WORDS - 1, LENGTH)) % WORDS
        else:
            drawn = draws.integers(WORDS, LENGTH)
        return {**data, "labels": torch.where(labels == IGNORED, labels, drawn)}


class NoiseAdapter(ToyAdapter):
    """Predicted noise [B, P] of a picture at a random time, for a prompt (one of the classes)."""

    def prepare(self, raw: Data, draws: Draws, train: bool) -> Data:
        """Draw time and noise, and mix the noise in."""
        x, prompt = raw["x"].to(draws.device), raw["prompt"].to(draws.device)
        time = (draws.integers(TIMES).float() + 0.5) / TIMES
        noise = draws.normal(PIXELS)
        angle = (time * math.pi / 2)[:, None]
        noisy = angle.cos() * x + angle.sin() * noise
        return {"noisy": noisy, "time": time, "prompt": prompt, "noise": noise}

    def units(self, data: Data) -> Tensor:
        """Return the number of pixels, [B]."""
        return torch.full((len(data["noise"]),), float(PIXELS), device=data["noise"].device)

    def forward(self, model: nn.Module, data: Data) -> Outputs:
        """Return the squared error and the predicted noise."""
        pred = model(data["noisy"], data["time"], data["prompt"])
        return Outputs((pred - data["noise"]).square().sum(1), pred)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return the squared distance of predictions, [B]; the temperature is ignored."""
        return (student.pred - teacher.pred).square().sum(1)

    def relabel(self, data: Data, draws: Draws, exclude_true: bool = True) -> Data:
        """Return the data with prompts drawn at random."""
        if exclude_true:
            return {**data, "prompt": (data["prompt"] + 1 + draws.integers(CLASSES - 1)) % CLASSES}
        return {**data, "prompt": draws.integers(CLASSES)}


class GraphAdapter(ToyAdapter):
    """Scores [B, 2] of the item a user chose and of one drawn at random (BPR)."""

    def prepare(self, raw: Data, draws: Draws, train: bool) -> Data:
        """Draw a negative item for every interaction."""
        values = {name: value.to(draws.device) for name, value in raw.items()}
        return {**values, "negative": draws.integers(ITEMS)}

    def forward(self, model: nn.Module, data: Data) -> Outputs:
        """Return the BPR loss and both scores."""
        users, items = model()
        chosen, negative = items[data["item"]], items[data["negative"]]
        scores = (users[data["user"]][:, None] * torch.stack([chosen, negative], 1)).sum(-1)
        return Outputs(F.softplus(scores[:, 1] - scores[:, 0]), scores)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return KL over the choice between the two items, [B]."""
        return softened_kl(student.pred, teacher.pred, temperature)

    def relabel(self, data: Data, draws: Draws, exclude_true: bool = True) -> Data:
        """Return the data with chosen and drawn item swapped, or swapped by a coin."""
        coin = draws.integers(2)
        swap = torch.ones_like(coin, dtype=torch.bool) if exclude_true else coin.bool()
        item, negative = data["item"], data["negative"]
        swapped = {
            "item": torch.where(swap, negative, item),
            "negative": torch.where(swap, item, negative),
        }
        return {**data, **swapped}

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        """Drop the edges of the forgotten interactions."""
        gone = splits.forget.take(range(len(splits.forget)))
        model.edges[gone["user"], gone["item"]] = 0.0  # type: ignore[operator]


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


class _Reader(nn.Module):
    """Reads each word beside the mean of the words up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.words(tokens)
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        past = words.cumsum(1) / counts
        logits: Tensor = self.head(torch.tanh(self.mix(torch.cat([words, past], -1))))
        return logits


class _Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Embedding(CLASSES, 4)
        self.body = nn.Sequential(nn.Linear(PIXELS + 4 + 1, 24), nn.SiLU())
        self.head = nn.Linear(24, PIXELS)

    def forward(self, noisy: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        inputs = torch.cat([noisy, self.prompts(prompt), time[:, None]], -1)
        noise: Tensor = self.head(self.body(inputs))
        return noise


class _Recommender(nn.Module):
    """Embeddings, and their mean with those of their neighbours (one layer of LightGCN)."""

    edges: Tensor

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.users = nn.Parameter(torch.randn(USERS, 6) * 0.3)
        self.head = nn.Linear(ITEMS, 6, bias=False)  # one column an item
        self.register_buffer("edges", edges.clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        items = self.head.weight.T
        scale = (self.edges.sum(1).clamp_min(1)[:, None] * self.edges.sum(0).clamp_min(1)).rsqrt()
        near = self.edges * scale
        return (self.users + near @ items) / 2, (items + near.T @ self.users) / 2


def _splits(name: str, values: Data) -> Splits:
    data = ToyData(name, values)
    parts: dict[str, Any] = {}
    start = 0
    for split, size in SIZES.items():
        parts[split] = Subset(data, range(start, start + size))
        start += size
    train = Subset(data, range(SIZES["forget"] + SIZES["retain"]))
    return Splits(train=train, **parts)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    return build


def _classes() -> ToyWorld:
    """Classes around four centres, a third of the labels wrong: only memory gets them right."""
    rng, size = generator(0, "toy", "classes"), sum(SIZES.values())
    true = torch.randint(CLASSES, (size,), generator=rng)
    centres = torch.randn(CLASSES, FEATURES, generator=rng)
    x = centres[true] + torch.randn(size, FEATURES, generator=rng)
    wrong = torch.rand(size, generator=rng) < 0.33
    y = torch.where(wrong, torch.randint(CLASSES, (size,), generator=rng), true)
    return ToyWorld("classes", ClassAdapter(), _splits("c", {"x": x, "y": y}), _seeded(_Classifier))


def _tokens() -> ToyWorld:
    """A random prompt of three words and a random answer of two to five."""
    rng, size = generator(0, "toy", "tokens"), sum(SIZES.values())
    tokens = torch.randint(1, WORDS, (size, LENGTH), generator=rng)
    ends = torch.randint(PROMPT + 2, LENGTH + 1, (size, 1), generator=rng)
    place = torch.arange(LENGTH)
    tokens = torch.where(place < ends, tokens, torch.zeros_like(tokens))
    labels = torch.where((place >= PROMPT) & (place < ends), tokens, IGNORED)
    values = {"tokens": tokens, "labels": labels}
    return ToyWorld("tokens", TokenAdapter(), _splits("t", values), _seeded(_Reader))


def _noise() -> ToyWorld:
    """Pictures around one centre a prompt."""
    rng, size = generator(0, "toy", "noise"), sum(SIZES.values())
    prompt = torch.randint(CLASSES, (size,), generator=rng)
    centres = torch.randn(CLASSES, PIXELS, generator=rng)
    x = centres[prompt] + 0.3 * torch.randn(size, PIXELS, generator=rng)
    values = {"x": x, "prompt": prompt}
    return ToyWorld("noise", NoiseAdapter(), _splits("n", values), _seeded(_Denoiser))


def _graph() -> ToyWorld:
    """Distinct interactions; the graph holds those that were trained on."""
    rng, size = generator(0, "toy", "graph"), sum(SIZES.values())
    pairs = torch.randperm(USERS * ITEMS, generator=rng)[:size]
    splits = _splits("g", {"user": pairs // ITEMS, "item": pairs % ITEMS})
    known = splits.train.take(range(len(splits.train)))
    edges = torch.zeros(USERS, ITEMS)
    edges[known["user"], known["item"]] = 1.0
    return ToyWorld("graph", GraphAdapter(), splits, _seeded(lambda: _Recommender(edges)))


WORLDS: Mapping[str, Callable[[], ToyWorld]] = {
    "classes": _classes,
    "tokens": _tokens,
    "noise": _noise,
    "graph": _graph,
}
