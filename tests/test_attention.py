from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from ippro_tp import Compensation, attention_heads, update_attention

timm = pytest.importorskip("timm")


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()


def pruner_of(model: nn.Module, **options) -> tp.pruner.BasePruner:
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "channel_groups": {}}
    return tp.pruner.BasePruner(
        model,
        (torch.randn(1, 3, 32, 32),),
        importance=tp.importance.MagnitudeImportance(),
        ignored_layers=[model.head],
        num_heads=attention_heads(model),
        **fresh,
        **{"pruning_ratio": 0.5, **options},
    )


@pytest.mark.parametrize(
    ("options", "heads", "size"),
    [({}, 3, 32), ({"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.3}, 2, 64)],
)
def test_a_pruned_vit_runs_and_is_compensated(options, heads, size):
    model = vit()
    reference, x = vit(), torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert list(attention_heads(model).values()) == [3, 3]
    plain = vit()
    pruner = pruner_of(plain, **options)
    pruner.step()
    update_attention(pruner)
    report = (
        Compensation()
        .calibrate(model, [torch.randn(96, 3, 32, 32)], progress=False)
        .step(pruner_of(model, **options))
    )
    assert not any(row.skipped for row in report.rows), str(report)
    for net in (plain, model):
        attention = net.blocks[0].attn
        assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (heads, size, heads * size)
        assert attention.scale == size**-0.5
    errors = [float((net(x) - reference(x)).norm().detach()) for net in (model, plain)]
    assert errors[0] < 0.75 * errors[1]


def test_other_numbers_are_set_by_repair():
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), 8

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x.view(len(x), self.width, *x.shape[2:]))

    def repair(model: nn.Module) -> None:
        model.width = model.a.out_channels

    model = Reshaping().eval()
    pruner = tp.pruner.BasePruner(
        model, (torch.randn(1, 3, 5, 5),), tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[model.b], num_heads={}, in_channel_groups={}, out_channel_groups={}, channel_groups={},
    )  # fmt: skip
    comp = Compensation().calibrate(pruner, [torch.randn(8, 3, 5, 5)], progress=False)
    (row,) = comp.step(pruner, repair).rows
    assert (model.width, row.kept) == (4, 4)
