"""The "paper" estimator against a literal Algorithm 1: models extended with real parameters D."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ippro_tp import PROImportance
from ippro_tp.estimators import paper
from ippro_tp.estimators.projective import pro_excess, pro_score
from ippro_tp.graph.groups import groups_of, read_group
from ippro_tp.records import Layer
from ippro_tp.tracing.extension import LiteralExtension

from .nets import CASES, make_pruner


class Extended:
    """Replaces activation calls by literal extension layers, in the order in which the model makes them.

    It knows nothing of the package's own channel flow: sites are numbered calls of F.relu, F.hardtanh, ...,
    and each test says by hand which call is the sigma of which layer.
    """

    names = ("relu", "relu_", "hardtanh", "hardtanh_", "relu6", "silu", "elu", "leaky_relu", "gelu")

    def __init__(self):
        self.layers: list[LiteralExtension] = []

    def __call__(self, model, x):
        calls = iter(range(1000))
        outer = self

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                kwargs = dict(kwargs or {})
                if func.__name__ not in outer.names:
                    return func(*args, **kwargs)
                number = next(calls)
                kwargs.pop("inplace", None)
                plain = getattr(F, {"hardtanh_": "hardtanh", "relu_": "relu"}.get(func.__name__, func.__name__))
                rest = [a for a in args[1:] if not isinstance(a, bool)]

                def sigma(value):
                    return plain(value, *rest, **kwargs)

                if number == len(outer.layers):
                    axis = args[0].dim() - 1 if args[0].dim() != 4 else 1
                    norms = torch.rand(args[0].shape[axis], dtype=args[0].dtype)
                    outer.layers.append(LiteralExtension(sigma, norms, axis))
                outer.layers[number].sigma = sigma
                return outer.layers[number](args[0])

        with Mode():
            return model(x)


def algorithm_1(model, batches, lam, sites, targets):
    """Tangents of Eq. 4 for each target layer: {name: (channels,)}.

    Args:
        sites: {layer: number of its activation call, or None for the identity}.
        targets: {layer: names of the parameters that make up F}.
    """
    model = copy.deepcopy(model)
    extended = Extended()
    for x, labels in batches:
        F.cross_entropy(extended(model, x), labels).backward()  # .grad adds up over the batches
    scores = {}
    for name, parameters in targets.items():
        module = model.get_submodule(name)
        rows, grads = [], []
        for parameter in parameters:
            p = module.get_parameter(parameter)
            swap = isinstance(module, nn.ConvTranspose2d)
            rows.append((p.transpose(0, 1) if swap else p).flatten(1) if p.dim() > 1 else p[:, None])
            g = p.grad
            grads.append((g.transpose(0, 1) if swap else g).flatten(1) if g.dim() > 1 else g[:, None])
        filters, grad = torch.cat(rows, 1).detach(), torch.cat(grads, 1)
        d = extended.layers[sites[name]].D.grad if sites[name] is not None else (filters * grad).sum(1)
        scores[name] = pro_score(filters, grad, d, lam)
    return scores


def check(model, x, labels, ignored, sites, lam=0.1, target="conv", targets=None):
    """Compare every group, coupled ones by the mean of Eq. 4 over their layers."""
    batches = list(zip(x.split(2), labels.split(2), strict=True))
    targets = targets or {name: ["weight"] for name in sites}
    expected = algorithm_1(model, batches, lam, sites, targets)
    imp = PROImportance(estimator="paper", step_size=lam, group_reduction="mean", target=target)
    pruner = make_pruner(model, x[:1], imp, [model.get_submodule(n) for n in ignored])
    imp.calibrate(pruner, batches, progress=False)
    compared = set()
    for group in groups_of(pruner):
        layers = [p for p in read_group(group).producers if p.name in expected]
        assert layers, f"no expectation for {read_group(group).key}"
        total = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for layer in layers:
            total[layer.root] += expected[layer.name][layer.index]
            compared.add(layer.name)
        tangent = total / len(layers)
        torch.testing.assert_close((imp(group).double() + 1).sqrt(), tangent, rtol=1e-5, atol=0)
        # float32 scores keep the *excess*: it agrees to float32 precision where the tangent alone would not.
        torch.testing.assert_close(imp(group).double(), tangent**2 - 1, rtol=1e-5, atol=1e-9)
    assert compared == set(expected)


def data(samples=4, size=32, classes=10):
    torch.manual_seed(1)
    return torch.randn(samples, 3, size, size, dtype=torch.float64), torch.randint(0, classes, (samples,))


def randomize_batchnorm(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


def resnet18_sites():
    sites, call = {"conv1": 0}, 1
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            sites[f"{name}.conv1"], sites[f"{name}.conv2"] = call, call + 1
            if stage > 1 and block == 0:
                sites[f"{name}.downsample.0"] = call + 1
            call += 2
    return sites


@pytest.mark.parametrize("target", ["conv", "norm"])
def test_resnet18(target):
    torch.manual_seed(0)
    model = randomize_batchnorm(torchvision.models.resnet18(num_classes=10)).double().eval()
    sites = resnet18_sites()
    targets = None
    if target == "norm":
        swap = {"conv1": "bn1", "conv2": "bn2", "0": "1"}

        def renamed(name):
            head, _, tail = name.rpartition(".")
            return f"{head}.{swap[tail]}" if head else swap[tail]

        sites = {renamed(name): call for name, call in sites.items()}
        targets = {name: ["weight", "bias"] for name in sites}
    check(model, *data(), ["fc"], sites, target=target, targets=targets)


def test_vgg11_bn():
    torch.manual_seed(0)
    model = torchvision.models.vgg11_bn(num_classes=10)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    model = randomize_batchnorm(model).double().eval()
    convs = [f"features.{i}" for i, m in enumerate(model.features) if isinstance(m, nn.Conv2d)]
    sites = {name: call for call, name in enumerate(convs)} | {"classifier.0": len(convs)}
    check(model, *data(), ["classifier.3"], sites)


def test_mobilenet_v2():
    torch.manual_seed(0)
    model = randomize_batchnorm(torchvision.models.mobilenet_v2(num_classes=10)).double().eval()
    sites, call = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, torchvision.models.mobilenetv2.Conv2dNormActivation):
            sites[f"{name}.0"] = call
            call += 1
        elif isinstance(module, nn.Conv2d) and f"{name}" not in sites:
            sites[name] = None  # the linear bottleneck: no activation follows its projection
    check(model, *data(), ["classifier.1"], sites)


def test_functional_net_with_concat_and_flatten():
    case = CASES["concat"]
    x, labels = case.inputs()
    check(case.model(), x, labels, ["fc"], {"a": 0, "b": 1, "c": 2, "hidden": 3}, lam=1e-3)


def test_transposed_and_grouped():
    case = CASES["transposed"]
    x, labels = case.inputs()
    check(case.model(), x, labels, ["fc"], {"down": 0, "up": 1, "grouped": 2})


def test_transformer_block_falls_back_to_the_identity():
    case = CASES["transformer"]
    model = case.model()
    for name in ("embed", "proj", "fc2"):  # identity: d = g.y at the output; without a bias that is F.grad
        model.get_submodule(name).register_parameter("bias", None)
    x, labels = case.inputs()
    sites = {"embed": None, "proj": None, "fc2": None, "fc1": 0}
    check(model, x, labels, ["fc", "q", "k", "v"], sites)


def test_joint_reduction_treats_coupled_filters_as_one_point():
    case = CASES["residual"]
    model, lam = case.model(), 0.05
    x, labels = case.inputs()
    batches = list(zip(x.split(2), labels.split(2), strict=True))
    imp = PROImportance(estimator="paper", step_size=lam)
    pruner = case.pruner(model, imp)
    imp.calibrate(pruner, batches, progress=False)

    extended, clone = Extended(), copy.deepcopy(model)
    for part, target in batches:
        F.cross_entropy(extended(clone, part), target).backward()
    layers = [clone.stem, clone.blocks[0]["conv2"], clone.blocks[1]["conv2"]]
    filters = torch.cat([layer.weight.flatten(1) for layer in layers], 1).detach()
    grad = torch.cat([layer.weight.grad.flatten(1) for layer in layers], 1)
    d = sum(extended.layers[i].D.grad for i in (0, 2, 4))
    expected = pro_score(filters, grad, d, lam) ** 2 - 1
    stream = next(g for g in groups_of(pruner) if len(read_group(g).producers) > 2)
    torch.testing.assert_close(imp(stream).double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lam", [1e-6, 0.05, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "prod", "first"])
def test_reductions_over_layers_order_as_those_of_eq_4(reduction, lam):
    """Tangents far from 1 too: means of squares would order otherwise."""
    generator = torch.Generator().manual_seed(0)
    filters, grads = torch.randn(2, 3, 40, 6, dtype=torch.float64, generator=generator)
    d = torch.randn(3, 40, dtype=torch.float64, generator=generator)
    tangents = torch.stack([pro_score(f, g, o, lam) for f, g, o in zip(filters, grads, d, strict=True)])
    wanted = {
        "mean": tangents.mean(0), "sum": tangents.sum(0), "max": tangents.amax(0), "prod": tangents.prod(0),
        "first": tangents[0],
    }[reduction]  # fmt: skip
    excess = [
        pro_excess(f.norm(dim=1), (f * g).sum(1), g.norm(dim=1), o, lam)
        for f, g, o in zip(filters, grads, d, strict=True)
    ]
    layers = [Layer(str(i), torch.arange(40), torch.arange(40), 40) for i in range(3)]
    found = paper._reduce_tangents(excess, layers, 40, reduction)
    common = {"sum": 3.0}.get(reduction, 1.0)  # what is left out of a sum
    reduced = torch.where(found > -1, (found + 1).clamp_min(0).sqrt() - 1, found)
    torch.testing.assert_close(reduced, wanted - common, rtol=1e-6, atol=1e-12)
    assert torch.equal(found.argsort(), wanted.argsort())


def test_a_channel_that_fewer_layers_have_counts_less():
    one, two = torch.tensor([0.3, 0.1]), torch.tensor([0.2])
    layers = [Layer("a", torch.arange(2), torch.arange(2), 2), Layer("b", torch.arange(1), torch.arange(1), 1)]
    found = paper._reduce_tangents([one**2 + 2 * one, two**2 + 2 * two], layers, 2, "sum")
    assert ((found + 1).sqrt() - 1).tolist() == pytest.approx([0.5, 0.1 - 1.0])


def test_tiny_steps_rank_in_float32_as_in_float64():
    case = CASES["residual"]
    orders = []
    for dtype in (torch.float64, torch.float32):
        model = case.model(dtype)
        x, labels = case.inputs(8, dtype)
        imp = PROImportance(estimator="paper", step_size=1e-8)
        pruner = case.pruner(model, imp)
        imp.calibrate(pruner, [(x, labels)], progress=False)
        orders.append([imp(group).argsort().tolist() for group in groups_of(pruner)])
    assert orders[0] == orders[1]


def test_weights_before_a_batchnorm_in_train_mode_have_no_radial_gradient():
    case = CASES["residual"]
    model = case.model().train()
    x, labels = case.inputs(8)
    imp = PROImportance(estimator="paper")
    pruner = case.pruner(model, imp)
    model.train()
    with imp.observe(pruner):
        F.cross_entropy(model(x), labels).backward()
    grad = imp._sums["grad/stem.weight"].flatten(1)
    radial = (grad * model.stem.weight.detach().flatten(1)).sum(1)
    assert radial.abs().max() < 1e-4 * grad.norm(dim=1).max()


WRITTEN_OUT = {
    "product": (F.silu, lambda x: x * torch.sigmoid(x)),
    "gate first": (F.silu, lambda x: torch.sigmoid(x).mul(x)),
    "in place": (F.silu, lambda x: x.mul_(torch.sigmoid(x))),
    "scaled gate": (F.hardswish, lambda x: x * (F.relu6(x + 3) / 6)),
    "mish": (F.mish, lambda x: x * torch.tanh(F.softplus(x))),
}


@pytest.mark.parametrize("estimator", ["paper", "expected"])
@pytest.mark.parametrize("form", WRITTEN_OUT)
def test_an_activation_written_as_a_product_is_one_activation(form, estimator):
    """x * sigmoid(x) is SiLU: the sigmoid alone is no activation of the layer."""
    builtin, written = WRITTEN_OUT[form]

    class Net(nn.Module):
        def __init__(self, act):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc, self.act = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), act

        def forward(self, x):
            return self.fc(self.act(self.conv(x)).mean((2, 3)))

    scores, sites = [], []
    for act in (builtin, written):
        model = Net(act).double().eval()
        imp = PROImportance(estimator, step_size=0.1) if estimator == "paper" else PROImportance(cost=None)
        pruner = make_pruner(model, torch.randn(1, 3, 8, 8, dtype=torch.float64), imp, [model.fc])
        x, labels = data(size=8, classes=4)
        imp.calibrate(pruner, [(x, labels)], progress=False)
        scores.append(imp(next(iter(groups_of(pruner)))))
        sites += next(iter(imp.report())).sites.values()
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-8)
    assert sites[1].startswith("x * ")


def test_products_that_are_no_activation_keep_their_gate():
    class Net(nn.Module):
        """Squeeze and excitation, and a gate that another layer makes."""

        def __init__(self):
            super().__init__()
            self.conv, self.squeeze = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
            self.gate, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            y = self.conv(x)
            y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
            return self.fc((y * torch.sigmoid(self.gate(x))).mean((2, 3)))

    model = Net().eval()
    imp = PROImportance()
    pruner = make_pruner(model, torch.randn(1, 3, 8, 8), imp, [model.fc])
    imp.calibrate(pruner, [torch.randn(2, 3, 8, 8)], progress=False)
    names = [site for row in imp.report() for site in row.sites.values() if site is not None]
    assert names
    assert not any(name.startswith("x * ") for name in names)
