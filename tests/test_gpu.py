"""On a CUDA device: the scores, cuts and weights of the CPU, in any precision, with one process or several."""

from __future__ import annotations

import copy
import gc
import io
import os
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ippro_tp import (
    Compensation,
    FisherNoise,
    LogitNoise,
    PROImportance,
    SpaSPImportance,
    attention_heads,
    load_pruned,
    save_pruned,
    update_attention,
)

from .nets import CASES, make_pruner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
MAKERS = {
    "expected": PROImportance,
    "squares": lambda: PROImportance(power=2, reference="origin"),
    "mean": lambda: PROImportance(reference="mean"),
    "single": lambda: PROImportance(group_reduction="mean"),
    "paper": lambda: PROImportance("paper", step_size=0.5),
    "paper norm": lambda: PROImportance("paper", target="norm", group_reduction="sum"),
    "spasp": SpaSPImportance,
    "spasp gated": lambda: SpaSPImportance(signed="gated"),
}


def flat(record, model):
    """A cost for groups that no forward pass has called."""
    return 1.0


UNCALLED = {
    "expected": lambda: PROImportance(cost=flat),
    "log": lambda: PROImportance(cost=flat, depletion="log", power=2),
    "coupled": lambda: PROImportance(cost=None, depletion="coupled"),
    "compensated": lambda: PROImportance(compensated=True),
    "normalised": lambda: PROImportance(cost=None, depletion=None, normalizer="mean"),
    "single": lambda: PROImportance(group_reduction="mean", cost=None),
    "mean": lambda: PROImportance(reference="mean", cost=flat),
    "paper": MAKERS["paper"],
    "spasp": SpaSPImportance,
    "spasp gated": MAKERS["spasp gated"],
}
SAVED = {name: MAKERS[name] for name in ("expected", "single", "paper", "spasp")}


@pytest.fixture(autouse=True)
def _exact_float32():
    """No TF32: its rounding would hide mistakes."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


def scores_of(imp, pruner):
    """Scores of all groups that the pruner's step asks for."""
    found = []
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        scores = imp(group)
        if scores is not None:
            found.append(scores)
    assert found
    return found


def assert_on(scores, device):
    assert {s.device.type for s in scores} == {torch.device(device).type}
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in scores)


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(a, b, strict=True):
        x, y = x.detach().cpu(), y.detach().cpu()
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


def correlation(a, b):
    a, b = (torch.cat([(s / s.abs().mean()).cpu() for s in scores]) for scores in (a, b))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def batches_of(case, dtype=torch.float64, samples=10, size=4):
    x, labels = case.inputs(samples, dtype)
    return list(zip(x.split(size), labels.split(size), strict=True))


def on_device(case, device, make, dtype=torch.float64, loss=F.cross_entropy, **options):
    """An importance calibrated on ``device`` from batches on the CPU, with its pruner."""
    model = case.model(dtype).to(device)
    example = case.inputs(1, dtype)[0].to(device)
    imp = make()
    pruner = make_pruner(model, example, imp, [model.get_submodule(n) for n in case.ignored], **options)
    imp.calibrate(pruner, batches_of(case, dtype), loss_fn=loss, progress=False)
    return imp, pruner


# -- scores and cuts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_cpu(name, maker, scope):
    if maker == "paper norm" and name not in ("residual", "depthwise"):
        pytest.skip("has no BatchNorm")
    if maker == "spasp gated" and name == "transposed":
        pytest.skip("is not for transposed convolutions")
    if scope == "local" and maker.startswith("spasp"):
        pytest.skip("votes over all sizes: a rounding may cast one of them otherwise")
    results = {}
    for device in ("cpu", CUDA):
        imp, pruner = on_device(CASES[name], device, MAKERS[maker], global_pruning=scope == "global")
        results[device] = scores_of(imp, pruner)
        assert_on(results[device], device)
    assert_close(results[CUDA], results["cpu"])


@pytest.mark.parametrize("loss", [None, LogitNoise, FisherNoise], ids=["default", "logits", "fisher"])
def test_losses_that_draw_noise_draw_the_same_on_both(loss):
    case, results = CASES["residual"], []
    for device in ("cpu", CUDA):
        imp, pruner = on_device(case, device, PROImportance, loss=loss and loss(), global_pruning=True)
        results.append(scores_of(imp, pruner))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("maker", SAVED)
def test_the_same_channels_are_pruned(maker):
    pruned = []
    for device in ("cpu", CUDA):
        pruner = on_device(CASES["residual"], device, MAKERS[maker], global_pruning=True)[1]
        pruner.step()
        pruned.append(pruner.model)
    x = CASES["residual"].inputs(3)[0]
    assert_close([pruned[1](x.to(CUDA))], [pruned[0](x)], 1e-8)
    assert {n: p.shape for n, p in pruned[0].named_parameters()} == {
        n: p.shape for n, p in pruned[1].named_parameters()
    }
    assert sum(p.numel() for p in pruned[0].parameters()) < sum(
        p.numel() for p in CASES["residual"].model().parameters()
    )


def resnet18():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model, [model.fc]


def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10).eval()
    return model, [model.head]


REAL = {"resnet18": resnet18, "vit": vit}


def real_pruner(build, device, imp, **options):
    model, ignored = build()
    model = model.to(device)
    heads = attention_heads(model)
    return make_pruner(model, torch.randn(1, 3, 32, 32, device=device), imp, ignored, num_heads=heads, **options)


def real_images(samples=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 32, 32, generator=generator)
    return x, torch.randint(0, 10, (samples,), generator=generator)


@pytest.mark.parametrize("maker", ["expected", "paper", "spasp"])
@pytest.mark.parametrize("net", REAL)
def test_scores_of_real_networks_in_float32(net, maker):
    x, labels = real_images()
    results = []
    for device in ("cpu", CUDA):
        imp = MAKERS[maker]()
        pruner = real_pruner(REAL[net], device, imp, global_pruning=True)
        imp.calibrate(pruner, zip(x.split(16), labels.split(16), strict=True), F.cross_entropy, progress=False)
        results.append(scores_of(imp, pruner))
    assert_on(results[1], CUDA)
    assert correlation(*results) > 0.9999
    assert_close(results[1], results[0], 1e-2)


@pytest.mark.parametrize("net", REAL)
def test_a_real_network_is_calibrated_pruned_compensated_and_saved(net, tmp_path):
    x, _ = real_images(64)
    x = x.to(CUDA)
    imp = PROImportance()
    pruner = real_pruner(REAL[net], CUDA, imp, global_pruning=True, pruning_ratio=0.3, round_to=4)
    model = pruner.model
    before, wanted = sum(p.numel() for p in model.parameters()), model(x).detach()
    imp.calibrate(pruner, x.split(16), progress=False)
    assert str(imp.report())
    comp = Compensation().calibrate(pruner, x.split(16), progress=False)
    report = comp.step(pruner)
    update_attention(pruner)
    assert report.rows
    assert not any(row.skipped for row in report.rows), str(report)
    assert sum(p.numel() for p in model.parameters()) < before
    assert {p.device for p in model.parameters()} == {CUDA}
    assert F.mse_loss(model(x), wanted) < wanted.var()

    def builder():
        return REAL[net]()[0]

    save_pruned(model, tmp_path, builder=builder)
    outputs = {}
    for device in ("cpu", CUDA):
        loaded = load_pruned(tmp_path, builder=builder, device=device)
        assert {p.device.type for p in loaded.parameters()} == {torch.device(device).type}
        outputs[device] = loaded(x.to(device))
    assert_close([outputs[CUDA]], [model(x)], 1e-5)
    assert_close([outputs["cpu"]], [model(x)], 1e-3)


class Sometimes(nn.Module):
    """A branch that runs while the graph is traced, and not in the calibration."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(5, 8)
        self.fc = nn.Linear(8, 3)
        self.with_branch = True

    def forward(self, x):
        y = self.a(x).relu()
        if self.with_branch:
            y = y + self.c(self.b(x).relu())
        return self.fc(y)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("maker", UNCALLED)
def test_a_group_without_gradients_scores_zero_on_the_device_of_its_layers(maker, scope):
    results = []
    for device in ("cpu", CUDA):
        torch.manual_seed(0)
        model = Sometimes().double().to(device)
        imp = UNCALLED[maker]()
        x = torch.randn(12, 6, dtype=torch.float64).to(device)
        pruner = make_pruner(model, x[:1], imp, [model.fc], global_pruning=scope == "global")
        model.with_branch = False
        labels = torch.arange(12, device=device) % 3
        imp.calibrate(pruner, [(x, labels)], F.cross_entropy, progress=False)
        results.append(scores_of(imp, pruner))
        assert_on(results[-1], device)
        if hasattr(imp, "report"):
            assert str(imp.report())
        pruner.step()
    assert_close(results[1], results[0])


# -- Compensation ------------------------------------------------------------------------------------------------


def distinct(model):
    """Weights without ties: rounding must not decide which channel goes."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.dim() > 1):
            p.mul_(
                torch.linspace(1 + i / 10, 2, p.shape[0], dtype=p.dtype, device=p.device).view(
                    -1, *[1] * (p.dim() - 1)
                )
            )
    return model


def magnitude_pruner(case, device, dtype=torch.float64):
    model = distinct(case.model(dtype)).to(device)
    example = case.inputs(1, dtype)[0].to(device)
    ignored = [model.get_submodule(n) for n in case.ignored]
    return make_pruner(model, example, tp.importance.GroupMagnitudeImportance(), ignored)


@pytest.mark.parametrize("ridge", [None, 1e-3])
@pytest.mark.parametrize("name", CASES)
def test_compensated_weights_are_those_of_the_cpu(name, ridge):
    case, states = CASES[name], []
    for device in ("cpu", CUDA):
        pruner = magnitude_pruner(case, device)
        comp = Compensation(ridge).calibrate(pruner, batches_of(case, samples=48, size=16), progress=False)
        report = comp.step(pruner)
        assert report.rows
        states.append([p.detach() for p in pruner.model.parameters()])
    assert {p.device for p in states[1]} == {CUDA}
    assert_close(states[1], states[0], 1e-6)


def test_compensation_of_a_vit_with_heads_in_float32():
    x, _ = real_images(64)
    outputs = []
    for device in ("cpu", CUDA):
        pruner = real_pruner(vit, device, tp.importance.GroupMagnitudeImportance())
        distinct(pruner.model)
        comp = Compensation(ridge=1e-2).calibrate(pruner, x.split(16), progress=False)
        report = comp.step(pruner)
        assert report.rows
        outputs.append(pruner.model(x[:8].to(device)))
    assert_close(outputs[1:], outputs[:1], 1e-2)


def test_samples_that_were_observed_on_the_device_stay_there():
    case = CASES["residual"]
    pruner = magnitude_pruner(case, CUDA)
    comp = Compensation()
    with comp.observe(pruner):
        for x, _ in batches_of(case, samples=32, size=8):
            pruner.model(x.to(CUDA))
    assert comp.step(pruner).rows


# -- moving statistics -------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def devices_of(value):
    if isinstance(value, torch.Tensor):
        return {value.device.type}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return set().union(*map(devices_of, value)) if value else set()
    return set()


@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("maker", SAVED)
def test_statistics_of_one_device_are_loaded_on_the_other(maker, source, target):
    case = CASES["residual"]
    imp, pruner = on_device(case, source, SAVED[maker], global_pruning=True)
    wanted = scores_of(imp, pruner)
    state = through_a_file(imp.state_dict())
    assert devices_of(state) == {"cpu"}
    other = SAVED[maker]()
    model = case.model().to(target)
    pruner = make_pruner(model, case.inputs(1)[0].to(target), other, [model.fc], global_pruning=True)
    other.load_state_dict(state)
    found = scores_of(other, pruner)
    assert_on(found, target)
    assert_close(found, wanted)
    if maker in ("expected", "single"):
        assert str(other.report())
    pruner.step()
    assert model(case.inputs(2)[0].to(target)).isfinite().all()


@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("maker", SAVED)
def test_statistics_of_two_devices_are_merged(maker, source, target):
    case = CASES["residual"]
    imp, pruner = on_device(case, target, SAVED[maker], global_pruning=True)
    other, _ = on_device(case, source, SAVED[maker], global_pruning=True)
    imp.merge(other)
    merged = scores_of(imp, pruner)
    assert_on(merged, target)
    twice, pruner = on_device(case, target, SAVED[maker], global_pruning=True)
    twice.merge(copy.deepcopy(twice))
    assert_close(merged, scores_of(twice, pruner))


@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_samples_of_one_device_compensate_a_model_on_the_other(source, target):
    case = CASES["residual"]
    data = batches_of(case, samples=48, size=16)
    comp = Compensation().calibrate(magnitude_pruner(case, source), data, progress=False)
    state = through_a_file(comp.state_dict())
    assert devices_of(state) == {"cpu"}
    loaded = Compensation()
    loaded.load_state_dict(state)
    weights = []
    for one in (loaded, comp):  # from a file, and the very same object
        pruner = magnitude_pruner(case, target)
        assert one.step(pruner).rows
        weights.append([p.detach() for p in pruner.model.parameters()])
    pruner = magnitude_pruner(case, target)
    Compensation().calibrate(pruner, data, progress=False).step(pruner)
    wanted = [p.detach() for p in pruner.model.parameters()]
    for found in weights:
        assert {p.device.type for p in found} == {target}
        assert_close(found, wanted, 1e-6)


def test_samples_of_two_devices_are_merged():
    case = CASES["residual"]
    comp, other = (
        Compensation().calibrate(magnitude_pruner(case, device), batches_of(case), progress=False)
        for device in (CUDA, "cpu")
    )
    comp.merge(other)
    assert comp.step(magnitude_pruner(case, CUDA)).rows


def test_a_model_that_moves_after_calibration_is_scored_where_it_is():
    case = CASES["residual"]
    imp, pruner = on_device(case, CUDA, PROImportance, global_pruning=True)
    wanted = scores_of(imp, pruner)
    pruner.model.cpu()
    found = scores_of(imp, pruner)
    assert_on(found, "cpu")
    assert_close(found, wanted)
    pruner.step()
    assert pruner.model(case.inputs(2)[0]).isfinite().all()


# -- precision and memory layout ---------------------------------------------------------------------------------


def observed(model, pruner, imp, batches, context, scaler=None):
    options = {} if scaler is None else {"loss_scale": scaler}
    with imp.observe(pruner, **options):
        for x, labels in batches:
            with context():
                loss = F.cross_entropy(model(x), labels)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.update(scaler.get_scale() / 2)
    return scores_of(imp, pruner)


@pytest.mark.parametrize("kind", ["bf16", "fp16 with a GradScaler"])
@pytest.mark.parametrize("maker", ["expected", "paper"])
@pytest.mark.parametrize("net", REAL)
def test_autocast_gives_the_scores_of_float32_but_for_its_rounding(net, maker, kind):
    x, labels = real_images()
    batches = list(zip(x.to(CUDA).split(16), labels.to(CUDA).split(16), strict=True))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16

    @contextmanager
    def context():
        with torch.autocast("cuda", dtype):
            yield

    results = []
    for low in (False, True):
        imp = MAKERS[maker]()
        pruner = real_pruner(REAL[net], CUDA, imp)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0) if low and dtype == torch.float16 else None
        how = context if low else (lambda: torch.autocast("cuda", enabled=False))
        results.append(observed(pruner.model, pruner, imp, batches, how, scaler))
        assert_on(results[-1], CUDA)
    assert correlation(*results) > (0.97 if kind == "bf16" else 0.998)
    assert not all(map(torch.equal, *results))  # low precision was in use


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_is_pruned_and_compensated(dtype):
    case = CASES["residual"]
    model = case.model(dtype).to(CUDA)
    x, labels = (t.to(CUDA) for t in case.inputs(32, dtype))
    imp = PROImportance()
    pruner = make_pruner(model, x[:1], imp, [model.fc])
    imp.calibrate(pruner, [(x, labels)], F.cross_entropy, progress=False)
    assert_on(scores_of(imp, pruner), CUDA)
    assert Compensation().calibrate(pruner, [x], progress=False).step(pruner).rows
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(x).isfinite().all()


@pytest.mark.parametrize("maker", ["expected", "paper", "spasp"])
def test_channels_last_gives_equal_scores(maker):
    x, labels = (t.to(CUDA) for t in real_images())
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        imp = MAKERS[maker]()
        pruner = real_pruner(resnet18, CUDA, imp, global_pruning=True)
        pruner.model.to(memory_format=layout)
        images = x.contiguous(memory_format=layout)
        imp.calibrate(
            pruner, zip(images.split(16), labels.split(16), strict=True), F.cross_entropy, progress=False
        )
        results.append(scores_of(imp, pruner))
        assert Compensation().calibrate(pruner, images.split(16), progress=False).step(pruner).rows
    assert correlation(*results) > 0.9999
    assert_close(results[1], results[0], 1e-2)


# -- nothing left behind, nothing waited for ---------------------------------------------------------------------


@pytest.mark.parametrize("maker", ["expected", "paper", "spasp"])
def test_the_model_and_the_memory_of_the_device_are_as_before(maker):
    case = CASES["residual"]
    model = case.model(torch.float32).to(CUDA)
    x, labels = (t.to(CUDA) for t in case.inputs(8, torch.float32))
    F.cross_entropy(model(x), labels).backward()
    pruner = make_pruner(model, x[:1], None, [model.fc])

    def snapshot():
        state = {n: (id(p), p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
        return state | {n: (id(b), b.clone()) for n, b in model.named_buffers()}

    def run():
        imp = MAKERS[maker]()
        imp.calibrate(pruner, [(x, labels)] * 3, F.cross_entropy, progress=False)
        return imp

    run()  # libraries take their workspace
    before, random_before = snapshot(), torch.cuda.get_rng_state()
    gc.collect()
    memory = torch.cuda.memory_allocated()
    imp = run()
    imp.reset()
    del imp
    gc.collect()
    assert torch.cuda.memory_allocated() <= memory
    after = snapshot()
    for name, values in before.items():
        for old, new in zip(values, after[name], strict=True):
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new, name
    assert torch.equal(torch.cuda.get_rng_state(), random_before)
    hooks = [name for name in nn.Module().__dict__ if "hook" in name]
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)


@pytest.mark.parametrize("maker", MAKERS)
def test_memory_does_not_grow_with_the_number_of_batches(maker):
    case = CASES["residual"]
    model = case.model(torch.float32).to(CUDA)
    x, labels = (t.to(CUDA) for t in case.inputs(4, torch.float32))
    imp = MAKERS[maker]()
    pruner = make_pruner(model, x[:1], imp, [model.fc])
    memory = []
    with imp.observe(pruner):
        for _ in range(12):
            F.cross_entropy(model(x), labels).backward()
            memory.append(torch.cuda.memory_allocated())
    assert memory[-1] <= memory[3] + (1 << 20)  # the allocator rounds; a batch kept would be more


@pytest.mark.parametrize("maker", MAKERS)
def test_the_host_never_waits_between_the_second_batch_and_the_last(maker):
    case = CASES["residual"]
    model = case.model(torch.float32).to(CUDA)
    x, labels = (t.to(CUDA) for t in case.inputs(4, torch.float32))
    imp = MAKERS[maker]()
    pruner = make_pruner(model, x[:1], imp, [model.fc])
    try:
        with imp.observe(pruner):
            for step in range(6):
                if step == 2:
                    torch.cuda.set_sync_debug_mode("error")
                loss = F.cross_entropy(model(x), labels)
                if imp.needs_gradients:
                    loss.backward()
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_on(scores_of(imp, pruner), CUDA)


# -- several processes -------------------------------------------------------------------------------------------


def share(rank, world):
    batches = batches_of(CASES["residual"], samples=12, size=2)
    return batches[rank::world]


def distributed(rank, world, backend, folder):
    """Scores and compensated weights of one rank, from its share of the images."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank if backend == "nccl" else 0)
    torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        results = {}
        for maker in SAVED:
            results[maker] = [s.cpu() for s in shared_scores(SAVED[maker], share(rank, world), device)]
        pruner = magnitude_pruner(CASES["residual"], device)
        comp = Compensation().calibrate(pruner, share(rank, world), progress=False)
        assert comp.step(pruner).rows
        results["compensation"] = [p.detach().cpu() for p in pruner.model.parameters()]
    finally:
        dist.destroy_process_group()
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))


def shared_scores(make, batches, device):
    case, imp = CASES["residual"], make()
    model = case.model().to(device)
    pruner = make_pruner(model, case.inputs(1)[0].to(device), imp, [model.fc], global_pruning=True)
    imp.calibrate(pruner, batches, F.cross_entropy, progress=False)
    found = scores_of(imp, pruner)
    assert_on(found, device)
    return found


@pytest.mark.parametrize(
    ("backend", "world"),
    [
        ("nccl", 1),
        ("gloo", 2),  # two processes share one device
        pytest.param(
            "nccl", 2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
        ),
    ],
)
def test_processes_hold_the_scores_of_one_process(backend, world, tmp_path):
    mp.spawn(distributed, (world, backend, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    for maker in SAVED:
        whole = shared_scores(SAVED[maker], share(0, 1), CUDA)
        for found in ranks:
            assert_close(found[maker], whole)
    for found in ranks[1:]:
        assert all(map(torch.equal, found["compensation"], ranks[0]["compensation"]))
