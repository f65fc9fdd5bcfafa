"""The comparison through ``prune()`` on the digits network: rows, resuming, the figure."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness.finetune import Recipe
from benchmarks.product import command
from benchmarks.product.command import COLUMNS, _figures
from benchmarks.tasks import digits

WORDS = "product --task digits --importances l2 --refits none compensation --targets 0.6 --calibration-images 100"


def test_rows_are_added_once_and_drawn(tmp_path, monkeypatch):
    built = digits.build
    monkeypatch.setattr(digits, "build", lambda config: built(config, Recipe(epochs=3, learning_rate=0.03)))
    out = tmp_path / "rows.csv"
    words = [*WORDS.split(), "--test-images", "200", "--out", str(out), "--cache-dir", str(tmp_path)]
    assert main(words) == 0
    first = out.read_text()
    rows = list(csv.DictReader(out.open()))
    assert [row["refit"] for row in rows] == ["none", "none", "compensation"]
    assert all(abs(float(row["macs"]) - 0.6) <= 0.01 for row in rows[1:])
    assert float(rows[2]["agreement"]) >= float(rows[1]["agreement"])
    assert main(words) == 0
    assert out.read_text() == first
    picture = tmp_path / "figure.png"
    assert main(["product-figure", "--rows", str(out), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 1000


def test_the_table_gives_means_over_seeds(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text(
        ",".join(COLUMNS) + "\n"
        "net,none,none,all,1.0,0,none,ok,1.0,1.0,90.0,91.0,100.0,100.0,0\n"
        "net,pro,none,global,0.5,0,own,ok,0.5,0.4,80.0,81.0,70.0,60.0,1\n"
        "net,pro,none,global,0.5,1,own,ok,0.5,0.4,82.0,83.0,72.0,62.0,1\n"
        "net,l2,none,global,0.75,0,own,TargetError: no,,,,,,,\n"
    )
    assert main(["product-table", "--rows", str(rows), "--values", "accuracy", "agreement"]) == 0
    printed = capsys.readouterr().out
    assert "unpruned 90.0 / 100.0" in printed
    assert "| pro | none | global | own | 2 | 81.0" in printed
    assert "71.0" in printed
    assert "l2" not in printed
    assert main(["product-table", "--rows", str(rows), "--values", "speed"]) == 2


def test_an_unknown_importance_or_refit_is_named(capsys):
    assert main(["product", "--task", "digits", "--importances", "l3"]) == 2
    assert "unknown importance 'l3'" in capsys.readouterr().err
    assert main(["product", "--task", "digits", "--refits", "glue"]) == 2
    assert "unknown refit 'glue'" in capsys.readouterr().err


def test_peers_look_once_and_have_rows_of_their_own(tmp_path, monkeypatch):
    built, looks = digits.build, []
    monkeypatch.setattr(digits, "build", lambda config: built(config, Recipe(epochs=1, learning_rate=0.03)))
    chip = command.PEERS["chip"]
    monkeypatch.setitem(command.PEERS, "chip", lambda *given: looks.append(1) or chip(*given))
    words = f"{WORDS} --test-images 100 --cache-dir {tmp_path} --out {tmp_path / 'rows.csv'}".split()
    words[words.index("l2")] = "chip"
    words[words.index("compensation")] = "gram"
    assert main(words) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["importance"], row["refit"], row["status"]) for row in rows[1:]] == [
        ("chip", "none", "ok"),
        ("chip", "gram", "ok"),
    ]
    assert len(looks) == 1


def test_figures_are_those_of_the_definitions():
    outputs = torch.tensor([[0.0, 3, 9], [2, 1, 0], [0, 1, 0]])  # of three classes, two occur
    wanted = torch.tensor([[0.0, 1, 2], [1, 0, 0], [1, 0, 0]])
    accuracy, among, agreement = _figures(outputs, wanted, torch.tensor([1, 0, 1]))
    assert (accuracy, among, agreement) == (pytest.approx(66.67), 100.0, pytest.approx(66.67))
