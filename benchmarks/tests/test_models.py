from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from benchmarks.criteria.registry import find_criterion
from benchmarks.errors import UsageError
from benchmarks.harness.prune import PruneConfig, prune, size
from benchmarks.models.checkpoints import load_checkpoint, read_state_dict
from benchmarks.models.cifar import NETWORKS
from ippro_tp.cli.cifar_resnet import BasicBlock, CifarResNet, option_a_shortcut


@pytest.mark.parametrize(("in_planes", "planes"), [(16, 32), (32, 64), (5, 10)])
def test_shortcut_equals_zero_padding_to_the_bit(in_planes, planes):
    x = torch.randn(3, in_planes, 8, 8)
    before = planes // 4
    padded = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, planes - in_planes - before))
    assert torch.equal(option_a_shortcut(in_planes, planes)(x), padded)


def test_block_equals_literal_option_a_forward():
    torch.manual_seed(0)
    block, x = BasicBlock(16, 32, 2).eval(), torch.randn(2, 16, 32, 32)
    out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    literal = F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
    assert torch.equal(block(x), literal)


def test_usual_checkpoint_without_shortcuts_loads(tmp_path):
    source, target = CifarResNet(20), CifarResNet(20)
    fixed = tuple(n for n, _ in source.named_parameters() if CifarResNet.frozen_parameters.search(n))
    assert fixed == ("layer2.0.shortcut.weight", "layer3.0.shortcut.weight")
    state = {n: t for n, t in source.state_dict().items() if n not in fixed}
    save_file(state, tmp_path / "net.safetensors")
    load_checkpoint(target, tmp_path / "net.safetensors", fixed)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(source.eval()(x), target.eval()(x))


def test_wrapped_and_prefixed_state_dict(tmp_path):
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "net.pth")
    assert list(read_state_dict(tmp_path / "net.pth")) == ["a"]


def test_checkpoint_of_another_architecture(tmp_path):
    save_file(CifarResNet(20).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(UsageError, match=r"fit the architecture.*matching --model"):
        load_checkpoint(CifarResNet(32), tmp_path / "net.safetensors")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint at"):
        read_state_dict(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("half.safetensors", b"\x10\x00", "cannot be read as a state dict"),
        ("half.pth", b"PK\x03\x04", "cannot be read as a state dict"),
        ("tensor.pth", torch.ones(2), "holds a Tensor, not a state dict"),
        ("epoch.pth", {"a": torch.ones(2), "epoch": 3}, "holds objects other than tensors"),
        ("module.pth", torch.nn.Linear(2, 2), "cannot be read as a state dict"),
    ],
)
def test_a_file_that_is_no_state_dict_is_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=message) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("resnet20", 41e6),
        ("vgg19_quarter", 25e6),
        ("mobilenetv2", 88e6),
        ("mobilenetv2_half", 7.8e6),
        ("resnet18d_quarter", 9.3e6),
        ("resnet26d_quarter", 11.8e6),
        ("densenet40", 18.1e6),
    ],
)
def test_networks_for_small_images(name, macs):
    torch.manual_seed(0)
    model, example = NETWORKS[name](num_classes=7).eval(), torch.randn(1, 3, 32, 32)
    assert model(example).shape == (1, 7)
    assert size(model, example)[0] == pytest.approx(macs, rel=0.05)
    classifier = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)][-1]
    importance = find_criterion("l2").build(model, None, [], 0)
    pruned = prune(model, example, (classifier,), importance, 0.5, "local", PruneConfig())
    assert pruned.macs < 0.5 * macs
    assert pruned.widths[classifier] == 7
