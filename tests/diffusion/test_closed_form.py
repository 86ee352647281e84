import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.diffusion import features
from mmforget.diffusion.attention import recorded
from mmforget.diffusion.attention_losses import joint_norm, on_grid, summed_norms
from mmforget.diffusion.closed_form import (
    READERS,
    Inverse,
    Ridge,
    Rows,
    Site,
    projected,
    sites,
    write,
)
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.methods import mace, rece, uce
from mmforget.diffusion.methods.mace import MACE, MACEConfig
from mmforget.diffusion.methods.rece import RECE, RECEConfig
from mmforget.diffusion.methods.uce import UCE, UCEConfig
from mmforget.diffusion.models import DiffusionModel, from_pipe
from mmforget.errors import ConfigError
from mmforget.types import UnlearningMethod
from tests.diffusion import world

FAMILIES = ("sd", "sdxl", "sd3", "flux")


def draw(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def solution(
    weight: Tensor, keys: Tensor, values: Tensor, kept: Tensor, scales: tuple[float, float, float]
) -> Tensor:
    """The published formula, by an explicit inverse."""
    erase, preserve, lamb = scales
    left = lamb * weight + erase * values.T @ keys + preserve * weight @ kept.T @ kept
    right = lamb * torch.eye(keys.shape[1], dtype=torch.float64)
    right = right + erase * keys.T @ keys + preserve * kept.T @ kept
    return left @ torch.linalg.inv(right)


# The solver


@pytest.mark.parametrize(("edited", "kept"), [(3, 2), (3, 0), (3, 20), (11, 4), (20, 1)])
def test_all_paths_give_the_published_formula(edited: int, kept: int) -> None:
    keys, guides, held = draw(edited, 9), draw(edited, 9, seed=1), draw(kept, 9, seed=2)
    weights = [draw(5, 9, seed=3), draw(7, 9, seed=4)]
    wanted = [solution(w, keys, guides @ w.T, held, (0.7, 1.3, 0.4)) for w in weights]
    ridge = Ridge(keys, 0.7, 0.4)
    for part in held.split(3):
        ridge.hold(part, 1.3)
    rows = ridge.rows()
    write(weights, rows, guides - keys)
    for found, expected in zip(weights, wanted, strict=True):
        torch.testing.assert_close(found, expected)
    matrix = 0.4 * torch.eye(9) + 0.7 * keys.T @ keys + 1.3 * held.T @ held
    torch.testing.assert_close(ridge.right(guides), guides @ torch.linalg.inv(matrix.double()))
    ridge.hold_gram(torch.eye(9))  # after a solve too
    torch.testing.assert_close(
        ridge.rows(), 0.7 * keys @ torch.linalg.inv(matrix + torch.eye(9)).double()
    )


@pytest.mark.parametrize("lamb", [1e-9, 0.0])
def test_without_regularisation_the_key_gets_the_guides_output(lamb: float) -> None:
    keys, guides, weight = draw(3, 40), draw(3, 40, seed=1), draw(6, 40, seed=2)
    old = weight.clone()
    write([weight], Ridge(keys, 1.0, lamb).rows(), guides - keys)
    torch.testing.assert_close(keys @ weight.T, guides @ old.T)
    away = draw(1, 40, seed=3)
    away = away - away @ torch.linalg.pinv(keys) @ keys
    torch.testing.assert_close(away @ weight.T, away @ old.T)


def test_orthogonal_texts_keep_their_outputs() -> None:
    basis = torch.linalg.qr(draw(8, 8)).Q
    keys, held, weight = basis[:2] * 5, basis[2:4] * 3, draw(4, 8, seed=1)
    old = weight.clone()
    ridge = Ridge(keys, 1.0, 0.1)
    ridge.hold(held, 1.0)
    write([weight], ridge.rows(), draw(2, 8, seed=2) - keys)
    assert (weight - old).abs().max() > 0.1
    torch.testing.assert_close(held @ weight.T, held @ old.T)


def test_a_singular_system_takes_the_smallest_change() -> None:
    keys = draw(2, 6)[[0, 1, 1]]
    guides = draw(2, 6, seed=1)[[0, 1, 1]]
    weight = draw(3, 6, seed=2)
    old = weight.clone()
    write([weight], Ridge(keys, 1.0, 0.0).rows(), guides - keys)
    torch.testing.assert_close(keys @ weight.T, guides @ old.T)
    assert not Inverse(torch.zeros(4, 4, dtype=torch.float64), 0.0).solve(draw(4, 2)).any()


@pytest.mark.parametrize("rows", [3, 12])
def test_scale_zero_changes_no_bit(rows: int) -> None:
    weight = draw(4, 7).float()
    old = weight.clone()
    keys = draw(rows, 7, seed=1)
    write([weight], Ridge(keys, 0.0, 0.5).rows(), draw(rows, 7, seed=2))
    assert torch.equal(weight, old)


def test_projection_is_joint_over_a_texts_rows() -> None:
    weight, keys, guides = draw(5, 4), draw(5, 4, seed=1), draw(5, 4, seed=2)
    keys[4] = 0  # a text without an output has nothing to project on
    shifts = projected(weight, keys, guides, torch.tensor([0, 0, 0, 1, 2]))
    found = (keys + shifts) @ weight.T
    for part in (slice(0, 3), slice(3, 4)):
        old, new = keys[part] @ weight.T, guides[part] @ weight.T
        unit = old / old.norm()
        torch.testing.assert_close(found[part], new - (unit * new).sum() * unit)
    torch.testing.assert_close(found[4], weight @ guides[4])


def test_rows_align_from_the_last_real_token() -> None:
    found = {"a": torch.arange(20).reshape(10, 2), "b": torch.arange(100, 120).reshape(10, 2)}
    rows = Rows(found, {"a": (2, 7), "b": (4, 6)}, ((0, 6), (6, 10)))
    a, b = rows.aligned(["a", "b"])
    assert (a[:, 0] // 2).tolist() == [2, 3, 7, 8, 9]
    assert ((b[:, 0] - 100) // 2).tolist() == [4, 5, 6, 7, 8]


# What the layers read


def reading(model: DiffusionModel, texts: list[str], scope: str) -> Any:
    pattern = READERS[model.denoiser_name]
    weights = world.context(model, UCE(UCEConfig())).scope(pattern)
    return sites(model, weights, texts, scope)


def test_last_real_token_and_the_begin_mark_of_the_empty_text() -> None:
    for family in ("sd", "sdxl"):
        model = world.model(family)
        (site,) = reading(model, ["", "a dog", "monet"], "last_token")
        embeds = model.encode(["", "a dog", "monet"]).embeds.double()
        for row, (text, place) in enumerate({"": 0, "a dog": 2, "monet": 1}.items()):
            assert torch.equal(site.rows.found[text], embeds[row, place : place + 1])
        layers = sum(n.endswith("attn2") for n, _ in model.denoiser.named_modules())
        assert len(site.weights) == 2 * layers
        (site,) = reading(model, ["", "a dog"], "sequence")
        assert torch.equal(site.rows.whole("a dog"), embeds[1])
        assert [len(rows) for rows in site.rows.aligned(["", "a dog"])] == [14, 14]


def test_transformers_read_a_sequence_and_a_pooled_text() -> None:
    model = world.model("flux")
    sequence, pooled = reading(model, ["", "a dog"], "last_token")
    made = model.encode(["", "a dog"])
    assert torch.equal(sequence.rows.whole("a dog"), made.embeds[1, 2:3].double())
    assert torch.equal(sequence.rows.whole(""), made.embeds[0, :1].double())
    assert made.pooled is not None
    assert torch.equal(pooled.rows.whole("a dog"), made.pooled[1:].double())
    assert sequence.weights[0] is model.denoiser.context_embedder.weight
    assert pooled.weights[0] is model.denoiser.time_text_embed.text_embedder.linear_1.weight


def test_an_empty_t5_text_is_its_end_mark_not_padding() -> None:
    class T5:
        """Like T5's tokenizer: no begin mark."""

        def __call__(self, texts: Sequence[str], **settings: Any) -> dict[str, Any]:
            return {"input_ids": [[*(range(5, 5 + len(t.split()))), 1] for t in texts]}

    model = copy.copy(world.model("flux"))
    model.shared = replace(model.shared, parts={**model.shared.parts, "tokenizer_2": T5()})
    from mmforget.diffusion.closed_form import _ends

    assert _ends(model, ["", "dog", "a dog"], 512) == (((0, 512),), [(0,), (0,), (1,)])


def test_sd3_reads_clip_and_t5() -> None:
    pipe = world.pipeline("sd3")
    without = reading(from_pipe(pipe), ["a dog"], "last_token")[0].rows.whole("a dog")
    assert len(without) == 1
    pipe = world.pipeline("sd3")
    pipe.register_modules(text_encoder_3=world._t5(0), tokenizer_3=world.tokenizer())
    model = from_pipe(pipe)
    embeds = model.encode(["a dog"]).embeds[0].double()
    rows = reading(model, ["a dog"], "last_token")[0].rows.whole("a dog")
    torch.testing.assert_close(rows, embeds[[2, 16 + 2]].detach(), rtol=0, atol=1e-5)
    assert len(reading(model, ["a dog"], "sequence")[0].rows.whole("a dog")) == len(embeds)


# UCE


def run(
    method: UnlearningMethod[Any], family: str = "sd", target: Erasure | None = None, seed: int = 0
) -> tuple[DiffusionModel, DiffusionModel]:
    before = world.model(family)
    after = copy.deepcopy(before)
    ctx = world.context(after, method, target=target, seed=seed)
    assert method.run(ctx) is after
    assert set(ctx.trainable) >= world.changed(before, after)
    return before, after


@torch.no_grad()
def distance(a: DiffusionModel, text_a: str, b: DiffusionModel, text_b: str) -> float:
    shape = (1, *a.latent_shape[:1], world.SIDE, world.SIDE)
    latents, t = draw(*shape, seed=9).float(), torch.tensor(500)
    first = a.predict(latents, t, a.encode([text_a]))
    return float((first - b.predict(latents, t, b.encode([text_b]))).norm())


def short() -> Erasure:
    """The request with a concept and an anchor of one word: T5's last tokens differ too."""
    target = world.erasure()
    return replace(target, concepts=(replace(target.concepts[0], text="monet", anchor="photo"),))


@torch.no_grad()
def fits(
    before: DiffusionModel, after: DiffusionModel, text: str, wanted: str, scope: str
) -> list[tuple[float, float]]:
    """Return for each site the error of a text's outputs before and after, to the wanted ones."""
    errors = []
    for old, new in zip(
        reading(before, [text, wanted], scope), reading(after, [text, wanted], scope), strict=True
    ):
        keys, guides = old.rows.aligned([text, wanted])
        goals = [guides @ w.double().T for w in old.weights]
        a, b = (
            torch.cat(
                [keys @ w.double().T - g for w, g in zip(site.weights, goals, strict=True)], 1
            )
            for site in (old, new)
        )
        errors.append((float(a.norm()), float(b.norm())))
    return errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embeddings", ["last_token", "sequence"])
def test_uce_moves_a_concept_to_its_anchor(family: str, embeddings: str) -> None:
    config = UCEConfig(embeddings=embeddings, texts="text", lamb=0.01)
    before, after = run(UCE(config), family, short())
    changed = world.changed(before, after)
    if before.denoiser_name == "unet":
        kinds = (".attn2.to_k.weight", ".attn2.to_v.weight")
        assert changed == {n for n, _ in before.named_parameters() if n.endswith(kinds)}
    else:
        assert changed == {
            "transformer.context_embedder.weight",
            "transformer.time_text_embed.text_embedder.linear_1.weight",
        }
    share = 0.05 if embeddings == "last_token" else 0.6
    for start, end in fits(before, after, "monet", "photo", embeddings):
        assert end < share * start
        for _, moved in fits(before, after, "crayon style", "crayon style", embeddings):
            assert moved < 0.5 * start
    if embeddings == "sequence" and family != "sdxl":  # whose pooled text stays the concept's
        start = distance(before, "monet", before, "photo")
        assert distance(after, "monet", before, "photo") < 0.75 * start
        moved = distance(after, "monet", before, "monet")
        assert distance(after, "crayon style", before, "crayon style") < 0.5 * moved


def test_the_bias_of_a_text_embedder_enters_once() -> None:
    config = UCEConfig(texts="text", lamb=1e-7)
    before, after = run(UCE(config), "flux", replace(world.erasure(), preserve=()))
    made = before.encode(["monet style", "photo style"])
    old, new = before.denoiser.context_embedder, after.denoiser.context_embedder
    assert old.bias.abs().max() > 0.01
    torch.testing.assert_close(new(made.embeds[0, 2]), old(made.embeds[1, 2]), rtol=0, atol=1e-4)
    old, new = (m.denoiser.time_text_embed.text_embedder.linear_1 for m in (before, after))
    assert made.pooled is not None
    torch.testing.assert_close(new(made.pooled[0]), old(made.pooled[1]), rtol=0, atol=1e-4)


def test_uce_without_effect_is_the_same_model_bit_for_bit() -> None:
    before, after = run(UCE(UCEConfig(erase_scale=0.0)))
    assert not world.changed(before, after)
    same = replace(world.erasure().concepts[0], anchor="monet")
    assert not world.changed(*run(UCE(UCEConfig()), target=Erasure((same,))))


def second() -> Concept:
    return Concept("dog", "object", "a dog", "a cat", ("photo of a dog",), ("photo of a cat",))


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_the_order_of_concepts_does_not_matter(technique: str) -> None:
    target = world.erasure()
    concepts = (*target.concepts, second())
    config = UCEConfig(expand=True, embeddings="sequence", technique=technique)
    first = run(UCE(config), target=replace(target, concepts=concepts))[1]
    other = run(UCE(config), target=replace(target, concepts=concepts[::-1]))[1]
    for a, b in zip(first.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_texts_of_a_request() -> None:
    target = replace(world.erasure(), concepts=(*world.erasure().concepts, second()))
    pairs = uce.pairs_of(target, UCEConfig())
    assert pairs == [("monet", "photo style"), ("dog", "a cat")]
    assert uce.pairs_of(target, UCEConfig(texts="text"), moderate=True) == [
        ("monet style", ""),
        ("a dog", ""),
    ]
    expanded = uce.pairs_of(target, UCEConfig(expand=True))
    assert len(expanded) == 12
    assert ("style of monet", "style of photo style") in expanded
    assert ("portrait of dog", "portrait of a cat") in expanded
    bare = replace(target, concepts=(replace(second(), anchor=""),))
    assert {new for _, new in uce.pairs_of(bare, UCEConfig(expand=True))} == {""}
    full = uce.pairs_of(target, UCEConfig(texts="prompts"))
    assert full[0] == ("a dog image in monet style", "a dog image in photo style")
    with pytest.raises(ConfigError, match="templates"):
        uce.pairs_of(target, UCEConfig(texts="prompts", expand=True))
    assert uce.preserved(target, UCEConfig(preserve_empty=True))[0] == ""
    assert len(uce.preserved(target, UCEConfig(texts="prompts"))) == 5


@pytest.mark.parametrize(("count", "weight"), [(1, 1.0), (4, 0.25), (40, 0.1)])
def test_the_published_weight_of_preserved_texts(count: int, weight: float) -> None:
    rows = Rows({str(k): draw(1, 6, seed=k) for k in range(count)}, {}, ())
    found, wanted = Ridge(draw(2, 6), 1.0, 0.1), Ridge(draw(2, 6), 1.0, 0.1)
    uce.hold(found, rows, list(rows.found), None)
    wanted.hold(torch.cat(list(rows.found.values())), weight)
    torch.testing.assert_close(found.rows(), wanted.rows())


def test_moderation_moves_to_the_empty_prompt() -> None:
    before, after = run(UCE(UCEConfig(mode="moderate", texts="text", lamb=0.01)))
    with torch.no_grad():
        rows = before.encode(["monet style", ""]).embeds
        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
        wanted = before.denoiser.get_submodule(name)(rows[1, 0])
        found = after.denoiser.get_submodule(name)(rows[0, 2])
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def balanced(**settings: Any) -> UCEConfig:
    return UCEConfig(mode="debias", texts="text", attributes=["dog", "cat"], **settings)


def test_debiasing_adds_attributes_until_ratios_fit() -> None:
    method = UCE(balanced(step_size=0.5, rounds=20, lamb=0.01, tolerance=0.1))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    before = world.model()
    rows = {t: before.encode([t]).embeds[0] for t in ("monet style", "dog", "cat")}
    layer = before.denoiser.get_submodule(name)
    with torch.no_grad():
        start = layer(rows["monet style"][2])
        towards = layer(rows["dog"][1]) - layer(rows["cat"][1])
    seen = []

    def measure(model: DiffusionModel, concept: Concept, names: Sequence[str], seed: int) -> Any:
        out = (model.denoiser.get_submodule(name)(rows["monet style"][2]) - start).detach()
        share = 0.1 + 0.5 * float((out * towards).sum() / towards.square().sum())
        seen.append((share, seed))
        return [share, 1 - share]

    method.measure = measure
    after = copy.deepcopy(before)
    method.run(world.context(after, method))
    shares = [share for share, _ in seen]
    assert shares[0] == pytest.approx(0.1)
    assert all(b > a for a, b in pairwise(shares))
    assert abs(shares[-1] - 0.5) < 0.1 < abs(shares[-2] - 0.5)
    assert len({seed for _, seed in seen}) == len(seen) < 20
    assert all(".attn2.to_" in n for n in world.changed(before, after))


def test_debiasing_starts_every_round_from_the_original_weights() -> None:
    names = ("a", "b", "dog", "cat", "kept")
    rows = Rows(
        {n: draw(1, 9, seed=k) for k, n in enumerate(names)}, dict.fromkeys(names, (0,)), ((0, 1),)
    )
    weight = draw(4, 9, seed=8)
    keys = torch.cat([rows.whole("a"), rows.whole("b")])
    script = [[[0.4, -0.4], [0.04, -0.04]], [[-0.1, 0.1], [0.2, -0.2]], [[0.0, 0.0], [0.01, -0.01]]]
    wanted = 0.5 * torch.tensor([[0.3, -0.3], [0.2, -0.2]]).double()  # small gaps count as none
    values = (keys + wanted @ torch.cat([rows.whole("dog"), rows.whole("cat")])) @ weight.T
    expected = solution(weight, keys, values, rows.whole("kept"), (0.7, 1.3, 0.4))
    config = balanced(step_size=0.5, erase_scale=0.7, preserve_scale=1.3, lamb=0.4)
    turns = []

    def gaps(turn: int) -> Tensor:
        turns.append(turn)
        return torch.tensor(script[turn])

    site = Site((torch.nn.Parameter(weight),), rows)
    total = uce.debias([site], ["a", "b"], ["kept"], gaps, config)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(site.weights[0].detach(), expected)
    assert turns == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "clip_weights"),
        ({"attributes": ["dog"]}, "two attributes"),
        ({"ratios": [0.5, 0.4]}, "summing to 1"),
        ({"ratios": [1.0]}, "one share for each"),
        ({"mode": "erase"}, "for method.mode=debias"),
        ({"expand": True}, "expand=false"),
    ],
)
def test_debiasing_says_what_it_needs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(UCE(replace(balanced(), **settings)))


def test_ratios_by_clip_count_the_closest_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clip:
        def __init__(self, *args: Any, **settings: Any) -> None:
            self.count = 0

        def texts(self, texts: Sequence[str]) -> Tensor:
            assert texts == ["This is a photo of dog.", "This is a photo of cat."]
            return torch.eye(2)

        def __call__(self, images: Tensor) -> Tensor:
            assert images.dtype == torch.uint8
            self.count += len(images)
            return torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 4)[self.count - len(images) :][
                : len(images)
            ]

    monkeypatch.setattr(features, "OpenClip", Clip)
    model = world.model()
    measure = uce.clip_measure(balanced(clip_weights="x", image_steps=1), model)
    shares = measure(model, world.erasure().concepts[0], ["dog", "cat"], 0)
    assert shares == pytest.approx([0.6, 0.4])


# RECE


def test_an_unedited_model_calls_a_concept_by_itself() -> None:
    weights = [draw(6, 4), draw(3, 4, seed=1)]
    rows = draw(5, 4, seed=2)
    torch.testing.assert_close(rece.adversarial(weights, weights, rows, 1e-12), rows)
    edited = [w + 0.3 * draw(*w.shape, seed=7) for w in weights]
    found = rece.adversarial(edited, weights, rows, 0.2).requires_grad_()
    cost = sum(
        (found @ new.T - rows @ old.T).square().sum()
        for new, old in zip(edited, weights, strict=True)
    )
    (slope,) = torch.autograd.grad(cost + 0.2 * found.square().sum(), [found])  # type: ignore[operator]
    assert slope.abs().max() < 1e-10  # it is the minimum that the paper defines


@pytest.mark.parametrize("family", FAMILIES)
def test_rece_erases_what_still_called_the_concept(family: str) -> None:
    before, first = run(RECE(RECEConfig(texts="text", rounds=0)), family, short())
    after = run(RECE(RECEConfig(texts="text", rounds=1, regular=0.01)), family, short())[1]
    assert world.changed(before, after) == world.changed(before, first)
    assert world.changed(first, after) == world.changed(before, after)
    texts = ["monet", "photo"]
    models = [reading(m, texts, "sequence") for m in (before, first, after)]
    for original, edited, final in zip(*models, strict=True):
        concept, anchor = (original.rows.whole(text) for text in texts)
        found = rece.adversarial(edited.weights, original.weights, concept, 0.01)

        def error(rows: Tensor, weights: Any, goal: Tensor, goals: Any) -> float:
            parts = [
                rows @ w.double().T - goal @ v.double().T
                for w, v in zip(weights, goals, strict=True)
            ]
            return float(torch.cat(parts, dim=1).detach().norm())

        costs = [
            error(rows, edited.weights, concept, original.weights) ** 2
            + 0.01 * float(rows.square().sum())
            for rows in (found, concept)
        ]
        assert costs[0] < 0.9 * costs[1]
        start = error(found, edited.weights, anchor, edited.weights)
        assert error(found, final.weights, anchor, edited.weights) < 0.8 * start


def test_rece_without_rounds_is_its_first_edit() -> None:
    shared: dict[str, Any] = {"preserve_scale": 0.1, "preserve_empty": True, "lamb": 0.1}
    one = run(RECE(RECEConfig(rounds=0)))[1]
    other = run(UCE(UCEConfig(embeddings="sequence", **shared)))[1]
    assert not world.changed(one, other)


# MACE and attention losses


def test_attention_losses_by_hand() -> None:
    layers = [draw(2, 3, 4, 5).abs().float(), draw(2, 3, 16, 5, seed=1).abs().float()]
    tokens = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()
    mask = (draw(2, 4, 4, seed=2) > 0).float()
    for given in (None, mask):
        squares = torch.zeros(2, 2)
        for k, layer in enumerate(layers):
            for b in range(2):
                part = layer[b][..., tokens[b]]
                if given is not None:
                    side = int(layer.shape[2] ** 0.5)
                    small = given[b].reshape(side, 4 // side, side, 4 // side).mean(dim=(1, 3))
                    part = part * small.reshape(1, -1, 1)
                squares[k, b] = part.square().sum()
        torch.testing.assert_close(joint_norm(layers, tokens, given), squares.sum(0).sqrt())
        torch.testing.assert_close(summed_norms(layers, tokens, given), squares.sqrt().sum(0))
    assert on_grid(torch.ones(1, 6, 4), 6).tolist() == [[1.0] * 6]


def test_no_attention_has_no_infinite_gradient() -> None:
    probs = torch.zeros(1, 1, 4, 3, requires_grad=True)
    tokens = torch.ones(3).bool()
    for loss in (joint_norm, summed_norms):
        (slope,) = torch.autograd.grad(loss([probs], tokens).sum(), [probs])
        assert not slope.any()


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ([0, 1, 2, 9], [0, 1, 3, 9], (2, 3, 3)),
        ([0, 1, 2, 3, 9], [0, 4, 3, 9], (1, 3, 2)),
        ([0, 5, 5, 9], [0, 5, 9], (2, 3, 2)),
        ([0, 5, 9], [0, 5, 5, 9], (2, 2, 3)),
        ([0, 1, 9], [0, 1, 9], (3, 3, 3)),
        ([0, 1, 2, 9], [0, 9], (1, 3, 1)),
    ],
)
def test_difference_of_token_lists(
    ours: list[int], theirs: list[int], wanted: tuple[int, int, int]
) -> None:
    assert mace.difference(ours, theirs) == wanted


def test_a_concepts_tokens_are_marked() -> None:
    model = world.model()
    prompts = ("a dog image in monet style", "crayon monet")
    concept = replace(
        world.erasure().concepts[0],
        prompts=prompts,
        anchors=("a dog image in style", "crayon a photo"),
    )
    found = mace.mark(model, concept)
    assert found.tokens.nonzero().tolist() == [[0, 5], [1, 2]]
    assert found.old[0] == (*range(5), *range(6, 16))
    assert found.new[0] == (*range(5), *range(5, 15))
    assert found.old[1] == (0, 1, *range(3, 15))
    assert found.new[1] == (0, 1, *range(4, 16))
    with pytest.raises(ConfigError, match="names nothing"):
        mace.mark(model, replace(concept, anchors=prompts))


def test_times_are_drawn_around_the_middle() -> None:
    odds = mace.importance(torch.arange(1000))
    assert odds.min() > 0
    assert int(odds.argmax()) == 300
    assert float(odds[180:420].sum() / odds.sum()) > 0.93


def test_refinement_gives_other_tokens_the_anchors_outputs() -> None:
    config = MACEConfig(steps=0, lamb=1e-9, preserve_scale=0.0)
    concept = world.erasure().concepts[0]
    concept = replace(concept, prompts=concept.prompts[:1], anchors=concept.anchors[:1])
    before, after = run(MACE(config), target=Erasure((concept,)))
    found = mace.mark(before, concept)
    old, new = before.encode(concept.prompts), before.encode(concept.anchors)
    name = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    ours, theirs = (m.denoiser.get_submodule(name) for m in (after, before))
    with torch.no_grad():
        got, wanted = ours(old.embeds[0, found.old[0]]), theirs(new.embeds[0, found.new[0]])
        kept = theirs(old.embeds[0, found.old[0]])
    assert (got - wanted).abs().max() < 1e-3 < (kept - wanted).abs().max()


def test_fusing_one_change_reproduces_it_where_the_concept_is() -> None:
    weight, keys, held = draw(5, 12), draw(4, 12, seed=1), draw(3, 12, seed=2)
    up, down = draw(5, 1, seed=3), draw(1, 12, seed=4)
    original, gram = draw(5, 12, seed=5), held.T @ held
    ridge = Ridge(keys, 1.0, 0.0)
    ridge.hold_gram(gram)
    pull = up @ (down @ (keys.T @ keys))
    found = mace.refit(weight, pull, original @ gram, gram, ridge)
    torch.testing.assert_close(keys @ found.T, keys @ (weight + up @ down).T)
    torch.testing.assert_close(held @ found.T, held @ original.T)


@torch.no_grad()
def attention(model: DiffusionModel, concept: Concept) -> float:
    found = mace.mark(model, concept)
    latents = draw(len(found.text), *model.latent_shape, seed=4).float()
    with recorded(model) as maps:
        model.predict(latents, torch.tensor(300), found.text)
        return float(summed_norms(maps.probs.values(), found.tokens).mean())


@pytest.mark.parametrize("mask", ["full", "attention"])
def test_mace_takes_attention_from_the_concept(mask: str) -> None:
    config = MACEConfig(
        steps=12, lr=0.03, images=2, image_steps=2, mask=mask, batch_size=2, lamb=0.01
    )
    before, refined = run(MACE(replace(config, steps=0)))
    after, target = run(MACE(config))[1], world.erasure()
    kinds = ("attn2.to_k.weight", "attn2.to_v.weight")
    names = {n for n, _ in before.named_parameters() if n.endswith(kinds)}
    assert world.changed(before, after) == names
    assert attention(after, target.concepts[0]) < 0.8 * attention(refined, target.concepts[0])
    moved = distance(after, "a cat image in monet style", before, "a cat image in monet style")
    kept = distance(after, "a cat image in crayon style", before, "a cat image in crayon style")
    assert kept < moved


def test_mace_trains_on_sdxl() -> None:
    config = MACEConfig(steps=1, images=1, image_steps=1)
    refined = run(MACE(replace(config, steps=0)), "sdxl")[1]
    assert world.changed(refined, run(MACE(config), "sdxl")[1])


def test_mace_counts_steps_and_repeats_itself() -> None:
    target = replace(world.erasure(), concepts=(*world.erasure().concepts, second()))
    config = MACEConfig(steps=2, images=2, image_steps=1, mask="attention", rank=2, lr=1e-2)
    method, after = MACE(config), world.model()
    ctx = world.context(after, method, target=target)
    method.run(ctx)
    assert ctx.engine.meter.steps == 4
    assert not world.changed(after, run(MACE(config), target=target)[1])
    assert world.changed(after, run(MACE(config), target=target, seed=1)[1])


def test_an_attention_mask_is_where_the_concept_is_seen() -> None:
    model = world.model()
    found = mace.mark(model, world.erasure().concepts[0])
    clean, noise = draw(3, 4, 8, 8).float(), draw(3, 4, 8, 8, seed=1).float()
    masks = [
        mace.attention_mask(model, clean, noise, found.text, found.tokens, level)
        for level in (0.0, 0.3, 0.7)
    ]
    assert masks[0].shape == (3, 8, 8)
    assert set(masks[1].unique().tolist()) == {0.0, 1.0}
    assert (masks[0].flatten(1).sum(dim=1) == 63).all()  # all but the smallest
    assert (masks[1] >= masks[2]).all()
    assert (masks[2].flatten(1).sum(dim=1) >= 1).all()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_mace_refuses_joint_attention(family: str) -> None:
    with pytest.raises(ConfigError, match=family):
        run(MACE(MACEConfig()), family)
