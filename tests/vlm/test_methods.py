"""Loss methods of the modality: the contract, closed forms, degenerate cases, errors."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod, Part, make_loss_method
from mmforget.registry import METHODS
from mmforget.rng import Draws
from mmforget.testing.contract import (
    Case,
    Outcome,
    check_accumulation,
    check_loss_method,
    check_metadata,
    check_moves,
    check_resume,
    check_same,
    check_terms,
    check_zero_rate,
    run_case,
)
from mmforget.testing.toys import ToyWorld
from mmforget.types import Batch, Outputs, Splits
from mmforget.vlm import ENTRIES
from mmforget.vlm.adapter import VLMAdapter, answer_logits, token_losses
from mmforget.vlm.chat import IGNORED, Chat, Item
from mmforget.vlm.data import Dialogues, check_images
from mmforget.vlm.methods.base import shifted_labels
from mmforget.vlm.methods.rmu import RMU, control_vector, down_projections
from mmforget.vlm.models import VLM, Lora
from tests.parity.vlm_losses import Held
from tests.vlm.families import DIM, build, picture

torch.set_num_threads(1)

SIZES = {"forget": 12, "retain": 24, "holdout": 4, "test": 4}
REFUSALS = ("I do not know.", "I cannot answer questions about private people.", "No.")
NAMED = ("Ada", "Lisbon", "a phone number", "May 1984", "an illness, a salary and a job")
LORA = Lora(rank=4, alpha=8.0, dropout=0.0)
PLAIN: dict[str, Any] = {
    "epochs": 1,
    "lr": 0.02,
    "batch_size": 4,
    "optimizer": "sgd",
    "schedule": "constant",
    "clip_norm": None,
    "weight_decay": 0.0,
    "scope": "all",
}


def items(name: str, count: int, images: Sequence[Path]) -> list[Item]:
    """Return items whose answers differ in length."""
    return [
        Item(
            f"{name}-{k}",
            images[k % len(images)],
            f"What is {name} {k} in the image?",
            f"The {name} {k} is {NAMED[k % len(NAMED)]}.",
        )
        for k in range(count)
    ]


@dataclass
class Made:
    """A tiny model's world, and what it is made of."""

    world: ToyWorld
    adapter: VLMAdapter
    start: VLM
    images: list[Path]

    def everywhere(self) -> "Made":
        """Return the same with logits of all positions kept."""
        adapter = VLMAdapter(self.adapter.chat, REFUSALS, LORA, everywhere=True)
        return replace(self, adapter=adapter, world=replace(self.world, adapter=adapter))

    def data(self, made: Sequence[Item]) -> Dialogues:
        return Dialogues(made, self.adapter.chat, check_images(self.images))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_world(tmp_path_factory.mktemp("pictures"))


def make_world(folder: Path) -> Made:
    """Return a tiny model's world, its pictures written to a folder."""
    images = [folder / f"{k}.png" for k in range(3)]
    for k, path in enumerate(images):
        picture(k).save(path)
    start = VLM(*build("llava"), "tiny")
    chat = Chat(start)
    adapter = VLMAdapter(chat, REFUSALS, LORA)
    digests = check_images(images)
    data: dict[str, Any] = {
        name: Dialogues(items(name, size, images), chat, digests) for name, size in SIZES.items()
    }
    train = Dialogues(data["forget"].items + data["retain"].items, chat, digests)
    streams = {
        "profiles": Dialogues(items("profile", SIZES["forget"], images), chat, digests),
        "decouple": Dialogues(items("decoupled", SIZES["forget"], images), chat, digests),
    }
    splits = Splits(train=train, streams=streams, **data)
    world = ToyWorld("llava", adapter, splits, lambda seed: copy.deepcopy(start))
    return Made(world, adapter, start, images)


@dataclass
class Ready:
    """A method set up on the tiny model, and one effective batch of each split."""

    method: LossMethod[Any]
    ctx: Context
    batches: dict[str, Batch]

    def terms(self, *splits: str) -> dict[str, Tensor]:
        parts = {split: self.batches[split] for split in splits or ("forget", "retain")}
        return self.method.loss(self.ctx, parts.get("forget"), parts.get("retain"))

    def outputs(self, split: str) -> Outputs:
        return self.ctx.forward(self.batches[split])

    def gradient(self, value: Tensor) -> Tensor:
        grads = self.ctx.gradients(value, list(self.ctx.trainable.values()))
        return torch.cat([grad.flatten() for grad in grads])


def ready(
    made: Made, name: str, settings: Mapping[str, Any] | None = None, scope: str | None = None
) -> Ready:
    method = make_loss_method(name, settings or {}, "method")
    ctx = Context(
        engine=Engine(Runtime(device="cpu", progress=False)),
        adapter=made.adapter,
        model=copy.deepcopy(made.start),
        splits=made.world.splits,
        reads=method.reads,
        label=name,
        seed=0,
    )
    ctx.epochs = method.training.epochs
    ctx.scope(scope or method.training.scope)
    method.setup(ctx)
    run = method.passes(0)[0]
    splits = ["forget", "retain", "profiles", "decouple"]
    (parts,) = ctx.engine.load(
        ctx.adapter,
        {split: (made.world.splits.get(split), list(range(6))) for split in splits},
        seed=0,
        stream=("test",),
        train=True,
        together=("forget", "retain") if run.together else (),
        relabel=("forget",) if run.relabel else (),
    )
    return Ready(method, ctx, parts)


def nudge(ctx: Context, size: float = 0.05) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in ctx.trainable.values():
            weight.add_(size * torch.randn(weight.shape, generator=rng))


def close(found: Tensor | float, wanted: Tensor | float, tolerance: float = 1e-5) -> bool:
    one, two = (torch.as_tensor(value).detach().item() for value in (found, wanted))
    return math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance)


def rows(batch: Batch, found: Outputs) -> list[tuple[Tensor, list[int]]]:
    """Return of each example the logits [n, V] and ids of its answer tokens, one by one."""
    kept = []
    for k, target in enumerate(batch.data.targets.tolist()):
        ids = [token for token in target if token != IGNORED]
        kept.append((found.pred[k, : len(ids)], ids))
    return kept


NAMES = ENTRIES["methods"]

CONTRACT: dict[str, tuple[str, dict[str, Any]]] = {
    "idk": ("idk", PLAIN),
    "dpo": ("dpo", PLAIN),
    "undial": ("vlm/undial", {**PLAIN, "retain_weight": 1.0}),
    "wga": ("vlm/wga", PLAIN),
    "satimp": ("vlm/satimp", {**PLAIN, "beta1": 0.5, "lr": 0.2}),
    "ceu": ("vlm/ceu", {**PLAIN, "skip": 1}),
    "icd": ("vlm/icd", PLAIN),
    "gapd": ("vlm/gapd", {"inner": PLAIN}),
    "gdpd": ("vlm/gdpd", {"aligned": True, "inner": PLAIN}),
    "klpd": ("vlm/klpd", {"inner": PLAIN}),
    "idkpd": ("vlm/idkpd", {"inner": PLAIN}),
    "pd_sam": ("vlm/pd", {"inner": {"name": "sam", "inner": {"name": "grad_diff", **PLAIN}}}),
}


@pytest.mark.parametrize("key", CONTRACT)
def test_contract(key: str, made: Made, tmp_path: Path) -> None:
    name, settings = CONTRACT[key]
    check_loss_method(Case(name, settings, made.world), tmp_path)


RMU_PLAIN = {**PLAIN, "scope": "auto", "alpha": 1.0, "c": 2.0, "lr": 0.5}


def test_contract_of_rmu(made: Made, tmp_path: Path) -> None:
    case = Case("vlm/rmu", RMU_PLAIN, made.world)
    check_metadata(case)
    first = run_case(case)
    check_moves(case, first)
    check_same(run_case(case).model, first.model, "a second run of one seed")
    check_zero_rate(case)
    check_accumulation(case, first)
    check_terms(case)
    check_resume(case, first, tmp_path)
    start, state = made.start.state_dict(), first.model.state_dict()
    moved = {name for name, value in state.items() if not torch.equal(value, start[name])}
    assert moved == set(first.ctx.trainable)
    (name,) = moved  # two layers: the first is steered, and nothing lies below it
    assert name.endswith("language_model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("key", ["dpo", "undial", "klpd"])
def test_contract_on_low_rank_adapters(key: str, made: Made, tmp_path: Path) -> None:
    name, settings = CONTRACT[key]
    if "inner" in settings:
        settings = {**settings, "inner": {**settings["inner"], "scope": "lora"}}
    else:
        settings = {**settings, "scope": "lora"}
    fresh = copy.deepcopy(made.start)
    fresh.attach(LORA)
    world = replace(made.world, build=lambda seed: copy.deepcopy(fresh))
    case = Case(name, settings, world)
    first = run_case(case, model=made.start)
    assert all("lora_" in n or "modules_to_save" in n for n in first.ctx.trainable)
    check_moves(case, first)
    check_zero_rate(case)
    check_accumulation(case, first)
    check_resume(case, first, tmp_path)


def test_every_method_has_metadata_and_serves_this_modality_alone() -> None:
    suppressing = {"vlm/pd", "vlm/idkpd"}
    for name in NAMES:
        cls = METHODS.get(name)
        assert cls.modalities == frozenset({"vlm"})
        assert cls.intent == ("suppression" if name in suppressing else "removal"), name
        default = make_loss_method(name, {}, "method")
        assert default.reads <= cls.reads, name
    tested = {name for name, _ in CONTRACT.values()} | {"vlm/rmu"}
    assert set(NAMES) <= tested


# Refusals.


def test_idk_is_one_mean_over_the_tokens_of_both(made: Made) -> None:
    one = ready(made, "idk")
    terms = one.terms()
    losses = {split: one.outputs(split).loss.sum().item() for split in ("forget", "retain")}
    counts = {s: (one.batches[s].data.targets != IGNORED).sum().item() for s in losses}
    total = sum(losses.values()) / sum(counts.values())
    assert close(sum(terms.values()), total)
    two = ready(made, "idk", {"sum_of_means": True}).terms()
    for split, value in two.items():
        assert close(value, losses[split] / counts[split])
    assert not close(sum(two.values()), total, 1e-2)


def test_idk_learns_refusals_drawn_for_each_item(made: Made) -> None:
    batch = ready(made, "idk").batches["forget"]
    told = [item.answer for item in batch.data.items]
    asked = [item.question for item in batch.data.items]
    original = made.world.splits.forget
    assert isinstance(original, Dialogues)
    assert asked == [item.question for item in original.items[:6]]
    assert set(told) <= set(REFUSALS) and len(set(told)) > 1
    decoded = [
        made.adapter.chat.decode([t for t in row if t != IGNORED])
        for row in batch.data.targets.tolist()
    ]
    assert decoded == told


def test_idk_makes_refusals_likely(made: Made) -> None:
    model = run_case(Case("idk", {**PLAIN, "epochs": 4, "lr": 0.1}, made.world)).model
    refusals = made.data([replace(i, answer=REFUSALS[0]) for i in items("forget", 8, made.images)])

    def loss(net: nn.Module) -> float:
        data = made.adapter.prepare(refusals.take(range(8)), Draws(0, total=1), False)
        with torch.no_grad():
            return float(made.adapter.forward(net, data).loss.mean())

    assert loss(model.eval()) < 0.7 * loss(made.start)


# DPO.


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_of_identical_policies_is_the_log_of_two(beta: float, made: Made) -> None:
    value = ready(made, "dpo", {"beta": beta}).terms("forget")["forget"]
    assert close(value, 2 / beta * math.log(2))
    plain = ready(made, "dpo", {"beta": beta, "standard": True}).terms("forget")["forget"]
    assert close(plain, math.log(2))


def test_dpo_compares_log_ratios_of_whole_answers(made: Made) -> None:
    settings = {"beta": 0.3, "forget_weight": 0.5, "retain_weight": 2.0}
    one = ready(made, "dpo", settings, scope="all")
    forget, adapter = one.batches["forget"], made.adapter
    chosen = adapter.relabel(forget.data, forget.draws("relabel"))
    assert all(item.answer in REFUSALS for item in chosen.items)
    nudge(one.ctx)

    def logp(model: nn.Module, data: Any) -> Tensor:
        return -adapter.forward(model, data).loss

    chosen_ratio, rejected_ratio = (
        logp(one.ctx.model, data) - logp(made.start, data).detach()
        for data in (chosen, forget.data)
    )
    wanted = -0.5 * (2 / 0.3) * F.logsigmoid(0.3 * (chosen_ratio - rejected_ratio)).mean()
    terms = one.terms()
    assert close(terms["forget"], wanted, 1e-4)
    grads = one.gradient(terms["forget"]), one.gradient(wanted)
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-4)
    retain = one.batches["retain"]
    assert close(terms["retain"], 2 * one.outputs("retain").loss.sum() / retain.units.sum())


def test_dpo_raises_refusals_above_answers(made: Made) -> None:
    case = Case("dpo", {**PLAIN, "epochs": 3, "retain_weight": 0.0}, made.world)
    model = run_case(case).model.eval()
    true = items("forget", 8, made.images)
    margins = []
    for net in (made.start, model):
        losses = []
        for told in (true, [replace(item, answer=REFUSALS[1]) for item in true]):
            raw = made.data(told).take(range(8))
            data = made.adapter.prepare(raw, Draws(0, total=1), False)
            with torch.no_grad():
                losses.append(made.adapter.forward(net, data).loss.mean())
        margins.append(float(losses[0] - losses[1]))
    assert margins[1] > margins[0] + 1


# UNDIAL.


def test_undial_of_strength_zero_is_the_originals_entropy(made: Made) -> None:
    one = ready(made, "vlm/undial", {"beta": 0.0}, scope="all")
    value = one.terms("forget")["forget"]
    entropies = [
        -(p * p.log()).sum(-1)
        for logits, _ in rows(one.batches["forget"], one.outputs("forget"))
        for p in [logits.softmax(-1)]
    ]
    assert close(value, torch.cat(entropies).mean())
    assert one.gradient(value).abs().max() < 1e-5  # CE to oneself is least


def test_undial_lowers_the_true_tokens_logit(made: Made) -> None:
    one = ready(made, "vlm/undial", {"beta": 4.0, "forget_weight": 3.0}, scope="all")
    before = rows(one.batches["forget"], one.outputs("forget"))
    nudge(one.ctx)
    value = one.terms("forget")["forget"]
    now = rows(one.batches["forget"], one.outputs("forget"))
    found = []
    for (old, ids), (new, _) in zip(before, now, strict=True):
        for place, token in enumerate(ids):
            lowered = old[place].clone()
            lowered[token] -= 4.0
            found.append(-(lowered.softmax(-1) * new[place].log_softmax(-1)).sum())
    assert close(value, 3 * torch.stack(found).mean())


def test_undial_reference_indexes_the_vocabulary_from_its_end(made: Made) -> None:
    everywhere = made.everywhere()
    one = ready(everywhere, "vlm/undial", {"beta": 4.0, "reference": True}, scope="all")
    batch = one.batches["forget"]
    assert not batch.data.inputs["attention_mask"].all()  # some rows are padded
    before = one.outputs("forget").pred
    nudge(one.ctx)
    value = one.terms("forget")["forget"]
    now = one.outputs("forget").pred
    ids, length = batch.data.inputs["input_ids"], now.shape[1]
    answer = batch.data.places("answer")
    found = []
    for k in range(len(ids)):
        for t in range(length - 1):
            lowered = before[k, t].clone()
            lowered[int(ids[k, t + 1]) if answer[k, t + 1] else IGNORED] -= 4.0
            found.append(-(lowered.softmax(-1) * now[k, t].log_softmax(-1)).sum())
    assert close(value, torch.stack(found).mean(), 1e-4)
    masked = ready(everywhere, "vlm/undial", {"beta": 4.0}, scope="all")
    nudge(masked.ctx)
    short = ready(made, "vlm/undial", {"beta": 4.0}, scope="all")
    nudge(short.ctx)
    assert close(masked.terms("forget")["forget"], short.terms("forget")["forget"])
    assert not close(value, short.terms("forget")["forget"], 1e-2)


def test_undial_reference_needs_logits_everywhere(made: Made) -> None:
    with pytest.raises(ConfigError, match="reference=true averages over prompt, image and padding"):
        ready(made, "vlm/undial", {"reference": True})


def test_undial_opens_retain_only_for_a_weight(made: Made) -> None:
    outcome = run_case(Case("vlm/undial", PLAIN, made.world))
    assert outcome.opened == outcome.method.reads == {"forget"}
    weighted = make_loss_method("vlm/undial", {"retain_weight": 0.5}, "method")
    assert weighted.reads == {"forget", "retain"}
    assert weighted.passes(0)[0].partner == "retain"


# Weights on tokens.


@pytest.mark.parametrize(
    ("name", "settings"),
    [("vlm/wga", {"beta": 0.0}), ("vlm/satimp", {"beta1": 0.0, "beta2": 0.0})],
)
def test_without_weights_it_is_gradient_ascent(
    name: str, settings: dict[str, Any], made: Made
) -> None:
    one, plain = (ready(made, n, s, "all") for n, s in ((name, settings), ("grad_ascent", {})))
    found, wanted = (each.terms("forget")["forget"] for each in (one, plain))
    assert close(found, wanted)
    assert torch.allclose(one.gradient(found), plain.gradient(wanted), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "one", "two"),
    [
        ("vlm/wga", {"beta": 0.7}, 0.7, 0.0),
        ("vlm/satimp", {"beta1": 0.5, "beta2": 2.0, "retain_weight": 1.0}, 0.5, 2.0),
    ],
)
def test_token_weights_are_constants(
    name: str, settings: dict[str, Any], one: float, two: float, made: Made
) -> None:
    each = ready(made, name, settings, scope="all")
    terms = each.terms()
    losses, weights = [], []
    for logits, ids in rows(each.batches["forget"], each.outputs("forget")):
        for place, token in enumerate(ids):
            loss = -logits[place].log_softmax(-1)[token]
            p = math.exp(-loss.item())
            losses.append(loss)
            weights.append(p**one * (1 - p) ** two)
    wanted = -sum(w * loss for w, loss in zip(weights, losses, strict=True)) / len(losses)
    assert isinstance(wanted, Tensor)
    assert close(terms["forget"], wanted)
    found = each.gradient(terms["forget"])
    assert torch.allclose(found, each.gradient(wanted), atol=1e-6)
    assert close(terms["retain"], each.outputs("retain").loss.sum() / 6 / _mean_units(each))


def _mean_units(each: Ready) -> float:
    return float(each.batches["retain"].units.mean())


# CE-U.


@pytest.mark.parametrize("skip", [0, 2])
def test_ceu_is_cross_entropy_to_what_the_model_would_say_unknowing(skip: int, made: Made) -> None:
    one = ready(made, "vlm/ceu", {"skip": skip}, scope="all")
    value = one.terms("forget")["forget"]
    found = []
    for logits, ids in rows(one.batches["forget"], one.outputs("forget")):
        for place, token in list(enumerate(ids))[skip:]:
            others = [t for t in range(logits.shape[1]) if t != token]
            target = logits[place, others].detach().softmax(-1)
            found.append(-(target * logits[place].log_softmax(-1)[others]).sum())
    wanted = torch.stack(found).mean()
    assert close(value, wanted)
    assert torch.allclose(one.gradient(value), one.gradient(wanted), atol=1e-6)


def test_ceu_gives_no_gradient_where_nothing_is_known() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = -40.0  # of the true token
    held = Held("vlm/ceu", {}, {"forget": [[IGNORED, 2, IGNORED]]}, {"forget": logits})
    assert close(held.loss(), math.log(3))
    assert held.gradients("logits")["grad_forget_logits"].abs().max() < 1e-12


def test_ceu_refuses_to_skip_whole_answers(made: Made) -> None:
    with pytest.raises(ConfigError, match=r"skip=99 leaves nothing of 12 answers.*'forget-0'"):
        ready(made, "vlm/ceu", {"skip": 99})


# RMU.


def rmu_terms(made: Made, settings: dict[str, Any]) -> tuple[Ready, RMU, dict[str, Tensor]]:
    one = ready(made, "vlm/rmu", {"scope": "language", **settings})
    method = one.method
    assert isinstance(method, RMU)
    nudge(one.ctx)
    return one, method, one.terms()


def states(made: Made, net: nn.Module, batch: Batch, layer: int) -> Tensor:
    """Return what a layer puts out, by the hidden states of transformers."""
    assert isinstance(net, VLM)
    with torch.no_grad():
        kept = net.net(**batch.data.inputs, output_hidden_states=True).hidden_states
    found: Tensor = kept[layer + 1]
    return found


@pytest.mark.parametrize(("forget", "retain"), [("answer", "text"), ("image", "question")])
def test_rmu_is_a_mean_over_tokens_then_examples(forget: str, retain: str, made: Made) -> None:
    settings = {
        "layer": 0,
        "c": 3.0,
        "c_relative": False,
        "alpha": 7.0,
        "forget_places": forget,
        "retain_places": retain,
    }
    one, method, terms = rmu_terms(made, settings)
    assert close(method.target.norm(), 3.0)
    assert (method.target > 0).all() and method.target.shape == (DIM,)
    losses: dict[str, list[float]] = {"forget": [], "retain": []}
    for split, kind in (("forget", forget), ("retain", retain)):
        batch = one.batches[split]
        now = states(made, one.ctx.model, batch, 0)
        goal = states(made, made.start, batch, 0) if split == "retain" else method.target
        errors = (now - goal).square().mean(-1)
        at = batch.data.places(kind)
        losses[split] = [float(errors[k][at[k]].mean()) for k in range(len(batch))]
    assert close(terms["forget"], sum(losses["forget"]) / 6, 1e-4)
    assert close(terms["retain"], 7 * sum(losses["retain"]) / 6, 1e-4)


def test_rmu_reference_divides_by_the_mean_of_inverse_counts(made: Made) -> None:
    fixed = {"layer": 0, "c_relative": False}
    one, method, terms = rmu_terms(made, {**fixed, "reference": True})
    batch = one.batches["forget"]
    at = batch.data.places("answer")
    errors = (states(made, one.ctx.model, batch, 0) - method.target).square().mean(-1) * at
    wanted = errors.sum(1).mean() * (1 / at.sum(1)).mean()
    assert close(terms["forget"], wanted, 1e-4)
    intended = rmu_terms(made, fixed)[2]["forget"]
    assert not close(wanted, intended, 1e-3)


def test_rmu_measures_its_target_in_lengths_of_states(made: Made) -> None:
    settings = {"layer": 0, "c": 2.0, "forget_places": "text", "scope": "language"}
    one = ready(made, "vlm/rmu", settings)
    assert isinstance(one.method, RMU)
    lengths = []
    for k in range(0, SIZES["forget"], 4):
        raw = made.world.splits.forget.take(range(k, k + 4))
        data = made.adapter.prepare(raw, Draws(0, total=1), False)
        with torch.no_grad():
            kept = made.start.net(**data.inputs, output_hidden_states=True).hidden_states[1]
        lengths.append(kept.norm(dim=-1)[data.places("text")])
    assert close(one.method.target.norm(), 2 * torch.cat(lengths).mean(), 1e-4)


def test_rmu_target_follows_the_seed_alone(made: Made) -> None:
    fixed = {**RMU_PLAIN, "c_relative": False, "epochs": 0}
    case = Case("vlm/rmu", fixed, made.world)
    before = torch.get_rng_state()
    targets = [_target(run_case(case, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], targets[2])


def _target(outcome: Outcome) -> Tensor:
    assert isinstance(outcome.method, RMU)
    return outcome.method.target


def test_rmu_reaches_its_target(made: Made) -> None:
    case = Case("vlm/rmu", {**RMU_PLAIN, "epochs": 8, "alpha": 0.0, "lr": 2.0}, made.world)
    outcome = run_case(case)
    target = _target(outcome)
    raw = made.world.splits.forget.take(range(8))
    data = made.adapter.prepare(raw, Draws(0, total=1), False)
    at = data.places("answer")
    distances = []
    for net in (made.start, outcome.model.eval()):
        with torch.no_grad():
            found = made.adapter.hidden(net, data, 0)
        distances.append(float((found - target).square().mean(-1)[at].mean()))
    assert distances[1] < 0.5 * distances[0]


def test_rmu_trains_down_projections_up_to_its_layer(made: Made) -> None:
    names = [name for name, _ in made.start.named_parameters()]
    for layer, wanted in ((0, [0]), (1, [0, 1])):
        one = ready(made, "vlm/rmu", {"layer": layer})
        ends = [f"language_model.layers.{k}.mlp.down_proj.weight" for k in wanted]
        assert [name for name in names if name.endswith(tuple(ends))] == list(one.ctx.trainable)
        flags = {name: p.requires_grad for name, p in one.ctx.model.named_parameters()}
        assert {name for name, flag in flags.items() if flag} == set(one.ctx.trainable)
    assert down_projections(made.start, 1).count("down_proj") == 2


def test_rmu_says_what_it_cannot_steer(made: Made) -> None:
    with pytest.raises(ConfigError, match="layer=2: the decoder has layers 0 to 1"):
        ready(made, "vlm/rmu", {"layer": 2})
    one = ready(made, "vlm/rmu", {"scope": "head", "layer": 0})
    with pytest.raises(ConfigError, match="scope=head holds no weight that acts on layer 0"):
        one.terms("forget")
    blind = made.data([replace(item, image=None) for item in items("blind", 4, made.images)])
    unseen = replace(made.world, splits=replace(made.world.splits, forget=blind))
    with pytest.raises(ConfigError, match=r"'blind-.' has no tokens of the kind 'image'"):
        ready(replace(made, world=unseen), "vlm/rmu", {"forget_places": "image"})


def test_two_draws_of_the_direction_are_not_orthogonal() -> None:
    rng = torch.Generator().manual_seed(0)
    one, two = (control_vector(torch.rand(4096, generator=rng)) for _ in range(2))
    assert close(one.norm(), 1.0)
    assert abs(float(one @ two) - 0.75) < 0.02


# ICD.


def test_icd_climbs_the_loss_of_profiles(made: Made) -> None:
    one = ready(made, "vlm/icd", scope="all")
    assert one.terms() == {}
    extra = one.batches["profiles"]
    terms = one.method.terms(one.ctx, Part(one.batches["forget"], extra=extra))
    assert list(terms) == ["forget"]
    assert close(terms["forget"], -one.outputs("profiles").loss.sum() / extra.units.sum())
    (run,) = one.method.passes(0)
    assert (run.anchor, run.extra, run.aligned) == ("forget", "profiles", True)


# Prompt decoupling.


def test_without_weight_decoupling_is_its_inner_method(made: Made) -> None:
    alone = run_case(Case("grad_diff", PLAIN, made.world)).model
    settings = {"weight": 0.0, "inner": {"name": "grad_diff", **PLAIN}}
    check_same(run_case(Case("vlm/pd", settings, made.world)).model, alone, "weight 0")


def test_decoupled_examples_are_learnt_beside_each_forget_batch(made: Made) -> None:
    one = ready(made, "vlm/gdpd", scope="all")
    batches = one.batches
    part = Part(batches["forget"], batches["retain"], batches["decouple"])
    terms = one.method.terms(one.ctx, part)
    means = {s: one.outputs(s).loss.sum() / batches[s].units.sum() for s in batches}
    assert close(terms["forget"], -means["forget"])
    assert close(terms["retain"], 0.5 * means["retain"])
    assert close(terms["decouple"], 0.5 * means["decouple"])
    assert sorted(terms) == ["decouple", "forget", "retain"]


def test_backward_leaves_the_inner_method_its_own_way(made: Made) -> None:
    sam = {"rho": 0.5, "inner": {"name": "grad_diff"}}
    one = ready(made, "vlm/pd", {"weight": 2.0, "inner": {"name": "sam", **sam}}, scope="all")
    inner = ready(made, "sam", sam, scope="all")
    batches = one.batches
    whole = Part(batches["forget"], batches["retain"], batches["decouple"])
    logged = one.method.backward(one.ctx, [whole])
    inner.method.backward(inner.ctx, [whole._replace(extra=None)])
    assert sorted(logged) == ["decouple", "forget", "retain"]
    extra = one.method.extra_loss(one.ctx, batches["decouple"])["decouple"]
    grads = one.ctx.gradients(extra, list(one.ctx.trainable.values()))
    for (name, weight), grad in zip(one.ctx.trainable.items(), grads, strict=True):
        other = inner.ctx.trainable[name].grad
        assert weight.grad is not None and other is not None
        assert torch.allclose(weight.grad, other + grad, atol=1e-5), name


@pytest.mark.parametrize(
    ("name", "inner", "weight", "settings"),
    [
        ("vlm/gapd", "GradAscent", 0.5, {}),
        ("vlm/gdpd", "GradDiff", 0.5, {"retain_weight": 0.5}),
        ("vlm/klpd", "KLRetain", 1.0, {"retain_weight": 1.0}),
        ("vlm/idkpd", "IDK", 1.0, {"sum_of_means": False}),
    ],
)
def test_published_pairs(name: str, inner: str, weight: float, settings: dict[str, Any]) -> None:
    method: Any = make_loss_method(name, {}, "method")
    assert type(method.inner).__name__ == inner and method.config.weight == weight
    published = {"lr": 1e-4, "epochs": 10, "batch_size": 32, "scope": "lora", **settings}
    for key, value in published.items():
        assert getattr(method.training, key) == value
    changed: Any = make_loss_method(name, {"inner": {"lr": 1e-5}}, "method")
    assert changed.training.lr == 1e-5 and changed.training.epochs == 10
    other: Any = make_loss_method(name, {"inner": {"name": "simnpo"}}, "method")
    assert other.training.lr == 1e-5 and other.training.epochs == 10  # its own
    assert other.training.scope == "all"
    assert method.reads == method.inner.reads | {"decouple"}


def test_decoupled_examples_stand_beside_forget_only(made: Made) -> None:
    method = make_loss_method("vlm/pd", {"inner": {"name": "random_label"}}, "method")
    assert [run.extra for run in method.passes(0)] == ["decouple", None]
    retained = {"inner": {"name": "grad_diff", "anchor": "retain"}}
    (run,) = make_loss_method("vlm/pd", retained, "method").passes(0)
    assert run.extra == "decouple" and not run.aligned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": {"name": "random_label", "order": "union"}}, "both splits in one order"),
        ({"inner": {"name": "finetune"}}, "reads no forget set"),
        ({"inner": {"name": "vlm/icd"}}, "a batch of profiles"),
        (
            {"aligned": True, "inner": {"name": "grad_diff", "anchor": "retain"}},
            "GradDiff walks retain: set method.aligned=false",
        ),
    ],
)
def test_decoupling_says_what_it_cannot_wrap(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loss_method("vlm/pd", settings, "method").passes(0)


def test_counterparts_are_those_of_the_forget_examples(made: Made) -> None:
    few = made.data(items("decoupled", 5, made.images))
    short = replace(made.world, splits=replace(made.world.splits, streams={"decouple": few}))
    with pytest.raises(ConfigError, match="5 decoupled examples are no counterparts of 12"):
        ready(replace(made, world=short), "vlm/gapd", {"aligned": True})
    settings = {"inner": PLAIN}
    assert run_case(Case("vlm/gapd", settings, short)).ctx.steps == 3  # drawn over and over

    pairs: list[tuple[list[str], list[str]]] = []
    for aligned in (True, False):
        method = Case("vlm/gapd", {**settings, "aligned": aligned}, made.world).method()
        inner = method.backward

        def note(ctx: Context, parts: Sequence[Part], inner: Any = inner) -> Mapping[str, Tensor]:
            for part in parts:
                assert part.forget is not None and part.extra is not None
                pairs.append(
                    (
                        [item.split("-")[1] for item in part.forget.ids],
                        [item.split("-")[1] for item in part.extra.ids],
                    )
                )
            found: Mapping[str, Tensor] = inner(ctx, parts)
            return found

        method.backward = note  # type: ignore[method-assign,assignment]
        run_case(Case("vlm/gapd", settings, made.world), method)
    assert all(one == two for one, two in pairs[:3])
    assert any(one != two for one, two in pairs[3:])
    assert all(len(one) == len(two) for one, two in pairs)


# What they share.


def test_answers_are_found_among_logits_of_all_positions(made: Made) -> None:
    short, whole = (ready(each, "vlm/wga", scope="all") for each in (made, made.everywhere()))
    few, all_of = (each.outputs("forget") for each in (short, whole))
    data = whole.batches["forget"].data
    targets = data.targets
    counts = targets != IGNORED
    found = answer_logits(all_of, data)
    wanted = answer_logits(few, short.batches["forget"].data)
    assert torch.allclose(found[counts], wanted[counts], atol=1e-5)
    losses = token_losses(found, targets)
    assert torch.allclose(losses.sum(1), few.loss, atol=1e-4)
    assert (losses[~counts] == 0).all() and (~counts).any()
    labels = shifted_labels(data, all_of.pred.shape[1] - 1)
    answer = data.places("answer")[:, 1:]
    assert torch.equal(labels != IGNORED, answer)
    assert torch.equal(labels[answer], data.inputs["input_ids"][:, 1:][answer])


def test_npo_by_vocabulary_compares_every_entry(made: Made) -> None:
    settings = {"ratio": "vocabulary", "beta": 0.4, "retain_weight": 0.0}
    one = ready(made.everywhere(), "npo", settings, scope="all")
    alike = one.terms("forget")["forget"]
    assert close(alike, 2 / 0.4 * math.log(2))
    before = one.outputs("forget").pred.log_softmax(-1)
    nudge(one.ctx)
    now = one.outputs("forget").pred.log_softmax(-1)
    wanted = 2 / 0.4 * (1 + (0.4 * (now - before)).exp()).log().mean()
    assert close(one.terms("forget")["forget"], wanted, 1e-4)
    assert now.shape[1] == one.batches["forget"].data.inputs["input_ids"].shape[1]
