"""SalUn, EraseDiff, ScissorHands and Forget-Me-Not on tiny pipelines, against their formulas."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.checkpoint import pack, unpack
from mmforget.context import Context
from mmforget.diffusion import ENTRIES
from mmforget.diffusion.attention import recorded
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.methods.ediff import EraseDiff, EraseDiffConfig, multiplier
from mmforget.diffusion.methods.fmn import ForgetMeNot, ForgetMeNotConfig, after_text
from mmforget.diffusion.methods.inversion import (
    InversionConfig,
    encode,
    initial,
    invert,
    occurrences,
    owners,
    phrase,
)
from mmforget.diffusion.methods.salun import (
    DiffusionSalUn,
    DiffusionSalUnConfig,
    Relabel,
    RelabelConfig,
)
from mmforget.diffusion.methods.shs import (
    ScissorHands,
    ScissorHandsConfig,
    project,
    redraw,
    snip,
)
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError, DataError
from mmforget.methods.base import Part
from mmforget.methods.salun import largest
from mmforget.registry import METHODS
from mmforget.types import Splits, UnlearningMethod
from tests.diffusion import world

torch.set_num_threads(1)

RELABEL = "mmforget.diffusion.methods.salun:Relabel"

LR = 1e-2
MONET, PHOTO = "a dog image in monet style", "a dog image in photo style"


def near(found: Tensor, wanted: Tensor, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def run(method: UnlearningMethod[Any], family: str = "sd", **more: Any) -> DiffusionModel:
    made = method.run(world.context(world.model(family), method, **more))
    assert isinstance(made, DiffusionModel)
    return made


def one_batch(method: Any, model: DiffusionModel) -> tuple[Context, Any, Any]:
    """Return a context in which `setup` was called, and one batch of each split."""
    ctx = world.context(model, method)
    ctx.scope(method.training.scope)
    method.setup(ctx)
    forget, retain = (next(ctx.batches(name, 4)) for name in ("forget", "retain"))
    return ctx, forget, retain


def view() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(9)
    shape = (4, 4, world.SIDE, world.SIDE)
    return torch.randn(shape, generator=rng), torch.tensor([100, 300, 600, 900])


@torch.no_grad()
def says(model: DiffusionModel, prompt: str) -> Tensor:
    latents, t = view()
    return model.predict(latents, t, model.encode([prompt] * 4))


def gap(model: DiffusionModel) -> float:
    """Return how far the concept's prediction is from its anchor's."""
    return float((says(model, MONET) - says(model, PHOTO)).square().mean())


# What the three relabelling methods share --------------------------------------------------------


def test_relabel_is_its_formula() -> None:
    model = world.model("sd")
    ctx, forget, retain = one_batch(Relabel(RelabelConfig(alpha=0.3)), model)
    terms = Relabel(RelabelConfig(alpha=0.3)).loss(ctx, forget, retain)
    with torch.no_grad():
        f, r = forget.data, retain.data
        aim = model.predict(f.latents, f.t, model.encode(f.anchors))
        found = model.predict(f.latents, f.t, model.encode(f.prompts))
        kept = model.predict(r.latents, r.t, model.encode(r.prompts))
    near(terms["forget"].detach(), (found - aim).square().mean())
    near(terms["retain"].detach(), 0.3 * (kept - r.noise).square().mean())
    assert set(Relabel(RelabelConfig(alpha=0.0)).loss(ctx, forget, retain)) == {"forget"}


def test_the_anchor_passes_no_gradient() -> None:
    model = world.model("sd")
    ctx, forget, _ = one_batch(Relabel(RelabelConfig()), model)
    (weight, *_) = ctx.trainable.values()
    (found,) = ctx.gradients(Relabel(RelabelConfig()).surrogate(ctx, forget), [weight])
    data = forget.data
    aim = says_on(model, data, data.anchors).detach()
    error = (says_on(model, data, data.prompts) - aim).square().mean()
    near(found, torch.autograd.grad(error, weight)[0])


def says_on(model: DiffusionModel, data: Any, prompts: Sequence[str]) -> Tensor:
    return model.predict(data.latents, data.t, model.encode(prompts))


METHODS_TO_RUN: dict[str, Callable[[dict[str, Any]], UnlearningMethod[Any]]] = {
    "relabel": lambda s: Relabel(RelabelConfig(**s)),
    "salun": lambda s: DiffusionSalUn(DiffusionSalUnConfig(inner=s)),
    "ediff": lambda s: EraseDiff(EraseDiffConfig(eta=5.0, **s)),
    "ediff_fixed": lambda s: EraseDiff(EraseDiffConfig(weight=5.0, **s)),
    "shs": lambda s: ScissorHands(ScissorHandsConfig(project=True, alpha=1.0, **s)),
}


@pytest.mark.parametrize("name", ["relabel", "ediff", "shs"])
def test_the_concept_comes_closer_to_its_anchor_and_only_the_scope_changes(name: str) -> None:
    before = world.model("sd")
    after = run(METHODS_TO_RUN[name]({"lr": LR, "epochs": 3, "scope": "xattn"}))
    changed = world.changed(before, after)
    assert changed and all(".attn2.to_" in entry for entry in changed)
    assert gap(after) < 0.8 * gap(before)


@pytest.mark.parametrize("name", ["salun", "ediff", "shs"])
def test_equal_seeds_give_equal_results(name: str) -> None:
    one, same = (run(METHODS_TO_RUN[name]({"max_steps": 1})) for _ in range(2))
    assert not world.changed(one, same)
    assert world.changed(one, run(METHODS_TO_RUN[name]({"max_steps": 1}), seed=1))


@pytest.mark.parametrize("name", [name for name in METHODS_TO_RUN if name != "shs"])
def test_no_epochs_change_nothing(name: str) -> None:
    assert not world.changed(world.model("sd"), run(METHODS_TO_RUN[name]({"epochs": 0})))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("name", ["salun", "ediff", "shs"])
def test_other_families(family: str, name: str) -> None:
    after = run(METHODS_TO_RUN[name]({"max_steps": 1, "lr": 1e-3, "scope": "xattn"}), family)
    assert world.changed(world.model(family), after)


# The published loader ----------------------------------------------------------------------------


class Watched(Relabel):
    def __init__(self, config: RelabelConfig) -> None:
        super().__init__(config)
        self.seen: list[tuple[set[str], set[str]]] = []
        self.noise: list[float] = []

    def backward(self, ctx: Context, parts: Sequence[Part]) -> dict[str, Tensor]:
        for forget, retain, _ in parts:
            assert forget is not None and retain is not None
            self.seen.append((set(forget.ids), set(retain.ids)))
            self.noise.append(float(forget.data.noise.sum()))
        return super().backward(ctx, parts)


def test_every_step_meets_other_images_by_default_and_the_first_rows_by_reference() -> None:
    data = world.splits()
    plain, published = (Watched(RelabelConfig(reference=r, batch_size=3)) for r in (False, True))
    for method in (plain, published):
        run(method, data=data)
        assert len(method.seen) == 6  # two epochs of eight images by three
    everything = {id for forget, _ in plain.seen[:3] for id in forget}
    assert everything == set(data.forget.ids)
    first = (set(data.forget.ids[:3]), set(data.retain.ids[:3]))
    assert published.seen == [first] * 6
    assert len(set(published.noise)) == 6


def test_the_published_surrogate_prompt_is_the_retain_image_s() -> None:
    model = world.model("sd")
    method = Relabel(RelabelConfig(reference=True))
    ctx = method._first_rows(world.context(model, method))
    (batch,) = (b for b in ctx.batches("forget", 4, shuffle=True))
    captions = {"dog": "a dog image in crayon style", "cat": "a cat image in crayon style"}
    for id, prompt in zip(batch.ids, batch.data.prompts, strict=True):
        if prompt.split()[1] in captions:
            assert method.captions[id] == captions[prompt.split()[1]]
    aim = says_on(model, batch.data, [method.captions[i] for i in batch.ids]).detach()
    error = (says_on(model, batch.data, batch.data.prompts) - aim).square().mean()
    near(method.surrogate(ctx, batch), error)


def test_the_published_loader_is_refused_inside_a_wrapper() -> None:
    method = DiffusionSalUn(DiffusionSalUnConfig(inner={"reference": True}))
    with pytest.raises(ConfigError, match="diffusion/relabel"):
        run(method)


# SalUn -------------------------------------------------------------------------------------------


def test_relabel_is_registered() -> None:
    assert ENTRIES["methods"]["diffusion/relabel"] == RELABEL
    assert METHODS.get("diffusion/relabel") is Relabel


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_salun_ranks_the_guided_gradient_over_the_whole_denoiser(guidance: float) -> None:
    model = world.model("sd")
    method = DiffusionSalUn(DiffusionSalUnConfig(ratio=0.3, guidance=guidance))
    ctx = world.context(model, method)
    ctx.scope("xattn")
    method.setup(ctx)
    trained = [w for w in model.parameters() if w.requires_grad]
    assert {id(w) for w in trained} == {id(w) for w in ctx.trainable.values()}

    weights = list(ctx.adapter.parameters(model, "all").values())
    sums = [torch.zeros_like(w) for w in weights]
    for w in weights:
        w.requires_grad_(True)
    empty = model.encode([""] * 4)
    for batch in ctx.batches("forget", 4):
        data = batch.data
        e0 = model.predict(data.latents, data.t, empty)
        pred = (1 + guidance) * says_on(model, data, data.prompts) - guidance * e0
        loss = -torch.nn.functional.mse_loss(pred, data.noise)
        for total, grad in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += grad
    flat = torch.cat([part.reshape(-1) for part in sums]).abs()
    wanted = torch.zeros_like(flat, dtype=torch.bool)
    wanted[flat.argsort(descending=True)[: int(0.3 * len(flat))]] = True
    parts = wanted.split([w.numel() for w in weights])
    of = {id(w): part.view_as(w) for w, part in zip(weights, parts, strict=True)}
    differing = sum(
        int((of[id(w)] != mask).sum())
        for w, mask in zip(ctx.trainable.values(), method.masks, strict=True)
    )
    assert differing <= 4  # one pass of 2B rows rounds otherwise than two of B
    kept = sum(int(mask.sum()) for mask in method.masks)
    assert 0 < kept < sum(w.numel() for w in ctx.trainable.values())


def test_salun_keeps_masked_weights_to_the_bit() -> None:
    before = world.model("sd")
    inner = {"lr": LR, "epochs": 4, "weight_decay": 0.1, "optimizer": "adamw"}
    method = DiffusionSalUn(DiffusionSalUnConfig(ratio=0.4, inner=inner))
    ctx = world.context(world.model("sd"), method)
    method.run(ctx)
    start = dict(before.named_parameters())
    changed = 0
    for (name, weight), mask in zip(ctx.trainable.items(), method.masks, strict=True):
        assert torch.equal(weight[~mask], start[name][~mask])
        changed += int((weight != start[name]).sum())
    kept = sum(int(mask.sum()) for mask in method.masks)
    assert changed > 0.95 * kept > 0


def test_salun_with_every_weight_is_relabel() -> None:
    inner = {"lr": LR, "epochs": 1}
    full = run(DiffusionSalUn(DiffusionSalUnConfig(ratio=1.0, inner=inner)))
    assert not world.changed(run(Relabel(RelabelConfig(**inner))), full)
    none = run(DiffusionSalUn(DiffusionSalUnConfig(ratio=0.0, inner=inner)))
    assert not world.changed(world.model("sd"), none)


def test_salun_must_rank_what_it_trains() -> None:
    method = DiffusionSalUn(DiffusionSalUnConfig(mask_scope="kv"))
    with pytest.raises(ConfigError, match="mask_scope=kv"):
        run(method)


def test_largest_breaks_ties_by_order() -> None:
    values = [torch.tensor([1.0, -2.0, 2.0]), torch.tensor([2.0, 0.0, -2.0])]
    assert [m.tolist() for m in largest(values, 0.5)] == [[False, True, True], [True, False, False]]
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        part = torch.randint(-3, 4, (23,), generator=rng).float()
        for ratio in (0.0, 0.2, 0.5, 0.9, 1.0):
            (mask,) = largest([part], ratio)
            order = part.abs().argsort(descending=True, stable=True)
            assert sorted(order[: int(ratio * 23)].tolist()) == mask.nonzero()[:, 0].tolist()


# EraseDiff ---------------------------------------------------------------------------------------


def test_the_multiplier_lets_the_forget_loss_fall_fast_enough() -> None:
    rng = torch.Generator().manual_seed(0)
    opposed = 0
    for _ in range(40):
        keep, erase = (
            [torch.randn(3, 2, generator=rng), torch.randn(4, generator=rng)] for _ in "ab"
        )
        factor = multiplier(keep, erase, 0.1)
        step = [k + factor * e for k, e in zip(keep, erase, strict=True)]
        rate = sum((s * e).sum() for s, e in zip(step, erase, strict=True))
        square = sum(e.square().sum() for e in erase)
        assert rate >= 0.1 * square - 1e-5
        if factor > 0:
            near(torch.as_tensor(rate), torch.as_tensor(0.1 * square), rtol=1e-4, atol=1e-5)
            opposed += 1
    assert 10 < opposed < 40
    assert multiplier([torch.ones(2)], [torch.zeros(2)], 0.1) == 0.0
    near(
        multiplier([torch.tensor([1.0, 2.0])], [torch.tensor([-2.0, 0.0])], 0.1), torch.tensor(0.6)
    )


@pytest.mark.parametrize("eta", [0.1, 3.0])
def test_ediff_steps_along_both_gradients(eta: float) -> None:
    model = world.model("sd")
    method = EraseDiff(EraseDiffConfig(eta=eta))
    ctx, forget, retain = one_batch(method, model)
    weights = list(ctx.trainable.values())
    erase = ctx.gradients(method.surrogate(ctx, forget), weights)
    keep = ctx.gradients(method.preserve(ctx, retain), weights)
    dot = sum(float((k * e).sum()) for k, e in zip(keep, erase, strict=True))
    square = sum(float(e.square().sum()) for e in erase)
    factor = max(0.0, eta - dot / square)
    logged = method.backward(ctx, [Part(forget, retain)])
    for weight, k, e in zip(weights, keep, erase, strict=True):
        assert weight.grad is not None
        near(weight.grad, k + factor * e, rtol=1e-4, atol=1e-7)
    near(logged["forget"], factor * method.surrogate(ctx, forget).detach(), rtol=1e-4)
    near(logged["retain"], method.preserve(ctx, retain).detach())
    assert (factor > 0) == (eta == 3.0) or eta == 0.1


class Traced(EraseDiff):
    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.trace: list[tuple[int, str, list[Tensor]]] = []

    def loss(self, ctx: Context, forget: Any, retain: Any) -> dict[str, Tensor]:
        if forget is not None:  # the first side of a step
            weights = [w.detach().clone() for w in ctx.trainable.values()]
            self.trace.append((ctx.epoch, ctx.phase, weights))
        else:
            assert not ctx.phase.startswith("inner")
        terms = super().loss(ctx, forget, retain)
        assert set(terms) == ({"forget"} if retain is None else {"retain"})
        return terms


def test_published_ediff_goes_back_before_every_outer_pass() -> None:
    settings: dict[str, Any] = {"weight": 0.1, "epochs": 2, "lr": LR, "reference": True}
    method = Traced(EraseDiffConfig(**settings))
    run(method, data=world.splits(6))  # two steps a pass
    phases = [f"{way} {k}" for k in range(2) for way in ("inner", "outer") for _ in range(2)]
    assert [(e, p) for e, p, _ in method.trace] == [(e, p) for e in range(2) for p in phases]
    for epoch in range(2):
        steps = [weights for e, _, weights in method.trace if e == epoch]
        for outer in (2, 6):
            assert all(torch.equal(a, b) for a, b in zip(steps[0], steps[outer], strict=True))
        assert not torch.equal(steps[0][0], steps[1][0])
    tensors, skeleton = pack(method.state())
    other = Traced(EraseDiffConfig(**settings))
    other.load_state(unpack(tensors, skeleton))
    assert other.phase == "outer 1"
    assert torch.equal(other.start[0], method.start[0])


def test_ediff_refuses_what_has_no_loss() -> None:
    with pytest.raises(ConfigError, match="weight"):
        run(EraseDiff(EraseDiffConfig(reference=True)))
    model = world.model("sd")
    method = EraseDiff(EraseDiffConfig())
    ctx, forget, retain = one_batch(method, model)
    with pytest.raises(ConfigError, match=r"inner\.weight"):
        method.loss(ctx, forget, retain)


# ScissorHands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 1.0])
def test_snip_ranks_all_tensors_together(sparsity: float) -> None:
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(7, 5, generator=rng), torch.randn(11, generator=rng)]
    slopes = [torch.rand(w.shape, generator=rng) for w in weights]
    masks, threshold = snip(weights, slopes, sparsity)
    saliency = torch.cat([(w * s).abs().reshape(-1) for w, s in zip(weights, slopes, strict=True)])
    assert sum(int(m.sum()) for m in masks) == 46 - int(sparsity * 46)
    found = torch.cat([m.reshape(-1) for m in masks])
    assert bool((saliency[found] > threshold).all()) and bool((saliency[~found] <= threshold).all())


def test_redrawn_weights_are_small_and_biases_zero() -> None:
    weight, bias = torch.ones(200, 200), torch.ones(50)
    mask = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    redraw("a.weight", weight, mask, 0)
    assert bool((weight[~mask] == 1.0).all())
    assert weight[mask].std().item() == pytest.approx(0.02, rel=0.03)
    assert abs(weight[mask].mean().item()) < 1e-3
    redraw("a.bias", bias, torch.arange(50) < 20, 0)
    assert bias.tolist() == [0.0] * 20 + [1.0] * 30


def test_shs_prunes_the_most_salient_entries_of_cross_attention() -> None:
    model, before = world.model("sd"), world.model("sd")
    method = ScissorHands(ScissorHandsConfig(epochs=0, sparsity=0.9))
    ctx = world.context(before, method)
    named = ctx.adapter.parameters(before, "all")
    batch = next(ctx.batches("forget", 4, shuffle=True))
    loss = (says_on(before, batch.data, batch.data.prompts) - batch.data.noise).square().mean()
    slopes = torch.autograd.grad(loss, list(named.values()))
    saliency = {n: (w * g).abs() for (n, w), g in zip(named.items(), slopes, strict=True)}
    flat = torch.cat([value.detach().reshape(-1) for value in saliency.values()])
    threshold = flat.sort().values[int(0.9 * len(flat)) - 1]
    method.run(world.context(model, method))
    after = dict(model.named_parameters())
    pruned = 0
    for name, weight in named.items():
        chosen = (saliency[name] > threshold) & (".attn2." in name)
        assert torch.equal(after[name] != weight, chosen)
        pruned += int(chosen.sum())
    assert pruned > 20


def test_a_projected_gradient_does_not_oppose_the_memory() -> None:
    rng = torch.Generator().manual_seed(2)
    for _ in range(30):
        gradient, memory = torch.randn(9, generator=rng), torch.randn(9, generator=rng)
        made, added = project(gradient, memory, 0.0, 0.0)
        if gradient @ memory >= 0:
            assert added is None and torch.equal(made, gradient)
            continue
        assert abs(float(made @ memory)) < 1e-5  # the nearest point of the half-space
        wide, least = project(gradient, memory, 5.0, 1e-3)
        assert least == 5.0
        near(wide, gradient + 5.0 * memory)


def test_projection_writes_every_entry_back_to_its_own_weight() -> None:
    model = world.model("sd")
    method = ScissorHands(ScissorHandsConfig(project=True, project_every=3))
    ctx, _, _ = one_batch(method, model)
    assert set(method.memory) == set(ctx.adapter.parameters(model, "xattn"))
    rng = torch.Generator().manual_seed(3)
    grads = {n: torch.randn(w.shape, generator=rng) for n, w in ctx.trainable.items()}
    for name, part in method.memory.items():
        grads[name] = grads[name] - 40.0 * part / part.norm()
    none = "unet.conv_out.bias"
    square = sum(float(part.square().sum()) for part in method.memory.values())
    dot = sum(float((grads[n] * part).sum()) for n, part in method.memory.items())
    v = max(-dot / (square + 1e-3), 0.5)
    for step in (2, 3):
        for name, weight in ctx.trainable.items():
            weight.grad = None if name == none else grads[name].clone()
        ctx.step = step
        method.after_backward(ctx)
        for name, weight in ctx.trainable.items():
            if name == none:
                assert weight.grad is None
                continue
            assert weight.grad is not None
            part = method.memory.get(name) if step == 3 else None
            near(
                weight.grad, grads[name] + (0.0 if part is None else v * part), rtol=1e-4, atol=1e-5
            )


def test_shs_refuses_a_projection_of_nothing() -> None:
    with pytest.raises(ConfigError, match="project=true"):
        run(ScissorHands(ScissorHandsConfig(project=True, scope="selfattn")))


# Forget-Me-Not and textual inversion -------------------------------------------------------------

FEW = InversionConfig(steps=0)


def erase(*concepts: tuple[str, str, str, str]) -> Erasure:
    """Return a request of (name, kind, text, anchor)."""
    return Erasure(tuple(Concept(*made, (made[2],), (made[3],)) for made in concepts))


def test_occurrences() -> None:
    ids = torch.tensor([[9, 1, 2, 1, 2, 8, 8], [9, 1, 1, 1, 8, 8, 8]])
    found, place = occurrences(ids, torch.tensor([1, 2]))
    assert found.int().tolist() == [[0, 1, 1, 1, 1, 0, 0], [0] * 7]
    assert place[0].tolist() == [0, 0, 1, 0, 1, 0, 0]
    overlapping, _ = occurrences(ids, torch.tensor([1, 1]))
    assert overlapping[1].int().tolist() == [0, 1, 1, 1, 0, 0, 0]
    for never in ([], [1] * 8):
        assert not occurrences(ids, torch.tensor(never, dtype=torch.int64))[0].any()


def test_a_name_of_many_tokens_is_found_whole() -> None:
    model = world.model("sd")
    (concept,) = erase(("Zebra", "object", "a photo of zebra", "a photo")).concepts
    assert phrase(model, concept) == "Zebra"
    ids = model.tokens([concept.text])
    name = initial(model, ["Zebra"]).ids["text_encoder"][0]
    assert len(name) == 5  # no word of this tokenizer: letters
    found, _ = occurrences(ids, name)
    assert found[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, *[0] * 7]
    tail = after_text(ids, model.tokenizer.eos_token_id)
    assert tail[0].int().tolist() == [0] * 9 + [1] * 7
    (unnamed,) = erase(("nudity", "unsafe", "a photo of art", "")).concepts
    assert phrase(model, unnamed) == "a photo of art"


@pytest.mark.parametrize("pooler", [False, True])
def test_fmn_is_the_norm_over_all_layers(pooler: bool) -> None:
    model = world.model("sd")
    method = ForgetMeNot(ForgetMeNotConfig(invert=False, use_pooler=pooler))
    ctx = world.context(model, method)
    ctx.scope("all")
    method.setup(ctx)
    batch = next(ctx.batches("forget", 3))
    data = batch.data
    with recorded(model) as maps, torch.no_grad():
        model.predict(data.latents, data.t, model.encode(["monet style"] * 3))
    chosen = [1] + (list(range(3, 16)) if pooler else [])  # start, monet, style, end ...
    wanted = []
    for k in range(3):
        parts = [p[k][..., chosen].reshape(-1) for p in maps.probs.values()]
        wanted.append(torch.cat(parts).norm())
    near(method.loss(ctx, batch, None)["forget"].detach(), torch.stack(wanted).mean())


@pytest.mark.parametrize(("kind", "scope"), [("style", ".attn2.to_"), ("object", "unet.")])
def test_fmn_turns_attention_away(kind: str, scope: str) -> None:
    target = erase(("monet", kind, "monet style", ""))
    before = world.model("sd")
    settings = {"lr": LR, "max_steps": 3, "batch_size": 4, "inversion": FEW}
    method = ForgetMeNot(ForgetMeNotConfig(**settings))
    after = run(method, target=target)
    changed = world.changed(before, after)
    assert changed and all(scope in name for name in changed)
    assert (kind == "style") == all(".attn2." in name for name in changed)
    assert attention(after) < 0.98 * attention(before)


def test_fmn_on_sdxl() -> None:
    config = ForgetMeNotConfig(max_steps=1, inversion=InversionConfig(steps=1))
    one, same = (run(ForgetMeNot(config), "sdxl") for _ in range(2))
    assert world.changed(world.model("sdxl"), one)
    assert not world.changed(one, same)


@torch.no_grad()
def attention(model: DiffusionModel) -> float:
    """Return the norm of the attention to monet and what follows the text."""
    latents, t = view()
    with recorded(model) as maps:
        model.predict(latents, t, model.encode(["monet style"] * 4))
    chosen = [1, *range(3, 16)]
    return float(torch.cat([p[..., chosen].reshape(-1) for p in maps.probs.values()]).norm())


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_fmn_needs_cross_attention(family: str) -> None:
    with pytest.raises(ConfigError, match="joint attention"):
        run(ForgetMeNot(ForgetMeNotConfig()), family)


def test_images_of_several_concepts_know_their_own() -> None:
    both = erase(("monet", "style", "monet style", ""), ("dog", "object", "a dog image", ""))
    data = world.Pictures(["a cat image in monet style", "a dog image"], ["", ""])
    assert owners(data, both.concepts) == {"s0-0": 0, "s0-1": 1}
    assert owners(data, both.concepts[:1]) == {"s0-0": 0, "s0-1": 0}
    nested = erase(("art", "style", "art", ""), ("monet art", "style", "monet art", ""))
    longest = world.Pictures(["a dog in Monet art"], [""])
    assert owners(longest, nested.concepts) == {"s0-0": 1}
    with pytest.raises(DataError, match="names none"):
        owners(world.Pictures(["a tree"], [""]), both.concepts)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_inversion_learns_embeddings_and_nothing_else(family: str) -> None:
    model = world.model(family)
    before, words = deepcopy(model), len(model.tokenizer)
    method = ForgetMeNot(ForgetMeNotConfig())
    ctx = world.context(model, method)
    concepts = world.erasure().concepts
    images = world.splits().forget
    settings = InversionConfig(steps=6, lr=0.1, batch_size=4)
    learned = invert(ctx, concepts, images, settings)
    assert not world.changed(before, model)
    assert len(model.tokenizer) == words
    start = initial(model, ["monet"])
    for name, vector in learned.tensors().items():
        assert vector.shape == start.tensors()[name].shape == (1, world.DIM)
        assert not torch.equal(vector, start.tensors()[name])
        assert not vector.requires_grad
    near(model.encode(["monet style"]).embeds, before.encode(["monet style"]).embeds)

    def error(embeddings: Any) -> float:
        total = 0.0
        for batch in ctx.batches("forget", 4):
            text = encode(model, ["monet style"] * 4, embeddings)
            found = model.predict(batch.data.latents, batch.data.t, text)
            total += float((found - batch.data.noise).square().mean())
        return total

    assert error(learned) < error(start)


def test_a_concept_s_own_embeddings_change_no_prompt() -> None:
    for family in ("sd", "sdxl"):
        model = world.model(family)
        own = initial(model, ["zebra", "monet"])
        prompts = ["a zebra in monet style", "a dog"]
        near(encode(model, prompts, own).embeds, model.encode(prompts).embeds)
        for vectors in own.vectors.values():
            vectors[0].copy_(vectors[0].flip(1))
        found, plain = encode(model, prompts, own).embeds, model.encode(prompts).embeds
        assert float((found[0] - plain[0]).abs().max().detach()) > 1e-3
        near(found[1], plain[1])
        assert not any(p.requires_grad is False for p in model.parameters())


def test_several_concepts_are_steered_together() -> None:
    data = world.splits()
    both = erase(("monet", "style", "monet style", ""), ("dog", "object", "a dog image", ""))
    pictures = world.Pictures(["a cat image in monet style", "a dog image"] * 2, [""] * 4)
    mixed = Splits(pictures, data.retain, data.train, data.holdout, data.test)
    settings = InversionConfig(steps=2, lr=0.01)
    method = ForgetMeNot(ForgetMeNotConfig(max_steps=2, batch_size=4, inversion=settings))
    run(method, target=both, data=mixed)
    assert method.tokens[0, :4].int().tolist() == [0, 1, 0, 1]
    assert method.tokens[1, :5].int().tolist() == [0, 0, 1, 0, 1]
