"""Views, frames and samples laid out in rows in any order, and gathered again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.robustness.inputs import image, pair, video
from benchmarks.robustness.line import Line

WIDTH, CLASSES = 12, 5


class Rows(nn.Module):
    """A small image encoder between two functions that lay samples out in rows and gather them again.

    Args:
        spread: inputs -> images, as many rows as it likes.
        gather: ``(features (rows, WIDTH), inputs)`` -> ``(samples, WIDTH)``.
    """

    def __init__(self, spread: Callable[..., Tensor], gather: Callable[..., Tensor]) -> None:
        super().__init__()
        self.spread, self.gather = spread, gather
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH)
        self.point, self.mix = nn.Conv2d(WIDTH, WIDTH + 4, 1), nn.Linear(WIDTH + 4, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def encode(self, x: Tensor) -> Tensor:
        """Features of images, a row each."""
        x = F.silu(self.point(F.relu(self.norm(self.conv(x)))))
        return F.relu(self.mix(x.mean((2, 3))))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Class scores."""
        return self.head(self.gather(self.encode(self.spread(*inputs)), *inputs))


def rows(
    name: str, kind: str, spread: Callable[..., Any], gather: Callable[..., Any], batch: Any = image, **more: Any
) -> Line:
    """A line of :class:`Rows`."""
    build = lambda: Rows(spread, gather)  # noqa: E731
    return Line(name, kind, build, batch, ("head",), plant="conv", norm="norm", **more)


def _views(x: Tensor) -> Tensor:
    return torch.cat([x, x.flip(-1), x * 0.5])


def _shuffled(x: Tensor) -> Tensor:
    return torch.argsort(x.flatten(1).sum(1))


LINES = (
    rows(
        "cat-views",
        "two views concatenated along the batch",
        lambda a, b: torch.cat((a, b)),
        lambda f, a, b: f.chunk(2)[0] - f.chunk(2)[1],
        pair,
    ),
    rows(
        "three-views",
        "three views made inside, view-major",
        _views,
        lambda f, x: f.view(3, -1, f.shape[-1]).amax(0),
    ),
    rows(
        "stack-flatten",
        "views stacked, then flattened",
        lambda a, b: torch.stack((a, b), 0).flatten(0, 1),
        lambda f, a, b: f.unflatten(0, (2, -1)).prod(0),
        pair,
    ),
    rows(
        "stack-inner",
        "views stacked behind the batch, then flattened",
        lambda a, b: torch.stack([a, b], dim=1).reshape(-1, 3, 8, 8),
        lambda f, a, b: f[::2] - f[1::2],
        pair,
    ),
    rows(
        "interleaved",
        "views written into every other row",
        lambda a, b: torch.stack((a, b), 1).flatten(0, 1),
        lambda f, a, b: f[0::2] * f[1::2],
        pair,
    ),
    rows(
        "frames",
        "frames folded into the batch, sample-major",
        lambda v: v.flatten(0, 1),
        lambda f, v: f.view(v.shape[0], 4, -1).mean(1),
        video,
    ),
    rows(
        "time-major",
        "frames folded into the batch, time-major",
        lambda v: v.transpose(0, 1).flatten(0, 1),
        lambda f, v: f.view(4, v.shape[0], -1).amax(0),
        video,
    ),
    rows(
        "movedim",
        "time-major by movedim with keywords",
        lambda v: torch.flatten(input=torch.movedim(v, source=1, destination=0), start_dim=0, end_dim=1),
        lambda f, v: f.reshape(shape=(4, -1, f.shape[-1])).movedim(source=0, destination=1).amax(dim=1),
        video,
    ),
    rows(
        "keywords",
        "cat, permute and chunk called with keywords",
        lambda a, b: torch.cat(tensors=(a, b), dim=0),
        lambda f, a, b: torch.sub(*torch.chunk(input=f, chunks=2, dim=0)),
        pair,
    ),
    rows(
        "swapaxes",
        "swapaxes and contiguous views",
        lambda v: v.swapaxes(0, 1).contiguous().view(-1, 3, 8, 8),
        lambda f, v: f.view(4, -1, f.shape[-1]).std(0),
        video,
    ),
    rows(
        "einsum",
        "rows laid out by einsum",
        lambda v: torch.einsum("ntchw->tnchw", v).reshape(-1, 3, 8, 8),
        lambda f, v: torch.einsum("tnc,t->nc", f.view(4, -1, f.shape[-1]), torch.tensor([1.0, -1, 2, 0.5])),
        video,
    ),
    rows(
        "expanded",
        "each sample repeated, expand and repeat_interleave",
        lambda x: torch.cat((x.repeat_interleave(2, 0), x[:, None].expand(-1, 2, -1, -1, -1).flatten(0, 1) + 0.3)),
        lambda f, x: f.view(2, -1, 2, f.shape[-1]).amax((0, 2)),
    ),
    rows(
        "tiled",
        "repeat along the batch, view-major",
        lambda x: x.repeat(3, 1, 1, 1) * torch.tensor([1.0, 0.5, -1]).repeat_interleave(len(x)).view(-1, 1, 1, 1),
        lambda f, x: f.view(3, -1, f.shape[-1]).amax(0),
    ),
    rows(
        "sorted",
        "rows sorted by a statistic and sorted back",
        lambda x: x[_shuffled(x)],
        lambda f, x: f[_shuffled(x).argsort()],
    ),
    rows(
        "index-select",
        "rows picked by index_select",
        lambda x: x.index_select(0, _shuffled(x)),
        lambda f, x: torch.zeros_like(f).index_copy(0, _shuffled(x), f),
    ),
    rows("reversed", "the batch flipped and flipped back", lambda x: x.flip(0), lambda f, x: f.flip(0)),
    rows("rolled-batch", "the batch rolled and rolled back", lambda x: x.roll(1, 0), lambda f, x: f.roll(-1, 0)),
    rows(
        "halves",
        "the batch processed in two parts of any size",
        lambda x: torch.cat((x[len(x) // 2 :], x[: len(x) // 2])),
        lambda f, x: torch.cat((f[len(f) - len(f) // 2 :], f[: len(f) - len(f) // 2])),
    ),
    rows(
        "negatives",
        "each sample against its neighbour in the batch",
        lambda x: x,
        lambda f, x: f - f.roll(1, 0),
        refuse=True,
    ),
    rows("batch-mean", "features centred over the batch", lambda x: x, lambda f, x: f - f.mean(0), refuse=True),
    rows(
        "batch-softmax",
        "attention over the batch",
        lambda x: x,
        lambda f, x: torch.softmax(f @ f.T, 1) @ f,
        refuse=True,
    ),
)
