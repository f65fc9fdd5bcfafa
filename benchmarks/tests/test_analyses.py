from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from benchmarks.__main__ import main
from benchmarks.errors import UsageError
from benchmarks.harness.evaluate import accuracy
from benchmarks.harness.prune import build_pruner
from benchmarks.harness.scores import FrozenScores, freeze, group_key, prunable_groups
from benchmarks.paper import calibration_size, correlation, curves, lam, magnitude, rescale, scoring
from benchmarks.paper.accuracies import Accuracies
from benchmarks.paper.rows import Rows
from benchmarks.tasks import digits
from benchmarks.tasks.base import TaskConfig
from ippro_tp import PROImportance
from ippro_tp.estimators.projective import pro_excess


@pytest.fixture
def toy(small_task, monkeypatch, tmp_path):
    """Run a command on the toy network; returns the folder of its results."""
    monkeypatch.setattr(digits, "build", lambda config: small_task)

    def command(name: str, *flags: str):
        assert main([name, "--out", str(tmp_path), "--batch-size", "20", *flags]) == 0
        return tmp_path / f"{name}-toy-net"

    return command


def values(folder, **varied):
    """Return the values of the one row that was made with ``varied``."""
    records = [json.loads(path.read_text()) for path in folder.glob("rows/*.json")]
    (record,) = [r for r in records if varied.items() <= r["config"].items()]
    return record["values"]


def published(folder, name: str) -> str:
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert len(pd.read_csv(folder / f"{name}.csv")) == len(list(folder.glob("rows/*.json")))
    return (folder / f"{name}.md").read_text()


# -- rows ------------------------------------------------------------------------------------------------------


def test_rows_are_written_once_and_belong_to_one_configuration(tmp_path):
    rows = Rows(tmp_path, {"test_images": 10})
    wanted = [{"criterion": "l1", "ratio": 0.5}, {"criterion": "l2", "ratio": 0.5}]
    rows.write(wanted[0], {"pruned": 0.25})
    assert rows.missing(wanted) == wanted[1:]
    assert rows.read().to_dict("records") == [{"criterion": "l1", "ratio": 0.5, "pruned": 0.25}]
    with pytest.raises(UsageError, match="test_images: 10 -> 20"):
        Rows(tmp_path, {"test_images": 20}).missing(wanted)


# -- scores and statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["conv", "norm"])
def test_one_set_of_statistics_serves_both_targets(small_task, target):
    batches = small_task.calibration(0, 40, 20)
    state, _ = scoring.gather(small_task, scoring.Statistics("paper", 40), batches, 20)
    ours = scoring.freeze_on(small_task, scoring.importance_of(state, target, 3.0), "ours")
    direct = PROImportance(estimator="paper", step_size=3.0, target=target)
    pruner = build_pruner(copy.deepcopy(small_task.model), small_task.example, ("fc",), direct)
    direct.calibrate(pruner, batches, progress=False)
    for key, scores in freeze(direct, pruner).scores.items():
        assert torch.allclose(ours.scores[key], scores, rtol=1e-4, atol=1e-7), key


def test_every_image_weighs_the_same_however_the_sample_is_cut(small_task):
    images, labels = (torch.cat(p) for p in zip(*small_task.calibration(0, 50, 50), strict=True))

    def state(cut: int):
        batches = zip(images.split(cut), labels.split(cut), strict=True)
        return scoring.gather(small_task, scoring.Statistics("paper", 50), batches, 20)[0]["sums"]

    whole, parts = state(50), state(20)
    assert all(torch.allclose(whole[k], parts[k], rtol=1e-3, atol=1e-5) for k in whole)


def test_statistics_are_kept_and_the_mode_matters(small_task, tmp_path, monkeypatch):
    config = TaskConfig(batch_size=20)
    kinds = [scoring.Statistics("paper", 40, mode=mode) for mode in scoring.MODES]
    first, train = (scoring.statistics(config, small_task, tmp_path, kind) for kind in kinds)
    assert not torch.allclose(first["sums"]["grad/conv1.weight"], train["sums"]["grad/conv1.weight"], rtol=0.1)
    monkeypatch.setattr(scoring, "gather", lambda *args: pytest.fail("gathered again"))
    again = scoring.statistics(config, small_task, tmp_path, kinds[0])
    assert torch.equal(again["sums"]["grad/conv1.weight"], first["sums"]["grad/conv1.weight"])
    # Behind a BatchNorm in train mode the loss does not depend on the length of a filter: F . grad = 0.
    cosines = []
    for state in (first, train):
        terms = scoring.projective_terms(scoring.importance_of(state), small_task.model)["blocks.0.conv1.out"]
        cosines.append(float((terms[1] / (terms[0] * terms[2]).clamp(min=1e-12)).abs().max()))
    assert cosines[1] < 0.01 < cosines[0]


def test_terms_are_those_of_autograd_and_of_the_score(small_task):
    batches = small_task.calibration(0, 40, 20)
    state, _ = scoring.gather(small_task, scoring.Statistics("paper", 40), batches, 20)
    importance = scoring.importance_of(state)
    terms = scoring.projective_terms(importance, small_task.model)
    model = copy.deepcopy(small_task.model)
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
    weight = model.blocks[0].conv1.weight
    f, g = weight.detach().flatten(1).double(), weight.grad.flatten(1).double()
    expected = torch.stack([f.norm(dim=1), (f * g).sum(1), g.norm(dim=1)])
    assert torch.allclose(terms["blocks.0.conv1.out"][:3], expected, rtol=1e-4, atol=1e-7)
    for step in (0.0, 0.1, 30.0):
        frozen = scoring.freeze_on(small_task, scoring.importance_of(state, "conv", step), "paper")
        for (name, _), scores in frozen.scores.items():
            assert torch.allclose(pro_excess(*terms[f"{name}.out"], step).float(), scores), (name, step)


def test_kept_channels_are_those_that_torch_pruning_keeps(small_task):
    model = copy.deepcopy(small_task.model)
    pruner = build_pruner(model, small_task.example, ("fc",), tp.importance.MagnitudeImportance(p=1), 0.37)
    scores = freeze(pruner.importance, pruner).scores
    before = model.blocks[0].conv1.weight.detach().clone()
    pruner.step()
    mask = scoring.kept_channels(scores["blocks.0.conv1", True], 0.37)
    inputs = scoring.kept_channels(next(s for (n, _), s in scores.items() if "conv1" not in n or n == "conv1"), 0)
    assert inputs.all()
    assert model.blocks[0].conv1.out_channels == mask.sum()
    kept_norms = before[mask].flatten(1).norm(dim=1)
    assert torch.all(model.blocks[0].conv1.weight.flatten(1).norm(dim=1) <= kept_norms + 1e-6)


# -- curves ----------------------------------------------------------------------------------------------------


def test_curves_end_to_end(toy, small_task, monkeypatch):
    flags = ["--ratios", "0.5", "--step-sizes", "0.1", "--seeds", "0", "1", "--bn-images", "40"]
    flags += ["--criteria", "random", "l1", "taylor", "--portions", "1", "0.5"]
    folder = toy("curves", *flags)
    text = published(folder, "curves")
    # random twice, l1 once, taylor and each of four ways of Eq. 4 on all images and on two halves.
    assert len(list(folder.glob("rows/*.json"))) == 2 + 1 + 3 + 3 * 4
    assert "Eq. 4, F = (gamma, beta), train mode, λ = 0.1, 54 images" in text
    model = copy.deepcopy(small_task.model)
    build_pruner(model, small_task.example, ("fc",), tp.importance.MagnitudeImportance(p=1), 0.5).step()
    expected = accuracy(model, small_task.evaluation("test", 0, 20), "cpu")
    assert values(folder, criterion="l1", ratio=0.5)["pruned"] == expected
    monkeypatch.setattr(Accuracies, "at_ratio", lambda *args: pytest.fail("computed again"))
    toy("curves", *flags)


def test_equal_networks_are_evaluated_once(small_task, monkeypatch):
    accuracies, calls = Accuracies(small_task, 20, 0, 40), []
    measured = Accuracies._accuracy
    monkeypatch.setattr(Accuracies, "_accuracy", lambda self, m: calls.append(1) or measured(self, m))
    pruner = build_pruner(
        copy.deepcopy(small_task.model), small_task.example, ("fc",), tp.importance.MagnitudeImportance(p=2)
    )
    scores = freeze(pruner.importance, pruner)
    doubled = FrozenScores({k: 2 * v for k, v in scores.scores.items()})
    assert accuracies.at_ratio(scores, 0.5) == accuracies.at_ratio(doubled, 0.5)
    assert len(calls) == 2


# -- lam -------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    found = lam.agreement([first, first], [second, first], 0.5)
    # One of six pairs is turned round: tau = (5 - 1) / 6. Of {3, 4} and {2, 4}, one is shared.
    assert found["tau_lowest"] == pytest.approx(4 / 6)
    assert found["tau"] == pytest.approx((4 / 6 + 1) / 2)
    assert found["kept"] == 3 / 4
    reversed_order = lam.agreement([first], [-first], 0.5)
    assert (reversed_order["tau"], reversed_order["kept"], reversed_order["kept_pooled"]) == (-1.0, 0.0, 0.0)


def test_breaks_by_hand():
    # Columns: nothing happens; the denominator crosses zero; only the second order takes over.
    norm, dot = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, -4.0, 0.1])
    grad, offset = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 0.0])
    found = lam.breaks(torch.stack([norm, dot, grad, offset]), 1.0)
    assert found == {"channels": 3, "crossed": 1, "changed": 0, "second_order": 1}
    assert lam.breaks(torch.stack([norm, dot, grad, offset]), 0.0)["second_order"] == 0
    assert lam.breaks(torch.stack([norm, dot, grad, offset]), 2.0)["changed"] == 1


def test_lam_end_to_end(toy):
    folder = toy("lam", "--step-sizes", "0", "1", "1e4", "--images", "40")
    assert "summed over 40 images" in published(folder, "lam")
    for target in ("conv", "norm"):
        for mode in ("eval", "train"):
            same = values(folder, target=target, mode=mode, step_size=1.0)
            far = values(folder, target=target, mode=mode, step_size=1e4)
            assert same["tau"] == same["kept"] == same["kept_pooled"] == 1.0
            assert far["tau"] < 0.9
            assert far["second_order"] > same["second_order"]


# -- magnitude -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Two convolutions and a Linear without BatchNorm."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.two(self.activation(self.one(x))))
        return self.fc(x.mean((2, 3)))


def plain_task(small_task, activation):
    torch.manual_seed(0)
    return dataclasses.replace(small_task, model=Plain(activation).eval())


@pytest.mark.parametrize("kind", rescale.KINDS)
def test_rescaling_leaves_the_function_and_pro_but_not_the_weights(small_task, kind):
    model = rescale.rescaled(small_task, kind, 0)
    assert rescale.output_difference(small_task, model) < 1e-4
    name = "blocks.0.bn1.weight" if kind == "between layers" else "blocks.0.conv1.weight"
    ratios = (
        (model.get_parameter(name) / small_task.model.get_parameter(name)).flatten(1)
        if ("conv" in name)
        else (model.get_parameter(name) / small_task.model.get_parameter(name))[:, None]
    )
    assert ratios.max() > 10 * ratios.min()
    assert torch.allclose(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-4)
    before, after = (
        scoring.arm_scores(TaskConfig(batch_size=20), task, 40)
        for task in (small_task, dataclasses.replace(small_task, model=model))
    )
    found = {
        name: magnitude.invariance(*(runner.scores(name, "none", 0)[0] for runner in (before, after)))
        for name in ("pro", "l1")
    }
    assert found["pro"]["spearman_lowest"] > 0.999
    assert found["pro"]["change"] < 1e-3
    assert found["l1"]["spearman"] < 0.7


def test_rescaling_without_batchnorm_and_its_refusals(small_task):
    task = plain_task(small_task, torch.relu)
    model = rescale.rescaled(task, "between layers", 0)
    assert not torch.allclose(model.one.bias, task.model.one.bias, rtol=0.5)
    assert torch.allclose(model(task.example), task.model(task.example), atol=1e-5)
    with pytest.raises(UsageError, match="changes the outputs"):
        rescale.rescaled(plain_task(small_task, torch.tanh), "between layers", 0)


def test_norms_of_channels_and_their_statistics(small_task):
    norms = magnitude.channel_norms(small_task)
    block = small_task.model.blocks[0]
    key = ("blocks.0.conv1", True)
    assert torch.allclose(norms["filter"][key], block.conv1.weight.flatten(1).norm(dim=1))
    expected = (block.bn1.weight.square() + block.bn1.bias.square()).sqrt()
    assert torch.allclose(norms["norm"][key], expected)
    shared = {"filter": {key: torch.tensor([1.0, 2.0, 3.0, 4.0])}}
    by_norm = magnitude.norm_statistics(FrozenScores({key: torch.tensor([1.0, 2.0, 3.0, 4.0])}), shared, 0.5)
    assert by_norm["filter_auc"] == 1.0
    assert by_norm["filter_ratio"] == pytest.approx(3 / 7)
    mixed = magnitude.norm_statistics(FrozenScores({key: torch.tensor([1.0, 4.0, 3.0, 2.0])}), shared, 0.5)
    assert mixed["filter_auc"] == 0.5  # kept: 2 and 3; pruned: 1 and 4


def test_magnitude_end_to_end(toy):
    flags = ["--criteria", "l1", "pro", "--seeds", "0", "--calibration-images", "40"]
    folder = toy("magnitude", *flags)
    assert "| l1" in published(folder, "magnitude")
    assert values(folder, rescaled="between layers", criterion="pro")["spearman"] == pytest.approx(1, abs=1e-3)
    assert values(folder, rescaled="none", criterion="l1")["filter_auc"] > 0.5


# -- correlation -----------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    first = FrozenScores(
        {("a", True): torch.tensor([1.0, 2.0, 3.0, 4.0]), ("b", True): torch.tensor([10.0, 20.0])}
    )
    second = FrozenScores(
        {("a", True): torch.tensor([1.0, 4.0, 9.0, 16.0]), ("b", True): torch.tensor([2.0, 1.0])}
    )
    found = correlation.similarity(first, second, 0.5)
    assert found["spearman"] == pytest.approx((1 - 1) / 2, abs=1e-12)
    assert found["pearson"] == pytest.approx((np.corrcoef([1, 2, 3, 4], [1, 4, 9, 16])[0, 1] - 1) / 2)
    assert found["overlap"] == 0.5
    x, y = [1, 2, 3, 4, 10, 20], [1, 4, 9, 16, 2, 1]
    assert found["pearson_global"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["overlap_global"] == pytest.approx(1 / 3)  # {4, 10, 20} and {4, 9, 16}: channel 4 only
    constant = FrozenScores({k: torch.ones(len(s)) for k, s in first.scores.items()})
    assert correlation.similarity(first, constant, 0.5)["pearson"] is None


def test_correlation_end_to_end(toy):
    flags = ["--criteria", "l1", "l2", "random", "--seeds", "0", "--calibration-images", "40"]
    folder = toy("correlation", *flags)
    assert "spearman" in published(folder, "correlation")
    close, far = (values(folder, first="l1", second=name)["spearman"] for name in ("l2", "random"))
    assert close > 0.4 > far
    frame = Rows(folder, {}).read()
    square = correlation.matrix(frame, "spearman")
    assert square.loc["l2", "l1"] == square.loc["l1", "l2"] == close


# -- calibration size ------------------------------------------------------------------------------------------


def test_balanced_order_takes_turns():
    order = calibration_size.balanced_order(torch.tensor([0, 0, 0, 2, 2, 1, 1]), 4)
    assert order.tolist() == [0, 5, 3, 1, 6, 4]


def test_samples_are_nested_and_balanced_ones_are(small_task):
    small, _ = calibration_size.sample(small_task, 1, 20, 20, balanced=False)
    large, _ = calibration_size.sample(small_task, 1, 40, 20, balanced=False)
    assert torch.equal(small, large[:20])
    images, labels = calibration_size.sample(small_task, 1, 20, 20, balanced=True)
    assert labels.bincount().tolist() == [5, 5, 5, 5]
    assert len(images.flatten(1).unique(dim=0)) == 20
    with pytest.raises(UsageError, match="a class has too few"):
        calibration_size.sample(small_task, 1, 54, 20, balanced=True)


def test_growing_samples_add_up_to_one_calibration(small_task):
    config = calibration_size.CalibrationSizeConfig(batch_size=20)
    chain = {"criterion": "pro-paper", "balanced": False, "draw": 2}
    steps = list(calibration_size._calibrated(config, small_task, chain, [20, 40]))
    assert [size for size, _, _ in steps] == [20, 40]
    grown = scoring.freeze_on(small_task, steps[-1][1], "grown")
    direct = PROImportance(estimator="paper", step_size=1.0)
    pruner = build_pruner(copy.deepcopy(small_task.model), small_task.example, ("fc",), direct)
    direct.calibrate(pruner, small_task.calibration(2, 40, 20), progress=False)
    for group in prunable_groups(pruner):
        assert torch.allclose(grown.scores[group_key(group)], direct(group), rtol=1e-3, atol=1e-6)


def test_calibration_size_end_to_end(toy):
    flags = ["--images", "20", "200", "--portions", "1", "--draws", "2", "--targets", "0.6"]
    folder = toy("calibration-size", *flags, "--bn-images", "40")
    published(folder, "calibration-size")
    frame = Rows(folder, {}).read()
    assert sorted(frame.images.unique()) == [20, 54]
    # All 54 images make one sample, whatever the draw; balanced samples take no more than half of them.
    assert sorted(frame[frame.images == 54].draw) == [0, 0]
    assert set(frame[frame.balanced].images) == {20}
    assert (frame.macs_fraction[frame.hit] - 0.6).abs().max() <= 0.01
    assert frame.hit.any()


def test_the_loss_from_few_images_is_paired():
    rows = [
        {"criterion": "pro", "balanced": False, "macs": 0.5, "hit": True, "draw": d, "images": i, "bn": bn}
        for d, i, bn in ((0, 200, 0.80), (0, 5000, 0.81), (1, 200, 0.78), (1, 5000, 0.81), (2, 200, 0.5))
    ]
    text = calibration_size._difference(pd.DataFrame(rows), 0.5)
    assert "loses +2.00 points" in text
    assert "mean of 2 draws, the largest loss +3.00" in text
    assert calibration_size._difference(pd.DataFrame(rows), 0.75) == ""


def test_unknown_criteria_end_in_a_message(toy, capsys):
    assert main(["calibration-size", "--criteria", "l1"]) == 2
    assert "known: pro, pro-paper" in capsys.readouterr().err
    assert main(["curves", "--criteria", "nonsense"]) == 2
    assert curves.PAPER == "paper"
