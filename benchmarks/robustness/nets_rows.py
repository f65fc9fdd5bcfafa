"""Layers that see other rows than the samples of the batch: windows, experts, regions, packed sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchvision.ops import roi_align

from benchmarks.robustness.inputs import image, tokens
from benchmarks.robustness.line import Line

CLASSES = 5


class Images(nn.Module):
    """A list of images in, as detectors take it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 18, 3), nn.Linear(18, CLASSES)

    def forward(self, images: list[Tensor]) -> Tensor:
        """Class scores, a row an image."""
        x = torch.stack(list(images))
        return self.head(F.relu(self.next(F.relu(self.conv(x)))).mean((2, 3)))


class Windows(nn.Module):
    """Shifted windows of tokens, as Swin has them, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 20), nn.Linear(20, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(x, (-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        y = self.down(F.gelu(self.up(self.norm(y.reshape(-1, 4, c)))))
        y = (
            (y - y.mean(1, keepdim=True))
            .view(n, h // 2, w // 2, 2, 2, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(n, h, w, c)
        )
        return self.head(F.relu(x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))


class Folds(nn.Module):
    """Patches folded into the batch, as in MobileViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 20), nn.Linear(20, 12)
        self.out, self.head = nn.Conv2d(12, 10, 1), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.silu(self.stem(x))
        n, c, h, w = x.shape
        y = x.reshape(n * c * h // 2, 2, w // 2, 2).transpose(1, 2).reshape(n, c, h * w // 4, 4)
        y = y.transpose(1, 3).reshape(n * 4, h * w // 4, c)
        y = y + self.down(F.silu(self.up(y)))
        y = y.view(n, 4, h * w // 4, c).transpose(1, 3).reshape(n * c * h // 2, w // 2, 2, 2)
        y = y.transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.silu(self.out(y)).mean((2, 3)))


class Table(nn.Module):
    """A table of positions, made by a layer, added from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.up = nn.Linear(6, 16), nn.Linear(1, 16), nn.Linear(16, 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        place = self.place(torch.linspace(-1, 1, x.shape[1])[:, None])
        return self.head(F.relu(self.up(F.relu(place + self.embed(x)))).mean(1))


class Experts(nn.Module):
    """A mixture of experts: each token goes to one of three, by masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.embed(x)
        tokens = x.reshape(-1, 16)
        gate, choice = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            picked = (choice == number).nonzero().flatten()
            out = out.index_add(0, picked, expert(tokens[picked]) * gate[picked, None])
        return self.head((tokens + out).view_as(x).mean(1))


class Boxes(nn.Module):
    """A head on regions of interest, three boxes an image, as in Mask R-CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12 * 4, 24), nn.Linear(24, 18)
        self.cls, self.box = nn.Linear(18, CLASSES), nn.Linear(18, 4)

    def forward(self, x: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Scores and offsets of the boxes."""
        y = roi_align(F.relu(self.conv(x)), list(boxes), 2).flatten(1)
        y = F.relu(self.fc2(F.relu(self.fc1(y))))
        return {"scores": self.cls(y).unflatten(0, (len(x), 3)), "offsets": self.box(y).unflatten(0, (len(x), 3))}


class Packed(nn.Module):
    """Sequences of several lengths, packed into rows without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        lengths = 2 + (x[:, 0, 0] > 0).long() * 3 + (x[:, 1, 1] > 0).long()
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y = F.relu(self.up(F.relu(self.embed(packed.data))))
        padded, _ = pad_packed_sequence(packed._replace(data=y), batch_first=True)
        return self.head(padded.sum(1))


class Masked(nn.Module):
    """Valid tokens alone go through a layer, picked by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        valid, x = x[..., 0] > -0.5, self.embed(x)
        y = torch.zeros_like(x)
        y[valid] = self.down(F.relu(self.up(x[valid])))
        return self.head((x + y).mean(1))


class TimeFirst(nn.Module):
    """Time first, batch second, all the way, outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of each step, ``(T, N, classes)``."""
        x = x.permute(1, 0, 2)
        return self.head(F.relu(self.up(F.relu(self.embed(x)).cumsum(0))))


class OneRow(nn.Module):
    """All samples side by side in one row of a 1D convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = nn.Linear(6, 16), nn.Conv1d(16, 24, 1), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        n, t, _ = x.shape
        y = F.relu(self.conv(F.relu(self.embed(x)).reshape(1, n * t, 16).transpose(1, 2)))
        return self.head(y.transpose(1, 2).reshape(n, t, 24).mean(1))


def _boxes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    corners = torch.rand(n, 3, 2, generator=generator) * 3
    return image(n, generator), torch.cat(
        (corners, corners + 2 + 2 * torch.rand(n, 3, 2, generator=generator)), -1
    )


LINES = (
    Line("list", "a list of images", Images, lambda n, g: list(image(n, g)), ("head",), "conv"),
    Line("windows", "shifted windows folded into the batch", Windows, image, ("head",), "up"),
    Line("folds", "patches folded into the batch (MobileViT)", Folds, image, ("head",), "up"),
    Line("table", "a table of positions added from the left", Table, tokens, ("head",), "up"),
    Line("experts", "mixture of experts, tokens by masks", Experts, tokens, ("head", "router"), "experts.0.0"),
    Line("boxes", "heads on regions of interest", Boxes, _boxes, ("cls", "box"), "fc2"),
    Line("packed", "packed sequences", Packed, tokens, ("head",), "up"),
    Line("masked", "rows picked by a mask", Masked, tokens, ("head",), "up"),
    Line(
        "time-first",
        "time first, batch second",
        TimeFirst,
        tokens,
        ("head",),
        "up",
        outputs=lambda y: y.transpose(0, 1),
    ),
    Line("one-row", "all samples side by side on one axis", OneRow, tokens, ("head",), "conv"),
)
