"""The removal order and the search along it, on sizes that are formulas."""

from __future__ import annotations

import itertools

import torch

from ippro_tp.pruning.order import Ranked, RemovalOrder
from ippro_tp.pruning.search import find


def ranked(key: str, scores: list[float], least: int = 1, multiple: int = 1) -> Ranked:
    return Ranked.of(key, torch.tensor(scores), least, multiple)


def test_global_order_is_by_score_and_leaves_what_has_to_stay():
    order = RemovalOrder([ranked("a", [5.0, 0.0, 0.0, 0.0]), ranked("b", [1.0, 2.0, 3.0], least=2)], "global")
    assert len(order) == 4
    assert [order.gone(n) for n in range(5)] == [
        {"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 2, "b": 0}, {"a": 3, "b": 0}, {"a": 3, "b": 1}
    ]  # fmt: skip


def test_equal_scores_alternate_between_groups():
    order = RemovalOrder([ranked("a", [0.0] * 8), ranked("b", [0.0] * 8)], "global")
    assert all(abs(g["a"] - g["b"]) <= 1 for g in map(order.gone, range(len(order) + 1)))


def test_local_order_takes_the_same_fraction_of_all():
    order = RemovalOrder([ranked("a", list(range(10))), ranked("b", list(range(1000, 1100)))], "local")
    for count in range(len(order)):
        gone = order.gone(count)
        assert abs(gone["a"] / 10 - gone["b"] / 100) <= 0.11


def test_multiples_never_take_more_than_was_ranked():
    group = ranked("a", [float(i) for i in range(12)], least=2, multiple=4)
    order = RemovalOrder([group], "global")
    assert group.most == 8
    assert [order.gone(n)["a"] for n in range(9)] == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def quadratic(units: dict[str, int]):
    def left(gone) -> float:
        shares = [(1 - gone[key] / count) ** 2 for key, count in units.items()]
        return sum(shares) / len(shares)

    return left


def test_targets_are_met_in_few_tries():
    units = {f"g{i}": 200 for i in range(20)}
    generator = torch.Generator().manual_seed(0)
    groups = [Ranked.of(key, torch.rand(n, generator=generator), 20) for key, n in units.items()]
    for scope in ("global", "local"):
        order = RemovalOrder(groups, scope)
        for target in (0.9, 0.5, 0.1):
            found = find(order, quadratic(units), target)
            assert abs(found.left - target) < 0.002
            assert found.tries <= 12


def test_where_steps_are_large_other_groups_fill_in():
    units = {"wide": 64, "narrow": 32, "tiny": 8}
    groups = [
        ranked("wide", [float(i) for i in range(64)], multiple=32),
        ranked("narrow", [float(i) + 0.5 for i in range(32)], multiple=2),
        ranked("tiny", [float(i) for i in range(8)], multiple=2),
    ]
    sizes = quadratic(units)
    possible = [
        sizes({"wide": w, "narrow": n, "tiny": t})
        for w, n, t in itertools.product((0, 32), range(0, 31, 2), range(0, 7, 2))
    ]
    reachable = [t / 100 for t in range(30, 100) if min(abs(size - t / 100) for size in possible) < 0.002]
    for target in reachable:
        found = find(RemovalOrder(groups, "global"), sizes, target)
        assert abs(found.left - target) <= 0.01, (target, found)


def test_what_cannot_be_reached_gives_the_nearest():
    found = find(RemovalOrder([ranked("a", [0.0, 1.0, 2.0, 3.0], least=3)], "global"), quadratic({"a": 4}), 0.1)
    assert found.gone == {"a": 1}
    assert found.left == 0.5625
