"""Two processes with different data hold the same scores as one process with all of it."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from ippro_tp import PROImportance
from ippro_tp.groups import groups_of

from .nets import CASES


def calibrated(batches, estimator):
    case = CASES["residual"]
    imp = PROImportance(estimator=estimator)
    pruner = case.pruner(case.model(), imp)
    imp.calibrate(pruner, batches, loss_fn=F.cross_entropy, progress=False)
    return [imp(group) for group in groups_of(pruner)]


def worker(rank, folder, estimator):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        x, labels = CASES["residual"].inputs(7)
        mine = slice(0, 4) if rank == 0 else slice(4, 7)
        torch.save(calibrated([(x[mine], labels[mine])], estimator), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("estimator", ["expected", "paper"])
def test_ranks_agree_to_the_bit_and_with_one_process(estimator):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder, estimator), nprocs=2)
        first, second = (torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2))
    assert all(map(torch.equal, first, second))
    x, labels = CASES["residual"].inputs(7)
    together = calibrated([(x[:4], labels[:4]), (x[4:], labels[4:])], estimator)
    for a, b in zip(first, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
