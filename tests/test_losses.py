"""The label-free losses: what their gradients are, and that they depend on the samples alone."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ippro_tp import FisherNoise, LogitNoise, ObservationError
from ippro_tp.calibration.losses import cross_entropy, main_output


def noise_of(loss, z):
    """Per-sample noise: the gradient of the summed loss with respect to the output."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z, None) * z.shape[0], z)[0]


@pytest.mark.parametrize("loss", [FisherNoise, LogitNoise])
@pytest.mark.parametrize("shape", [(12, 10), (12, 5, 3, 2), (12, 4, 7)])
def test_noise_does_not_depend_on_how_samples_are_batched(loss, shape):
    torch.manual_seed(0)
    z = torch.randn(shape)
    if loss is FisherNoise and z.dim() == 3:  # tokens or sequences: that has to be said
        loss = partial(FisherNoise, dim=2)
    together = noise_of(loss(seed=3), z)
    one = loss(seed=3)
    cut = torch.cat([noise_of(one, part) for part in z.split([1, 4, 7])])
    torch.testing.assert_close(cut, together, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(noise_of(loss(seed=4), z), together)


def test_global_random_stream_is_not_touched():
    state = torch.get_rng_state()
    FisherNoise()(torch.zeros(2, 3), None)
    LogitNoise()(torch.zeros(2, 3), None)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_covariance_is_the_fisher_information_of_the_softened_prediction(temperature):
    z = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    noise = noise_of(FisherNoise(temperature), z.expand(200_000, 4))
    p = (z[0] / temperature).softmax(0)
    expected = p.diag() - p.outer(p)
    torch.testing.assert_close(noise.T @ noise / len(noise), expected, atol=4e-3, rtol=0)
    torch.testing.assert_close(noise.sum(1), torch.zeros(len(noise)), atol=1e-5, rtol=0)


def test_logit_noise_is_standard_normal():
    noise = noise_of(LogitNoise(), torch.zeros(100_000, 3))
    torch.testing.assert_close(noise.T @ noise / len(noise), torch.eye(3), atol=2e-2, rtol=0)
    assert noise.isfinite().all()


def test_the_tensor_is_found_in_what_models_return():
    a, b = torch.ones(2, 3), torch.zeros(2, 3)

    class Output:
        logits = a

    for value in (a, (a, b), [a], {"out": a, "aux": b}, {"aux": b, "logits": a}, Output(), (None, (a,))):
        assert main_output(value) is a
    with pytest.raises(ObservationError, match=r"loss_fn"):
        main_output({"labels": torch.ones(2, dtype=torch.long)})
    with pytest.raises(ObservationError, match=r"holds no class scores"):
        FisherNoise()(torch.ones(4), None)


def test_cross_entropy_needs_labels():
    z, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert cross_entropy((z,), y) == F.cross_entropy(z, y)
    with pytest.raises(ObservationError, match="labels"):
        cross_entropy(z, None)
