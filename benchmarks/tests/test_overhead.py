from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.errors import UsageError
from benchmarks.harness.scores import prunable_groups
from benchmarks.overhead.command import (
    ARMS,
    BOTH,
    FORWARD,
    Measured,
    OverheadConfig,
    build_subject,
    chosen_arms,
    score,
    table,
)
from benchmarks.overhead.memory import counted_reads, peak_bytes, read_bandwidth

SMALL = OverheadConfig(batches=2, batch_size=3, rounds=1, image_size=16)


def test_peak_is_that_of_tensors_alive_at_once():
    x = torch.ones(1 << 18)  # 1 MiB, alive before: not counted

    def steps():
        a = x + 1  # 1
        b = torch.cat([a, a])  # 3
        del a  # 2
        c = b[:5] + 1  # 2 and a little
        del b, c
        return x * 2  # 1

    steps()
    assert peak_bytes(steps) == 3 << 20


def test_peak_sees_what_autograd_keeps():
    x = torch.ones(1 << 18, requires_grad=True)
    assert peak_bytes(lambda: x.detach().exp().exp().sum()) == 2 << 20
    # Both results are kept for backward, where the first gradient joins them.
    assert peak_bytes(lambda: x.exp().exp().sum().backward()) >= 3 << 20


def test_bandwidth_is_positive_and_follows_the_clock():
    ticks = iter(range(100))
    assert read_bandwidth(clock=lambda: float(next(ticks)), megabytes=2) == 2 << 20


def test_reads_are_gradient_and_value_of_every_tap():
    subject = build_subject("resnet20", SMALL)
    with counted_reads() as reads:
        ARMS["PRO (default)"].run(subject)
    # Layers read as many inputs as convolutions write outputs: 19 of them, 2 shortcuts; 2 batches.
    assert len(reads) == 2 * (19 + 2)
    largest = 2 * 4 * 3 * 16 * 16 * 16
    assert max(reads) == largest


def test_arms_leave_the_model_trainable_and_give_scores():
    subject = build_subject("resnet20", SMALL)
    groups = list(prunable_groups(subject.pruner))
    for name, arm in ARMS.items():
        importance = arm.run(subject)
        assert all(p.requires_grad for p in subject.model.parameters()), name
        if importance is not None:
            lengths = [None if s is None else len(s) for s in score(importance, groups)]
            assert all(n in (None, len(g[0].idxs)) for n, g in zip(lengths, groups, strict=True))
        subject.model.zero_grad()


def test_ratios_are_paired_by_round():
    found = {BOTH: Measured([1.0, 2.0, 4.0], 100), "PRO (default)": Measured([1.2, 2.4, 4.8], 150, 0.5)}
    row = table(found, ARMS).splitlines()[-1].split("|")
    assert [cell.strip() for cell in row[4:9]] == ["1.200", "1.200 to 1.200", "0.0", "1.50", "0.500"]


def test_chosen_arms_keep_the_plain_runs():
    assert list(chosen_arms(("spasp",)))[:2] == [FORWARD, BOTH]
    assert "i-SpaSP" in chosen_arms(("spasp",))
    assert "TP Taylor" not in chosen_arms(("spasp",))
    with pytest.raises(UsageError, match="magic"):
        chosen_arms(("magic",))


BAD = [("amp", "int8"), ("models", "resnet57"), ("clock", "sun"), ("rounds", "0")]


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_bad_flags_end_in_one_line(flag, value, capsys):
    assert main(["overhead", f"--{flag}", value]) == 2
    assert capsys.readouterr().err.count("\n") == 1


FLAGS = ["--models", "resnet20", "--image-size", "8", "--batch-size", "2", "--batches", "1", "--rounds", "1"]


def test_command_prints_tables(capsys):
    assert main(["overhead", *FLAGS, "--arms", "default"]) == 0
    assert main(["overhead", *FLAGS, "--scoring"]) == 0
    out = capsys.readouterr().out
    assert "times the floor" in out
    assert "Taylor is" in out


@pytest.mark.slow
def test_scaling_counts_batches(capsys):
    assert main(["overhead", *FLAGS, "--scaling"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| resnet20")]
    assert [row[3].strip() for row in rows] == ["1", "2", "4"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
def test_freed_memory_is_kept():
    """A block that was freed is not fetched from the system again: no page faults. In a process of its own."""
    code = """
import resource, torch
from benchmarks.overhead.memory import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1000  # 5 times 16 MiB are 20480 pages


def test_phases_add_up(capsys):
    main(
        [
            "overhead",
            "--phases",
            "--models",
            "resnet20",
            "--batches",
            "1",
            "--batch-size",
            "4",
            "--image-size",
            "16",
        ]
    )
    shown = capsys.readouterr().out
    assert "cut and refit" in shown
    assert "search" in shown


@pytest.mark.slow
def test_latency_is_asked_predicted_and_measured(capsys):
    main(["overhead", "--latency", "0.7", "--models", "resnet20", "--batch-size", "1", "--image-size", "16"])
    assert "measured / asked" in capsys.readouterr().out


def test_a_step_of_compensation_is_timed_beside_plain_passes(capsys):
    flags = ["--models", "resnet20", "--samples", "24", "--image-size", "16", "--rounds", "1", "--batch-size", "8"]
    assert main(["refit", *flags]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [cell.strip() for cell in row[1:4]] == ["resnet20", "24", "16"]
    assert float(row[7]) > 0
    assert row[9].strip() == "0"
    assert main(["refit", "--clock", "sun"]) == 2
