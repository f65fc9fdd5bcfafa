"""VGG with BatchNorm for 32x32 images: one Linear layer after the convolutions, as is usual on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

LAYOUTS = {
    16: (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512),
    19: (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512),
}


class CifarVGG(nn.Module):
    """VGG-16 or -19 (Simonyan and Zisserman 2015): 3x3 convolutions, four poolings by two, a mean over 2x2.

    Args:
        depth: 16 or 19.
        num_classes: Number of outputs.
        width: Factor of all numbers of channels.
    """

    def __init__(self, depth: int, num_classes: int = 100, width: float = 1.0) -> None:
        super().__init__()
        if depth not in LAYOUTS:
            raise ValueError(f"no CIFAR VGG of depth {depth}; known depths: {', '.join(map(str, LAYOUTS))}")
        layers: list[nn.Module] = []
        planes = 3
        for entry in LAYOUTS[depth]:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
            else:
                out = round(entry * width)
                layers += [nn.Conv2d(planes, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True)]
                planes = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``[N, 3, 32, 32]``."""
        return self.classifier(self.features(x).mean((2, 3)))
