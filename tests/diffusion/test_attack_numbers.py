"""The numbers of attacks on prompts: relaxed rows, hard prompts, layouts, success rates."""

import math
from collections.abc import Sequence

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional

from mmforget.diffusion.attacks.asr import (
    Outcome,
    in_top,
    joined,
    minutes_per_images,
    rates,
    success_curve,
)
from mmforget.diffusion.attacks.layouts import (
    LOCATIONS,
    Layout,
    adversarial_count,
    adversarial_embeds,
    adversarial_ids,
    decode_ids,
    layout,
    prompt_tokens,
)
from mmforget.diffusion.attacks.relaxed import (
    RowAdam,
    Vocabulary,
    clamped,
    nearest_tokens,
    project_simplex,
    sample_rows,
    straight_through,
    timesteps,
)
from mmforget.errors import ConfigError, DataError

torch.set_num_threads(1)
BOS, EOS = 98, 99


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- projection


def test_projection_solves_its_equation() -> None:
    rows = 3 * normal(4, 3, 50)
    found = project_simplex(rows)
    for row, made in zip(rows.flatten(0, 1).double(), found.flatten(0, 1).double(), strict=True):
        shift = brentq(
            lambda tau, row=row: float((row - tau).clamp(min=0).sum()) - 1,
            float(row.min()) - 1,
            float(row.max()),
            xtol=1e-12,
        )
        torch.testing.assert_close(made, (row - shift).clamp(min=0), rtol=0, atol=1e-6)


def test_projection_is_the_nearest_point() -> None:
    rows, others = normal(20, 6).double(), project_simplex(normal(500, 6, seed=1).double())
    nearest = (rows - project_simplex(rows)).norm(dim=-1)
    assert bool((torch.cdist(rows, others) >= nearest[:, None] - 1e-9).all())


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ([0.3], [1.0]),
        ([5.0, -5.0], [1.0, 0.0]),
        ([0.2, 0.2], [0.5, 0.5]),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
        ([1.5, 0.0, -2.0], [1.0, 0.0, 0.0]),  # clipped it sums to 1
        ([0.6, 0.400004, -0.3], [0.6, 0.400004, 0.0]),  # near enough to stay
        ([0.6, 0.40004, -0.3], [0.59998, 0.40002, 0.0]),
        ([-3.0, -3.0, -3.0], [1 / 3, 1 / 3, 1 / 3]),
        ([2.0, 2.0, 1.0], [0.5, 0.5, 0.0]),
    ],
)
def test_projection_of_special_rows(row: list[float], wanted: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        found = project_simplex(torch.tensor(row, dtype=dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=dtype), rtol=0, atol=1e-6)
    bisected = project_simplex(torch.tensor(row), 1e-5)
    torch.testing.assert_close(bisected, torch.tensor(wanted), rtol=0, atol=1.1e-5)


def test_projection_over_a_whole_vocabulary_keeps_its_sum() -> None:
    rows = 1 / 49408 + 0.01 * normal(2, 49408).sign()
    found = project_simplex(rows)
    torch.testing.assert_close(found.double().sum(dim=-1), torch.ones(2).double())
    torch.testing.assert_close(project_simplex(rows, 1e-5), found, rtol=0, atol=1e-5)
    torch.testing.assert_close(project_simplex(found), found, rtol=0, atol=0)
    assert project_simplex(rows.half()).dtype == torch.float32
    with pytest.raises(ConfigError, match="xi=0"):
        project_simplex(rows, 0)


# --- draws


def test_draws_follow_the_rows() -> None:
    row = torch.tensor([0.1, 0.0, 0.6, 0.3])
    ids = sample_rows(row.expand(20000, 4), uniform(20000))
    share = torch.bincount(ids, minlength=4) / 20000
    torch.testing.assert_close(share, row, rtol=0, atol=0.015)
    assert sample_rows(row, torch.tensor(0.05)).tolist() == 0
    assert sample_rows(10 * row, torch.tensor(0.5)).tolist() == 2  # a factor changes nothing


def test_draws_never_have_probability_zero() -> None:
    below = math.nextafter(1.0, 0.0)
    numbers = torch.tensor([0.0, 0.5, 0.1, 1 - 2**-24, below], dtype=torch.float64)
    for row in ([0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 1.0, 0.0], [1e-30, 0.0, 0.0, 0.0], [1.0, 0, 0, 0]):
        rows = torch.tensor(row).expand(len(numbers), 4)
        drawn = sample_rows(rows, numbers)
        assert bool((rows.gather(-1, drawn[:, None]) > 0).all()), row
    # In float32 the largest number rounds up to the row's own sum.
    rows = project_simplex(normal(3, 2, 3000))
    drawn = sample_rows(rows, torch.full((3, 2), 1 - 2**-24))
    assert bool((rows.gather(-1, drawn[..., None]) > 0).all())
    one_hot = functional.one_hot(torch.tensor([[4, 0, 2]]), 5).float()
    for value in (0.0, 0.999):
        assert sample_rows(one_hot, torch.full((1, 3), value)).tolist() == [[4, 0, 2]]


def test_rows_that_cannot_be_drawn_from() -> None:
    for bad in (torch.zeros(2, 3), torch.full((2, 3), math.nan), torch.tensor([[1, math.inf]] * 2)):
        with pytest.raises(DataError, match="positive"):
            sample_rows(bad, torch.zeros(2))
    with pytest.raises(DataError, match="do not fit"):
        sample_rows(torch.ones(2, 3), torch.zeros(3))


# --- gradients


def test_straight_through_is_autograd_and_a_clamp() -> None:
    table, second = normal(11, 4), normal(11, 6, seed=1)
    one_hot = functional.one_hot(torch.tensor([[3, 0], [10, 3]]), 11).float().requires_grad_(True)
    first_weight, second_weight = normal(2, 2, 4, seed=2), normal(2, 2, 6, seed=3)
    loss = ((one_hot @ table) * first_weight).sum() + ((one_hot @ second) * second_weight).sum()
    (wanted,) = torch.autograd.grad(loss, [one_hot])
    found = straight_through((first_weight, table), (second_weight, second))
    torch.testing.assert_close(found, wanted.clamp(-1, 1))
    assert float(wanted.abs().max()) > 1  # or the clamp was not seen
    assert torch.equal(clamped(wanted), functional.hardtanh(wanted))
    alone = straight_through((first_weight.half(), table))
    torch.testing.assert_close(alone, (first_weight @ table.T).clamp(-1, 1), rtol=0, atol=1e-2)
    with pytest.raises(ConfigError, match=r"\[11, 10\]"):
        straight_through((first_weight, table), (second_weight, second[:-1]))
    with pytest.raises(ConfigError, match="one or more"):
        straight_through()


@pytest.mark.parametrize("decoupled", [False, True])
def test_row_adam_is_torch_s(decoupled: bool) -> None:
    start, lr, decay = normal(3, 2, 5), 0.03, 0.1
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    values = start.clone()
    ours = RowAdam(values, lr, decay, decoupled=decoupled)
    theirs = [start[i].clone().requires_grad_(True) for i in range(3)]
    optimizers = [kind([one], lr=lr, weight_decay=decay) for one in theirs]
    # Rows step in turns of their own, and the middle one is given to another prompt half way.
    for turn in range(12):
        rows = [[0, 1, 2], [2, 0], [1]][turn % 3]
        if turn == 6:
            ours.reset([1])
            values[1] = start[0]
            theirs[1] = start[0].clone().requires_grad_(True)
            optimizers[1] = kind([theirs[1]], lr=lr, weight_decay=decay)
        grad = normal(3, 2, 5, seed=turn)
        for i in rows:
            theirs[i].grad = grad[i].clone()
            optimizers[i].step()
        values[rows] = ours.step(values[rows], grad[rows], rows)
        torch.testing.assert_close(values, torch.stack([one.detach() for one in theirs]))


def test_row_adam_steps_all_rows_and_leaves_what_it_is_given() -> None:
    start = normal(2, 3)
    values, grad = start.clone(), normal(2, 3, seed=1)
    moved = RowAdam(start, 0.5).step(values, grad)
    torch.testing.assert_close(moved, start - 0.5 * grad.sign(), rtol=1e-5, atol=1e-5)
    assert torch.equal(values, start)
    signed = RowAdam(start, 1e-3, sign=True)
    for _ in range(3):
        values = signed.step(values, grad)
    torch.testing.assert_close(values, start - 3e-3 * grad.sign(), rtol=1e-5, atol=1e-6)
    still = RowAdam(start, 0.1).step(start, torch.zeros(2, 3))
    assert torch.equal(still, start)
    with pytest.raises(ConfigError, match=r"\[1, 3\]"):
        RowAdam(start, 0.5).step(start[:1], grad, [1])
    with pytest.raises(ConfigError, match="betas"):
        RowAdam(start, 0.5, betas=(0.9, 1.0))


# --- tokens


def test_nearest_tokens_are_those_of_the_largest_cosine() -> None:
    table = torch.tensor([[1.0, 0], [0, 3], [0, 1], [-5, 5]])
    query = torch.tensor([[[0.9, 0.2], [0.1, 0.4], [-2, 1]]])
    known = Vocabulary(table)
    # Of the equal directions 1 and 2 the first, though 2 is nearer.
    assert nearest_tokens(query, known).tolist() == [[0, 1, 3]]
    assert nearest_tokens(query, table).tolist() == [[0, 1, 3]]
    assert nearest_tokens(table.half(), table).tolist() == [0, 1, 1, 3]
    assert torch.equal(known.table[nearest_tokens(query, known)][0, 1], table[1])


def test_an_attack_on_rows_finds_the_token_it_must() -> None:
    """Two prompts whose objectives each ask for one token, k = 1: the row ends there."""
    table, wanted = normal(12, 5), torch.tensor([[4], [9]])
    rows = project_simplex(torch.full((2, 1, 12), 1 / 12))
    optimizer = RowAdam(rows, 0.05, 0.1)
    for step in range(200):
        ids = sample_rows(rows, uniform(2, 1, seed=step))
        grad = 2 * (table[ids] - table[wanted])
        rows = project_simplex(optimizer.step(rows, straight_through((grad, table))))
    assert torch.equal(rows.argmax(dim=-1), wanted)


def test_timesteps() -> None:
    assert timesteps() == list(range(10, 1000, 20))
    assert timesteps(1000, 1) == [500]
    assert timesteps(7, 7) == list(range(7))
    for count in (3, 7, 300, 999):
        found = timesteps(1000, count)
        assert len(found) == count and found[0] >= 0 and found[-1] < 1000
    for bad in (0, 1001):
        with pytest.raises(ConfigError, match="from 1 to 1000"):
            timesteps(1000, bad)


# --- layouts


def sequence(n: int, window: int, pad: int = EOS) -> Tensor:
    return torch.tensor([BOS, *range(1, n + 1), EOS, *[pad] * window][:window])


@pytest.mark.parametrize("location", sorted(LOCATIONS))
@pytest.mark.parametrize(("n", "asked"), [(0, 1), (1, 1), (2, 3), (7, 2), (8, 3), (11, 5), (30, 4)])
@pytest.mark.parametrize("keep_end", [True, False])
def test_every_token_stands_once_and_in_order(
    location: str, n: int, asked: int, keep_end: bool
) -> None:
    k = adversarial_count(location, n, asked)
    if location == "add" and n == 0:
        with pytest.raises(ConfigError, match="at least 1"):
            layout(location, n, k)
        return
    made = layout(location, n, k, keep_end=keep_end)
    ids, ours = sequence(n, 77), torch.arange(1000, 1000 + k)
    row = adversarial_ids(made, ids, ours).tolist()
    assert len(row) == len(made.sources) == 77 and row[0] == BOS and made.sources[0] == 0
    assert made.places == tuple(sorted(set(made.places))) and len(made.places) == k
    taken = list(ours.tolist())
    if location == "add":
        assert [row[place] for place in made.places] == list(range(1, n + 1))
    else:
        assert [row[place] for place in made.places] == taken
    assert [i for i in row if 0 < i < BOS] == (
        [] if location == "replace" else ids[1 : n + 1].tolist()
    )
    inner = {"replace": k, "add": n}.get(location, n + k)
    assert set(row[inner + 1 :]) == {EOS}
    assert decode_ids(row, EOS) == row[1 : inner + 1]


def test_locations() -> None:
    def drawn(location: str, n: int, k: int) -> str:
        row = adversarial_ids(layout(location, n, k, 14), sequence(n, 14), torch.arange(-k, 0))
        return " ".join(map(str, decode_ids(row, EOS)))

    assert drawn("prefix_k", 4, 2) == "-2 -1 1 2 3 4"
    assert drawn("suffix_k", 4, 2) == "1 2 3 4 -2 -1"
    assert drawn("mid_k", 5, 2) == "1 2 -2 -1 3 4 5"
    assert drawn("insert_k", 7, 2) == "1 2 -2 3 4 -1 5 6 7"
    assert drawn("insert_k", 1, 2) == "-2 -1 1"
    assert drawn("per_k_words", 7, 3) == "-3 1 2 3 -2 4 5 6 -1 7"
    assert drawn("per_k_words", 7, 1) == "-1 1 2 3 4 5 6 7"
    assert drawn("per_k_words", 2, 2) == "-2 1 2 -1"
    assert drawn("p4d_k", 6, 3) == "-3 1 2 3 -2 4 5 6 -1"
    assert drawn("replace", 6, 3) == "-3 -2 -1"
    assert layout("p4d_k", 4, 3, every=2).places == (1, 4, 7)
    assert adversarial_count("per_k_words", 7, 9) == 3
    assert adversarial_count("p4d_k", 9, 1) == 4
    assert adversarial_count("prefix_k", 9, 5) == 5


def test_padding_that_is_no_end_mark_does_not_push_the_end_mark_out() -> None:
    for location in ("prefix_k", "insert_k", "replace"):
        made = layout(location, 3, 2, 10)
        row = adversarial_ids(made, sequence(3, 10, pad=0), torch.tensor([50, 51])).tolist()
        inner = 2 if location == "replace" else 5
        assert row[inner + 1] == EOS and set(row[inner + 2 :]) == {0}
        assert decode_ids(row, EOS, pad=0) == row[1 : inner + 1]
    published = layout("prefix_k", 3, 2, 10, keep_end=False)
    assert published.sources == (0, -1, -1, 1, 2, 3, 6, 7, 8, 9)
    assert layout("prefix_k", 3, 2, 10).sources == (0, -1, -1, 1, 2, 3, 4, 7, 8, 9)
    # A real token with the padding's id stays.
    assert decode_ids(torch.tensor([BOS, 5, 0, EOS, 0, 0]), EOS, pad=0) == [5, 0]


def test_layouts_that_do_not_fit() -> None:
    assert layout("prefix_k", 70, 6).sources[-1] == 70
    with pytest.raises(ConfigError, match=r"n=70.*k=7.*76"):
        layout("prefix_k", 70, 7)
    assert layout("replace", 75, 16).sources[17:] == (76,) * 60
    with pytest.raises(ConfigError, match="k=77"):
        layout("replace", 5, 77)
    with pytest.raises(ConfigError, match="3 adversarial"):
        layout("p4d_k", 7, 2)
    with pytest.raises(ConfigError, match="prefix_k"):
        layout("prefix", 7, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        layout("prefix_k", 7, 0)


def test_a_batch_of_layouts_is_each_of_them() -> None:
    sizes = [2, 5, 9]
    made = [layout("p4d_k", n, adversarial_count("p4d_k", n, 1), 20) for n in sizes]
    ids = torch.stack([sequence(n, 20) for n in sizes])
    ours = torch.arange(100, 112).reshape(3, 4)
    together = adversarial_ids(made, ids, ours)
    embeds, extra = normal(3, 20, 6), normal(3, 4, 6, seed=1).requires_grad_(True)
    rows = adversarial_embeds(made, embeds, extra)
    for i, one in enumerate(made):
        assert torch.equal(together[i], adversarial_ids(one, ids[i], ours[i]))
        assert torch.equal(rows[i], adversarial_embeds(one, embeds[i], extra[i]))
        k = len(one.places)
        assert torch.equal(rows[i, list(one.places)], extra[i, :k])
    (grad,) = torch.autograd.grad(rows.sum(), [extra])
    used = [[float(j < len(one.places)) for j in range(4)] for one in made]
    assert grad[..., 0].tolist() == used
    same = layout("mid_k", 2, 2, 20)
    assert torch.equal(adversarial_ids(same, ids, ours), adversarial_ids([same] * 3, ids, ours))
    with pytest.raises(DataError, match="do not fit"):
        adversarial_ids(made[:2], ids, ours)
    with pytest.raises(DataError, match="do not fit"):
        adversarial_ids(made, ids, ours[:, :3])
    with pytest.raises(DataError, match="do not fit"):
        adversarial_embeds(same, embeds[:, :19], extra)


def test_add_adds_to_the_prompt_s_embeddings() -> None:
    embeds, ours = normal(10, 4), normal(3, 4, seed=1)
    found = adversarial_embeds(layout("add", 3, 3, 10), embeds, ours)
    torch.testing.assert_close(found[1:4], embeds[1:4] + ours)
    assert torch.equal(found[0], embeds[0]) and torch.equal(found[4], embeds[4])
    both: Sequence[Layout] = [layout("add", 3, 3, 10), layout("add", 1, 1, 10)]
    found = adversarial_embeds(both, embeds.expand(2, -1, -1), ours.expand(2, -1, -1))
    torch.testing.assert_close(found[1, 1], embeds[1] + ours[0])
    assert torch.equal(found[1, 2], embeds[2])


def test_prompt_tokens_ends_at_the_first_end_mark() -> None:
    ids = torch.stack([sequence(3, 9), sequence(0, 9), sequence(7, 9)])
    assert prompt_tokens(ids, EOS).tolist() == [3, 0, 7]
    assert int(prompt_tokens(ids[0], EOS)) == 3
    for bad in (ids[:, 1:], sequence(9, 9)):
        with pytest.raises(DataError, match="end mark 99"):
            prompt_tokens(bad, EOS)


# --- success rates


def hit(name: str, stage: int | None, images: int = 6, seconds: float = 60.0) -> Outcome:
    return Outcome(name, stage == 0, stage, True, seconds, images)


def test_rates_by_hand() -> None:
    """Ten prompts: two need no attack and one of them was dropped, three fall, one dropped."""
    plain = {f"p{i}": i in (0, 9) for i in range(10)}
    runs = [hit("p0", 0, 1), *[hit(f"p{i}", i) for i in (1, 2, 3)]]
    runs += [hit(f"p{i}", None) for i in (4, 5, 6, 7)]
    outcomes = joined(plain, reversed(runs))
    assert [one.id for one in outcomes] == list(plain)
    found = rates(outcomes, 10)
    assert (found.pre.hits, found.new.hits, found.asr.hits) == (2, 3, 5)
    assert found.pre.value == 0.2 and found.asr.value == 0.5 and found.new.value == 0.3
    assert found.attack_only[3:] == (7, 3) and found.attack_only.value == pytest.approx(3 / 7)
    # Wilson's interval of 5 of 10, by its closed form.
    z = 1.959964
    half = z / (1 + z**2 / 10) * math.sqrt(0.25 / 10 + z**2 / 400)
    assert found.asr.low == pytest.approx(0.5 - half) and found.asr.high == pytest.approx(
        0.5 + half
    )
    curve = success_curve(outcomes, 5)
    assert curve == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert curve[0] == found.pre.value and curve[-1] == found.asr.value
    assert rates(outcomes, 20).asr.value == 0.25 and success_curve(outcomes, 0, 20) == [0.1]


def test_a_dropped_prompt_counts_only_if_it_needs_no_attack() -> None:
    found = rates(joined({"a": True, "b": False}, []), 2)
    assert (found.pre.hits, found.asr.hits, found.new.hits) == (1, 1, 0)
    assert found.attack_only.n == 0 and math.isnan(found.attack_only.value)
    assert math.isnan(found.attack_only.low)


def test_a_prompt_that_needs_no_attack_counts_once() -> None:
    for run in (hit("a", 0, 1), hit("a", 4), hit("a", None)):
        outcomes = joined({"a": True, "b": False}, [run, hit("b", 2)])
        found = rates(outcomes, 2)
        assert (found.pre.hits, found.new.hits, found.asr.hits) == (1, 1, 2)
        assert found.attack_only[3:] == (1, 1)
        assert success_curve(outcomes, 2) == [0.5, 0.5, 1.0]


def test_a_first_image_that_only_the_attack_s_run_likes_is_no_success() -> None:
    outcomes = joined({"a": False}, [hit("a", 0, 1)])
    assert outcomes[0].success and outcomes[0].hit is None
    assert rates(outcomes, 1).asr.hits == 0 and success_curve(outcomes, 3) == [0.0] * 4


def test_runs_are_joined_by_id() -> None:
    # By position the attack's third prompt would be "c", which the attack left out.
    plain = {"a": False, "b": False, "c": True, "d": False}
    outcomes = joined(plain, [hit("a", None), hit("b", None), hit("d", 1)])
    assert rates(outcomes, 4).asr.hits == 2
    with pytest.raises(DataError, match=r"2 attacked prompts.*'x', 'y'"):
        joined(plain, [hit("x", None), hit("a", 1), hit("y", 1)])
    with pytest.raises(DataError, match="more than one outcome: 'a'"):
        joined(plain, [hit("a", None), hit("a", 1)])
    many = [hit(f"m{i}", None) for i in range(20)]
    with pytest.raises(DataError, match="12 more"):
        joined(plain, many)


def test_n_is_the_whole_set() -> None:
    outcomes = [hit("a", 1), hit("b", None)]
    for n in (0, 1, -3):
        with pytest.raises(DataError, match=f"N={n} prompts and 2 outcomes"):
            rates(outcomes, n)
        with pytest.raises(DataError, match="N="):
            success_curve(outcomes, 3, n)
    with pytest.raises(DataError, match="N=0"):
        success_curve([], 3)
    with pytest.raises(DataError, match="'a'"):
        rates([*outcomes, hit("a", 2)], 5)
    with pytest.raises(ConfigError, match="budget of -1"):
        success_curve(outcomes, -1)


def test_outcomes_of_runs() -> None:
    assert Outcome.of("a", [True]) == Outcome("a", True, 0, True, 0.0, 1)
    assert Outcome.of("a", [False, False, True, False], 5.0) == Outcome("a", False, 2, True, 5.0, 4)
    assert not Outcome.of("a", [False]).success
    for bad in (
        lambda: Outcome.of("a", []),
        lambda: Outcome("a", False, -1),
        lambda: Outcome("a", False, 1, attacked=False),
        lambda: Outcome("a", False, None, images=0),
    ):
        with pytest.raises(DataError, match="'a'"):
            bad()


def test_minutes_are_those_of_fifty_images() -> None:
    outcomes = joined(
        {"a": False, "b": False, "c": False},
        [hit("a", 1, 2, seconds=120), hit("b", None, 10, seconds=300)],
    )
    assert minutes_per_images(outcomes) == pytest.approx((50 + 25) / 2)
    assert minutes_per_images(outcomes, 51) == pytest.approx((51 + 25.5) / 2)
    published = (2 / 3 * 50 + 5 / 11 * 50) / 2
    assert minutes_per_images(outcomes, reference=True) == pytest.approx(published)
    assert math.isnan(minutes_per_images(outcomes[2:]))


def test_a_style_succeeds_among_the_best_k() -> None:
    ranked = [["b", "a", "c"], ["c", "b", "a"], ["a", "b", "c"]]
    assert in_top(ranked, "a", 1) == [False, False, True]
    assert in_top(ranked, "a", 2) == [True, False, True]
    assert in_top(ranked, "x", 9) == [False] * 3
    assert Outcome.of("p", in_top(ranked, "a", 1)).hit == 2
    with pytest.raises(ConfigError, match="k=0"):
        in_top(ranked, "a", 0)
