"""Task ``digits``: scikit-learn's 1,797 handwritten digits and a small ResNet trained on the spot.

Nothing is downloaded, and everything is done in about two minutes on two cores: the default of ``make compare``.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.errors import UsageError
from benchmarks.harness.evaluate import accuracy
from benchmarks.harness.finetune import Recipe, finetune
from benchmarks.models.checkpoints import load_checkpoint
from benchmarks.models.small_resnet import SmallResNet
from benchmarks.tasks.base import Task, TaskConfig, TaskDefaults, TensorImages

MODEL = "resnet14"
TEST_IMAGES = 500
RECIPE = Recipe(epochs=30, learning_rate=0.03, batch_size=64)

DEFAULTS = TaskDefaults(
    criteria=(
        "random", "l1", "l2", "bn", "lamp", "fpgm", "fpgm-fixed", "taylor", "taylor-gate", "hessian",
        "hessian-fixed", "pro", "pro-paper-lam0.001", "pro-paper-lam1",
    ),
    targets=(0.75, 0.5),
    calibration_images=256,
    costs=("none", "macs"),
    depletions=("none", "log", "coupled"),
)  # fmt: skip


def digit_images() -> tuple[TensorImages, TensorImages]:
    """Return the training and test images, shuffled once with a fixed seed."""
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    parts = order[TEST_IMAGES:], order[:TEST_IMAGES]
    train, test = (TensorImages(pixels[part], labels[part], (0.305,), (0.376,)) for part in parts)
    return train, test


def build(config: TaskConfig, recipe: Recipe = RECIPE) -> Task:
    """Return the task; its network is trained unless ``--checkpoint`` or the cache holds one."""
    if config.model not in ("", MODEL):
        raise UsageError(f"task digits has one network, {MODEL}; got --model {config.model}")
    train, test = digit_images()
    model = SmallResNet(num_classes=10)
    example = train.batch(torch.tensor([0]))[0]
    task = Task("digits", MODEL, model, example, train, test, 10, ignored=("fc",))
    cached = config.cache_dir / f"digits_{MODEL}_{recipe.epochs}epochs.safetensors"
    if config.checkpoint is not None or cached.exists():
        load_checkpoint(model, config.checkpoint or cached)
    else:
        _train(task, recipe)
        cached.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), cached)
    return task


def _train(task: Task, recipe: Recipe) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in task.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is slower on several
    try:
        finetune(task.model, task, recipe, seed=0, device="cpu", label="training the digits network")
    finally:
        torch.set_num_threads(threads)
    score = accuracy(task.model, task.evaluation("test", 0, 250), "cpu")
    print(f"digits: trained {MODEL} to {score:.2%} on {TEST_IMAGES} test images")
