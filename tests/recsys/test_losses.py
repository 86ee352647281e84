import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.recsys import losses
from mmforget.recsys.losses import (
    bpr,
    contrast,
    embedding_norm,
    half_squared,
    infonce,
    log_partition,
    reverse_bpr,
    squared,
    svd_contrast,
    type_contrast,
)


def test_bpr_is_minus_log_sigmoid_and_does_not_saturate() -> None:
    positive, negative = torch.randn(2, 5, dtype=torch.float64).unbind()
    torch.testing.assert_close(bpr(positive, negative), -F.logsigmoid(positive - negative))
    torch.testing.assert_close(reverse_bpr(positive, negative), bpr(negative, positive))
    far = torch.tensor([-200.0], requires_grad=True)
    value = bpr(far, torch.zeros(1))
    value.sum().backward()
    assert value.item() == pytest.approx(200.0)
    assert far.grad.item() == pytest.approx(-1.0)


def test_reverse_bpr_fades_once_the_item_is_below() -> None:
    score = torch.tensor([3.0, 0.0, -3.0], requires_grad=True)
    reverse_bpr(score, torch.zeros(3)).sum().backward()
    torch.testing.assert_close(score.grad, torch.sigmoid(score.detach()))


def test_l2_forms() -> None:
    user, item, negative = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2, 3)
    parts = [user, item, negative]
    squares = sum(float((part**2).sum()) for part in parts)
    assert half_squared(*parts).item() == pytest.approx(squares / 8, rel=1e-5)
    norms = sum(float((part**2).sum() ** 0.5) for part in parts)
    assert embedding_norm(*parts).item() == pytest.approx(norms / 4, rel=1e-5)
    assert squared(parts).item() == pytest.approx(squares, rel=1e-5)


def naive(first: Tensor, second: Tensor, nodes: list[int], others: list[int], t: float) -> Tensor:
    found = []
    for node in nodes:
        a = first[node] / first[node].norm()
        scores = torch.stack([a @ (second[k] / second[k].norm()) for k in others]) / t
        found.append(-(a @ (second[node] / second[node].norm()) / t - scores.exp().sum().log()))
    return torch.stack(found)


def test_each_contrast_is_its_definition() -> None:
    first, second = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    batch = [3, 0, 3, 5]
    nodes, unique, every = torch.tensor(batch), [0, 3, 5], list(range(6))
    for form, wanted in {
        "unique": naive(first, second, unique, unique, 0.3).mean(),
        "batch": naive(first, second, batch, batch, 0.3).mean(),
        "all": naive(first, second, batch, every, 0.3).mean(),
        "sum": naive(first, second, unique, every, 0.3).sum(),
    }.items():
        torch.testing.assert_close(contrast(first, second, nodes, 0.3, form), wanted)
    with pytest.raises(ConfigError, match="unique, batch, all, sum"):
        contrast(first, second, nodes, 0.3, "some")


def test_both_types_count_and_a_sum_is_put_on_the_scale_of_a_mean() -> None:
    first, second = torch.randn(2, 9, 4, dtype=torch.float64).unbind()
    user, item = torch.tensor([0, 1, 1]), torch.tensor([4, 2, 0])
    for form, scale in (("unique", 1.0), ("sum", 3.0)):
        users = contrast(first[:3], second[:3], user, 0.2, form)
        items = contrast(first[3:], second[3:], item, 0.2, form)
        found = type_contrast(first, second, 3, user, item, 0.2, form)
        torch.testing.assert_close(found, (users + items) / scale)


def test_small_temperatures_and_zero_rows_stay_finite() -> None:
    view = torch.randn(4, 3) * 100
    view[1] = 0
    view.requires_grad_()
    value = infonce(view, view, temperature=1e-3).sum()
    value.backward()
    assert value.isfinite() and view.grad.isfinite().all()
    main = (torch.randn(4, 3) * 100).requires_grad_()
    value = svd_contrast(main * 1.0, main, torch.arange(4), 1e-2)
    value.backward()
    assert value.isfinite() and main.grad.isfinite().all()


def test_partition_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    anchor, others = torch.randn(7, 3), torch.randn(5, 3)

    def graded() -> tuple[Tensor, Tensor, Tensor]:
        a, o = anchor.clone().requires_grad_(), others.clone().requires_grad_()
        value = log_partition(a, o, 0.5)
        return value, *torch.autograd.grad((value * torch.arange(7)).sum(), (a, o))

    whole = graded()
    monkeypatch.setattr(losses, "CELLS", 10)  # blocks of two rows
    for ours, theirs in zip(graded(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(whole[0], (anchor @ others.T / 0.5).exp().sum(1).log())


def test_the_svd_contrast_clamps_its_positive_and_keeps_its_floor() -> None:
    far = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    found = svd_contrast(far, far, torch.tensor([0, 1]), 1.0)
    assert found.item() == pytest.approx(10000 - 5)
    view, main = torch.tensor([[1.0]]), torch.tensor([[-100.0]])
    low = svd_contrast(view, main, torch.tensor([0]), 1.0)
    assert low.item() == pytest.approx(torch.tensor(1e-8).log().item() + 5)
