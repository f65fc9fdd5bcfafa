"""SpaSPImportance against a literal, sample-wise run of the paper's Algorithms 1 and 2 with autograd."""

from __future__ import annotations

import copy
import gc
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ippro_tp import NotCalibratedError, ObservationError, SpaSPImportance, StaleStatisticsError
from ippro_tp.cli.cifar_resnet import CifarResNet
from ippro_tp.estimators import spasp_math as maths
from ippro_tp.estimators import spasp_ranking as ranking
from ippro_tp.importance import spasp

WEIGHTS = Path(__file__).parents[1].parent / "shared" / "weights" / "cifar10_resnet20.safetensors"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small run slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def literal(
    outputs: Callable[[Tensor], list[Tensor]],
    hidden: Tensor,
    size: int,
    iterations: int = 20,
    bias: bool = True,
    activation: Tensor | None = None,
    gate: Tensor | float = 1.0,
) -> list[Tensor]:
    """Algorithm 1 as it is written, sample by sample, with the gradient of Algorithm 2 by autograd.

    ``hidden`` is ``(N, C, ...)``; ``outputs`` maps it to what the second layers return. ``activation`` and
    ``gate`` (what gradients are multiplied with) are for the extensions. Gives S after each iteration as ``(C,)``
    masks.
    """
    axes = [0, *range(2, hidden.dim())]
    h = hidden.sum(axes) if activation is None else activation
    chosen = torch.zeros(hidden.shape[1], dtype=torch.bool, device=hidden.device)
    history = []
    for iteration in range(iterations):
        mask = chosen.to(hidden).view(1, -1, *[1] * (hidden.dim() - 2))
        pruned = [out.detach() for out in outputs(hidden * mask)]
        if iteration == 0 and bias:
            pruned = [torch.zeros_like(out) for out in pruned]
        with torch.enable_grad():
            full = hidden.detach().clone().requires_grad_(True)
            loss = sum(((out - gone) ** 2).sum() / 2 for out, gone in zip(outputs(full), pruned, strict=True))
            (gradient,) = torch.autograd.grad(loss, full)
        y = (gradient * gate).sum(axes)
        leading = torch.sort(y, descending=True, stable=True).indices[: 2 * size]
        merged = chosen.clone()
        merged[leading] = True
        b = torch.where(merged, h, -torch.inf)
        chosen = torch.zeros_like(chosen)
        chosen[torch.sort(b, descending=True, stable=True).indices[:size]] = True
        history.append(chosen)
    return history


def make_pruner(model: nn.Module, example: Tensor, importance=None, ignored=(), **options) -> tp.pruner.BasePruner:
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    return tp.pruner.BasePruner(
        model,
        (example,),
        importance=importance or SpaSPImportance(),
        ignored_layers=list(ignored),
        **{**fresh, **options},
    )


def group_of(pruner: tp.pruner.BasePruner, layer: nn.Module):
    graph = pruner.DG
    width = graph.get_out_channels(layer)
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(range(width)))


def ratio_for(keep: int, channels: int) -> float:
    return (channels - keep - 0.5) / channels  # half a channel of slack: TP keeps int(channels * (1 - ratio))


def top(scores: Tensor, size: int) -> Tensor:
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.topk(scores, size).indices] = True
    return mask


def chain(*layers: nn.Module, inputs: int = 3, width: int = 12) -> nn.Sequential:
    """``width`` hidden channels after a ReLU, the layers under test, and a head that flattens what they give."""
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), *layers).double().eval()


def inputs_of(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def randomise_norms(model: nn.Module) -> None:
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, -1, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 3)


def check_every_iteration(
    model: nn.Module, x: Tensor, root: nn.Module, hidden: Tensor, outputs, sizes, bias: bool = True
) -> None:
    """Compare S after each of six iterations, for each size."""
    calibrated = SpaSPImportance(bias=bias)
    calibrated.calibrate(make_pruner(model, x[:1]), [x], progress=False)
    pruner = make_pruner(model, x[:1])
    group = group_of(pruner, root)
    for size in sizes:
        pruner.per_step_pruning_ratio = [0, ratio_for(size, hidden.shape[1])]
        for iterations, wanted in enumerate(literal(outputs, hidden, size, 6, bias), start=1):
            imp = SpaSPImportance(iterations=iterations, bias=bias)
            imp.load_state_dict(calibrated.state_dict())
            imp.bind(pruner)
            scores = imp(group)
            assert scores.shape == (len(group[0].idxs),)
            assert scores.dtype == torch.float32
            assert scores.isfinite().all()
            assert torch.equal(top(scores, size), wanted), (size, iterations)


# -- the set S -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_give_the_literal_set_at_every_iteration(kernel):
    rng = random.Random(kernel)
    for setting in range(20):
        torch.manual_seed(1000 * kernel + setting)
        stride, dilation = rng.choice([1, 2, 3]), rng.choice([1, 2])
        padding, bias, norm = rng.choice([0, 1, 2, 3]), rng.random() < 0.5, rng.random() < 0.5
        conv = nn.Conv2d(12, rng.choice([4, 9]), kernel, stride, padding, dilation, bias=bias)
        after = [nn.BatchNorm2d(conv.out_channels)] if norm else []
        model = chain(conv, *after, nn.ReLU(), nn.Conv2d(conv.out_channels, 2, 1))
        randomise_norms(model)
        x = torch.randn(5, 3, 11, 10, dtype=torch.float64)
        hidden = inputs_of(model, conv, x)
        sizes = rng.sample(range(1, 6), 2)
        second = nn.Sequential(conv, *after)
        check_every_iteration(
            model, x, model[0], hidden, lambda h, f=second: [f(h)], sizes, bias=rng.random() < 0.7
        )


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.ConvTranspose2d(12, 5, 3, stride=2, padding=1, output_padding=1),
        lambda: nn.ConvTranspose2d(12, 5, 4, stride=2, bias=False),
        lambda: nn.Conv2d(12, 5, 4, padding="same"),
        lambda: nn.Conv2d(12, 5, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(12, 5, (1, 5), padding=(0, 2)),
    ],
    ids=["transposed", "transposed, plain", "same padding", "reflected", "not square"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("norm", [False, True])
def test_other_convolutions_give_the_literal_set(layer, norm):
    torch.manual_seed(3)
    conv = layer()
    after = [nn.BatchNorm2d(5)] if norm else []
    model = chain(conv, *after, nn.ReLU(), nn.Conv2d(5, 2, 1))
    randomise_norms(model)
    x = torch.randn(4, 3, 8, 7, dtype=torch.float64)
    second = nn.Sequential(conv, *after)
    check_every_iteration(model, x, model[0], inputs_of(model, conv, x), lambda h: [second(h)], [2, 4])


def tied(outputs: Callable[[Tensor], list[Tensor]], groups: int) -> Callable[[Tensor], list[Tensor]]:
    """Units of channels i, i + C / groups, ...: ``(N, U, groups, ...)`` hidden maps to ``(N, C, ...)``."""
    return lambda h: outputs(h.transpose(1, 2).flatten(1, 2))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_convolution_gives_the_literal_set_of_tied_channels(norm, stride):
    torch.manual_seed(5 + stride)
    conv = nn.Conv2d(24, 6, 3, stride, 1, groups=2)
    after = [nn.BatchNorm2d(6)] if norm else []
    model = chain(conv, *after, nn.ReLU(), nn.Conv2d(6, 2, 1), width=24)
    randomise_norms(model)
    x = torch.randn(4, 3, 8, 7, dtype=torch.float64)
    second = nn.Sequential(conv, *after)
    hidden = inputs_of(model, conv, x).unflatten(1, (2, 12)).transpose(1, 2)
    calibrated = SpaSPImportance()
    calibrated.calibrate(make_pruner(model, x[:1]), [x], progress=False)
    for size in (2, 4):
        pruner = make_pruner(model, x[:1], pruning_ratio=ratio_for(size, 12))
        calibrated.bind(pruner)
        scores = calibrated(group_of(pruner, model[0])).view(2, 12)
        assert torch.equal(scores[0], scores[1])
        wanted = literal(tied(lambda h: [second(h)], 2), hidden, size)[-1]
        assert torch.equal(top(scores[0], size), wanted)


def test_the_operator_route_equals_the_closed_form():
    torch.manual_seed(0)
    for groups in (1, 3):
        conv = nn.Conv2d(12, 6, 3, 2, 1, groups=groups).double()
        total, index, shift = torch.rand(12, 6, 5).double(), torch.tensor([1, 4, 5, 11]), torch.rand(6).double()
        fast = maths.conv_matrix(conv.weight.detach(), total, shift, index, (2, 2), (1, 1), (1, 1), groups)
        constant = shift.view(-1, 1, 1)
        weight = conv.weight.detach()
        slow = maths.operator_matrix(lambda x: F.conv2d(x, weight, None, 2, 1, 1, groups), total, constant, index)  # noqa: B023
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other)


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12 * 6, 7), nn.BatchNorm1d(7)
        self.fc2 = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.bn(self.fc1(F.adaptive_avg_pool2d(F.relu(self.conv(x)), (2, 3)).flatten(1)))))


def test_flatten_and_linear():
    torch.manual_seed(1)
    model = Flattened().double().eval()
    randomise_norms(model)
    x = torch.randn(6, 3, 8, 9, dtype=torch.float64)
    hidden = inputs_of(model, model.fc1, x).unflatten(1, (12, 6))
    check_every_iteration(model, x, model.conv, hidden, lambda h: [model.bn(model.fc1(h.flatten(1)))], [2, 3, 5])
    hidden = inputs_of(model, model.fc2, x)
    check_every_iteration(model, x, model.fc1, hidden, lambda h: [model.fc2(h)], [1, 2, 3])


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 12), nn.Linear(12, 9), nn.Linear(9, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.relu(self.fc1(x)))).mean(1))


def test_linear_on_tokens_sums_over_all_leading_axes():
    torch.manual_seed(2)
    model = Tokens().double().eval()
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    hidden = inputs_of(model, model.fc2, x).transpose(1, 2)
    check_every_iteration(model, x, model.fc1, hidden, lambda h: [model.fc2(h.transpose(1, 2))], [2, 3, 5])


class Branches(nn.Module):
    """Two branches are concatenated and read by two layers; ``left`` is also read on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.one, self.bn = nn.Conv2d(17, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6)
        self.two, self.alone = nn.Conv2d(17, 4, 1), nn.Conv2d(12, 3, 3)
        self.head = nn.ModuleList(nn.Conv2d(n, 2, 1) for n in (6, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.left(x)), F.relu(self.right(x))
        both = torch.cat([right, left], 1)
        outs = [self.bn(self.one(both)), self.two(both), self.alone(left)]
        return sum(head(F.relu(out)).mean((2, 3)) for head, out in zip(self.head, outs, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_concatenation_and_several_consumers(bias):
    torch.manual_seed(4)
    model = Branches().double().eval()
    randomise_norms(model)
    x = torch.randn(4, 3, 8, 7, dtype=torch.float64)
    both = inputs_of(model, model.one, x)
    right, left = both[:, :5], both[:, 5:]

    def outputs(hidden: Tensor) -> list[Tensor]:
        cat = torch.cat([right, hidden], 1)
        return [model.bn(model.one(cat)), model.two(cat), model.alone(hidden)]

    check_every_iteration(model, x, model.left, left, outputs, [2, 3, 5], bias)


def test_resnet20_gives_the_literal_set_in_all_blocks():
    if not WEIGHTS.is_file():
        pytest.skip(f"no trained ResNet-20 at {WEIGHTS}")
    from benchmarks.models.checkpoints import load_checkpoint

    model = CifarResNet(20)
    fixed = tuple(n for n, _ in model.named_parameters() if CifarResNet.frozen_parameters.search(n))
    load_checkpoint(model, WEIGHTS, fixed)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    # Smooth noise: like images, it excites the stages unevenly.
    x = F.interpolate(torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), 32, mode="bicubic")
    imp = SpaSPImportance()
    imp.calibrate(make_pruner(model, x[:1]), [x], progress=False)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    assert len(blocks) == 9
    for keep in (0.5, 0.4, 0.3, 0.2):
        pruner = make_pruner(model, x[:1], pruning_ratio=1 - keep)
        imp.bind(pruner)
        for block in blocks:
            hidden = inputs_of(model, block.conv2, x)
            size = int(hidden.shape[1] * (1 - (1 - keep)))
            wanted = literal(lambda h, b=block: [b.bn2(b.conv2(h))], hidden, size, iterations=8)[-1]
            assert torch.equal(top(imp(group_of(pruner, block.conv1)), size), wanted)


# -- under Torch-Pruning's pruners -----------------------------------------------------------------------------


def two_convolutions(seed: int = 0, width: int = 20) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    conv = nn.Conv2d(width, 6, 3, padding=1)
    model = chain(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1), width=width)
    randomise_norms(model)
    return model, torch.randn(6, 3, 8, 8, dtype=torch.float64)


def wanted_set(model: nn.Module, x: Tensor, size: int) -> Tensor:
    return literal(lambda h: [model[3](model[2](h))], inputs_of(model, model[2], x), size)[-1]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"pruning_ratio": 0.7}, 6),
        ({"pruning_ratio": 0.7, "round_to": 4}, 4),
        ({"pruning_ratio": 0.5, "max_pruning_ratio": 0.3}, 10),  # TP checks the cap before a step only
        ({"pruning_ratio": 0.2, "dict": 0.75}, 5),
        ({"pruning_ratio": 0.2, "dict": 0.9, "max_pruning_ratio": 0.8}, 3),  # here TP does; int(3.9999)
        ({"pruning_ratio": 0.2, "dict": 0.75, "round_to": 3}, 3),
    ],
    ids=str,
)
def test_a_local_pruner_keeps_exactly_the_papers_set(options, kept):
    model, x = two_convolutions()
    options = dict(options)
    if "dict" in options:
        options["pruning_ratio_dict"] = {model[0]: options.pop("dict")}
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], imp, [model[2], model[5]], **options)
    imp.calibrate(pruner, [x[:4], x[4:]], progress=False)
    chosen, before = wanted_set(model, x, kept), copy.deepcopy(model)
    pruner.step()
    assert model[0].out_channels == kept
    assert torch.equal(model[0].weight, before[0].weight[chosen])
    assert torch.equal(model[2].weight, before[2].weight[:, chosen])
    model(x)


def test_iterative_steps_take_the_size_of_each_step():
    model, x = two_convolutions()
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], imp, [model[2], model[5]], pruning_ratio=0.8, iterative_steps=2)
    imp.calibrate(pruner, [x], progress=False)
    chosen, before = wanted_set(model, x, 12), copy.deepcopy(model)
    pruner.step()
    assert torch.equal(model[0].weight, before[0].weight[chosen])
    with pytest.raises(StaleStatisticsError, match="again"):
        pruner.step()
    pruner.current_step = 1
    imp.calibrate(pruner, [x], progress=False)
    chosen, before = wanted_set(model, x, int(20 * (1 - 0.8))), copy.deepcopy(model)
    pruner.step()
    assert torch.equal(model[0].weight, before[0].weight[chosen])


def test_without_a_pruner_the_cut_is_close_and_exact_from_half_on():
    model, x = two_convolutions()
    pruner = make_pruner(model, x[:1])
    imp = SpaSPImportance()
    imp.calibrate(model, [x], progress=False)
    scores = imp(group_of(pruner, model[0]))
    assert len(scores.unique()) == 20
    for size in range(10, 20):
        assert torch.equal(top(scores, size), wanted_set(model, x, size))
    agreement = [int((top(scores, size) & wanted_set(model, x, size)).sum()) / size for size in range(2, 10)]
    assert sum(agreement) / len(agreement) > 0.7


def test_partial_groups_get_the_scores_of_their_channels():
    model, x = two_convolutions()
    pruner = make_pruner(model, x[:1], pruning_ratio=0.7)
    imp = SpaSPImportance()
    imp.calibrate(pruner, [x], progress=False)
    full = imp(group_of(pruner, model[0]))
    graph = pruner.DG
    part = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [2, 6, 9])
    assert torch.equal(imp(part), full[[2, 6, 9]])


def test_groups_that_nothing_reads_have_no_score():
    model, x = two_convolutions()
    pruner = make_pruner(model, x[:1])
    imp = SpaSPImportance()
    imp.calibrate(pruner, [x], progress=False)
    assert imp(group_of(pruner, model[5])) is None
    assert imp(group_of(pruner, model[5])) is None


def test_one_calibration_serves_several_pruners_of_copies():
    model, x = two_convolutions()
    imp = SpaSPImportance()
    imp.calibrate(model, [x], progress=False)
    for kept in (3, 6):
        other = copy.deepcopy(model)
        pruner = make_pruner(other, x[:1], imp, [other[2], other[5]], pruning_ratio=ratio_for(kept, 20))
        imp.bind(pruner)
        pruner.step()
        assert torch.equal(other[0].weight, model[0].weight[wanted_set(model, x, kept)])
    with pytest.raises(TypeError, match="pruner"):
        imp.bind(model)


def test_errors_name_the_fix():
    model, x = two_convolutions()
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], imp, [model[2], model[5]])
    with pytest.raises(NotCalibratedError, match="model\\(images\\)"):
        pruner.step()
    pruner.reset()
    imp.calibrate(pruner, [x], progress=False)
    pruner.step()
    with pytest.raises(StaleStatisticsError, match="again"):
        imp(group_of(pruner, model[0]))
    with pytest.raises(TypeError, match="option"):
        imp.calibrate(pruner, [x], progress=False, loss_reduction="mean")
    for wrong in ({"iterations": 0}, {"signed": "squared"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SpaSPImportance(**wrong)


def test_a_consumer_that_was_pruned_on_its_own_is_stale():
    torch.manual_seed(4)
    model = Branches().double().eval()
    x = torch.randn(4, 3, 8, 7, dtype=torch.float64)
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], imp)
    imp.calibrate(pruner, [x], progress=False)
    pruner.DG.get_pruning_group(model.right, tp.prune_conv_out_channels, [0]).prune()
    with pytest.raises(StaleStatisticsError, match="reads 16 channels"):
        imp(group_of(pruner, model.left))


class Attention(nn.Module):
    """Self-attention as timm writes it, so that Torch-Pruning follows the heads."""

    def __init__(self, dim: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(5, dim)
        self.qkv, self.proj, self.fc = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        rows, tokens, _ = x.shape
        head_dim = self.qkv.out_features // (3 * self.heads)
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, -1)
        return self.fc((x + self.proj(y)).mean(1))


def attention(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return Attention().double().eval(), torch.randn(6, 7, 5, dtype=torch.float64)


@pytest.mark.parametrize("dims", [False, True], ids=["heads only", "heads and their dimensions"])
def test_whole_heads_are_units(dims):
    model, x = attention()
    imp = SpaSPImportance(signed="abs")
    pruner = make_pruner(
        model,
        x[:1],
        imp,
        [model.embed, model.fc, model.proj],
        pruning_ratio=0.5,
        num_heads={model.qkv: 4},
        prune_num_heads=True,
        prune_head_dims=dims,
        head_pruning_ratio=0.75,
    )
    imp.calibrate(pruner, [x], progress=False)
    context = inputs_of(model, model.proj, x)
    hidden = context.unflatten(2, (4, 6)).transpose(1, 2)  # (N, heads, tokens, 6)
    magnitude = hidden.abs().sum((0, 2, 3))
    by_head = literal(lambda h: [model.proj(h.transpose(1, 2).flatten(2))], hidden, 1, activation=magnitude)[-1]
    hidden = context.unflatten(2, (4, 6)).permute(0, 3, 1, 2)  # (N, 6, tokens, heads)
    magnitude = hidden.abs().sum((0, 2, 3))
    by_dim = literal(lambda h: [model.proj(h.permute(0, 2, 3, 1).flatten(2))], hidden, 3, activation=magnitude)[-1]
    wanted = by_head.repeat_interleave(6) & (by_dim.repeat(4) if dims else True)
    weight = model.proj.weight.detach().clone()
    pruner.step()
    assert torch.equal(model.proj.weight, weight[:, wanted])


def test_head_dimensions_are_tied_across_heads():
    model, x = attention(1)
    imp = SpaSPImportance()
    pruner = make_pruner(
        model, x[:1], imp, [model.embed, model.fc, model.proj], pruning_ratio=0.6, num_heads={model.qkv: 4}
    )
    imp.calibrate(pruner, [x], progress=False)
    hidden = inputs_of(model, model.proj, x).unflatten(2, (4, 6)).permute(0, 3, 1, 2)
    wanted = literal(lambda h: [model.proj(h.permute(0, 2, 3, 1).flatten(2))], hidden, 2)[-1]
    weight = model.proj.weight.detach().clone()
    pruner.step()
    assert torch.equal(model.proj.weight, weight[:, wanted.repeat(4)])


# -- signed activations, an extension --------------------------------------------------------------------------


def gelu_net(kind: str) -> tuple[nn.Module, Tensor, Callable[[Tensor], list[Tensor]]]:
    torch.manual_seed(7)
    if kind == "linear":
        second = nn.Sequential(nn.Linear(12, 5), nn.Identity())
        model = nn.Sequential(nn.Linear(4, 12), nn.GELU(), second[0], nn.GELU(), nn.Linear(5, 2))
        x = torch.randn(6, 3, 4)
    else:
        conv = nn.Conv2d(12, 6, 3, 2, 1) if kind == "conv" else nn.Conv2d(12, 6, 1, bias=False)
        second = nn.Sequential(conv, nn.BatchNorm2d(6))
        model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GELU(), *second, nn.GELU(), nn.Conv2d(6, 2, 1))
        x = torch.randn(6, 3, 9, 8)
    model = model.double().eval()
    randomise_norms(model)
    return model, x.double(), second


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "1x1"])
@pytest.mark.parametrize("signed", ["abs", "gated"])
def test_signed_variants_equal_their_literal(signed, kind, bias):
    model, x, second = gelu_net(kind)
    hidden = inputs_of(model, model[2], x)
    channel = -1 if kind == "linear" else 1
    hidden = hidden.movedim(channel, 1)

    def outputs(h: Tensor) -> list[Tensor]:
        return [second(h.movedim(1, channel))]

    axes = [0, *range(2, hidden.dim())]
    if signed == "abs":
        activation, gate = hidden.abs().sum(axes), 1.0
    else:
        alone = torch.eye(12, dtype=torch.float64)
        nothing = outputs(torch.zeros_like(hidden))[0]
        activation = torch.stack(
            [((outputs(hidden * m.view(1, -1, *[1] * (hidden.dim() - 2)))[0] - nothing) ** 2).sum() for m in alone]
        ).detach()
        gate = hidden
    calibrated = SpaSPImportance(signed=signed, bias=bias)
    pruner = make_pruner(model, x[:1])
    calibrated.calibrate(pruner, [x[:2], x[2:]], progress=False)
    for size in (2, 4):
        pruner.per_step_pruning_ratio = [0, ratio_for(size, 12)]
        wanted = literal(outputs, hidden, size, 20, bias, activation, gate)[-1]
        assert torch.equal(top(calibrated(group_of(pruner, model[0])), size), wanted)


def test_gated_statistics_of_what_they_cannot_be_made_of():
    model = chain(nn.ConvTranspose2d(12, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    with pytest.raises(ObservationError, match='signed="abs"'):
        SpaSPImportance(signed="gated").calibrate(model, [torch.randn(2, 3, 6, 6).double()], progress=False)


def test_gated_grouped_convolution_sums_over_each_group():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1, groups=2).double()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    energy = maths.energy_matrix(conv.weight.detach().flatten(2), spasp.gram("conv", conv, x))
    with torch.no_grad():
        parts = [conv(x * m.view(1, -1, 1, 1)) - conv(torch.zeros_like(x)) for m in torch.eye(8).double()]
    wanted = torch.stack([torch.stack([(one * other).sum() for one in parts]) for other in parts])
    torch.testing.assert_close(energy, wanted)


# -- between groups, an extension ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (lambda: nn.Conv2d(12, 6, 3, 2, 1), 1),
        (lambda: nn.Conv2d(12, 6, 1, bias=False), 1),
        (lambda: nn.Conv2d(12, 6, 3, padding=1, groups=2), 2),
        (lambda: nn.Conv2d(12, 6, 1, groups=2), 2),
        (lambda: nn.ConvTranspose2d(12, 5, 3, 2), 1),
    ],
    ids=["3x3", "1x1", "3x3 grouped", "1x1 grouped", "transposed"],
)
def test_scores_between_groups_are_the_relative_error_of_the_mean_output(layer, groups):
    torch.manual_seed(0)
    conv = layer()
    model = chain(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(), nn.Conv2d(conv.out_channels, 2, 1))
    randomise_norms(model)
    x = torch.randn(5, 3, 8, 7, dtype=torch.float64)
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], imp, global_pruning=True)
    imp.calibrate(pruner, [x], progress=False)
    scores = imp(group_of(pruner, model[0])).view(groups, -1)[0]
    mean = inputs_of(model, conv, x).mean(0, keepdim=True)
    order, nothing = scores.argsort(), model[3](conv(torch.zeros_like(mean)))
    energies = []
    for count in range(1, len(order) + 1):
        mask = torch.zeros(len(order), dtype=torch.float64).index_fill(0, order[:count], 1.0).repeat(groups)
        energies.append(((model[3](conv(mean * mask.view(1, -1, 1, 1))) - nothing) ** 2).sum().detach())
    wanted = (torch.stack(energies) / energies[-1]).cummax(0).values
    torch.testing.assert_close(scores[order].double(), wanted, rtol=1e-5, atol=1e-7)


def test_a_global_pruner_bounds_the_error_of_every_group_alike():
    model, x = gelu_net("conv")[:2]
    wide = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU())
    model = nn.Sequential(*wide, nn.Conv2d(16, 2, 1)).double().eval()
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], imp, [model[4]], pruning_ratio=0.5, global_pruning=True)
    imp.calibrate(pruner, [x], progress=False)
    scores = [imp(group_of(pruner, layer)) for layer in (model[0], model[2])]
    assert all(len(s.unique()) == len(s) and (s > 0).all() and s.max() > 0.99 for s in scores)
    pruner.step()
    assert model[0].out_channels + model[2].out_channels == 14
    model(x)


def test_dead_channels_go_first_and_a_dead_group_has_finite_scores():
    model, x = two_convolutions()
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    imp = SpaSPImportance()
    imp.calibrate(model, [x], progress=False)
    pruner = make_pruner(model, x[:1])
    assert imp(group_of(pruner, model[0])).isfinite().all()
    model[0].bias.data[5:] = 1.0
    imp.calibrate(model, [x], progress=False)
    assert set(imp(group_of(pruner, model[0])).argsort()[:5].tolist()) == set(range(5))


# -- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", ["sum", "abs", "gated"])
def test_statistics_do_not_depend_on_the_split_into_batches(signed):
    torch.manual_seed(0)
    model = Flattened().eval()
    x = torch.randn(12, 3, 8, 9)
    parts = SpaSPImportance(signed=signed)
    parts.calibrate(model, [x[:5], x[5:7]], progress=False)
    rest = SpaSPImportance(signed=signed)
    rest.calibrate(model, [x[7:]], progress=False)
    parts.merge(rest)
    whole = SpaSPImportance(signed=signed)
    whole.calibrate(model, [x], progress=False)
    one, other = whole.state_dict()["sums"], parts.state_dict()["sums"]
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == torch.float64
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)
    if signed == "sum":
        assert {name: tuple(value.shape) for name, value in one.items()} == {
            "samples": (),
            "sum/fc1/rows": (72,),
            "count/fc1/rows": (),
            "sum/fc2/rows": (7,),
            "count/fc2/rows": (),
        }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-7), (torch.bfloat16, 1e-14)]
)
def test_sums_are_in_double_precision(dtype, tolerance):
    torch.manual_seed(0)
    for shape in [(300, 4, 5, 6), (300, 4, 3), (300, 8)]:
        x = torch.rand(shape).to(dtype)
        total = spasp._summed(x, torch.float64)
        assert total.dtype == torch.float64
        torch.testing.assert_close(total, x.double().sum(0), rtol=tolerance, atol=tolerance)


def test_images_of_several_sizes_add_up():
    model, x = two_convolutions()
    pruner = make_pruner(model, x[:1], pruning_ratio=0.7)
    imp = SpaSPImportance()
    small = x[:3, :, :5, :6]
    imp.calibrate(pruner, [x, small], progress=False)
    chosen = torch.zeros(20, dtype=torch.bool, device=x.device)
    sums = [inputs_of(model, model[2], part) for part in (x, small)]
    h = sum(part.sum((0, 2, 3)) for part in sums)
    second = nn.Sequential(model[2], model[3])
    for iteration in range(8):
        y = torch.zeros_like(h)
        for hidden in sums:
            mask = chosen.to(hidden).view(1, -1, 1, 1)
            gone = second(hidden * mask) if iteration else torch.zeros_like(second(hidden))
            full = hidden.clone().requires_grad_(True)
            ((second(full) - gone.detach()) ** 2).sum().div(2).backward()
            y += full.grad.sum((0, 2, 3))
        merged = chosen | top(y, 12)
        chosen = top(torch.where(merged, h, -torch.inf), 6)
    assert torch.equal(top(imp(group_of(pruner, model[0])), 6), chosen)


def test_the_model_is_left_as_it_was():
    model, x = two_convolutions()
    model.train()
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    imp = SpaSPImportance()
    imp.calibrate(model, [x], progress=False)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m.training for m in model] == [True, True, True, False, True, True]
    assert model[0].weight.grad.sum() == model[0].weight.numel()
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_pickling_and_copying_keep_the_statistics_and_drop_the_pruner():
    model, x = two_convolutions()
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], imp, pruning_ratio=0.7)
    imp.calibrate(pruner, [x], progress=False)
    group = group_of(pruner, model[0])
    loaded = SpaSPImportance()
    loaded.load_state_dict(imp.state_dict())
    for other in (pickle.loads(pickle.dumps(imp)), copy.deepcopy(imp), loaded):
        other.bind(pruner)
        assert torch.equal(other(group), imp(group))
    imp.bind(None)
    assert torch.equal(pickle.loads(pickle.dumps(imp))(group), imp(group))


def test_the_pruner_is_not_kept_alive():
    model, x = two_convolutions()
    imp = SpaSPImportance()
    pruner = make_pruner(model, x[:1], tp.importance.RandomImportance())
    imp.calibrate(pruner, [x], progress=False)
    graph = pruner.DG
    assert imp._pruner_of(graph) is pruner
    del pruner
    gc.collect()
    assert imp._pruner_of(graph) is None


# -- maths -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), units=st.integers(2, 30), signed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_iteration_ends_and_half_is_the_top_of_the_activations(seed, units, signed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, units, generator=generator, dtype=torch.float64)
    h = torch.rand(units, generator=generator, dtype=torch.float64) - 0.5 * signed
    response = maths.Response.zero(units, torch.device("cpu"))
    response.activation += h
    response.add_factors(weight, weight * h)
    sizes = torch.arange(1, units)
    chosen = ranking.select(response, sizes, 50)
    assert torch.equal(chosen.sum(1), sizes)
    assert torch.equal(chosen, ranking.select(response, sizes, 51))
    for size in sizes[2 * sizes >= units].tolist():
        assert torch.equal(chosen[size - 1], top(h, size))
    votes = chosen.sum(0) + ranking.ascending_ranks(h) / units
    torch.testing.assert_close(ranking.vote_scores(response, 50), votes / units)


def test_strictly_increasing():
    values = torch.tensor([0.0, 0.0, 1e-3, 1e-3, 1.0, 1.0 + 1e-9, 5.0], dtype=torch.float64)
    rising = ranking.strictly_increasing(values)
    assert rising.dtype == torch.float32
    assert (rising.diff() > 0).all()
    torch.testing.assert_close(rising.double(), values, rtol=1e-6, atol=1e-6)
