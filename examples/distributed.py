"""Calibrate on several processes, prune the same channels on each, and go on training with DDP.

    torchrun --nproc-per-node 2 examples/distributed.py

Each rank looks at its own share of the images; the statistics are added up when ``calibrate`` ends, so that all
ranks hold the same scores, those of one process with all images. Images here are random: put in your own.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from ippro_tp import PROImportance


def build() -> nn.Sequential:
    """A small network."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def main() -> None:
    """Calibrate, prune, fine-tune; check that the ranks agree."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same images and the same model on every rank
    images = TensorDataset(torch.randn(50, 3, 16, 16), torch.randint(0, 10, (50,)))
    mine = Subset(images, range(rank, len(images), world))  # unlike DistributedSampler, this repeats no image

    model = build().to(device)  # not yet wrapped by DDP
    imp = PROImportance()
    pruner = tp.pruner.BasePruner(
        model, torch.randn(1, 3, 16, 16, device=device), imp, global_pruning=True, pruning_ratio=0.5,
        max_pruning_ratio=0.9, ignored_layers=[model[8]],
    )  # fmt: skip
    imp.calibrate(pruner, DataLoader(mine, batch_size=8), progress=rank == 0)  # on every rank
    pruner.step()

    ddp = DistributedDataParallel(model)  # now: pruning has replaced the parameters
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    loader = DataLoader(images, batch_size=8)  # every rank needs as many batches here; use a DistributedSampler
    for x, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(ddp(x.to(device)), labels.to(device)).backward()
        optimizer.step()

    total = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    everyones = [torch.empty_like(total) for _ in range(world)]
    dist.all_gather(everyones, total)
    if not all(torch.equal(other, total) for other in everyones):
        raise SystemExit("the ranks hold different models")
    print(f"rank {rank} of {world}: {model[0].out_channels} and {model[3].out_channels} channels", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
