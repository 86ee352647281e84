import hashlib

import pytest
import torch

from mmforget.rng import Draws, derive, generator


def test_derive_is_the_hash_of_its_name() -> None:
    digest = hashlib.sha256(b"7/train/3").digest()
    assert derive(7, "train", 3) == int.from_bytes(digest[:8], "big") >> 1
    seeds = {derive(s, *stream) for s in range(20) for stream in ((), ("a",), ("b",), ("a", 1))}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_depends_on_nothing_else() -> None:
    first = torch.rand(4, generator=generator(1, "x"))
    torch.manual_seed(5)
    torch.rand(100)
    assert torch.equal(torch.rand(4, generator=generator(1, "x")), first)
    assert not torch.equal(torch.rand(4, generator=generator(1, "y")), first)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Draws(0, "x", total=8).normal(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("total", [1, 7, 64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_draws_do_not_depend_on_the_split(total: int, shape: tuple[int, ...]) -> None:
    def draw(rows: slice | list[int] | None) -> list[torch.Tensor]:
        draws = Draws(3, "train", 9, total=total, rows=rows)
        return [draws.uniform(*shape), draws.normal(*shape), draws.integers(11, *shape)]

    whole = draw(None)
    assert [tensor.shape for tensor in whole] == [(total, *shape)] * 3
    for parts in (2, 3):
        cuts = [slice(total * i // parts, total * (i + 1) // parts) for i in range(parts)]
        for expected, *split in zip(whole, *map(draw, cuts), strict=True):
            assert torch.equal(torch.cat(split), expected)
    rows = [total - 1, 0]
    for expected, tensor in zip(whole, draw(rows), strict=True):
        assert torch.equal(tensor, expected[rows])


def test_successive_draws_differ_and_repeat() -> None:
    def twice(seed: int) -> torch.Tensor:
        draws = Draws(seed, "x", total=5)
        return torch.stack([draws.uniform(4), draws.uniform(4)])

    assert torch.equal(twice(1), twice(1))
    assert not torch.equal(*twice(1))
    assert not torch.equal(twice(1), twice(2))


def test_ranges_and_moments() -> None:
    draws = Draws(0, "x", total=20_000)
    uniform = draws.uniform(low=-2.0, high=6.0)
    assert -2 <= uniform.min() < -1.99
    assert 5.99 < uniform.max() <= 6
    assert uniform.mean().item() == pytest.approx(2.0, abs=0.08)
    normal = draws.normal()
    assert normal.mean().item() == pytest.approx(0.0, abs=0.03)
    assert normal.std().item() == pytest.approx(1.0, abs=0.03)
    integers = draws.integers(5)
    assert integers.dtype == torch.int64
    assert set(integers.tolist()) == {0, 1, 2, 3, 4}
    assert draws.integers(1).eq(0).all()


def test_empty_rows() -> None:
    draws = Draws(0, total=4, rows=[])
    assert draws.normal(2).shape == (0, 2)


def test_block_draws_depend_on_the_place_alone() -> None:
    from mmforget.rng import BlockDraws

    whole = BlockDraws(0, "evaluate", start=0, stop=200)
    expected = [whole.uniform(3), whole.normal(), whole.integers(9, 2)]
    for size in (1, 50, 64, 130):
        parts = [
            BlockDraws(0, "evaluate", start=s, stop=min(s + size, 200)) for s in range(0, 200, size)
        ]
        found = [[p.uniform(3), p.normal(), p.integers(9, 2)] for p in parts]
        for k in range(3):
            assert torch.equal(torch.cat([row[k] for row in found]), expected[k])
