"""Golden vectors of losses on answers about images, mapped to the methods that run.

The model holds its logits (or hidden states) as parameters, one tensor a split. Batches are loaded
by a method's own pass, and the adapter is the modality's: only its tokens come from the vectors.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.methods.base import LossMethod, Part, make_loss_method
from mmforget.rng import Draws
from mmforget.types import Splits
from mmforget.vlm.adapter import Tokens, VLMAdapter
from mmforget.vlm.chat import IGNORED, Chat, Encoded
from mmforget.vlm.methods.rmu import RMU, control_vector
from mmforget.vlm.models import VLM, Lora

Vector = dict[str, Any]


class HeldVLM(VLM):
    """A model whose parameters are its outputs: logits or states, [N, T, ...] a split."""

    def __init__(self, **held: Any) -> None:
        nn.Module.__init__(self)
        made = {name: nn.Parameter(_floats(value)) for name, value in held.items()}
        self.held = nn.ParameterDict(made)
        self.net = nn.Identity()

    def set(self, **held: Any) -> None:
        with torch.no_grad():
            for name, value in held.items():
                self.held[name].copy_(_floats(value))

    @property
    def base(self) -> Any:
        width = next(iter(self.held.values())).shape[-1]
        text = SimpleNamespace(hidden_size=width)
        return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))

    @property
    def layers(self) -> nn.ModuleList:
        return nn.ModuleList([nn.Identity()])

    def scope(self, scope: str, lora: Lora) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def logits(self, inputs: Mapping[str, Tensor], keep: int = 0) -> Tensor:
        (split,) = [name for name in self.held if name in inputs]
        found: Tensor = self.held[split][inputs[split]]
        return found

    def hidden(self, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
        return self.logits(inputs)


class Labelled:
    """The rows of a split; position t of the model's logits predicts label t + 1."""

    def __init__(self, split: str, labels: Any, everywhere: bool, padded: bool = True) -> None:
        self.split, self.labels = split, torch.tensor(labels)
        self.everywhere, self.padded = everywhere, padded
        self.ids = [f"{split}-{i}" for i in range(len(self.labels))]
        self.digests = self.ids

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Tokens:
        rows = torch.tensor(list(indices))
        labels = self.labels[rows]
        length = labels.shape[1]
        places = [(row != IGNORED).nonzero().squeeze(1) for row in labels]
        width = max(len(place) for place in places)
        targets = torch.full((len(rows), width), IGNORED)
        at = torch.zeros_like(targets)
        mask = torch.ones_like(labels)
        for k, place in enumerate(places):
            targets[k, : len(place)] = labels[k, place]
            at[k, : len(place)] = place - 1
            if self.padded:
                mask[k, int(place[-1]) + 1 :] = 0
        inputs = {
            self.split: rows,
            "input_ids": torch.zeros_like(labels),
            "attention_mask": mask,
        }
        return Tokens(inputs, targets, at, 0 if self.everywhere else length, (), image_token=1)


class HeldAdapter(VLMAdapter):
    """The modality's adapter; refusals are the rows of another split."""

    def __init__(self, refusals: Labelled | None, everywhere: bool) -> None:
        self.refused, self.everywhere = refusals, everywhere
        self.lora = Lora()

    def prepare(self, raw: Any, draws: Draws, train: bool) -> Tokens:
        made: Tokens = raw
        return made

    def relabel(self, data: Tokens, draws: Draws, exclude_true: bool = True) -> Tokens:
        assert self.refused is not None
        return self.refused.take(data.inputs["forget"].tolist())


class Held:
    """A method set up at the start's logits, whose model then holds the student's.

    Args:
        name: Registry name.
        settings: Its config section.
        labels: Of each split; `refusal` is what `relabel` gives.
        student: Logits of each split.
        start: Those of the original, where it differs.
        everywhere: Keep the logits of all positions.
        padded: Whether what stands behind an answer is padding.
    """

    def __init__(
        self,
        name: str,
        settings: Vector,
        labels: Vector,
        student: Vector,
        start: Vector | None = None,
        everywhere: bool = False,
        padded: bool = True,
    ) -> None:
        data = {split: Labelled(split, rows, everywhere, padded) for split, rows in labels.items()}
        self.model = HeldVLM(**{**student, **(start or {})})
        self.method: LossMethod[Any] = make_loss_method(name, settings, "method")
        first = next(iter(data.values()))
        forget, retain = data.get("forget", first), data.get("retain", first)
        self.ctx = Context(
            engine=Engine(Runtime(device="cpu", progress=False)),
            adapter=HeldAdapter(data.get("refusal"), everywhere),
            model=self.model.eval(),
            splits=Splits(forget, retain, first, first, first, streams=data),
            reads=self.method.reads,
            label="parity",
            seed=0,
        )
        self.ctx.epochs = self.method.training.epochs
        self.ctx.scope(self.method.training.scope)
        self.method.setup(self.ctx)
        self.model.set(**student)
        (run,) = self.method.passes(0)
        read = [split for split in (run.anchor, run.partner, run.extra) if split is not None]
        (parts,) = self.ctx.engine.load(
            self.ctx.adapter,
            {split: (data[split], list(range(len(data[split])))) for split in read},
            seed=0,
            stream=("parity",),
            train=True,
            together=("forget", "retain") if run.together else (),
            relabel=("forget",) if run.relabel else (),
        )
        self.part = Part(parts.get("forget"), parts.get("retain"), parts.get(run.extra or ""))

    def terms(self) -> dict[str, Tensor]:
        return self.method.terms(self.ctx, self.part)

    def loss(self) -> float:
        return sum(value.item() for value in self.terms().values())

    def gradients(self, kind: str, renamed: Mapping[str, str] | None = None) -> Vector:
        loss = torch.stack(list(self.terms().values())).sum()
        grads = self.ctx.gradients(loss, list(self.ctx.trainable.values()))
        names = [name.removeprefix("held.") for name in self.ctx.trainable]
        again = renamed or {}
        return {
            f"grad_{again.get(name, name)}_{kind}": grad
            for name, grad in zip(names, grads, strict=True)
        }


def _splits(inputs: Vector, names: Mapping[str, str]) -> tuple[Vector, Vector]:
    """Return labels and logits of splits, each under its name in the vector."""
    labels = {split: inputs[f"{key}_labels"] for split, key in names.items()}
    return labels, {split: inputs[f"{key}_logits"] for split, key in names.items()}


def _weights(inputs: Vector) -> Vector:
    hyper = inputs["hyper"]
    return {"forget_weight": hyper["gamma"], "retain_weight": hyper["alpha"]}


BOTH = {"forget": "forget", "retain": "retain"}
REFUSED = {**BOTH, "refusal": "idk"}


def _fiubench(inputs: Vector) -> Vector:
    start = {"retain": inputs["oracle_retain_logits"]}
    everywhere = Held("kl_retain", {"reference": True}, *_splits(inputs, BOTH), start, True)
    answers = Held("kl_retain", {}, *_splits(inputs, BOTH), start)
    refused = _splits(inputs, REFUSED)
    return {
        "ga": Held("grad_ascent", {}, *_splits(inputs, BOTH)).loss(),
        "gd": Held("grad_diff", {}, *_splits(inputs, BOTH)).loss(),
        "kl": everywhere.loss(),
        "kl_term_all_positions": everywhere.terms()["retain"].item(),
        "kl_answer_tokens_only": answers.terms()["retain"].item(),
        "po_idk": Held("idk", {}, *refused).loss(),
        "po_sum_of_means": Held("idk", {"sum_of_means": True}, *refused).loss(),
    }


def _safeeraser(inputs: Vector) -> Vector:
    named = _splits(inputs, {**REFUSED, "decouple": "pd"})
    start = {"retain": inputs["oracle_retain_logits"]}
    kl = {"inner": {"reference": True}}
    decoupled = Held("vlm/pd", {}, *named)
    return {
        "gapd": Held("vlm/gapd", {}, *named).loss(),
        "gdpd": Held("vlm/gdpd", {}, *named).loss(),
        "klpd": Held("vlm/klpd", kl, *named, start, True).loss(),
        "idkpd": Held("vlm/idkpd", {}, *named).loss(),
        "pd_term": decoupled.terms()["decouple"].item(),
    }


def _npo(inputs: Vector) -> Vector:
    labels, student = {"forget": inputs["labels"]}, {"forget": inputs["forget_logits"]}
    start = {"forget": inputs["oracle_forget_logits"]}
    alone = {**labels, "retain": inputs["labels"]}
    both = {**student, "retain": inputs["forget_logits"]}
    names = {
        "batch": "batch_token_mean",
        "sequence": "sequence_sum",
        "vocabulary": "full_vocab_ratio",
    }
    found = {}
    for ratio, name in names.items():
        settings = {"beta": inputs["beta"], "ratio": ratio, "retain_weight": 0.0}
        made = Held("npo", settings, alone, both, start, ratio == "vocabulary")
        found[name] = made.loss()
    return found


def _dpo(inputs: Vector) -> Vector:
    settings = {**_weights(inputs), "beta": inputs["hyper"]["beta"]}
    start = {
        "forget": inputs["ref_forget_logits"],
        "refusal": inputs["ref_alternate_logits"],
    }
    named = _splits(inputs, {**BOTH, "refusal": "alternate"})
    made = Held("dpo", settings, *named, start)
    return {"loss": made.loss(), **made.gradients("logits", {"refusal": "alternate"})}


def _idk_po(inputs: Vector) -> Vector:
    labels, student = _splits(inputs, {"retain": "retain", "refusal": "idk"})
    labels["forget"], student["forget"] = labels["refusal"], student["refusal"]  # never learnt
    return {
        "loss_concatenated": Held("idk", {}, labels, student).loss(),
        "loss_sum_of_two_means": Held("idk", {"sum_of_means": True}, labels, student).loss(),
    }


def _undial(inputs: Vector) -> Vector:
    settings = {**_weights(inputs), "beta": inputs["hyper"]["beta"]}
    start = {"forget": inputs["ref_forget_logits"]}
    named = _splits(inputs, BOTH)
    coded = Held("vlm/undial", {**settings, "reference": True}, *named, start, True)
    alone = {"beta": inputs["hyper"]["beta"]}
    return {
        "loss_as_coded": coded.loss(),
        "grad_forget_logits_as_coded": coded.gradients("logits")["grad_forget_logits"],
        "forget_loss_masked_variant": Held("vlm/undial", alone, *named, start).loss(),
    }


def _wga(inputs: Vector) -> Vector:
    settings = {**_weights(inputs), "beta": inputs["hyper"]["beta"]}
    made = Held("vlm/wga", settings, *_splits(inputs, BOTH))
    return {"loss": made.loss(), **made.gradients("logits")}


def _satimp(inputs: Vector) -> Vector:
    own = {name: inputs["hyper"][name] for name in ("beta1", "beta2")}
    made = Held("vlm/satimp", {**_weights(inputs), **own}, *_splits(inputs, BOTH))
    return {"loss": made.loss(), **made.gradients("logits")}


def _ceu(inputs: Vector) -> Vector:
    settings = {"skip": inputs["ignore_first_n_answer_tokens"]}
    made = Held("vlm/ceu", settings, *_splits(inputs, {"forget": "forget"}))
    return {"loss": made.loss(), **made.gradients("logits")}


def _rmu(inputs: Vector) -> Vector:
    labels = {split: inputs[f"{split}_labels"] for split in BOTH}
    student = {split: inputs[f"{split}_act"] for split in BOTH}
    start = {"retain": inputs["frozen_retain_act"]}
    target = inputs["steering_coeff"] * control_vector(_floats(inputs["uniform_draw"]))

    def made(settings: Vector, padded: bool) -> Held:
        fixed = {"alpha": inputs["alpha"], "layer": 0, "scope": "language", "c_relative": False}
        found = Held("vlm/rmu", {**fixed, **settings}, labels, student, start, padded=padded)
        assert isinstance(found.method, RMU)
        found.method.target = target
        return found

    coded = made({"reference": True}, padded=True)
    whole = made({"forget_places": "all", "retain_places": "all"}, padded=False)
    return {
        "control_vector": target,
        "loss_masked": coded.loss(),
        **coded.gradients("act"),
        "loss_unmasked_wmdp": whole.loss(),
        "loss_intended": made({}, padded=True).loss(),
    }


def _floats(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _answer_only_loss(inputs: Vector) -> Vector:
    assert inputs["ignore_index"] == IGNORED
    data = Labelled("forget", inputs["labels"], everywhere=False).take(range(len(inputs["labels"])))
    adapter = HeldAdapter(None, everywhere=False)
    loss = adapter.forward(HeldVLM(forget=inputs["logits"]), data).loss
    units = adapter.units(data)
    return {
        "summed_per_sequence": loss,
        "num_answer_tokens": units,
        "per_token_per_sequence": loss / units,
        "token_mean_batch": (loss.sum() / units.sum()).item(),
        "sequence_mean_batch": (loss / units).mean().item(),
    }


def _label_mask(inputs: Vector) -> Vector:
    ids = inputs["input_ids"]
    prompt, _, _ = inputs["conversation"].partition(inputs["roles"][1])
    words = len(prompt.split()) + len(inputs["roles"][1].split())
    start = words + (len(ids) - len(inputs["conversation"].split()))  # a BOS, or none
    chat = Chat.__new__(Chat)  # without a processor: the vector brings tokens
    chat.pad, chat.image_token = 0, -1

    def labels(leak: bool) -> list[int]:
        adapter = VLMAdapter(chat, (), Lora(), everywhere=True, leak=leak)
        data = adapter.tokens((), [Encoded(ids, start, {}, {})], "cpu")
        made = torch.full((len(ids),), IGNORED)
        made[data.at[0] + 1] = data.targets[0]
        return made.tolist()

    reference, corrected = labels(leak=True), labels(leak=False)
    return {
        "reference_labels": reference,
        "corrected_labels": corrected,
        "reference_leaks_prompt_tokens": sum(
            a != b for a, b in zip(reference, corrected, strict=True)
        ),
    }


ADAPTERS: dict[str, Callable[[Vector], Vector]] = {
    "answer_only_loss": _answer_only_loss,
    "label_mask": _label_mask,
    "fiubench_losses": _fiubench,
    "safeeraser_pd_losses": _safeeraser,
    "vlm/npo": _npo,
    "dpo": _dpo,
    "idk_po": _idk_po,
    "undial": _undial,
    "wga": _wga,
    "satimp": _satimp,
    "ceu": _ceu,
    "rmu": _rmu,
}
