"""Golden vectors of loss methods, mapped to the methods that run.

The models hold their logits as parameters, so that the gradient of a loss with respect to them is
that of autograd through the whole method.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.methods.base import LossMethod, Part, make_loss_method
from mmforget.methods.salun import largest
from mmforget.rng import Draws
from mmforget.testing.toys import ClassAdapter, TokenAdapter, ToyAdapter, ToyData
from mmforget.types import Batch, Outputs, Splits
from tests.parity.vision_numbers import bad_teacher_metrics

Vector = dict[str, Any]


class Held(nn.Module):
    """A model whose parameters are its logits: one tensor a split, [N, ...]."""

    def __init__(self, **logits: Any) -> None:
        super().__init__()
        made = {name: nn.Parameter(_floats(value)) for name, value in logits.items()}
        self.logits = nn.ParameterDict(made)

    def forward(self, where: tuple[str, Tensor]) -> Tensor:
        split, rows = where
        return self.logits[split][rows]

    def set(self, **logits: Any) -> None:
        with torch.no_grad():
            for name, value in logits.items():
                self.logits[name].copy_(_floats(value))


class Rows:
    """The rows of a split: labels, and where their logits are."""

    def __init__(self, split: str, name: str, labels: Any, inputs: str) -> None:
        self.split, self.name, self.inputs = split, name, inputs
        self.labels = torch.tensor(labels)
        self.ids = [f"{split}-{i}" for i in range(len(self.labels))]
        self.digests = self.ids

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Any:
        rows = torch.tensor(list(indices))
        return {self.name: self.labels[rows], self.inputs: (self.split, rows)}


class HeldClasses(ClassAdapter):
    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        return raw


class HeldTokens(TokenAdapter):
    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        return raw


class LinearClasses(ClassAdapter):
    """Features as they are, and wrong labels that the vector names."""

    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        return raw

    def relabel(self, data: Any, draws: Draws, exclude_true: bool = True) -> Any:
        return {**data, "y": data["wrong"]}


class Quadratic(ToyAdapter):
    """0.5 xᵀA x - bᵀx of the model's weights x, one a split; notes where forget was evaluated.

    Methods climb the loss of the forget set and the vector descends it: hence the sign.
    """

    def __init__(self, coefficients: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.coefficients = coefficients
        self.seen: list[Tensor] = []

    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        return raw

    def value(self, split: str, x: Tensor) -> Tensor:
        matrix, vector = self.coefficients[split]
        return 0.5 * x @ matrix @ x - vector @ x

    def forward(self, model: nn.Module, data: Any) -> Outputs:
        split, _ = data["where"]
        x = model.get_parameter("x")
        if split == "forget":
            self.seen.append(x.detach().clone())
        value = self.value(split, x)[None]
        return Outputs(-value if split == "forget" else value, x[None])


def context(
    method: LossMethod[Any],
    adapter: Any,
    model: nn.Module,
    data: Mapping[str, Any],
    bad_teacher: nn.Module | None = None,
) -> Context:
    """Return a context in which the method is set up, its model being θ0."""
    first = next(iter(data.values()))
    forget, retain = data.get("forget", first), data.get("retain", first)
    ctx = Context(
        engine=Engine(Runtime(device="cpu", progress=False)),
        adapter=adapter,
        model=model.eval(),
        splits=Splits(forget=forget, retain=retain, train=first, holdout=first, test=first),
        reads=method.reads,
        label="parity",
        seed=0,
        fresh_model=None if bad_teacher is None else lambda seed: bad_teacher,
    )
    ctx.epochs = method.training.epochs
    ctx.scope("all")
    method.setup(ctx)
    return ctx


def batches(ctx: Context, data: Mapping[str, Any], union: bool = False) -> dict[str, Batch]:
    """Return all of the data as one effective batch."""
    parts = {name: (rows, list(range(len(rows)))) for name, rows in data.items()}
    joined = ("forget", "retain") if union else ()
    (made,) = ctx.engine.load(
        ctx.adapter, parts, seed=0, stream=("parity",), train=True, together=joined
    )
    return made


def _tokens(name: str, settings: Vector, inputs: Vector) -> tuple[LossMethod[Any], Context, Any]:
    """Set up a method at the vector's reference logits, then put in the student's."""
    splits = [split for split in ("forget", "retain") if f"{split}_logits" in inputs]
    student = {split: inputs[f"{split}_logits"] for split in splits}
    start = {split: inputs.get(f"ref_{split}_logits", student[split]) for split in splits}
    data = {split: Rows(split, "labels", inputs[f"{split}_labels"], "tokens") for split in splits}
    model = Held(**start)
    method = make_loss_method(name, settings, "method")
    ctx = context(method, HeldTokens(), model, data)
    model.set(**student)
    return method, ctx, batches(ctx, data)


def _loss(name: str, settings: Vector, inputs: Vector) -> Vector:
    method, ctx, made = _tokens(name, settings, inputs)
    terms = method.loss(ctx, made.get("forget"), made.get("retain"))
    loss = torch.stack(list(terms.values())).sum()
    grads = ctx.gradients(loss, list(ctx.trainable.values()))
    named = zip(ctx.trainable, grads, strict=True)
    found = {f"grad_{key.removeprefix('logits.')}_logits": grad for key, grad in named}
    return {"loss": loss.item(), **found}


def _weights(inputs: Vector) -> Vector:
    hyper = inputs["hyper"]
    return {"forget_weight": hyper["gamma"], "retain_weight": hyper["alpha"]}


def _grad_ascent(inputs: Vector) -> Vector:
    return _loss("grad_ascent", {}, inputs)


def _graddiff(inputs: Vector) -> Vector:
    if inputs["hyper"]["retain_loss_type"] == "KL":
        return _loss("kl_retain", {**_weights(inputs), "reference": True}, inputs)
    return _loss("grad_diff", _weights(inputs), inputs)


def _npo(inputs: Vector) -> Vector:
    hyper = inputs["hyper"]
    retain = {"retain": hyper["retain_loss_type"].lower(), "reference": True}
    return _loss("npo", {**_weights(inputs), **retain, "beta": hyper["beta"]}, inputs)


def _npo_variants(inputs: Vector) -> Vector:
    found: Vector = {}
    names = {
        "sequence": "sequence_sum_npo",
        "raw": "muse_raw_logit_variant",
        "batch": "batch_mean_loss_variant",
    }
    for ratio, name in names.items():
        settings = {"beta": inputs["beta"], "ratio": ratio}
        method, ctx, made = _tokens("npo", settings, inputs)
        forget = made["forget"]
        found[name] = method.loss(ctx, forget, None)["forget"].item()
        found["per_sequence_nll"] = ctx.forward(forget).loss
        before = method.before  # type: ignore[attr-defined]
        if before is not None:  # `raw` compares predictions, so it holds none
            found["per_sequence_ref_nll"] = [before[i] for i in forget.ids]
    return found


def _simnpo(inputs: Vector) -> Vector:
    hyper = inputs["hyper"]
    own = {"beta": hyper["beta"], "delta": hyper["delta"]}
    return _loss("simnpo", {**_weights(inputs), **own}, inputs)


def _sam(inputs: Vector) -> Vector:
    coefficients = {
        split: (_floats(inputs[f"A_{split}"]), _floats(inputs[f"b_{split}"]))
        for split in ("forget", "retain")
    }
    adapter, model = Quadratic(coefficients), nn.Module()
    model.x = nn.Parameter(_floats(inputs["x"]))
    data = {split: Rows(split, "y", [0], "where") for split in coefficients}
    inner = {"name": "grad_diff", "retain_weight": inputs["gamma"]}
    method = make_loss_method("sam", {"rho": inputs["rho"], "inner": inner}, "method")
    ctx = context(method, adapter, model, data)
    made = batches(ctx, data)
    clean = method.loss(ctx, made["forget"], None)["forget"]
    (clean_grad,) = ctx.gradients(clean, [model.x])
    adapter.seen.clear()
    method.backward(ctx, [Part(made["forget"], made["retain"])])
    start, perturbed = adapter.seen  # forget is evaluated twice, no more
    (retain_grad,) = ctx.gradients(method.loss(ctx, None, made["retain"])["retain"], [model.x])
    assert model.x.grad is not None
    return {
        "clean_forget_loss": clean.item(),
        "clean_forget_grad": clean_grad,
        "eps": perturbed - start,
        "x_perturbed": perturbed,
        "perturbed_forget_loss": adapter.value("forget", perturbed).item(),
        "perturbed_forget_grad": model.x.grad - retain_grad,
        "final_grad": model.x.grad,
        "x_restored": model.x.detach(),
    }


def _linear(inputs: Vector) -> nn.Linear:
    weight, bias = _floats(inputs["weight"]), _floats(inputs["bias"])
    model = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(bias)
    return model


def _class_data(inputs: Vector) -> dict[str, ToyData]:
    found = {}
    for split in ("forget", "retain"):
        if f"{split}_x" in inputs:
            y = torch.tensor(inputs[f"{split}_y"])
            wrong = torch.tensor(inputs["random_y"]) if "random_y" in inputs else y
            values = {"x": _floats(inputs[f"{split}_x"]), "y": y}
            found[split] = ToyData(split, {**values, "wrong": wrong if split == "forget" else y})
    return found


def _single_sgd_step(inputs: Vector) -> Vector:
    beta = inputs["neggrad_plus_alpha"]
    runs: dict[str, tuple[str, Vector, tuple[str, ...]]] = {
        "finetune": ("finetune", {}, ("retain",)),
        "neggrad": ("grad_ascent", {}, ("forget",)),
        "advanced_neggrad": ("grad_diff", {}, ("forget", "retain")),
        "neggrad_plus": (
            "grad_diff",
            {"retain_weight": beta, "forget_weight": 1 - beta, "anchor": "retain"},
            ("forget", "retain"),
        ),
        "random_label_forget_batch": ("random_label", {}, ("forget",)),
        "l1_sparse": ("l1_sparse", {"gamma": inputs["l1_coefficient"]}, ("retain",)),
    }
    plain = {"lr": inputs["lr"], "momentum": 0.0, "weight_decay": 0.0, "max_steps": 1}
    found: Vector = {}
    for key, (name, settings, splits) in runs.items():
        data, model = _class_data(inputs), _linear(inputs)
        size = {"batch_size": max(len(part) for part in data.values())}
        method = make_loss_method(name, {**plain, **size, **settings}, "method")
        ctx = context(method, LinearClasses(), model, data)
        made = batches(ctx, {split: data[split] for split in splits})
        terms = method.loss(ctx, made.get("forget"), made.get("retain"))
        method.run(ctx)
        loss = sum(value.item() for value in terms.values())
        found[key] = {"loss": loss, "weight": model.weight.detach(), "bias": model.bias.detach()}
    return found


def _scrub_losses(inputs: Vector) -> Vector:
    labels = inputs["labels"]
    settings = {"gamma": inputs["gamma"], "alpha": inputs["alpha"], "temperature": inputs["T"]}
    method = make_loss_method("scrub", settings, "method")
    splits = ("forget", "retain")
    data = {split: Rows(split, "y", labels, "x") for split in splits}
    model = Held(**dict.fromkeys(splits, inputs["teacher_logits"]))
    ctx = context(method, HeldClasses(), model, data)
    model.set(**dict.fromkeys(splits, inputs["student_logits"]))
    made = batches(ctx, data)
    rise = method.loss(ctx, made["forget"], None)["forget"]
    fall = torch.stack(list(method.loss(ctx, None, made["retain"]).values())).sum()
    entropy = ctx.unit_mean(ctx.forward(made["retain"]).loss, made["retain"])
    return {
        "distill_kl": -rise.item(),
        "cross_entropy": entropy.item(),
        "max_step_loss": rise.item(),
        "min_step_loss": fall.item(),
        "grad_max_wrt_student_logits": ctx.gradients(rise, [model.logits["forget"]])[0],
        "grad_min_wrt_student_logits": ctx.gradients(fall, [model.logits["retain"]])[0],
    }


def _bad_teacher(inputs: Vector) -> Vector:
    flags = torch.tensor(inputs["is_forget"]).bool()
    groups = {"forget": flags, "retain": ~flags}

    def part(name: str) -> dict[str, Tensor]:
        return {split: _floats(inputs[name])[rows] for split, rows in groups.items()}

    found: Vector = bad_teacher_metrics(inputs)
    for key, reference in (("unlearner_loss", True), ("unlearner_loss_batchmean", False)):
        settings = {"temperature": inputs["KL_temperature"], "reference": reference}
        method = make_loss_method("bad_teacher", settings, "method")
        data = {
            split: Rows(split, "y", [0] * int(rows.sum()), "x")
            for split, rows in groups.items()
            if rows.any()
        }
        model = Held(**part("full_teacher_logits"))
        bad = Held(**part("bad_teacher_logits"))
        ctx = context(method, HeldClasses(), model, data, bad)
        model.set(**part("student_logits"))
        made = batches(ctx, data, union=True)
        terms = method.loss(ctx, made.get("forget"), made.get("retain"))
        found[key] = sum(value.item() for value in terms.values())
    return found


def _salun_mask(inputs: Vector) -> Vector:
    if "batch_gradients" in inputs:
        return _ranked(inputs)
    found: Vector = {}
    for tenths in range(1, 11):
        ratio = tenths / 10
        settings = {"ratio": ratio, "mask_batch_size": inputs["batch_size"]}
        method = make_loss_method("salun", settings, "method")
        ctx = context(method, LinearClasses(), _linear(inputs), _class_data(inputs))
        masks = [mask.int() for mask in method.masks]  # type: ignore[attr-defined]
        found[f"mask_{ratio}"] = dict(zip(ctx.trainable, masks, strict=True))
        found[f"count_{ratio}"] = sum(int(mask.sum()) for mask in masks)
    return found


def _ranked(inputs: Vector) -> Vector:
    sums = {name: torch.tensor(value).sum(0) for name, value in inputs["batch_gradients"].items()}
    masks = largest(list(sums.values()), inputs["threshold"])
    kept = torch.cat([v[m] for v, m in zip(sums.values(), masks, strict=True)]).abs()
    return {
        "mask": dict(zip(sums, [mask.int() for mask in masks], strict=True)),
        "n_kept": len(kept),
        "smallest_kept_abs_gradient": float(f"{kept.min().item():.9g}"),  # float32, as stored
    }


def _floats(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


ADAPTERS: dict[str, Callable[[Vector], Vector]] = {
    "grad_ascent": _grad_ascent,
    "graddiff": _graddiff,
    "graddiff_kl": _graddiff,
    "npo": _npo,
    "npo_variants": _npo_variants,
    "simnpo": _simnpo,
    "sam_step_quadratic": _sam,
    "method_single_sgd_step": _single_sgd_step,
    "scrub_losses": _scrub_losses,
    "bad_teacher": _bad_teacher,
    "salun_mask": _salun_mask,
}
