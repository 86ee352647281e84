from pathlib import Path

import numpy as np
import pytest

from mmforget.errors import DataError, SplitError
from mmforget.recsys.benchmarks.cure4rec import UserSetRequest, chosen_users
from mmforget.recsys.data import Interactions
from mmforget.recsys.formats import Table
from mmforget.recsys.requests import AdversarialRequest, Request, forgotten_pairs, read_injected

USER = np.array([0, 0, 0, 1, 1, 2, 3, 3])
ITEM = np.array([0, 2, 4, 1, 2, 2, 0, 4])


def world(names: bool = False) -> tuple[Interactions, Table]:
    table = Table(
        users=5,
        items=5,
        train=(USER, ITEM),
        test=(np.array([0]), np.array([1])),
        val=None,
        features={},
        format="lightgcn",
        notes=(),
        user_names=["u10", "u20", "u30", "u40", "u50"] if names else None,
        item_names=["a", "b", "c", "d", "e"] if names else None,
    )
    return Interactions(USER, ITEM, 5, np.arange(len(USER))), table


def test_a_fraction_of_edges_is_drawn_by_the_seed() -> None:
    first = forgotten_pairs(Request(fraction=0.5), *world())
    again = forgotten_pairs(Request(fraction=0.5), *world())
    other = [forgotten_pairs(Request(fraction=0.5, seed=s), *world()) for s in range(1, 6)]
    assert first.sum() == 4 and (first == again).all()
    assert any((first != one).any() for one in other)


def test_named_edges_by_number_and_by_name() -> None:
    gone = forgotten_pairs(Request(edges=["0:2", "3:4"]), *world())
    assert np.nonzero(gone)[0].tolist() == [1, 7]
    gone = forgotten_pairs(Request(edges=["u10:c", "u40:e"]), *world(names=True))
    assert np.nonzero(gone)[0].tolist() == [1, 7]


def test_users_and_items() -> None:
    assert forgotten_pairs(Request("users", users=["3"]), *world()).tolist() == [False] * 6 + [
        True,
        True,
    ]
    gone = forgotten_pairs(Request("items", items=["2"]), *world())
    assert ITEM[gone].tolist() == [2, 2, 2] and not (ITEM[~gone] == 2).any()
    both = forgotten_pairs(Request("users_items", users=["3"], items=["2"]), *world())
    assert both.sum() == 5


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(edges=["0:1"]), "1 interactions that are not in the training data, such as 0:1"),
        (Request(edges=["0-1"]), "is no pair"),
        (Request(edges=["0:9"]), "unknown item"),
        (Request("users", users=["9"]), "unknown user"),
        (Request("users", users=["4"]), "user 4 of the request has no training interaction"),
        (Request("users", users=["0", "1", "2", "3"]), "forgets all 8"),
        (Request(fraction=1.0), "forgets all 8"),
        (Request(fraction=0.0), "forgets nothing"),
        (Request("items", users=["0"]), "request.users is given, but request.kind=items"),
    ],
)
def test_bad_requests(request_: Request, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        forgotten_pairs(request_, *world())


def test_unknown_names_have_close_matches() -> None:
    with pytest.raises(SplitError, match="Close: u20"):
        forgotten_pairs(Request("users", users=["u21"]), *world(names=True))


def test_a_file_of_edges(tmp_path: Path) -> None:
    file = tmp_path / "edges.csv"
    file.write_text("user,item\n0,2\n1,1\n")
    gone = forgotten_pairs(AdversarialRequest(file=str(file)), *world())
    assert np.nonzero(gone)[0].tolist() == [1, 3]
    with pytest.raises(SplitError, match="both given"):
        forgotten_pairs(Request(file=str(file), edges=["0:2"]), *world())
    file.write_text("user,item\n0,7\n")
    with pytest.raises(DataError, match="outside the 5 users and 5 items"):
        read_injected(file, world()[1])


def test_cure4rec_sets_count_and_break_ties_by_id() -> None:
    counts = np.array([5, 0, 7, 7, 1, 1, 3, 3, 2, 9])
    core = chosen_users(counts, UserSetRequest(percent=34))  # 3.06 of 9 active users
    assert core.tolist() == [2, 3, 9]
    assert chosen_users(counts, UserSetRequest("edge", percent=12)).tolist() == [4]
    drawn = chosen_users(counts, UserSetRequest("random", percent=50))
    assert len(drawn) == 4 and 1 not in drawn
    with pytest.raises(SplitError, match="is none"):
        chosen_users(counts, UserSetRequest(percent=5))
