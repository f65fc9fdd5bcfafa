"""Small nets, each with one thing that index maps get wrong, and its example input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class C2f(nn.Module):
    def __init__(self):
        super().__init__()
        self.cv1, self.cv2, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(32, 12, 1), nn.Linear(12, 5)
        self.m = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(y[-1] + torch.relu(block(y[-1])))
        return self.head(torch.relu(self.cv2(torch.cat(y, 1))).mean((2, 3)))


class Split(nn.Module):
    """Pieces of sizes that are kept in a list."""

    def __init__(self):
        super().__init__()
        self.sizes = [4, 8]
        self.first, self.a, self.b = nn.Linear(6, 12), nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x):
        a, b = self.first(x).relu().split(self.sizes, -1)
        return self.a(a) + self.b(b)


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        y = self.first(x).relu()
        half = y.shape[-1] // 2
        return self.a(y[..., :half]) + self.b(y[..., half:])


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 1), nn.Conv2d(12, 6, 1)
        self.d = nn.Conv2d(6, 12, 1)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x).relu()], 1)
        return self.head(y + self.d(self.c(y).relu()))


class ChannelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        y = self.b(self.a(x).relu()).relu()
        n, c, h, w = y.shape
        return self.head(y.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w))


class PixelShuffle(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 3))


class Roll(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.b(torch.roll(self.a(x).relu(), (1, 2), (2, 3)).flip(1))


class Flatten(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3))


class Windows(nn.Module):
    """Window attention with a table of biases and shifted windows, as in Swin."""

    def __init__(self):
        super().__init__()
        self.heads, self.table = 4, nn.Parameter(torch.randn(4, 4, 4))
        self.embed, self.qkv, self.proj = nn.Conv2d(3, 8, 1), nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(x, (-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        qkv = self.qkv(y.reshape(-1, 4, c)).reshape(-1, 4, 3, self.heads, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = ((q @ k.transpose(-2, -1)) + self.table).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(y.shape[0], 4, -1))
        y = y.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + torch.roll(y, (1, 1), (1, 2))
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean((1, 2)))


class Apart(nn.Module):
    """Query, key and value apart; fewer heads of keys than of queries; a class token and LayerScale."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.size = 4, 2, 3
        self.embed, self.token = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out, self.gamma, self.head = nn.Linear(12, 8), nn.Parameter(torch.rand(8)), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.num_heads, self.size).transpose(1, 2)
        k = self.k(x).view(n, t, self.num_kv_heads, self.size).transpose(1, 2)
        v = self.v(x).view(n, t, self.num_kv_heads, self.size).transpose(1, 2)
        k, v = (z.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        return self.head((x + self.gamma * self.out(y))[:, 0])


class AsWide(nn.Module):
    """Two blocks of attention that reshapes by the width of its input and keeps the scale, as in CaiT."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.embed, self.head = 4, nn.Linear(5, 12), nn.Linear(12, 2)
        self.qkv = nn.ModuleList(nn.Linear(12, 36) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for qkv, proj in zip(self.qkv, self.proj, strict=True):
            n, t, c = x.shape
            q, k, v = qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
            x = x + proj(y)
        return self.head(x.mean(1))


class Functional(nn.Module):
    """A layer's weight is used by ``F.linear``, with a bias that is put together, as in BEiT."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.qkv = nn.Linear(6, 24, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("k_bias", torch.zeros(8))
        self.proj = nn.Linear(8, 2)

    def forward(self, x):
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        n, t, _ = x.shape
        qkv = F.linear(x, self.qkv.weight, bias).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(y.transpose(1, 2).reshape(n, t, -1))


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attn = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(x + self.fc2(self.fc1(x).relu()))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(8, 10), nn.Linear(5, 2)

    def forward(self, x):
        gate, value = self.a(x).chunk(2, -1)
        return self.c(F.glu(self.b(F.silu(gate) * value), -1))


class Shared(nn.Module):
    """One layer called twice, and one weight under two names."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.back = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.back.weight = self.embed.weight

    def forward(self, x):
        y = self.embed(x)
        y = y + self.mid(self.mid(y).relu()).relu()
        return self.back(y)


class Unknown(nn.Module):
    """A Fourier transform and a function of NumPy's in the middle; the rest can be pruned."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = torch.fft.rfft(self.a(x), n=14).real
        return self.d(torch.cumsum(self.c(self.b(y).relu()), -1))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(Double.apply(self.a(x)))


class InPlace(nn.Module):
    """Channels written into a tensor of zeros, and an input that is changed in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x).relu_()
        y = x.new_zeros(x.shape[0], a.shape[1] + b.shape[1], *x.shape[2:])
        y[:, : a.shape[1]] = a
        y[:, a.shape[1] :] = b
        return self.c(y)


class Padded(nn.Module):
    """Rows are padded to whole windows, with channels last."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = F.pad(self.a(x.permute(0, 2, 3, 1)), (0, 0, 0, 1, 0, 2))
        return self.c(self.b(y).relu())


class Multiplier(nn.Sequential):
    """A depthwise convolution with two outputs for each input."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.PReLU(12), nn.Conv2d(12, 2, 1))


IMAGES, VECTORS, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(3, 6), torch.randn(2, 4, 5)
NETS = {
    C2f: IMAGES, Split: VECTORS, Slices: VECTORS, Concat: IMAGES, ChannelShuffle: IMAGES, PixelShuffle: IMAGES,
    Roll: IMAGES, Flatten: IMAGES, Windows: IMAGES, Apart: TOKENS, AsWide: TOKENS,
    Functional: torch.randn(2, 4, 6), Multihead: TOKENS,
    Gate: VECTORS, Shared: torch.arange(6).view(2, 3), Unknown: VECTORS, Custom: VECTORS,
    InPlace: IMAGES, Multiplier: IMAGES, Padded: IMAGES,
}  # fmt: skip
