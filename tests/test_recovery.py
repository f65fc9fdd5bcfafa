"""Recovery: never further from the unpruned model on held-out samples, and nothing but weights is changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from ippro_tp import Compensation, NotCalibratedError, ObservationError, Recovery
from ippro_tp.compensation import distilling
from ippro_tp.compensation.augmenting import is_image, mirrored, mixed, shifted
from ippro_tp.compensation.distilling import _schedule
from ippro_tp.compensation.orthogonal import Muon, orthogonalised
from tests.nets import Residual


def pair(seed: int = 0) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A pruned network, the unpruned one and inputs."""
    torch.manual_seed(seed)
    teacher = Residual().train()
    inputs = list(torch.randn(96, 3, 8, 8).split(32))
    for x in inputs:
        teacher(x)  # BatchNorm statistics that are not those of new weights
    teacher.eval()
    model = copy.deepcopy(teacher)
    ones = [block["conv1"] for block in model.blocks]
    pruner = tp.pruner.BasePruner(
        model,
        (inputs[0][:1],),
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.4,
        ignored_layers=[m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in ones],
    )
    pruner.step()
    return model, teacher, inputs


def recovery(inputs: list[Tensor], model: nn.Module, **options) -> Recovery:
    settings = {"steps": 30, "batch_size": 16, "held_out": 0.25} | options
    return Recovery(**settings).calibrate(model, inputs, progress=False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(model: nn.Module, teacher: nn.Module, inputs: list[Tensor]) -> float:
    with torch.no_grad():
        x = torch.cat(inputs)
        wanted = teacher.eval()(x)
        return float((model.eval()(x) - wanted).square().mean() / wanted.var(correction=0))


def test_comes_nearer_to_the_unpruned_model():
    model, teacher, inputs = pair()
    before = distance(model, teacher, inputs)
    report = recovery(inputs, model, steps=100, lr=1e-2).run(model, teacher, progress=True)
    assert report.after < 0.5 * report.before
    assert distance(model, teacher, inputs) < 0.5 * before
    assert report.steps == 100
    assert report.kept > 0
    assert report.held_out == 24
    assert "held-out" in str(report)


def test_the_report_says_what_the_held_out_samples_say():
    model, teacher, inputs = pair()
    how = recovery(inputs, model, lr=1e-2)
    start = copy.deepcopy(model)
    report = how.run(model, teacher)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:24]
    held_out = [torch.cat(inputs)[order]]
    assert report.before == pytest.approx(distance(start, teacher, held_out), rel=1e-4)
    assert report.after == pytest.approx(distance(model, teacher, held_out), rel=1e-4)


@pytest.mark.parametrize("lr", [10.0, 1e30])
def test_a_rate_that_destroys_is_lowered_and_never_ends_worse(lr):
    model, teacher, inputs = pair()
    before = state(model)
    report = recovery(inputs, model, lr=lr, steps=40).run(model, teacher)
    assert report.after <= report.before
    assert report.kept > 0 or same(before, state(model))
    assert report.lr <= lr


def test_a_gradient_that_is_not_finite_is_not_followed():
    model, teacher, inputs = pair()

    def spoilt(x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)

    before = state(model)
    report = recovery(inputs, model, augment=spoilt).run(model, teacher)
    assert report.kept == 0
    assert report.after == report.before
    assert same(before, state(model))


def test_an_equal_model_is_left_alone():
    _, teacher, inputs = pair()
    model = copy.deepcopy(teacher)
    before = state(model)
    report = recovery(inputs, model).run(model, teacher)
    assert (report.before, report.after, report.steps, report.kept) == (0, 0, 0, 0)
    assert same(before, state(model))


def test_the_seed_decides():
    results = []
    for seed in (0, 0, 1):
        model, teacher, inputs = pair()
        torch.manual_seed(len(results))
        torch.rand(len(results))  # the global stream has no say

        def noisy(x: Tensor) -> Tensor:
            return x + 0.1 * torch.randn_like(x)

        recovery(inputs, model, augment=noisy, seed=seed, lr=1e-2).run(model, teacher)
        results.append(state(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("training", [False, True])
def test_only_weights_change(training):
    model, teacher, inputs = pair()
    model.train(training)
    teacher.train(not training)
    model.fc.weight.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    grad = model.stem.weight.grad
    before, taught = state(model), state(teacher)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    how = recovery(inputs, model, lr=1e-2)
    with torch.no_grad():
        how.run(model, teacher)
    after = state(model)
    assert torch.equal(torch.rand(3), expected)
    assert same(taught, state(teacher))
    assert teacher.training is not training
    assert all(m.training is training for m in model.modules())
    assert torch.equal(before["fc.weight"], after["fc.weight"])
    assert not model.fc.weight.requires_grad
    assert not torch.equal(before["stem.weight"], after["stem.weight"])
    assert model.stem.weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert model.fc.bias.grad is None
    for name, _ in model.named_buffers():
        assert torch.equal(before[name], after[name]), name


def test_a_model_without_gradients_is_trained_as_a_whole():
    model, teacher, inputs = pair()
    model.requires_grad_(False)
    before = state(model)
    recovery(inputs, model, lr=1e-2).run(model, teacher)
    assert not torch.equal(before["fc.weight"], state(model)["fc.weight"])
    assert not any(p.requires_grad for p in model.parameters())


def test_an_exception_restores_the_weights():
    model, teacher, inputs = pair()
    calls = []

    def failing(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return x

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        recovery(inputs, model, augment=failing, lr=1e-2).run(model, teacher)
    assert same(before, state(model))
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


class Wrapped(nn.Module):
    """Gives more than a tensor, and takes two inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.hidden, self.out = kind, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor):
        x = self.out(F.relu(self.hidden(torch.cat([a, b], 1))))
        outputs = {"dict": {"logits": x, "ids": x.argmax(1)}, "tuple": (x, [x.argmax(1), x.mean(1)])}
        return outputs[self.kind]


@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.parametrize("named", [False, True])
def test_any_structure_of_inputs_and_outputs(kind, named):
    torch.manual_seed(0)
    teacher = Wrapped(kind)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.hidden.weight[:3] = 0
    a, b = torch.randn(64, 2), torch.randn(64, 4)
    inputs = [{"a": a, "b": b}] if named else [((a, b), torch.zeros(64))]
    seen = []

    def mirrored(inputs):
        seen.append(type(inputs))
        return {"a": -inputs["a"], "b": inputs["b"]} if named else (-inputs[0], inputs[1])

    how = Recovery(steps=40, lr=1e-2, augment=mirrored).calibrate(model, inputs, progress=False)
    report = how.run(model, teacher)
    assert report.after < report.before
    assert set(seen) == {dict if named else tuple}


def test_images_are_mirrored_by_chance_and_nothing_else_is():
    images = torch.randn(4, 3, 2, 4)
    turned = torch.tensor([True, False, False, True])
    found = mirrored(images, turned)
    assert torch.equal(found[turned], images.flip(3)[turned])
    assert torch.equal(found[~turned], images[~turned])
    assert not is_image((images, images), {})
    assert not is_image((), {"x": images})
    layer = nn.Linear(4, 2)
    results = []
    for augment in ("mirror", None):
        model = copy.deepcopy(layer)
        with torch.no_grad():
            model.weight[:, 0] = 0
        how = Recovery(steps=10, augment=augment, lr=1e-2)
        how.calibrate(model, [torch.linspace(-1, 1, 256).view(64, 4)], progress=False).run(model, layer)
        results.append(state(model))
    assert same(*results)


def test_images_are_shifted_by_up_to_an_eighth():
    images = torch.arange(2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    padded = F.pad(images, (3, 3, 2, 2), mode="reflect")
    windows = [padded[:, :, top : top + 16, left : left + 24] for top in range(5) for left in range(7)]
    seen = set()
    for seed in range(20):
        found = shifted(images, torch.Generator().manual_seed(seed))
        places = [[i for i, w in enumerate(windows) if torch.equal(w[n], found[n])] for n in range(2)]
        assert all(len(place) == 1 for place in places)
        seen |= {place[0] for place in places}
    assert len(seen) > 15
    small = torch.randn(2, 3, 4, 4)
    assert torch.equal(shifted(small, torch.Generator()), small)


def test_half_of_the_images_are_mixed_with_another():
    images = torch.eye(5).view(5, 5, 1, 1)
    found = mixed(images, torch.Generator().manual_seed(0)).flatten(1)
    shares = torch.rand(2, generator=torch.Generator().manual_seed(0))
    for i, share in enumerate(shares):
        expected = torch.zeros(5)
        expected[i], expected[i - 1] = share, 1 - share
        assert torch.allclose(found[i], expected)
    assert torch.equal(found[2:], images.flatten(1)[2:])
    assert torch.equal(mixed(images[:1], torch.Generator()), images[:1])


@pytest.mark.parametrize("augment", ["mirror", None])
def test_a_teacher_that_is_asked_once_says_the_same(augment, monkeypatch):
    results, calls = [], []
    for most in (1 << 28, 0):
        monkeypatch.setattr(distilling, "TOLD", most)
        model, teacher, inputs = pair()
        handle = teacher.register_forward_hook(lambda *_: calls.append(1))
        recovery(inputs, model, lr=1e-3, augment=augment, steps=60).run(model, teacher)
        handle.remove()
        results.append(state(model))
        calls.append(0)
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-4), name
    once, always = "".join(map(str, calls)).split("0")[:2]
    assert len(once) < len(always)


def test_samples_that_are_not_finite_are_left_out():
    model, teacher, inputs = pair()
    inputs[1][3] = torch.nan
    report = recovery(inputs, model, lr=1e-2).run(model, teacher)
    assert report.held_out == 24
    assert report.after < report.before


def test_samples_of_compensation_are_shared():
    model, teacher, inputs = pair()
    compensation = Compensation().calibrate(model, inputs, progress=False)
    how = Recovery(steps=10, lr=1e-2)
    how.merge(compensation)
    assert how.run(model, teacher).held_out == 6
    again = Recovery(steps=10, lr=1e-2)
    again.load_state_dict(how.state_dict())
    assert again.run(copy.deepcopy(model), teacher).held_out == 6


def test_fewer_samples_than_a_batch():
    model, teacher, inputs = pair()
    report = recovery(inputs, model, batch_size=500, steps=10, lr=1e-2).run(model, teacher)
    assert report.after < report.before


def test_the_rate_rises_and_falls():
    rates = [_schedule(step / 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2, rel=0.01)
    assert rates.index(max(rates)) == 4
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_refusals():
    model, teacher, inputs = pair()
    with pytest.raises(NotCalibratedError, match=r"recovery\.calibrate"):
        Recovery().run(model, teacher)
    how = recovery(inputs, model)
    with pytest.raises(ValueError, match="share parameters"):
        how.run(model, model)
    with pytest.raises(ObservationError, match="at least two"):
        recovery([inputs[0][:1]], model).run(model, teacher)
    other = copy.deepcopy(model)
    other.fc = nn.Linear(6, 3)
    with pytest.raises(ObservationError, match="ignored_layers"):
        how.run(other, teacher)
    for options in (
        {"steps": 0},
        {"lr": 0.0},
        {"batch_size": 0},
        {"held_out": 1.0},
        {"augment": "x"},
        {"max_samples": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Recovery(**options)


def test_steps_are_the_orthogonal_factor_of_the_momentum():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6), (5, 5)):
        matrix = torch.randn(shape, dtype=torch.float64)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonalised(matrix)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_weights_follow_muon_and_the_rest_adam():
    torch.manual_seed(0)
    weight, depthwise, bias = (nn.Parameter(torch.zeros(*s)) for s in ((4, 3, 2, 2), (6, 1, 3, 3), (7,)))
    ours = Muon([weight, depthwise, bias], lr=0.01)
    twins = [nn.Parameter(p.detach().clone()) for p in (depthwise, bias)]
    adam = torch.optim.Adam(twins, lr=0.01, betas=(0.9, 0.99))
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        for p, twin in zip((depthwise, bias), twins, strict=True):
            p.grad = twin.grad = torch.randn_like(p)
        before, first = weight.detach().clone(), "momentum" not in ours.state[weight]
        ours.step()
        adam.step()
        step = (weight.detach() - before).flatten(1)
        assert step.square().mean().sqrt() == pytest.approx(0.01 * 0.3, rel=0.4)  # a row of 12 has length 1
        if first:
            u, _, v = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
            assert torch.nn.functional.cosine_similarity(step.flatten(), -(u @ v).flatten(), dim=0) > 0.95
    for p, twin in zip((depthwise, bias), twins, strict=True):
        assert torch.allclose(p, twin, atol=1e-7)


def test_the_rate_follows_the_error_where_none_is_given():
    model, teacher, inputs = pair()
    report = recovery(inputs, model, steps=5).run(model, teacher)
    assert report.lr == pytest.approx(min(2e-3, 1e-2 * report.before))
