"""Taps against the literal extension layer with real parameters."""

import pytest
import torch
import torch.nn.functional as F

from ippro_tp.errors import ObservationError
from ippro_tp.extension import LiteralExtension, Tap, require_grad, sample_sums


@pytest.mark.parametrize(
    "sigma", [F.relu, F.silu, F.gelu, torch.tanh, lambda x: x], ids=["relu", "silu", "gelu", "tanh", "identity"]
)
@pytest.mark.parametrize(("shape", "axis"), [((4, 5, 3, 3), 1), ((4, 6, 5), 2), ((4, 5), 1)])
def test_tap_reads_the_gradient_of_D(sigma, shape, axis):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    psi = LiteralExtension(sigma, torch.rand(5, dtype=torch.float64), axis)
    weight = torch.randn(shape, dtype=torch.float64)
    (psi(x) * weight).sum().backward()

    seen = []
    y = sigma(x) if sigma(x) is not x else x.clone()
    tap = Tap(x, y, axis, 4, seen.append, "sigma")
    (y * weight).sum().backward()
    assert seen[0].shape == (4, 5)
    torch.testing.assert_close(seen[0].sum(0), psi.D.grad)
    assert tap.storage != 0


def test_literal_layer_is_not_lossless_in_float32_but_the_tap_is():
    torch.manual_seed(0)
    x = torch.randn(64, 32, 8, 8, requires_grad=True)
    psi = LiteralExtension(F.relu, 1e3 * torch.rand(32))
    y = F.relu(x)
    reference = y.detach().clone()
    Tap(x, y, 1, 64, lambda sums: None, "relu")
    assert torch.equal(y, reference)
    torch.testing.assert_close(psi(x), reference, atol=1e-3, rtol=0)


def test_a_copy_survives_being_overwritten():
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    y = x * 3
    seen = []
    tap = Tap(y, y, 1, 1, seen.append, "layer")
    tap.copy_value()
    y.relu_()
    y.sum().backward()
    assert seen[0].tolist() == [[0.0, 6.0]]  # gradient at y before relu_: 0 and 1


def test_unnoticed_overwriting_is_an_error():
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    y = x * 3
    Tap(y, y, 1, 1, lambda sums: None, "layer3")
    y.relu_()
    with pytest.raises(ObservationError, match=r"layer3.*overwritten"):
        y.sum().backward()


def test_closed_taps_are_silent():
    x = torch.ones(1, 2, requires_grad=True)
    y = x * 2
    seen = []
    tap = Tap(y, y, 1, 1, seen.append, "layer")
    tap.close()
    tap.close()
    y.sum().backward()
    assert seen == []


def test_rows_of_windows_are_summed_to_samples():
    g = torch.randn(6, 4, 5)
    sums = sample_sums(g, torch.ones_like(g), axis=2, batch=2)
    torch.testing.assert_close(sums, g.view(2, 3, 4, 5).sum((1, 2)))
    with pytest.raises(ObservationError, match="batch of 4"):
        sample_sums(g, g, axis=2, batch=4)


def test_half_precision_is_summed_in_float32():
    g = torch.full((1, 1, 300, 300), 1.0, dtype=torch.bfloat16)
    assert sample_sums(g, g, 1, 1).item() == 90_000.0


def test_require_grad_allows_in_place_and_views():
    base = torch.randn(6, 4)
    for x in (base, base.view(2, 3, 4)):
        out = require_grad(x)
        assert out.requires_grad
        assert torch.equal(out, x)
        out.relu_()
        out.sum().backward()
