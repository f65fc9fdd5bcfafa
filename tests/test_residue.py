"""Nothing is left behind: the model is as before, whatever happens inside a calibration."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ippro_tp import NotCalibratedError, ObservationError, PROImportance
from ippro_tp.graph.groups import groups_of

from .nets import CASES

HOOKS = [name for name in nn.Module().__dict__ if "hook" in name]


def snapshot(model):
    """Everything about a model that a calibration could touch."""
    state = {}
    for name, module in model.named_modules():
        state[name, "attributes"] = sorted(module.__dict__)
        state[name, "training"] = module.training
        state[name, "class"] = type(module)
        state[name, "forward"] = "forward" in module.__dict__
        for hook in HOOKS:
            state[name, hook] = tuple(getattr(module, hook) or ())
    for name, p in model.named_parameters():
        state[name, "parameter"] = id(p)
        state[name, "value"] = p.detach().clone()
        state[name, "requires_grad"] = p.requires_grad
        state[name, "grad"] = None if p.grad is None else (id(p.grad), p.grad.clone())
        state[name, "parameter hooks"] = (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ()))
    for name, b in model.named_buffers():
        state[name, "buffer"] = (id(b), b.clone())
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_untouched(before, model):
    after = snapshot(model)
    assert before.keys() == after.keys()
    changed = [key for key in before if not same(before[key], after[key])]
    assert changed == []


@pytest.fixture(params=["expected", "paper"])
def ready(request):
    """A model in mixed modes with gradients, flags and buffers of its own; statistics from before."""
    case = CASES["residual"]
    model = case.model(torch.float32)
    imp = PROImportance(estimator=request.param)
    pruner = case.pruner(model, imp)
    x, labels = case.inputs(4, torch.float32)
    imp.calibrate(pruner, [(x, labels)], progress=False)
    model.train()
    model.blocks[1].eval()
    F.cross_entropy(model(x), labels).backward()
    model.fc.weight.grad = None
    model.blocks[0]["conv1"].weight.requires_grad_(False)
    model.register_forward_hook(lambda *args: None)
    return model, imp, pruner, x, labels


class Boom(Exception):
    pass


def loop(model, imp, pruner, x, labels, steps=2):
    with imp.observe(pruner):
        for _ in range(steps):
            F.cross_entropy(model(x), labels).backward()


def test_after_observe(ready):
    model = ready[0]
    before = snapshot(model)
    loop(*ready)
    assert_untouched(before, model)


def test_after_calibrate(ready):
    model, imp, pruner, x, labels = ready
    before = snapshot(model)
    imp.calibrate(pruner, [(x, labels)], progress=False)
    imp.calibrate(model, [(x, labels)], progress=False)
    assert_untouched(before, model)


def test_random_streams_are_the_users_own(ready):
    model, imp, pruner, x, labels = ready
    state = torch.get_rng_state()
    imp.calibrate(pruner, [(x, labels)], progress=False)
    imp.calibrate(model, [(x, labels)], progress=False)
    [imp(group) for group in groups_of(pruner)]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_optimizer_step_inside_does_nothing(ready):
    model, imp, pruner, x, labels = ready
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    before = snapshot(model)
    with imp.observe(pruner):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
    assert_untouched(before, model)


def no_grad(model, imp, pruner, x, labels):
    with imp.observe(pruner), torch.no_grad():
        model(x)


def inference_mode(model, imp, pruner, x, labels):
    with imp.observe(pruner), torch.inference_mode():
        model(x)


def no_backward(model, imp, pruner, x, labels):
    with imp.observe(pruner):
        model(x)


def not_called(model, imp, pruner, x, labels):
    with imp.observe(pruner):
        model.fc(torch.ones(1, 6))


def empty_loader(model, imp, pruner, x, labels):
    imp.calibrate(pruner, [], progress=False)


def vector_loss(model, imp, pruner, x, labels):
    imp.calibrate(pruner, [(x, labels)], lambda out, y: F.cross_entropy(out, y, reduction="none"), progress=False)


def python_loss(model, imp, pruner, x, labels):
    imp.calibrate(pruner, [(x, labels)], lambda out, y: 1.0, progress=False)


def nan_loss(model, imp, pruner, x, labels):
    imp.calibrate(pruner, [(x, labels)], lambda out, y: out.sum() * float("nan"), progress=False)


def nan_input(model, imp, pruner, x, labels):
    imp.calibrate(pruner, [(x * float("nan"), labels)], F.cross_entropy, progress=False)


def detached_loss(model, imp, pruner, x, labels):
    imp.calibrate(pruner, [(x, labels)], lambda out, y: out.detach().sum(), progress=False)


def changing_activations(model, imp, pruner, x, labels):
    with imp.observe(pruner):
        F.cross_entropy(model(x), labels).backward()
        relu, model.relu = model.relu, nn.SiLU()
        try:
            F.cross_entropy(model(x), labels).backward()
        finally:
            model.relu = relu


def late_backward(model, imp, pruner, x, labels):
    with imp.observe(pruner):
        loss = F.cross_entropy(model(x), labels)
        loss.backward(retain_graph=True)
        model(x)
        loss.backward()


def compiled(model, imp, pruner, x, labels):
    wrapper = nn.Module()  # what torch.compile(model) returns, without its own traces on the model
    wrapper._orig_mod = model
    imp.calibrate(wrapper, [(x, labels)], progress=False)


def wrong_target(model, imp, pruner, x, labels):
    imp.calibrate("resnet18", [(x, labels)], progress=False)


def in_forward(model, imp, pruner, x, labels):
    handle = model.blocks[1]["conv2"].register_forward_pre_hook(raise_boom)
    try:
        loop(model, imp, pruner, x, labels)
    finally:
        handle.remove()


def in_backward(model, imp, pruner, x, labels):
    with imp.observe(pruner):
        out = model(x)
        out.register_hook(raise_boom)
        out.sum().backward()


def in_deep_backward(model, imp, pruner, x, labels):
    def hook(module, args, y):
        y.register_hook(raise_boom)

    handle = model.blocks[0]["bn1"].register_forward_hook(hook)
    try:
        loop(model, imp, pruner, x, labels)
    finally:
        handle.remove()


def between_batches(model, imp, pruner, x, labels):
    with imp.observe(pruner):
        F.cross_entropy(model(x), labels).backward()
        raise Boom


def raise_boom(*args):
    raise Boom


FAULTS = {
    no_grad: (ObservationError, "no_grad"),
    inference_mode: (ObservationError, "inference_mode"),
    no_backward: (ObservationError, r"loss\.backward\(\)"),
    not_called: (ObservationError, "never called"),
    empty_loader: (ValueError, "loader is empty"),
    vector_loss: (ValueError, r"shape \(4,\).*one number"),
    python_loss: (ValueError, "float.*one number"),
    nan_loss: (ObservationError, "NaN or inf"),
    nan_input: (ObservationError, "NaN or inf"),
    detached_loss: (ObservationError, "detached"),
    changing_activations: (ObservationError, r"activations changed.*was relu.*now it is silu"),
    late_backward: (ObservationError, "already|had been counted"),
    compiled: (ObservationError, "_orig_mod"),
    wrong_target: (TypeError, "pruner.*str"),
    in_forward: (Boom, None),
    in_backward: (Boom, None),
    in_deep_backward: (Boom, None),
    between_batches: (Boom, None),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_after_an_error_the_model_and_the_statistics_are_as_before(ready, fault):
    model, imp, pruner, x, labels = ready
    error, message = FAULTS[fault]
    before = snapshot(model)
    scores = [imp(group) for group in groups_of(pruner)]
    with pytest.raises(error, match=message):
        fault(model, imp, pruner, x, labels)
    assert_untouched(before, model)
    assert all(map(torch.equal, [imp(group) for group in groups_of(pruner)], scores))
    loop(*ready)  # and it can be used again
    assert all(imp(group).isfinite().all() for group in groups_of(pruner))


def test_a_first_calibration_that_fails_leaves_no_statistics():
    case = CASES["residual"]
    model = case.model(torch.float32)
    imp = PROImportance()
    pruner = case.pruner(model, imp)
    with pytest.raises(Boom):
        between_batches(model, imp, pruner, *case.inputs(2, torch.float32))
    with pytest.raises(NotCalibratedError):
        imp(next(groups_of(pruner)))


@pytest.mark.parametrize("estimator", ["expected", "paper"])
@pytest.mark.parametrize("name", CASES)
def test_forward_values_are_the_same_to_the_bit(name, estimator):
    case = CASES[name]
    model = case.model(torch.float32)
    x, labels = case.inputs(4, torch.float32)
    plain = model(x)
    imp = PROImportance(estimator=estimator)
    pruner = case.pruner(model, imp)
    with imp.observe(pruner):
        watched = model(x)
        F.cross_entropy(watched, labels).backward()
    assert torch.equal(plain, watched)


def test_memory_does_not_grow_with_the_number_of_batches():
    case = CASES["concat"]
    model = case.model(torch.float32)
    x, labels = case.inputs(4, torch.float32)
    imp = PROImportance()
    pruner = case.pruner(model, imp)
    counts = []
    with imp.observe(pruner):
        for step in range(30):
            F.cross_entropy(model(x), labels).backward()
            if step in (9, 29):
                gc.collect()
                counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[1] <= counts[0]
    assert len(imp._sums) == 2 * len(imp._records) + 1  # sizes, products; samples
