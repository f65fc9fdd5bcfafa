"""MACs and parameters against counts by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ippro_tp.pruning.counter import count


class StdConv(nn.Conv2d):
    """timm's StdConv2d in short: a convolution with a standardised weight."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Own(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, out))

    def forward(self, x):
        return x @ self.w


def twice(layer):
    return nn.Sequential(layer, nn.ReLU(), layer)


IMAGE, TOKENS = torch.randn(1, 4, 9, 7), torch.randn(2, 5, 8)
HAND = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2), IMAGE, 4 * 6 * 9 * 4 * 3),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), IMAGE, 2 * 6 * 9 * 9 * 7),
    "depthwise": (nn.Conv2d(4, 4, 5, groups=4, padding=2), IMAGE, 4 * 25 * 9 * 7),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), IMAGE, 4 * 6 * 4 * 9 * 7),
    "conv1d": (nn.Conv1d(5, 3, 2), TOKENS, 2 * 5 * 3 * 2 * 7),
    "conv3d": (nn.Conv3d(1, 2, 3), torch.randn(1, 1, 4, 4, 4), 2 * 27 * 8),
    "subclass": (StdConv(4, 6, 3), IMAGE, 4 * 6 * 9 * 7 * 5),
    "norm": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()), IMAGE, 4 * 6 * 9 * 7),
    "linear": (nn.Linear(8, 3), TOKENS, 2 * 5 * 8 * 3),
    "one row": (nn.Linear(8, 3), torch.randn(8), 8 * 3),
    "called twice": (twice(nn.Linear(8, 8)), TOKENS, 2 * 2 * 5 * 64),
    "own layer": (Own(8, 3), TOKENS, 2 * 5 * 8 * 3),
    "own layer, one row": (Own(8, 3), torch.randn(8), 8 * 3),
    "lstm": (nn.LSTM(8, 3, batch_first=True), TOKENS, 2 * 5 * 4 * 3 * (8 + 3)),
    "gru": (nn.GRU(8, 3, batch_first=True), TOKENS, 2 * 5 * 3 * 3 * (8 + 3)),
    "bilinear": (nn.Bilinear(8, 8, 3), (TOKENS, TOKENS), 2 * 5 * 8 * 8 * 3),
    "self attention": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        (TOKENS, TOKENS, TOKENS),
        2 * (5 * 8 * 8 * 4 + 5 * 5 * 8 * 2),
    ),
    "encoder layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        TOKENS,
        2 * (5 * 8 * 8 * 4 + 5 * 5 * 8 * 2 + 2 * 5 * 8 * 16),
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_macs_are_those_counted_by_hand(name):
    model, x, macs = HAND[name]
    counts = count(model, x)
    assert counts.macs == macs == sum(counts.by_layer.values())
    assert counts.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", [(1, 2, 5, 4), (3, 1, 7, 6)])
@pytest.mark.parametrize("values", [4, 6])
def test_products_of_attention_count(size, values):
    class Products(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    batch, heads, tokens, width = size
    q, k = torch.randn(size), torch.randn(batch, heads, 9, width)
    v = torch.randn(batch, heads, 9, values)
    assert count(Products(), (q, k, v)).macs == batch * heads * tokens * 9 * (width + values)


def test_a_vision_transformer_by_hand():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)
    tokens, d = 17, 192
    block = tokens * d * (3 * d + d + 8 * d) + 2 * tokens * tokens * d
    assert count(model, torch.randn(1, 3, 32, 32)).macs == 16 * 3 * 64 * d + 2 * block + d * 5


def test_layers_are_named_and_operations_go_to_the_innermost():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
            self.head = nn.Linear(6, 3)

        def forward(self, x, scale=None):
            y = self.body(x)
            y = y if scale is None else y * scale
            return F.linear(y, self.head.weight) @ torch.ones(3, 2)

    counts = count(Net(), {"x": torch.randn(1, 8), "scale": torch.ones(1)})
    assert counts.by_layer == {"body.0": 48, "": 18 + 6}
    assert count(Net(), [torch.randn(1, 8)]).macs == counts.macs
    assert count(Net().body, 3, forward_fn=lambda m, n: m(torch.randn(n, 8))).macs == 3 * 48


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.attention = nn.BatchNorm1d(8), nn.Dropout(), nn.MultiheadAttention(8, 2)
            self.drop.eval()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            assert not self.training
            y = self.norm(x) + torch.rand_like(x)
            y = self.attention(y, y, y)[0]
            if fails:
                raise RuntimeError("as asked")
            return y

    model = Net()
    model.norm.weight.grad = torch.ones(8)
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    if fails:
        with pytest.raises(RuntimeError, match="as asked"):
            count(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    else:
        count(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert flags == [m.training for m in model.modules()]
    assert model.norm.weight.grad is not None
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_failure_that_the_model_catches_is_no_matter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(8, 3)

        def forward(self, x):
            try:
                return self.first(x)
            except RuntimeError:
                return self.second(x) @ torch.ones(3, 1)

    assert count(Net(), torch.ones(1, 8)).by_layer == {"second": 24, "": 3}


def test_it_counts_under_inference_mode():
    model, x, macs = HAND["self attention"]
    with torch.inference_mode():
        assert count(model, x).macs == macs


def test_a_token_that_a_forward_pass_expands_is_no_obstacle():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 6)

        def forward(self, x):
            return self.layer(self.token.expand(len(x), -1, -1))

    model = Token()
    assert count(model, torch.zeros(3, 2)).macs == 3 * 4 * 6
    assert all(p.requires_grad for p in model.parameters())
