from __future__ import annotations

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.errors import UsageError
from benchmarks.harness import compare
from benchmarks.harness.cells import write_json
from benchmarks.harness.finetune import reinitialise
from benchmarks.harness.report import read_cells
from benchmarks.models.small_resnet import SmallResNet


def test_compare_then_report_end_to_end(quick_digits, tmp_path, capsys):
    out = tmp_path / "out"
    axes = [
        "--cost",
        "none",
        "--depletion",
        "none",
        "--compensate",
        "none",
        "fold",
        "recover",
        "--recovery-steps",
        "20",
    ]
    training = ["--finetune-epochs", "1", "--from-scratch"]
    assert main([*quick_digits, "--criteria", "random", "l1", *training, *axes]) == 0
    cells = read_cells(out)
    arms = [arm + more for arm in ("l1", "random") for more in ("", " + compensation", " + recovery")]
    assert sorted(cells.arm) == [*arms, "unpruned"]
    assert (cells.status == "ok").all()
    assert cells[["finetuned", "scratch"]].notna().all(axis=None)
    record = json.loads(next(out.glob("cells/*/l1__global__0.6__seed0.json")).read_text())
    folded = json.loads(next(out.glob("cells/*/l1+fold__global__0.6__seed0.json")).read_text())
    assert folded["widths"] == record["widths"]
    assert abs(record["macs_fraction"] - 0.6) <= 0.01
    assert record["min_width"] == min(record["widths"].values())
    assert {"pruned", "bn", "finetuned", "scratch"} == record["accuracy"].keys()
    assert {"calibration", "scoring", "pruning", "batchnorm", "finetune", "scratch"} <= record["seconds"].keys()
    assert main(["report", str(out)]) == 0
    assert (out / "report.md").exists()
    assert (out / "accuracy_digits_resnet14.png").stat().st_size > 10_000


def test_the_schedule_is_an_axis(quick_digits, tmp_path):
    axes = [
        "--scopes",
        "local",
        "--criteria",
        "ispasp",
        "--schedule",
        "once",
        "front",
        "--compensate",
        "none",
        "fold",
    ]
    assert main([*quick_digits, *axes]) == 0
    cells = read_cells(tmp_path / "out")
    arms = ["ispasp", "ispasp + compensation", "ispasp + compensation, front to back", "ispasp, front to back"]
    assert sorted(cells.arm) == [*arms, "unpruned"]
    assert (cells.status == "ok").all()
    assert cells.hit.all()
    assert cells[cells.arm != "unpruned"].macs_fraction.nunique() == 1


def test_depletion_is_an_axis_of_scores_without_a_sign(quick_digits, tmp_path):
    axes = ["--cost", "none", "--depletion", "none", "log"]
    assert main([*quick_digits, "--criteria", "l2", "pro-paper-lam1", *axes]) == 0
    cells = read_cells(tmp_path / "out")
    assert sorted(cells.arm) == ["l2", "l2, depletion", "pro-paper-lam1", "unpruned"]
    assert (cells.status == "ok").all()
    kept = [json.loads(path.read_text())["widths"] for path in sorted((tmp_path / "out").glob("cells/*/l2*.json"))]
    assert len(kept) == 2
    assert kept[0] != kept[1]


def test_coupling_is_an_axis_of_arms_that_know_it(quick_digits, tmp_path):
    axes = ["--cost", "macs", "--depletion", "coupled", "coupled0", "coupled1"]
    assert main([*quick_digits, "--criteria", "l2", "pro", *axes]) == 0
    cells = read_cells(tmp_path / "out")
    arms = ["pro / macs, coupled", "pro / macs, coupled0", "pro / macs, coupled1"]
    assert sorted(cells.arm) == [*arms, "unpruned"]
    assert (cells.status == "ok").all()
    with pytest.raises(UsageError, match="--depletion 'joint' is not known"):
        compare._grid(compare.CompareConfig(depletion=("joint",)), ("pro",))


def test_digits_ranks_globally_with_and_without_cost_and_depletion():
    cells = compare._grid(compare.CompareConfig(), ("l1", "pro"))
    assert {cell.cost for cell in cells if cell.scope == "global"} == {"none", "macs"}
    for name, kinds in (("l1", {"none", "log"}), ("pro", {"none", "log", "coupled"})):
        assert {cell.depletion for cell in cells if (cell.scope, cell.criterion) == ("global", name)} == kinds
    assert {(cell.cost, cell.depletion) for cell in cells if cell.scope == "local"} == {("none", "none")}


def test_second_run_recomputes_nothing_and_changed_config_is_detected(quick_digits, tmp_path, monkeypatch, capsys):
    assert main([*quick_digits, "--criteria", "l1"]) == 0
    monkeypatch.setattr(compare, "_execute", lambda *args: pytest.fail("something was computed again"))
    assert main([*quick_digits, "--criteria", "l1"]) == 0
    capsys.readouterr()
    assert main([*quick_digits, "--criteria", "l1", "--round-to", "4"]) == 2
    assert "round_to" in capsys.readouterr().err


def test_failed_cell_stays_visible_and_is_tried_again(quick_digits, tmp_path, monkeypatch):
    from benchmarks.criteria import registry as criteria

    def broken(model, pruner, batches, seed):
        raise RuntimeError("no scores today")

    monkeypatch.setitem(criteria._REGISTRY, "broken", criteria.Criterion("broken", broken, "none", 1.0, False))
    assert main([*quick_digits, "--criteria", "broken"]) == 0
    path = next((tmp_path / "out").glob("cells/*/broken*.json"))
    record = json.loads(path.read_text())
    assert record["status"] == "failed"
    assert record["error"] == "RuntimeError: no scores today"
    monkeypatch.setitem(
        criteria._REGISTRY,
        "broken",
        criteria.Criterion("broken", criteria.find_criterion("l1").build, "none", 1.0, False),
    )
    assert main([*quick_digits, "--criteria", "broken"]) == 0
    assert json.loads(path.read_text())["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--criteria", "magic"], "unknown criterion 'magic'; known: random"),
        (
            ["compare", "--task", "cifar10", "--checkpoint", "x.pth", "--data-dir", "nowhere"],
            "no checkpoint at x.pth",
        ),
        (["compare", "--targets", "75"], "between 0 and 1"),
        (["report", "nowhere"], "no results under nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_interrupted_write_leaves_no_half_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "cell.json", {"accuracy": float("nan")})
    assert not (tmp_path / "cell.json").exists()


def test_reinitialised_weights_are_new_but_the_frozen_ones():
    model = SmallResNet()
    trained = {name: p.detach().clone().fill_(7.0) for name, p in model.named_parameters()}
    frozen = (next(name for name in trained if name.endswith("bias")),)
    found = []
    for seed in (0, 0, 1):
        model.load_state_dict(trained, strict=False)
        reinitialise(model, frozen, seed)
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, found[2][name]) for name, value in found[0].items())
    assert [name for name, value in found[0].items() if torch.equal(value, trained[name])] == list(frozen)
