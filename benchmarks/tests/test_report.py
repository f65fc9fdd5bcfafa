from __future__ import annotations

import numpy as np
import pytest

from benchmarks.errors import UsageError
from benchmarks.harness.cells import UNPRUNED, Cell, write_json
from benchmarks.harness.report import (
    ReportConfig,
    bootstrap_interval,
    markdown,
    paired_differences,
    read_cells,
    run,
)
from ippro_tp.cli.runs import read_runs

BN = {"l1": 0.5, "pro": 0.7, "lamp": 0.6}


@pytest.fixture
def results(tmp_path):
    """Three arms, two seeds; one seed of lamp missed at 0.5, and one cell of pro failed at 0.75."""

    def add(criterion, scope, target, seed, **record):
        cell = Cell(criterion, "none", scope, target, seed)
        config = {"task": "toy", "model": "net", **cell.__dict__}
        write_json(cell.path(tmp_path, "toy", "net"), {"config": config, "status": "ok", **record})

    for seed in (0, 1):
        add(UNPRUNED, "all", 1.0, seed, hit=True, macs_fraction=1.0, accuracy={"pruned": 0.9, "bn": 0.88})
        for criterion, bn in BN.items():
            for target in (0.75, 0.5):
                accuracy = {"pruned": 0.1234, "bn": bn + 0.01 * seed}
                record = {"hit": True, "macs_fraction": target, "accuracy": accuracy, "rounding": "uniform"}
                if (criterion, target, seed) == ("lamp", 0.5, 1):
                    # Accuracies that must never be shown, although this file has them.
                    record |= {"hit": False, "macs_fraction": 0.41, "accuracy": {"pruned": 0.9876, "bn": 0.9876}}
                if (criterion, target, seed) == ("pro", 0.75, 1):
                    record = {"status": "failed", "error": "RuntimeError: boom"}
                add(criterion, "global", target, seed, **record)
    return tmp_path


def test_missed_and_failed_cells_are_named_and_never_numbers(results):
    text = markdown(read_cells(results))
    table = next(line for line in text.splitlines() if line.startswith("| lamp"))
    assert "missed 1 of 2" in table
    assert "98.8" not in text
    assert "Missed MACs targets: 1 cells" in text
    assert "0.410" in text
    pro = next(line for line in text.splitlines() if line.startswith("| pro"))
    assert "failed 1 of 2" in pro
    assert "RuntimeError: boom" in text
    assert "98.76" not in read_cells(results).to_csv()


def test_means_and_base_line(results):
    text = markdown(read_cells(results))
    assert "12.3 ± 0.0 / 50.5 ± 0.7" in text
    assert "Unpruned: as it is 90.0 ± 0.0, BN re-estimated 88.0 ± 0.0." in text


def test_paired_differences_use_common_cells_only(results):
    cells = read_cells(results)
    table = paired_differences(cells[cells.scope == "global"]).set_index("criterion")
    assert table.loc["pro", "pairs"] == 3
    assert table.loc["pro", "mean"] == "+20.0"
    assert table.loc["lamp", "pairs"] == 3
    assert "l1" not in table.index


def test_bootstrap_interval_contains_the_mean():
    values = np.random.default_rng(0).normal(2.0, 1.0, 30)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert np.isnan(bootstrap_interval(values[:2])).all()


def test_files_are_written(results, capsys):
    run(ReportConfig(results))
    assert {"report.md", "cells.csv", "accuracy_toy_net.png"} <= {p.name for p in results.iterdir()}


def test_arms_can_be_chosen(results):
    run(ReportConfig(results, arms=("pro", "l1")))
    text = (results / "report.md").read_text()
    assert "| pro" in text
    assert "lamp" not in text
    with pytest.raises(UsageError, match=r"'magic'.*'lamp'"):
        run(ReportConfig(results, arms=("magic",)))


def test_prune_runs_side_by_side(tmp_path, capsys):
    for name, importance, seed, tuned in (("a", "pro", 0, 0.8), ("b", "pro", 1, 0.7), ("c", "l1", 0, 0.6)):
        plan = {"macs_fraction": 0.5, "params_fraction": 0.25}
        quality = {"unpruned": 0.9, "pruned": 0.1, "finetuned": tuned}
        result = {"title": "net, half", "importance": importance, "quality": quality, "compensation": []}
        write_json(tmp_path / name / "config.json", {"identity": {"seed": seed, "train_epochs": 0}})
        write_json(tmp_path / name / "results.json", result | {"plan": plan})
    (tmp_path / "unfinished").mkdir()
    run(ReportConfig(tmp_path))
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert rows[0] == ["importance", "runs", "MACs left (%)", "unpruned", "pruned", "fine-tuned"]
    assert rows[2:] == [
        ["l1", "1", "50.0", "90.0", "10.0", "60.0"],
        ["pro", "2", "50.0 ± 0.0", "90.0 ± 0.0", "10.0 ± 0.0", "75.0 ± 7.1"],
    ]
    runs = read_runs(tmp_path)
    assert [record["run"] for record in runs] == ["a", "b", "c"]
    assert all(record["bn"] is None for record in runs)
    assert (tmp_path / "runs.csv").exists()
