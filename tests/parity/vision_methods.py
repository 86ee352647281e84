"""Golden vectors of the methods that only image classifiers have, on linear models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.types import Outputs, Splits
from mmforget.vision.adapter import FaceAdapter, Faces
from mmforget.vision.methods.boundary_shrink import neighbours, predicted
from mmforget.vision.methods.fisher import FisherConfig, measure, variance
from mmforget.vision.methods.influence import InfluenceConfig, InfluenceUnlearning
from mmforget.vision.methods.ssd import SSD, SSDConfig, importances
from mmforget.vision.methods.unsir import class_objective, fit_noise


class Rows:
    """Feature rows and labels as a data set."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.ids = self.digests = [str(i) for i in range(len(x))]

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: Sequence[int]) -> Faces:
        return Faces(self.x[list(indices)], self.y[list(indices)])


class Float64(FaceAdapter):
    """The classifier adapter for rows that are no images, in the vectors' double precision."""

    def prepare(self, raw: Any, draws: Any, train: bool) -> Faces:
        return raw

    def forward(self, model: nn.Module, data: Faces) -> Outputs:
        logits = model(data.image)
        return Outputs(cross_entropy(logits, data.label, reduction="none"), logits)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def linear(inputs: Mapping[str, Any]) -> nn.Sequential:
    weight, bias = tensor(inputs["weight"]), tensor(inputs["bias"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0])).double()
    model.load_state_dict({"1.weight": weight, "1.bias": bias})
    return model.eval()


def rows(inputs: Mapping[str, Any], name: str) -> Rows:
    return Rows(tensor(inputs[f"{name}_x"]), torch.tensor(inputs[f"{name}_y"]))


def context(inputs: Mapping[str, Any], reads: frozenset[str]) -> Context:
    """Return a context over the vector's model and splits; `train` is retain, then forget."""
    model, retain = linear(inputs), rows(inputs, "retain")
    forget = rows(inputs, "forget") if "forget_x" in inputs else retain
    train = Rows(torch.cat([retain.x, forget.x]), torch.cat([retain.y, forget.y]))
    return Context(
        engine=Engine(Runtime(device="cpu", progress=False)),
        adapter=Float64(model[1].out_features, multilabel=False, augmented=False),
        model=model,
        splits=Splits(forget=forget, retain=retain, train=train, holdout=retain, test=retain),
        reads=reads,
        label="parity",
        seed=0,
    )


def ssd(inputs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, prefix in (("ssd", ""), ("lfssd", "lfssd_")):
        config = SSDConfig(
            alpha=inputs["alpha_selection"],
            dampening=inputs["lambda_dampening"],
            importance=kind,
            importance_batch_size=inputs["batch_size"],
        )
        ctx = context(inputs, SSD.reads)
        weights = list(ctx.scope("all").values())
        for split, name in (("forget", "forget"), ("train", "full")):
            measured = importances(ctx, split, weights, inputs["batch_size"], kind)
            found[f"{prefix}importance_{name}"] = _named(measured)
        SSD(config).run(ctx)
        after = _named(weights)
        found[f"{kind}_weight"], found[f"{kind}_bias"] = after["weight"], after["bias"]
        if kind == "ssd":
            before = linear(inputs).parameters()
            changed = [a != b for a, b in zip(weights, before, strict=True)]
            found["n_changed"] = sum(int(part.sum()) for part in changed)
    return found


def influence(inputs: Mapping[str, Any]) -> dict[str, Any]:
    config = InfluenceConfig(
        alpha=inputs["alpha"], samples=inputs["N"], reference=True, batch_size=4
    )
    ctx = context(inputs, InfluenceUnlearning.reads)
    after = _named(list(InfluenceUnlearning(config).run(ctx).parameters()))
    return {"weight_after": after["weight"], "bias_after": after["bias"]}


def fisher(inputs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    forms = {
        "empirical_fisher": FisherConfig(form="simple"),
        "grad2_acc": FisherConfig(reference=True, batch_size=inputs["hessian_batch_size"]),
    }
    for name, config in forms.items():
        ctx = context(inputs, frozenset({"retain"}))
        information = measure(ctx, ctx.scope("all"), config)
        for short, value in _named(list(information.values())).items():
            found[f"{name}_{short}"] = value
    for short, value in _named(list(information.values())).items():
        spread = variance(tensor(value), inputs["alpha"], is_head=True)
        found[f"noise_variance_{short}_x1e6"] = (spread * 1e6).tolist()
    return found


def unsir(inputs: Mapping[str, Any]) -> dict[str, Any]:
    model, start = linear(inputs), tensor(inputs["noise_init"])
    label = torch.full((len(start),), inputs["forget_class"])

    def objective(noise: Tensor) -> Tensor:
        loss = cross_entropy(model(noise), label, reduction="none")
        return class_objective(loss, noise, inputs["l2_coefficient"])

    return {"noise": fit_noise(start, objective, inputs["steps"], inputs["adam_lr"]).tolist()}


def boundary_shrink(inputs: Mapping[str, Any]) -> dict[str, Any]:
    model, label = linear(inputs), torch.tensor(inputs["y"])
    adapter = Float64(model[1].out_features, multilabel=False, augmented=False)
    near = neighbours(adapter, model, Faces(tensor(inputs["x"]), label), inputs["bound"])
    adversarial = predicted(adapter, model, near)
    return {
        "x_adv": near.image.tolist(),
        "adv_label": adversarial.tolist(),
        "n_label_changed": int((adversarial != label).sum()),
    }


def _named(values: Sequence[Tensor]) -> dict[str, Any]:
    weight, bias = values
    return {"weight": weight.tolist(), "bias": bias.tolist()}


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ssd": ssd,
    "influence_woodfisher": influence,
    "fisher_forgetting": fisher,
    "unsir_noise": unsir,
    "boundary_shrink_fgsm": boundary_shrink,
}
