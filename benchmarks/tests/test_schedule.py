from __future__ import annotations

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.harness.prune import PruneConfig, widths
from benchmarks.harness.schedule import prune_front_to_back


def test_each_group_is_scored_on_the_network_as_it_is_by_then():
    class Net(nn.Module):
        """Layers are registered in another order than they run."""

        def __init__(self):
            super().__init__()
            self.last, self.second, self.first = nn.Conv2d(10, 4, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.last(self.second(self.first(x).relu()).relu())

    torch.manual_seed(0)
    net, seen, tuned = Net(), [], []

    def build(model, pruner):
        seen.append((model.first.out_channels, model.second.out_channels))
        return tp.importance.MagnitudeImportance()

    wanted = {"first": 5, "second": 6, "last": 4}
    pruned = prune_front_to_back(
        net, torch.randn(1, 3, 4, 4), ("last",), wanted, build, PruneConfig(), between=tuned.append
    )
    assert pruned.widths == wanted
    assert seen == [(8, 10), (5, 10)]
    assert len(tuned) == 2
    assert widths(net) == {"first": 8, "second": 10, "last": 4}
