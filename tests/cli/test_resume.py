"""A run that is killed goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ippro_tp.cli import training
from ippro_tp.cli.main import main
from ippro_tp.cli.store import Store

from .helpers import flags, make_folder

MORE = ["--train-epochs", "1", "--finetune-epochs", "2", "--pruning-ratio", "0.4", "--no-compensate"]
MORE += ["--checkpoint-every", "2", "--distill"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), (("train", 14), ("val", 4)))


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(flags(folder, out, *MORE)) == 0
    return out


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_stopped_twice_inside_training(folder, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, steps = training.Trainer._step, 0

    def counted(self, *args):
        nonlocal steps
        steps += 1
        if steps in (4, 10):  # in the middle of the unpruned network's epoch, and of the first of fine-tuning
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(training.Trainer, "_step", counted)
    for _ in range(2):
        with pytest.raises(Killed):
            main(flags(folder, out, *MORE))
        assert not (out / "model.safetensors").exists()
    assert main(flags(folder, out, *MORE)) == 0
    assert_same(out, undisturbed)


def assert_same(one: Path, other: Path) -> None:
    assert (one / "shapes.json").read_text() == (other / "shapes.json").read_text()
    first, second = (load_file(x / "model.safetensors") for x in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_is_read_without_pickle(tmp_path):
    store = Store(tmp_path, {"a": 1}, {})
    state = {"w": torch.randn(3), "position": {"epoch": 1, "loss": [0.5]}}
    store.save_checkpoint("finetuned", state)
    assert torch.equal(store.load_checkpoint("finetuned")["w"], state["w"])
    store.drop_checkpoint("finetuned")
    assert store.load_checkpoint("finetuned") is None
    torch.save({"x": os.system}, tmp_path / "progress" / "finetuned.pt")
    with pytest.raises(Exception, match="weights_only"):
        store.load_checkpoint("finetuned")


@pytest.mark.slow
def test_killed_at_ten_random_moments(folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ippro_tp", *flags(folder, out, *MORE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    subprocess.run([*command[:-1], command[-1], "--dry-run"], env=environment, check=True, capture_output=True)
    start_up = time.monotonic() - begin
    chance = random.Random(0)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(chance.uniform(0.6, 1.5) * start_up) == 0
            break  # it was finished before it could be killed
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 3
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same(out, undisturbed)
    assert not [p for p in out.rglob("*") if p.suffix == ".tmp"]
