"""The layout of samples in rows, told from masks of what changes: no model, no hook."""

import pytest
import torch

from ippro_tp.tracing.extension import sample_sums
from ippro_tp.tracing.rows import Rows, infer

N = 3


def masks(outer, inner, samples=(0, 1), share=1.0):
    """What changes with each of ``samples`` where rows lie as ``(outer, N, inner)``; some rows may not."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for sample in samples:
        mask = torch.zeros(outer, N, inner, dtype=torch.bool)
        mask[:, sample] = torch.rand(outer, inner, generator=generator) < share
        found[sample] = mask.flatten()
    return found


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 49), (2, 1), (7, 1), (7, 4), (4, 12), (12, 7)])
def test_any_three_factors_are_found(outer, inner, share):
    found = infer(masks(outer, inner, share=share), N)
    assert found is not None
    if share == 1.0 or outer * inner > 20:
        assert (found.kind, found.outer, found.count) == ("samples", outer, outer * N * inner)
    assert found.fits(outer * 8 * inner, 8)
    assert not found.fits(outer * 8 * inner + 8, 8)


def test_rows_that_nothing_changes_say_nothing():
    assert infer({0: torch.zeros(6, dtype=torch.bool), 1: torch.zeros(6, dtype=torch.bool)}, N) is None


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ([1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], "several samples"),
        ([1, 0, 0, 0], [0, 1, 0, 0], "4 rows for 3 samples"),
        ([0, 1, 0], [1, 0, 0], "no order"),  # the batch was turned round
    ],
)
def test_rows_that_are_nobodys_are_called_so(first, second, why):
    found = infer({0: torch.tensor(first).bool(), 1: torch.tensor(second).bool()}, N)
    assert found.kind == "mixed"
    assert why in found.why


def test_images_of_another_size_bring_as_many_rows_each_only_if_they_lie_one_after_another():
    assert Rows("samples", 1, 6, 2).fits(40, 8, same_form=False)
    assert not Rows("samples", 1, 6, 2).fits(40, 8)
    assert not Rows("samples", 3, 6, 2).fits(40, 8, same_form=False)
    assert Rows("shared", 1, 6, 2).fits(40, 8)


@pytest.mark.parametrize(
    ("shape", "axis", "outer"),
    [
        ((6, 5, 4, 4), 1, 1),
        ((6, 5, 4, 4), 1, 2),  # views joined along the batch
        ((7, 3, 5), 2, 7),  # time first
        ((14, 3, 5), 2, 7),
        ((4, 9, 5), 2, 4),  # heads beside the samples
        ((5, 7, 6), 0, 14),  # channels first of all, time, then samples
        ((2, 3, 5), 2, 1),  # samples across two dimensions
        ((7, 2, 3, 2, 5), 4, 7),
        ((2, 6, 6, 5), 3, 4),
    ],
)
def test_sums_of_rows_in_any_layout(shape, axis, outer):
    torch.manual_seed(0)
    batch = 3 if shape != (2, 3, 5) else 6
    g, x = torch.randn(shape), torch.randn(shape)
    products = (g * x).movedim(axis, -1).reshape(-1, shape[axis])
    inner = len(products) // (outer * batch)
    owner = torch.arange(len(products)) // inner % batch
    expected = torch.zeros(batch, shape[axis]).index_add_(0, owner, products)
    torch.testing.assert_close(sample_sums(g, [x], axis, batch, outer)[0], expected)
    torch.testing.assert_close(
        sample_sums(g, [x], axis, batch, None)[0], expected.sum(0).div(batch).expand(batch, -1)
    )
