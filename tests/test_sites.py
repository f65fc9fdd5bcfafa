"""Which layers carry a group's score, in nets where that is not obvious."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from ippro_tp import PROImportance, SpaSPImportance
from ippro_tp.graph.groups import groups_of, read_group

from .nets import make_pruner


class Attention(nn.Module):
    """A residual stream that a Linear layer (or an Embedding) and nn.MultiheadAttention write to."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        self.embedded = self.embed(x)
        y = self.norm(self.embedded)
        self.attended = self.attention(y, y, y, need_weights=False)[0]
        return self.fc((self.embedded + self.attended).mean(1))


@pytest.mark.parametrize("words", [False, True], ids=["linear", "embedding"])
def test_attention_modules_and_embeddings_write_to_the_stream(words):
    torch.manual_seed(0)
    model = Attention(nn.Embedding(10, 8) if words else nn.Linear(3, 8)).eval()
    x = torch.randint(0, 10, (6, 5)) if words else torch.randn(6, 5, 3)
    weights = torch.randn(6, 4)
    imp = PROImportance(cost=None)
    pruner = make_pruner(model, x[:1], imp, [model.fc], root_module_types=[nn.Linear, nn.Embedding])
    with imp.observe(pruner):
        ((model(x) * weights).sum() / 6).backward()
    (group,) = groups_of(pruner)
    (row,) = imp.report()
    assert set(row.producers) == {"embed", "attention"}

    out = model(x)
    written = [model.embedded, model.attended]
    gradients = torch.autograd.grad((out * weights).sum(), written)
    offsets = sum((g * y).sum(1) for g, y in zip(gradients, written, strict=True))
    torch.testing.assert_close(imp(group), offsets.abs().mean(0).detach(), rtol=1e-4, atol=1e-6)
    pruner.step()
    model(x).sum().backward()
    assert model.norm.weight.numel() == 4


def test_channels_that_are_positions_of_another_layer_are_left_alone():
    """gMLP's gate: Torch-Pruning takes the tokens of one layer for channels of the other."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc1 = nn.Linear(6, 5), nn.Linear(5, 16)
            self.proj, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            u, v = self.fc1(self.stem(x).relu()).chunk(2, dim=-1)
            v = self.proj(v.transpose(1, 2)).transpose(1, 2)
            return self.fc2(u * v).mean(1)

    model = Gate().eval()
    x = torch.randn(4, 8, 6)

    def pruner(ignored):
        return tp.pruner.BasePruner(
            model, x[:1], importance=None, ignored_layers=[model.fc2, *ignored], in_channel_groups={},
            out_channel_groups={}, num_heads={}, channel_groups={},
        )  # fmt: skip

    imp, wrong = PROImportance(), pruner([])
    with pytest.warns(RuntimeWarning, match=r"not be pruned(.|\n)*'fc1' to 'proj'(.|\n)*ignored_layers"):
        imp.calibrate(wrong, [x], progress=False)
    for group in groups_of(wrong):
        names = {p.name for p in read_group(group).producers}
        assert (imp(group) is None) == ({"fc1", "proj"} <= names)
    right = pruner([model.proj])
    imp.calibrate(right, [x], progress=False)
    assert all(imp(group) is not None for group in groups_of(right))


@pytest.mark.parametrize("settings", [{}, {"reference": "mean"}, {"estimator": "paper"}], ids=str)
@pytest.mark.parametrize("tokens", [4, 6, 3])
def test_samples_are_told_apart_where_tokens_come_first(tokens, settings):
    """``batch_first=False`` puts the tokens into dimension 0: as many as samples, a multiple of them, or fewer.

    A table that is permuted before it is added (relative positions) moves no samples.
    """

    class Net(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("table", torch.randn(tokens, 8, 1))
            self.batch_first, self.embed = batch_first, nn.Linear(3, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            y = self.embed(x) + self.table.permute(2, 0, 1)
            if self.batch_first:
                return self.fc(self.block(y)[:, 0])
            return self.fc(self.block(y.transpose(0, 1))[0])

    torch.manual_seed(1)
    x, labels = torch.randn(2, tokens, 3), torch.randint(4, (2,))
    scores = []
    for batch_first in (True, False):
        model = Net(batch_first).eval()
        imp = PROImportance(cost=None, **settings)
        pruner = make_pruner(model, x[:1], imp, [model.fc])
        with imp.observe(pruner):
            nn.functional.cross_entropy(model(x), labels).backward()
        scores.append([imp(group) for group in groups_of(pruner)])
    assert len(scores[0]) == len(scores[1]) >= 2
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


class Gated(nn.Module):
    """A gated linear unit of one Linear layer: rows i and i + 6 go together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2, self.fc = (
            nn.Linear(3, 8),
            nn.Linear(8, 12),
            nn.Linear(6, 8),
            nn.Linear(8, 4),
        )

    def forward(self, x):
        y = self.embed(x)
        a, b = self.fc1(y).chunk(2, dim=-1)
        return self.fc(y + self.fc2(a * b.sigmoid()))


class Halves(nn.Module):
    """Halves of a convolution's output are added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        a, b = self.conv(x.view(-1, 3, 1, 1).expand(-1, -1, 4, 4)).split(4, 1)
        return self.fc(self.next(a + b.relu()).mean((2, 3)))


class Folded(nn.Module):
    """A Linear layer whose outputs become maps: four positions make one channel of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.fc = nn.Linear(3, 24), nn.ConvTranspose2d(6, 8, 2), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.up(self.stem(x).view(-1, 6, 2, 2)).relu().mean((2, 3)))


@pytest.mark.parametrize("net", [Gated, Halves, Folded])
def test_positions_that_go_together_have_one_score(net):
    """As Torch-Pruning removes them, one at a time; their score is that of scaling them jointly."""
    torch.manual_seed(0)
    model = net().double().eval()
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.randint(4, (5,))
    imp = PROImportance(cost=None)
    pruner = make_pruner(model, x[:1], imp, [model.fc])
    with imp.observe(pruner):
        nn.functional.cross_entropy(model(x), labels).backward()
    met = 0
    for group in list(groups_of(pruner)):
        record, scores = read_group(group), imp(group)
        tied = record.tied if record.tied is not None else torch.arange(record.width)
        met += record.tied is not None
        module, handler = group[0].dep.target.module, group[0].dep.handler
        for i in range(record.width):
            alone = pruner.DG.get_pruning_group(module, handler, [i])
            gone = {j for item in alone if item.dep == alone[0].dep for j in item.idxs}
            assert gone == set((tied == tied[i]).nonzero().view(-1).tolist())
        for unit in tied.unique().tolist():
            torch.testing.assert_close(scores[tied == unit], scores[unit].expand(int((tied == unit).sum())))
            expected = joint_offset(model, record, (tied == unit).nonzero().view(-1), x, labels)
            torch.testing.assert_close(scores[unit].double(), expected, rtol=1e-3, atol=1e-9)
    assert met == 1
    assert sum("positions that go together" in note for row in imp.report() for note in row.notes) == 1


def joint_offset(model, record, positions, x, labels, step=1e-5):
    """Mean size of the derivative of each sample's loss by the scale of all rows at ``positions``."""
    losses = []
    for factor in (1 + step, 1 - step):
        scaled = copy.deepcopy(model)
        for layer in record.producers:
            rows = layer.index[torch.isin(layer.root, positions)]
            module = scaled.get_submodule(layer.name)
            with torch.no_grad():
                if isinstance(module, nn.ConvTranspose2d):
                    module.weight[:, rows] *= factor
                else:
                    module.weight[rows] *= factor
                module.bias[rows] *= factor
        losses.append(nn.functional.cross_entropy(scaled(x), labels, reduction="none").detach())
    return ((losses[0] - losses[1]) / (2 * step)).abs().mean()


@pytest.mark.parametrize("make", [PROImportance, SpaSPImportance], ids=["pro", "spasp"])
def test_half_of_a_gated_unit_is_half(make):
    torch.manual_seed(0)
    model = Gated().eval()
    imp = make()
    pruner = make_pruner(model, torch.randn(1, 3), imp, [model.fc, model.embed, model.fc2], pruning_ratio=0.5)
    imp.calibrate(pruner, [torch.randn(8, 3)], progress=False)
    pruner.step()
    assert (model.fc1.out_features, model.fc2.in_features) == (6, 3)
    model(torch.randn(2, 3))


def test_a_group_that_a_weight_reads_unseen_is_left_alone():
    """BEiT calls F.linear with the weight of qkv: Torch-Pruning would cut the stream and not the weight."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.hidden = nn.Linear(3, 8), nn.Linear(8, 6)
            self.qkv, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            y = self.hidden(self.stem(x).relu())
            return self.fc(nn.functional.linear(y, self.qkv.weight).relu())

    torch.manual_seed(0)
    model = Net().eval()
    imp = PROImportance()
    pruner = make_pruner(model, torch.randn(1, 3), imp, [model.fc])
    with pytest.warns(RuntimeWarning, match="1 groups get no score(.|\n)*'hidden.out': 'qkv' reads"):
        imp.calibrate(pruner, [torch.randn(8, 3)], progress=False)
    again = PROImportance()
    again.load_state_dict(imp.state_dict())
    for group in groups_of(pruner):
        for each in (imp, again):
            assert (each(group) is None) == (read_group(group).key == "hidden.out")
    assert any("not scored" in note for row in imp.report() for note in row.notes)
    pruner.step()
    assert (model.stem.out_features, model.hidden.out_features) == (4, 6)
    model(torch.randn(2, 3))


@pytest.mark.parametrize("tokens", [4, 5])
def test_a_table_that_all_samples_share_counts_sample_by_sample(tokens):
    """Learned positions: their rows are no samples, also where there are as many."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.positions, self.fc = nn.Linear(3, 8), nn.Embedding(tokens, 8), nn.Linear(8, 4)

        def forward(self, x):
            self.table = self.positions(torch.arange(tokens))
            self.embedded = self.embed(x)
            return self.fc((self.embedded + self.table).tanh().mean(1))

    torch.manual_seed(0)
    model = Net().double().eval()
    x, weights = torch.randn(4, tokens, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    imp = PROImportance(cost=None)
    pruner = make_pruner(model, x[:1], imp, [model.fc])
    with imp.observe(pruner):
        ((model(x) * weights).sum() / 4).backward()
    (group,) = groups_of(pruner)
    out = model(x)
    (own,) = torch.autograd.grad((out * weights).sum(), [model.embedded])
    offsets = (own * (model.embedded + model.table)).sum(1)
    assert {row.root: len(row.producers) for row in imp.report()} == {read_group(group).key: 2}
    torch.testing.assert_close(imp(group).double(), offsets.abs().mean(0).detach(), rtol=1e-6, atol=1e-9)
