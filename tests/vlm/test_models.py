"""Models of every family: parts, scopes, adapters, the frozen copy, and files that others read."""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import CheckpointError, ConfigError
from mmforget.vlm import mini_model
from mmforget.vlm.chat import Chat, Item
from mmforget.vlm.models import VLM, Frozen, Lora, load, open_model, save
from tests.vlm.families import CASES, FACTS, ask, build, make, picture

QUESTIONS = ("What is the name of the person in the image?", "Which city?")
ANSWERS = ("Ada Moreno", "Lisbon, on 3 May 1984")
LORA = Lora(rank=2, alpha=4.0, dropout=0.0)
SOME = ("llava", "qwen2_5_vl", "mllama")  # a plain one, a tower with a merger, cross-attention


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def built(family: str) -> VLM:
    return VLM(*build(family), "tiny")


def fresh(family: str) -> VLM:
    return copy.deepcopy(built(family))


@lru_cache
def asked(family: str) -> dict[str, Tensor]:
    """Return inputs of two questions about images of two shapes; the second row is shorter."""
    images = [picture(0, 40, 40), picture(1, 32, 80)]
    return dict(ask(built(family).processor, images, QUESTIONS, ANSWERS))


def logits(model: VLM, family: str) -> Tensor:
    with torch.no_grad():
        return model.logits(asked(family))


def loss(model: VLM, family: str) -> Tensor:
    """Return the cross entropy of each text's last tokens."""
    inputs = asked(family)
    ends = inputs["attention_mask"].sum(1)
    places = ends[:, None] - 1 - torch.arange(5)
    found = model.logits(inputs).gather(
        1, (places - 1)[:, :, None].expand(-1, -1, model.base.lm_head.out_features)
    )
    return F.cross_entropy(found.flatten(0, 1), inputs["input_ids"].gather(1, places).flatten())


def prepare(model: VLM, scope: str, lora: Lora = LORA) -> dict[str, nn.Parameter]:
    """Make a scope trainable and all else not, as methods do."""
    trained = model.scope(scope, lora)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in trained.values()))
    return trained


def train(model: VLM, family: str, trained: Mapping[str, nn.Parameter], steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, family).backward()
        optimizer.step()


def ids(parameters: Any) -> set[int]:
    return {id(parameter) for parameter in parameters}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)


def below(model: VLM, names: tuple[str, ...]) -> set[int]:
    """Return the parameters of modules, or parameters, by their names in the plain model."""
    held = dict(model.base.named_parameters(remove_duplicate=False))
    found = [ids(v for k, v in held.items() if f"{k}.".startswith(f"{name}.")) for name in names]
    assert all(found)
    return set().union(*found)


@pytest.mark.parametrize("family", CASES)
def test_parts_are_those_of_the_family(family: str) -> None:
    model, facts = built(family), FACTS[family]
    parts = model.parts()
    projector = below(model, facts.projector)
    assert ids(parts["projector"].values()) == projector
    assert ids(parts["vision"].values()) == below(model, (facts.vision,)) - projector
    assert ids(parts["language"].values()) == below(model, (facts.language,))
    assert ids(parts["head"].values()) == {id(model.base.lm_head.weight)}
    assert model.decoder is model.base.get_submodule(facts.language)
    assert len(model.layers) == model.base.config.get_text_config().num_hidden_layers
    # Tied heads aside, every parameter is in one part.
    tied = model.base.lm_head.weight is model.base.get_input_embeddings().weight
    count = sum(len(part) for part in parts.values()) - tied
    assert count == len(list(model.parameters()))
    assert set().union(*parts.values()) == {name for name, _ in model.named_parameters()}
    held = dict(model.named_parameters())
    assert all(held[name] is p for part in parts.values() for name, p in part.items())


@pytest.mark.parametrize("family", CASES)
def test_scopes_are_made_of_parts(family: str) -> None:
    model = built(family)
    parts = model.parts()
    for name in ("vision", "projector", "language", "head"):
        assert model.scope(name, LORA) == parts[name]
    everything = model.scope("all", LORA)
    assert ids(everything.values()) == ids(model.parameters()) - ids(parts["vision"].values())
    place = FACTS[family].language
    chosen = model.scope(rf"{place}\.layers\.1\..*norm", LORA)
    assert chosen and all(f"{place}.layers.1." in name and "norm" in name for name in chosen)


@pytest.mark.parametrize("family", SOME)
def test_a_regex_into_the_tower_and_one_that_matches_nothing(family: str) -> None:
    model = built(family)
    with pytest.raises(ConfigError, match=r"would train \d+ tensors of the vision tower.*frozen"):
        model.scope(r"layers\.0|blocks\.0", LORA)
    with pytest.raises(ConfigError, match="matches no parameter; accepted are all, lora"):
        model.scope("vision_towel", LORA)
    with pytest.raises(ConfigError, match="is no regex"):
        model.scope("(", LORA)


@dataclass
class Trained:
    """A model with adapters after two steps, and what was there before."""

    family: str
    start: VLM
    model: VLM
    before: dict[str, Tensor]
    attached: Tensor
    trained: dict[str, nn.Parameter]
    frozen: Frozen
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family: str = request.param
    folder = make(family, tmp_path_factory.mktemp(family))
    start = open_model(str(folder))
    model = copy.deepcopy(start)
    chosen = prepare(model, "lora")
    attached, before = logits(model, family), values(model)
    frozen = Frozen(model, chosen)
    train(model, family, chosen)
    model.eval()
    return Trained(family, start, model, before, attached, chosen, frozen, folder)


def test_adapters_change_nothing_until_they_are_trained(trained: Trained) -> None:
    start = logits(trained.start, trained.family)
    assert torch.equal(trained.attached, start)
    assert (logits(trained.model, trained.family) - start).abs().max() > 0.05


def test_adapters_lie_on_the_decoder_and_the_projector_is_whole(trained: Trained) -> None:
    model, facts = trained.model, FACTS[trained.family]
    adapters = {name for name in trained.trained if "lora_" in name}
    linears = [
        name
        for name, module in trained.start.decoder.named_modules()
        if isinstance(module, nn.Linear) and ".experts" not in name and not name.endswith(".gate")
    ]
    places = {f"net.base_model.model.{facts.language}.{name}" for name in linears}
    assert adapters == {f"{p}.lora_{side}.default.weight" for p in places for side in "AB"}
    copied = [p for name, p in trained.trained.items() if name not in adapters]
    whole = trained.start.parts()["projector"]
    names = {name for name in whole if "image_newline" not in name}  # of no module
    assert sorted(p.shape for p in copied) == sorted(whole[name].shape for name in names)
    parts = model.parts()
    assert adapters < parts["language"].keys()
    assert trained.trained.keys() - adapters < parts["projector"].keys()
    assert len(parts["vision"]) == len(trained.start.parts()["vision"])


def test_training_changes_adapters_and_projector_alone(trained: Trained) -> None:
    now = values(trained.model)
    changed = {f"{name}" for name in now if not torch.equal(now[name], trained.before[name])}
    assert changed == trained.trained.keys()
    parts = trained.model.parts()
    assert all(p.grad is None for p in parts["vision"].values())
    held = {name for name, p in trained.model.named_parameters() if p.grad is not None}
    assert held == trained.trained.keys()


def test_frozen_is_the_start_and_copies_nothing(trained: Trained) -> None:
    assert trained.frozen._kept is None
    assert not list(trained.frozen.parameters()) and not list(trained.frozen.buffers())
    mine = logits(trained.model, trained.family)
    trained.model.train()
    with trained.frozen.as_was() as before:
        assert not before.training
        assert torch.equal(before.logits(asked(trained.family)), trained.attached)
    assert trained.model.training
    trained.model.eval()
    assert torch.equal(logits(trained.model, trained.family), mine)
    wanted = {name for name, p in trained.model.named_parameters() if p.requires_grad}
    assert wanted == trained.trained.keys()


def test_a_second_attach_and_merge_keep_the_outputs(trained: Trained) -> None:
    mine = logits(trained.model, trained.family)
    model = copy.deepcopy(trained.model)
    chosen = model.attach(Lora(rank=3, alpha=1.0, dropout=0.0))
    assert torch.allclose(logits(model, trained.family), mine, atol=1e-4)
    assert {p.shape[0] for name, p in chosen.items() if "lora_A" in name} == {3}
    model.merge()
    model.merge()  # nothing left to do
    assert torch.allclose(logits(model, trained.family), mine, atol=1e-4)
    names = dict(trained.start.named_parameters())
    assert dict(model.named_parameters()).keys() == names.keys()
    vision = trained.start.parts()["vision"]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in vision.items())
    assert torch.equal(logits(trained.model, trained.family), mine)  # a copy was merged


def test_a_copy_is_independent(trained: Trained) -> None:
    mine = logits(trained.model, trained.family)
    twin = copy.deepcopy(trained.model)
    assert torch.equal(logits(twin, trained.family), mine)
    assert not ids(twin.parameters()) & ids(trained.model.parameters())
    assert twin.processor is trained.model.processor
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(trained.model, trained.family), mine)


def test_adapters_are_read_back_here_and_by_peft(trained: Trained, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    mine, start = logits(trained.model, trained.family), logits(trained.start, trained.family)
    save(trained.model, tmp_path / "made")
    files = {file.name for file in (tmp_path / "made").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    read = load(tmp_path / "made", trained.start)
    assert not read.training and torch.equal(logits(read, trained.family), mine)
    assert torch.equal(logits(trained.start, trained.family), start)
    plain = AutoModelForImageTextToText.from_pretrained(trained.folder)
    peft = PeftModel.from_pretrained(plain, str(tmp_path / "made")).eval()
    with torch.no_grad():
        assert torch.equal(peft(**asked(trained.family)).logits, mine)


def test_a_whole_model_is_read_back_here_and_by_transformers(
    trained: Trained, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, start = copy.deepcopy(trained.model), logits(trained.start, trained.family)
    model.merge()
    mine = logits(model, trained.family)
    save(model, tmp_path)
    assert torch.equal(logits(load(tmp_path, trained.start), trained.family), mine)
    assert torch.equal(logits(trained.start, trained.family), start)
    again = open_model(str(tmp_path))
    assert torch.equal(logits(again, trained.family), mine)
    assert again.processor.chat_template == trained.start.processor.chat_template
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = ask(AutoProcessor.from_pretrained(tmp_path), picture(0), QUESTIONS[0], ANSWERS[0])
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, model.logits(inputs))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_one_layer_and_one_kind_of_module(family: str) -> None:
    model = fresh(family)
    lora = Lora(2, 4.0, 0.0, targets="down_proj", layers=[1], projector=False)
    chosen = model.attach(lora)
    place = f"net.base_model.model.{FACTS[family].language}.layers.1.mlp.down_proj"
    assert list(chosen) == [f"{place}.lora_A.default.weight", f"{place}.lora_B.default.weight"]
    assert [tuple(p.shape) for p in chosen.values()] == [(2, 64), (32, 2)]


def test_layers_are_numbers_not_their_digits() -> None:
    model = VLM(mini_model.make_net(40, 0, dim=32, layers=12, heads=2, tower=32), None, "tiny")
    chosen = model.attach(Lora(2, 4.0, 0.0, layers=[1], projector=False))
    assert chosen and all(".layers.1." in name for name in chosen)


def test_the_update_is_alpha_over_rank_times_ba() -> None:
    model, start = fresh("llava"), built("llava")
    lora = Lora(rank=4, alpha=6.0, dropout=0.0, targets="q_proj", layers=[0], projector=False)
    below, above = model.attach(lora).values()
    with torch.no_grad():
        above.normal_()
    update = 6.0 / 4 * above.detach() @ below.detach()
    model.merge()
    was, now = (each.layers[0].self_attn.q_proj.weight for each in (start, model))
    assert torch.allclose(now - was, update, atol=1e-5) and update.abs().max() > 0.1
    rest = model.state_dict()
    key = "net.model.language_model.layers.0.self_attn.q_proj.weight"
    del rest[key]
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in rest.items())


def test_adapters_begin_alike_and_draw_from_no_global_stream() -> None:
    one, two = fresh("llava"), fresh("llava")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = one.attach(LORA)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = two.attach(LORA)
    assert same({**first}, {**second})
    assert all(p.any() for name, p in first.items() if "lora_A" in name)


def test_dropout_acts_in_training_alone() -> None:
    model = fresh("llava")
    chosen = model.attach(Lora(2, 4.0, 0.5))
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.normal_(0, 0.1)
    assert torch.equal(logits(model, "llava"), logits(model, "llava"))
    model.train()
    assert not torch.equal(logits(model, "llava"), logits(model, "llava"))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    model = fresh("llava").train(training)
    model.attach(LORA)
    assert all(module.training == training for module in model.modules())
    model.base.lm_head.train(not training)  # one module held apart
    twin = copy.deepcopy(model)
    assert twin.base.lm_head.training == (not training) and twin.training == training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": "out_proj"}, r"'out_proj' names no module of model\.language_model .*q_proj"),
        ({"targets": "q_proj", "layers": [0, 2]}, "the decoder has layers 0 to 1"),
        ({"layers": [-1]}, "the decoder has layers 0 to 1"),
        ({"targets": "("}, "is no regex"),
        ({"experts": True, "dropout": 0.05}, "needs lora.dropout=0"),
        ({"experts": True}, "has no stacked experts"),
    ],
)
def test_adapters_that_cannot_be(change: dict[str, Any], message: str) -> None:
    model = fresh("llava")
    start = values(model)
    with pytest.raises(ConfigError, match=message):
        model.attach(Lora(**{"rank": 2, "alpha": 4.0, "dropout": 0.0, **change}))
    assert same(values(model), start)


def test_targets_reach_no_tower_that_names_its_modules_alike() -> None:
    model = fresh("llava")
    assert any("q_proj" in name for name in model.parts()["vision"])
    chosen = model.attach(Lora(2, 4.0, 0.0, targets=r"\w+_proj", projector=False))
    assert chosen and all(".language_model.layers." in name for name in chosen)


@pytest.mark.parametrize("layers", [[], [1]])
def test_experts_are_trained(layers: list[int], tmp_path: Path) -> None:
    family = "qwen3_vl_moe"
    model, start = fresh(family), built(family)
    lora = Lora(2, 4.0, 0.0, layers=layers, experts=True)
    chosen = prepare(model, "lora", lora)
    assert torch.equal(logits(model, family), logits(start, family))
    frozen = Frozen(model, chosen)
    train(model, family, chosen)
    model.eval()
    assert frozen._kept is None
    with frozen.as_was() as before:
        assert torch.equal(before.logits(asked(family)), logits(start, family))
    mine = logits(model, family)
    save(model, tmp_path)
    assert torch.equal(logits(load(tmp_path, start), family), mine)
    model.merge()
    assert torch.allclose(logits(model, family), mine, atol=1e-4)
    now = dict(model.named_parameters())
    moved = {name for name, p in start.named_parameters() if not torch.equal(now[name], p)}
    stacked = {name for name in moved if ".mlp.experts." in name}
    assert stacked == {
        f"net.model.language_model.layers.{layer}.mlp.experts.{name}"
        for layer in (layers or [0, 1])
        for name in ("gate_up_proj", "down_proj")
    }
    assert not {name for name in moved if ".mlp.gate." in name}  # the router


def test_any_other_scope_merges_adapters_first(tmp_path: Path) -> None:
    model = fresh("llava")
    train(model, "llava", prepare(model, "lora"))
    model.eval()
    mine = logits(model, "llava")
    chosen = prepare(model, "all")
    assert not isinstance(model.net, PeftModel)
    assert chosen.keys() == built("llava").scope("all", LORA).keys()
    assert torch.allclose(logits(model, "llava"), mine, atol=1e-4)
    train(model, "llava", chosen)
    model.eval()
    save(model, tmp_path)  # all that was trained is in the files
    assert torch.equal(logits(load(tmp_path, built("llava")), "llava"), logits(model, "llava"))


@pytest.mark.parametrize("scope", ["all", "head", "projector", "lora"])
@pytest.mark.parametrize("family", SOME)
def test_frozen_computes_the_start_between_forward_and_backward(family: str, scope: str) -> None:
    model = fresh(family)
    if scope == "lora":  # adapters that are not fresh: switching them off would go too far back
        train(model, family, prepare(model, "lora"), steps=1)
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    else:
        chosen = prepare(model, scope)
    model.eval()
    model.base.lm_head.train()  # one module held apart
    frozen, teacher = Frozen(model, chosen), copy.deepcopy(model)
    assert sum(kept.numel() for kept in frozen._kept or []) == sum(
        p.numel() for p in chosen.values()
    )
    wanted = logits(teacher, family)
    train(model, family, chosen, steps=1)
    model.eval()
    model.base.lm_head.train()
    mine = logits(model, family)
    assert not torch.equal(mine, wanted)

    def gradients(other: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        student = model.logits(asked(family))
        distance = (student - other()).square().mean()
        distance.backward()
        return [p.grad.clone() for p in chosen.values() if p.grad is not None]

    def ours() -> Tensor:
        with frozen.as_was() as before:
            assert not before.base.lm_head.training
            found = before.logits(asked(family))
        assert not found.requires_grad and torch.equal(found, wanted)
        return found

    places = [p.data_ptr() for p in chosen.values()]
    found, plain = gradients(ours), gradients(lambda: wanted)
    assert len(found) == len(plain) == len(chosen)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert [p.data_ptr() for p in chosen.values()] == places
    assert model.base.lm_head.training and not model.training
    assert torch.equal(logits(model, family), mine)


def test_frozen_puts_the_model_back_after_an_error() -> None:
    for scope in ("lora", "head"):
        model = fresh("llava").train()
        chosen = prepare(model, scope)
        frozen = Frozen(model, chosen)
        with torch.no_grad():
            for parameter in chosen.values():
                parameter.add_(0.1)
        mine = logits(model, "llava")
        with pytest.raises(ZeroDivisionError), frozen.as_was():
            raise ZeroDivisionError
        assert model.training and torch.equal(logits(model, "llava"), mine)
        assert not torch.equal(logits(model, "llava"), logits(built("llava"), "llava"))


def test_switching_adapters_off_keeps_what_is_trainable() -> None:
    model = fresh("llava")
    chosen = prepare(model, "lora")
    names = [name for name in chosen if "lora_A" in name]
    for name in names:
        chosen[name].requires_grad_(False)
    frozen = Frozen(model, {name: p for name, p in chosen.items() if name not in names})
    with frozen.as_was():
        pass
    held = {name for name, p in model.named_parameters() if p.requires_grad}
    assert held == chosen.keys() - set(names)


def test_adapters_are_fresh_only_while_nothing_was_trained() -> None:
    model = fresh("llava")
    assert not model.fresh_adapters(dict(model.named_parameters()))
    chosen = model.attach(LORA)
    assert model.fresh_adapters(chosen)
    assert not model.fresh_adapters(dict(model.named_parameters()))  # weights under them too
    projector = next(p for name, p in chosen.items() if "modules_to_save" in name)
    was = projector.detach().clone()
    projector.data.add_(1.0)
    assert not model.fresh_adapters(chosen)
    projector.data.copy_(was)
    assert model.fresh_adapters(chosen)
    next(p for name, p in chosen.items() if "lora_B" in name).data.add_(1.0)
    assert not model.fresh_adapters(chosen)


@pytest.mark.parametrize("family", CASES)
def test_hidden_states_are_those_of_a_whole_pass(family: str) -> None:
    model, inputs = built(family), asked(family)
    with torch.no_grad():
        wanted = model.net(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    ran: list[int] = []
    last = len(model.layers) - 1
    handles = [
        layer.register_forward_pre_hook(lambda m, args, k=k: ran.append(k))
        for k, layer in enumerate(model.layers)
    ]
    for layer in range(last + 1):
        ran.clear()
        with torch.no_grad():
            found = model.hidden(inputs, layer)
        assert ran == list(range(layer + 1))
        if layer == last:  # the list ends with normed states
            found = model.decoder.norm(found)
        assert torch.equal(found, wanted[layer + 1])
    for handle in handles:
        handle.remove()
    for layer in (-1, last + 1):
        with pytest.raises(ConfigError, match=rf"layer {layer}: .* 0 to {last}"):
            model.hidden(inputs, layer)


def test_a_skipped_layer_passes_on_what_it_was_given() -> None:
    model = built("mllama")  # its layer 1 is of cross-attention: none without an image
    text = ask(model.processor, None, QUESTIONS[0], ANSWERS[0])
    with torch.no_grad():
        assert torch.equal(model.hidden(text, 1), model.hidden(text, 0))


@pytest.mark.parametrize("family", CASES)
def test_logits_of_the_last_positions(family: str) -> None:
    model, inputs = built(family), asked(family)
    whole = logits(model, family)
    assert whole.shape[:2] == inputs["input_ids"].shape
    few = model.logits(inputs, 4)
    assert few.shape[1] == 4 and torch.allclose(few, whole[:, -4:], atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_checkpointing_gives_the_same_gradients(family: str) -> None:
    def gradients(model: VLM, layer: int | None) -> tuple[list[Tensor], int]:
        ran: list[int] = []
        handle = model.layers[0].input_layernorm.register_forward_hook(lambda *_: ran.append(1))
        model.zero_grad()
        value = loss(model, family)
        if layer is not None:
            value = model.hidden(asked(family), layer).square().mean()
        value.backward()
        handle.remove()
        return [p.grad for p in chosen.values() if p.grad is not None], sum(ran)

    for scope in ("all", "lora"):
        plain = fresh(family).train()
        saving = fresh(family).train()
        saving.base.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in (None, 0, 1):
            kept = []
            for model in (plain, saving):
                chosen = prepare(model, scope)
                kept.append(gradients(model, layer))
            (wanted, once), (found, again) = kept
            assert len(found) == len(wanted) > 0
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert again == once + 1  # it is computed anew for the backward pass


@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe"])
def test_half_precision(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / "start")
    start = open_model(str(folder), torch.bfloat16)
    assert {p.dtype for p in start.parameters()} == {torch.bfloat16}
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in asked(family).items()
    }
    asked_half = start.logits(inputs).detach()
    assert asked_half.dtype == torch.float32 and asked_half.isfinite().all()
    model = copy.deepcopy(start)
    chosen = prepare(model, "lora")
    assert {p.dtype for name, p in chosen.items() if "lora_" in name} == {torch.float32}
    assert torch.equal(model.logits(inputs), asked_half)
    frozen = Frozen(model, chosen)
    optimizer = torch.optim.SGD(chosen.values(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.logits(inputs, 4).logsumexp(-1).sum().backward()
        optimizer.step()
    mine = model.logits(inputs).detach()
    assert mine.isfinite().all() and not torch.equal(mine, asked_half)
    with frozen.as_was() as before:
        assert torch.equal(before.logits(inputs), asked_half)
    save(model, tmp_path / "made")
    assert torch.equal(load(tmp_path / "made", start).logits(inputs), mine)


def test_saving_asks_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from peft.utils import save_and_load

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", never)
    monkeypatch.setattr(huggingface_hub, "file_exists", never)
    model = fresh("llava")
    model.base.name_or_path = model.base.config._name_or_path = "someone/something"
    model.attach(LORA)
    save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of adapters of the tiny LLaVA, none of its tensors zero."""
    model = fresh("llava")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.attach(LORA).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    folder = tmp_path_factory.mktemp("adapters")
    save(model, folder)
    return folder


def changed(
    adapters: Path,
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    **config: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    held = tensors(load_file(adapters / "adapter_model.safetensors"))
    save_file(held, folder / "adapter_model.safetensors")
    said = json.loads((adapters / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return folder


Q = "layers.0.self_attn.q_proj.lora_B"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any], str]] = {
    "renamed": (
        lambda t: {k.replace("language_model", "text_model"): v for k, v in t.items()},
        {},
        r"28 of its 32 tensors find no place \(.*text_model.*renamed\?",
    ),
    "renamed projector": (
        lambda t: {k.replace("multi_modal_projector", "mm"): v for k, v in t.items()},
        {},
        r"lacks '.*multi_modal_projector\.linear_1\.weight'",
    ),
    "one missing": (
        lambda t: {k: v for k, v in t.items() if Q not in k},
        {},
        rf"1 that its config asks for are missing, such as .*{Q}",
    ),
    "no projector": (
        lambda t: {k: v for k, v in t.items() if "lora" in k},
        {},
        r"lacks '.*multi_modal_projector",
    ),
    "one more": (
        lambda t: {**t, "base_model.model.else": torch.ones(1)},
        {},
        r"1 of its 33 tensors find no place \(base_model\.model\.else\)",
    ),
    "another rank": (dict, {"r": 4}, "does not fit the model: .*size mismatch for .*lora_A"),
    "other modules": (dict, {"target_modules": ["fc9"]}, "does not fit the model: .*target"),
    "no number": (dict, {"lora_alpha": "x"}, "does not fit the model"),
    "another kind": (
        dict,
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
        "kind PROMPT_TUNING; accepted is LORA",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_adapters_that_do_not_fit(case: str, adapters: Path, tmp_path: Path) -> None:
    tensors, config, message = TENSORS[case]
    start = built("llava")
    before, names = values(start), [name for name, _ in start.named_modules()]
    with pytest.raises(CheckpointError, match=message):
        load(changed(adapters, tmp_path, tensors, **config), start)
    assert same(values(start), before) and [n for n, _ in start.named_modules()] == names
    assert not isinstance(start.net, PeftModel)


def test_damaged_files_of_adapters(adapters: Path, tmp_path: Path) -> None:
    folder = changed(adapters, tmp_path)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, said = file.read_bytes(), config.read_text()
    for content in (whole[:-8], whole[:20], b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="holds no adapter that peft reads"):
            load(folder, built("llava"))
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        load(folder, built("llava"))
    file.write_bytes(whole)
    for text in ("{", "[]", said.replace("LORA", "NO_SUCH")):
        config.write_text(text)
        with pytest.raises(CheckpointError, match="holds no adapter that peft reads"):
            load(folder, built("llava"))


def test_adapters_that_change_nothing_are_warned_of(
    adapters: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(adapters, built("llava"))
        assert not [r for r in caplog.records if r.name == "mmforget.vlm.models"]
        folder = changed(
            adapters,
            tmp_path,
            lambda t: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()},
        )
        load(folder, built("llava"))
    (said,) = [r.getMessage() for r in caplog.records if r.name == "mmforget.vlm.models"]
    assert "all B are zero" in said and str(tmp_path) in said


def test_adapters_are_read_onto_the_plain_original(adapters: Path) -> None:
    wanted = logits(load(adapters, built("llava")), "llava")
    start = fresh("llava")
    start.attach(LORA)  # fresh ones: merged, they change nothing
    assert torch.equal(logits(load(adapters, start), "llava"), wanted)
    assert isinstance(start.net, PeftModel)


def resaved(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return edit


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


NORM = "language_model.norm.weight"
STORED = "language_model.model.norm.weight"  # its name in files of LLaVA
FOLDERS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "missing": (
        resaved(lambda t: {k: v for k, v in t.items() if k != STORED}),
        f"is no whole model: 1 tensors are missing, such as model.{NORM}",
        f"1 tensors are missing, such as model.{NORM}",
    ),
    "left over": (
        resaved(lambda t: {**t, "model.else": torch.ones(1)}),
        r"1 tensors find no place in it, such as model\.else",
        None,  # opened: checkpoints on the hub hold buffers that models no longer have
    ),
    "another shape": (resaved(lambda t: {**t, STORED: torch.ones(3)}), "is not opened", "mismatch"),
    "truncated": (cut, "is not opened", "is not opened"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named", "no file named"),
    "no json": (lambda f: (f / "config.json").write_text("{") and None, "JSON", "JSON"),
    "another kind": (
        lambda f: (f / "config.json").write_text('{"model_type": "no_such"}') and None,
        "is not opened",
        "not opened as a vision-language model",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_do_not_fit(case: str, tmp_path: Path) -> None:
    edit, loading, opening = FOLDERS[case]
    start = built("llava")
    before = values(start)
    edit(make("llava", tmp_path, seed=1))
    with pytest.raises(CheckpointError, match=loading):
        load(tmp_path, start)
    assert same(values(start), before)
    if opening is None:
        open_model(str(tmp_path))
    else:
        with pytest.raises(CheckpointError, match=opening):
            open_model(str(tmp_path))


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a Qwen2_5_VL\w+, the original is a Llava"):
        load(make("qwen2_5_vl", tmp_path / "other"), built("llava"))
    folder = tmp_path / "larger"
    mini_model.make_net(40, 0, dim=32, layers=1, heads=2, tower=32).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"\d+ tensors differ in name or shape, such as"):
        load(folder, built("llava"))


def test_a_file_of_named_tensors(tmp_path: Path) -> None:
    other, start = VLM(*build("llava", seed=1), "other"), built("llava")
    before = values(start)
    held = {name: value.clone() for name, value in other.base.state_dict().items()}
    save_file(held, tmp_path / "made.safetensors")
    torch.save({"state_dict": held}, tmp_path / "made.pt")
    wanted = logits(other, "llava")
    adapted = fresh("llava")
    adapted.attach(LORA)
    for onto in (start, adapted):
        for name in ("made.safetensors", "made.pt"):
            assert torch.equal(logits(load(tmp_path / name, onto), "llava"), wanted)
    del held[f"model.{NORM}"]
    save_file(held, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=NORM):
        load(tmp_path / "less.safetensors", start)
    for path in (tmp_path / "none", tmp_path / "none" / "model.safetensors"):
        with pytest.raises(CheckpointError, match="no such file"):
            load(path, start)
    assert same(values(start), before)


def test_a_file_stands_for_its_folder(adapters: Path, tmp_path: Path) -> None:
    make("llava", tmp_path, seed=1)
    for folder in (tmp_path, adapters):
        wanted = logits(load(folder, built("llava")), "llava")
        assert not torch.equal(wanted, logits(built("llava"), "llava"))
        found = load(folder / "model.safetensors", built("llava"))  # there or not
        assert torch.equal(logits(found, "llava"), wanted)


def test_attention_and_place_are_kept(tmp_path: Path) -> None:
    folder = make("llava", tmp_path / "made")
    model = open_model(str(folder), attention="eager")
    assert model.source == str(folder)
    save(model, tmp_path / "again")
    for read in (model, copy.deepcopy(model), load(tmp_path / "again", model)):
        assert read.base.config.get_text_config()._attn_implementation == "eager"


def test_templates(tmp_path: Path) -> None:
    folder = make("llava", tmp_path / "made")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"no chat template; .*model\.template=FILE\.jinja"):
        open_model(str(folder))
    with pytest.raises(ConfigError, match=r"model\.template=.*no such file"):
        open_model(str(folder), template=str(tmp_path / "none.jinja"))
    (tmp_path / "mine.jinja").write_text(text.replace("USER: ", "HUMAN: "))
    model = open_model(str(folder), template=str(tmp_path / "mine.jinja"))
    made = Chat(model).encode(Item("", None, QUESTIONS[0], ANSWERS[0]))
    said = model.processor.tokenizer.decode(made.ids)
    assert said == f"<s>HUMAN: {QUESTIONS[0]} ASSISTANT: {ANSWERS[0]}</s>"
    save(model, tmp_path / "again")
    assert "HUMAN: " in open_model(str(tmp_path / "again")).processor.chat_template


def test_what_is_no_folder_and_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"not opened as a vision-language model.*hub id"):
        open_model(str(tmp_path / "none"))
    folder = make("llava", tmp_path / "made")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_model("~/made").source == "~/made"
    for name in ("processor_config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match="not opened as a vision-language model"):
            open_model(str(folder))
        (folder / name).write_bytes(content)


def test_models_without_a_tower_or_a_decoder_of_their_own() -> None:
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    part = {**small, "num_hidden_layers": 1, "vocab_size": 8}
    text = LlamaForCausalLM(LlamaConfig(**part))
    with pytest.raises(ConfigError, match="LlamaForCausalLM keeps its vision tower elsewhere"):
        VLM(text, None, "")
    clip = CLIPModel(CLIPConfig(text_config=part, vision_config={**part, "image_size": 32}))
    del clip.text_model
    with pytest.raises(ConfigError, match="CLIPModel has no decoder apart from its vision tower"):
        VLM(clip, None, "")


def test_the_mini_model(tmp_path: Path) -> None:
    texts = ["What is the name?", "The name is Ada Moreno.", "Where?", "In Lisbon."]
    mini_model.train_tokenizer(texts).save(str(tmp_path / "words.json"))
    words = mini_model.read_tokenizer(tmp_path / "words.json")
    mini_model.write_folder(tmp_path / "made", mini_model.make_net(len(words), 3), words)
    model = open_model(str(tmp_path / "made"))
    chat = Chat(model)
    picture(0, 64, 64).save(tmp_path / "a.png")
    made = chat.encode(Item("", tmp_path / "a.png", texts[0], texts[1]))
    patches = "<image>" * (mini_model.SIDE // mini_model.PATCH) ** 2
    assert words.decode(made.ids) == f"<s><user>{patches}{texts[0]}<assistant>{texts[1]}</s>"
    assert words.decode(made.ids[made.start :]) == f"{texts[1]}</s>"
    assert [words.convert_tokens_to_ids(token) for token in mini_model.SPECIAL] == list(range(6))
    assert model.window == mini_model.WINDOW and len(words) < mini_model.VOCABULARY
    found = model.logits(chat.collate([made], "cpu"))
    assert found.isfinite().all() and found.shape[-1] == len(words)
    drawn = [mini_model.make_net(len(words), seed).state_dict() for seed in (3, 3, 4)]
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])
    assert same(drawn[0], model.base.state_dict())
