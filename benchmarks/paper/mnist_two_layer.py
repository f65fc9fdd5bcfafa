"""``mnist``: the two-layer experiment of the i-SpaSP paper (PMLR v168, Sec. 6.1-6.2), and its synthetic check.

A network of one hidden ReLU layer, without biases, is trained on MNIST; hidden units are pruned at once to each
size by each criterion; accuracy is taken before and after fine-tuning. The synthetic part prunes random hidden
layers whose sorted row sums decay like ``i ** (-1 / p)`` and fits how fast the residual falls with the size.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from benchmarks.errors import UsageError
from benchmarks.harness.cells import as_dict, environment, write_json
from benchmarks.harness.prune import apply, build_pruner
from benchmarks.harness.tables import spread
from ippro_tp import PROImportance, SpaSPImportance
from ippro_tp.estimators import spasp_math as maths
from ippro_tp.estimators import spasp_ranking as ranking

PIXELS, CLASSES = 28 * 28, 10
ARMS = ("i-SpaSP", "Top-K", "L1", "PRO")


@dataclass(frozen=True)
class MnistConfig:
    """The two-layer MNIST experiment of the i-SpaSP paper, and the decay of the residual on synthetic data."""

    data_dir: Path = Path("data/mnist")
    """Folder with train/<digit>/*.png and test/<digit>/*.png."""
    out: Path = Path("runs/mnist")
    """Where ispasp_mnist.json and ispasp_mnist.md go."""
    width: int = 10_000
    """Hidden units of the unpruned network."""
    keep: tuple[int, ...] = (100, 250, 500, 750, 1000)
    """Hidden units after pruning."""
    seeds: tuple[int, ...] = (0, 1)
    """Of initial weights, order of images and calibration images."""
    train_images: int = 20_000
    """Random images of the training split (0: all 60,000)."""
    test_images: int = 0
    """Random images of the test split (0: all 10,000)."""
    calibration_images: int = 1280
    """Training images that criteria look at: the number of the authors' code."""
    epochs: int = 3
    """Of training the unpruned network."""
    finetune_epochs: int = 2
    """After pruning."""
    batch_size: int = 128
    """Images per training step."""
    lr: float = 1e-3
    """Learning rate of Adam, cosine to zero; the same for fine-tuning."""
    trials: int = 20
    """Draws of the synthetic check."""


class TopActivations(tp.importance.Importance):
    """Scores that are given: the sum of each hidden unit's activation over the calibration images.

    Args:
        sums: ``(width,)``.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    def __call__(self, group, **kwargs) -> Tensor:
        """Return the sums."""
        return self.sums


def run(config: MnistConfig) -> dict:
    """Run both parts, write JSON and Markdown into ``config.out``, print the Markdown, return the record.

    Raises:
        UsageError: There are no images, or a size is not below the width.
    """
    if not config.keep or not all(0 < size < config.width for size in config.keep):
        raise UsageError(f"--keep must be sizes between 1 and {config.width - 1} (--width)")
    started = time.perf_counter()
    train = read_images(config.data_dir / "train", config.train_images)
    test = read_images(config.data_dir / "test", config.test_images)
    rows = [row for seed in config.seeds for row in _one_seed(config, seed, train, test)]
    record = {
        "config": as_dict(config),
        "environment": environment(),
        "rows": rows,
        "synthetic": synthetic(config.trials),
        "seconds": time.perf_counter() - started,
    }
    write_json(config.out / "ispasp_mnist.json", record)
    text = markdown(record)
    (config.out / "ispasp_mnist.md").write_text(text)
    print(text)
    return record


def read_images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return pixels ``[N, 784]`` in [0, 1] and labels ``[N]`` of ``count`` random images (0: all)."""
    if not folder.is_dir():
        raise UsageError(f"no MNIST images in {folder}; give --data-dir with train/<digit>/ and test/<digit>/")
    images = ImageFolder(folder, lambda image: torch.from_numpy(np.array(image.convert("L"))))
    if len(images.classes) != CLASSES:
        raise UsageError(f"{folder} has {len(images.classes)} class folders; MNIST has {CLASSES}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = [images[i] for i in order[: count or None].tolist()]
    pixels = torch.stack([image for image, _ in chosen]).flatten(1).float() / 255
    return pixels, torch.tensor([label for _, label in chosen])


def two_layers(width: int) -> nn.Sequential:
    """Return ``W1 relu(W0 x)``: no biases, as in the paper."""
    return nn.Sequential(nn.Linear(PIXELS, width, bias=False), nn.ReLU(), nn.Linear(width, CLASSES, bias=False))


def fit(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, batch_size: int, seed: int
) -> nn.Module:
    """Train ``model`` in place with cross-entropy; images in an order that depends on ``seed`` only."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, epochs * math.ceil(len(images) / batch_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return top-1 accuracy in per cent."""
    images, labels = data
    predicted = torch.cat([model(part).argmax(1) for part in images.split(1000)])
    return 100 * (predicted == labels).double().mean().item()


def _one_seed(
    config: MnistConfig, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[dict]:
    torch.manual_seed(seed)
    dense = fit(two_layers(config.width), train, config.epochs, config.lr, config.batch_size, seed)
    drawn = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    drawn = drawn[: config.calibration_images]
    batches = list(zip(*(d[drawn].split(128) for d in train), strict=True))
    with torch.no_grad():
        hidden = dense[1](dense[0](train[0][drawn])).double()
        exact = hidden @ dense[2].weight.double().T
    rows = [{"seed": seed, "arm": "dense", "keep": config.width, "before": accuracy(dense, test)}]
    arms = _importances(dense, batches, hidden, seed)
    for size in config.keep:
        for arm, importance in arms.items():
            model = copy.deepcopy(dense)
            # TP keeps int(width * (1 - ratio)): half a unit of slack makes the rounding safe.
            ratio = (config.width - size - 0.5) / config.width
            pruner = build_pruner(model, test[0][:1], ("2",), importance, ratio)
            if isinstance(importance, SpaSPImportance):
                importance.bind(pruner)
            apply(pruner)
            with torch.no_grad():
                error = (model(train[0][drawn]).double() - exact).square().sum() / exact.square().sum()
            before = accuracy(model, test)
            fit(model, train, config.finetune_epochs, config.lr, config.batch_size, seed)
            row = {"seed": seed, "arm": arm, "keep": size, "before": before, "after": accuracy(model, test)}
            rows.append(row | {"residual": error.item(), "units": model[0].out_features})
    return rows


def _importances(
    dense: nn.Module, batches: list[tuple[Tensor, Tensor]], hidden: Tensor, seed: int
) -> dict[str, Callable]:
    """Return the arms, calibrated on ``dense``."""
    spasp, pro = SpaSPImportance(), PROImportance(seed=seed)
    for importance in (spasp, pro):
        torch.manual_seed(seed)
        importance.calibrate(dense, batches, progress=False)
    scores = (spasp, TopActivations(hidden.sum(0)), tp.importance.MagnitudeImportance(p=1), pro)
    return dict(zip(ARMS, scores, strict=True))


# -- synthetic -------------------------------------------------------------------------------------------------


def synthetic(
    trials: int, widths: tuple[int, ...] = (100, 200), powers: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
) -> list[dict]:
    """Return, for each width and p, the fitted exponent of ``|V|_F`` against the size s, and the bound's.

    Hidden rows are ``i ** (-1 / p)`` times a random non-negative vector of unit sum, so that the row sums are
    p-row-compressible with R = 1 and Theorem 4's exponent is ``1 - 1 / p``. Weights are Gaussian.
    """
    rows = []
    for width in widths:
        for power in powers:
            sizes = torch.arange(4, width // 2, 2)
            generator = torch.Generator().manual_seed(width)
            squares = torch.zeros(len(sizes), dtype=torch.float64)
            for _ in range(trials):
                squares += _residuals(width, power, sizes, generator)
            line = stats.linregress(sizes.double().log(), (squares / trials).sqrt().log())
            row = {"width": width, "p": power, "exponent": float(line.slope), "r2": float(line.rvalue**2)}
            rows.append(row | {"bound": 1 - 1 / power})
    return rows


def _residuals(width: int, power: float, sizes: Tensor, generator: torch.Generator) -> Tensor:
    decay = torch.arange(1, width + 1, dtype=torch.float64) ** (-1 / power)
    decay = decay[torch.randperm(width, generator=generator)]
    hidden = torch.rand(width, 32, generator=generator, dtype=torch.float64)
    hidden *= (decay / hidden.sum(1))[:, None]
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    response = maths.Response.zero(width, torch.device("cpu"))
    response.activation += hidden.sum(1)
    response.add_factors(weight, weight * hidden.sum(1))
    chosen = ranking.select(response, sizes, 20)
    return torch.stack([(weight @ (hidden * ~mask[:, None])).square().sum() for mask in chosen])


# -- report ----------------------------------------------------------------------------------------------------


def markdown(record: dict) -> str:
    """Return the tables of a record of :func:`run`."""
    config, rows = record["config"], record["rows"]
    dense = [row["before"] for row in rows if row["arm"] == "dense"]
    lines = [
        f"MNIST, one hidden ReLU layer of {config['width']} units, no biases; trained for {config['epochs']} "
        f"epochs on {config['train_images'] or 'all'} images, fine-tuned for {config['finetune_epochs']}; "
        f"criteria see {config['calibration_images']} training images. Top-1 in per cent on "
        f"{config['test_images'] or 'all'} test images, before / after fine-tuning; mean (± standard deviation) "
        f"over seeds {config['seeds']}. Unpruned: {spread(dense)}.",
        _table(rows, config["keep"], lambda row: (row["before"], row["after"])),
        "Relative residual |V|² / |U|² on the calibration images, before fine-tuning:",
        _table(rows, config["keep"], lambda row: (row["residual"],), form="{:.3f}"),
        "Synthetic: the exponent of |V| against the size s, fitted to log |V| over log s, the R² of that line, "
        "and the exponent of the bound of Theorem 4 (1 - 1/p). More negative is faster.",
        tabulate(
            [[r["width"], r["p"], r["exponent"], r["r2"], r["bound"]] for r in record["synthetic"]],
            ["hidden units", "p", "fitted", "R²", "bound"],
            tablefmt="github",
            floatfmt=(".0f", ".1f", ".2f", ".3f", ".2f"),
        ),
    ]
    return "\n\n".join(lines) + "\n"


def _table(rows: list[dict], sizes: list[int], values: Callable[[dict], tuple], form: str = "{:.1f}") -> str:
    body = []
    for arm in ARMS:
        row = [arm]
        for size in sizes:
            found = [values(r) for r in rows if r["arm"] == arm and r["keep"] == size]
            row.append(" / ".join(spread(column, form) for column in zip(*found, strict=True)))
        body.append(row)
    return tabulate(body, ["criterion", *(f"keep {size}" for size in sizes)], tablefmt="github")
