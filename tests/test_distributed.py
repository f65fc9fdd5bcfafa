"""Two processes with different data hold the same scores as one process with all of it, and fail together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ippro_tp import Compensation, ObservationError, PROImportance, SpaSPImportance
from ippro_tp.graph.groups import groups_of

from .nets import CASES, make_pruner

BATCHES = [4, 2, 3]  # rank 0 takes the first two, rank 1 the last: uneven in number and in size
IMPORTANCES = {
    "expected": PROImportance,
    "expected mean": lambda: PROImportance(group_reduction="mean", power=2),
    "paper": lambda: PROImportance("paper", step_size=0.5),
    "paper norm": lambda: PROImportance("paper", target="norm", group_reduction="sum"),
    "spasp": SpaSPImportance,
    "spasp gated": lambda: SpaSPImportance(signed="gated"),
}
CASE = CASES["residual"]


class Boom(Exception):
    pass


def batches(rank=None):
    x, labels = CASE.inputs(sum(BATCHES))
    whole = list(zip(x.split(BATCHES), labels.split(BATCHES), strict=True))
    return whole if rank is None else whole[:2] if rank == 0 else whole[2:]


def scores_of(imp, pruner):
    return [imp(group) for group in groups_of(pruner)]


def calibrated(imp, data, model=None, **options):
    pruner = CASE.pruner(model or CASE.model(), imp, **options)
    imp.calibrate(pruner, data, loss_fn=F.cross_entropy, progress=False)
    return scores_of(imp, pruner)


def scores(name, rank=None):
    # i-SpaSP's order for a known size hardly depends on the data; its scores for a global ranking do.
    return calibrated(IMPORTANCES[name](), batches(rank), global_pruning=name.startswith("spasp"))


def compensated(data, **options):
    """Weights of a model that was pruned by magnitude and compensated."""
    model = CASE.model()
    with torch.no_grad():  # no ties: rounding must not decide which channel goes
        for i, p in enumerate(p for p in model.parameters() if p.dim() > 1):
            p.mul_(torch.linspace(1 + i / 10, 2, p.shape[0], dtype=p.dtype).view(-1, *[1] * (p.dim() - 1)))
    pruner = CASE.pruner(model, tp.importance.GroupMagnitudeImportance())
    comp = Compensation(**options).calibrate(pruner, data, progress=False)
    report = comp.step(pruner)
    assert report.rows
    assert not any(row.skipped for row in report.rows)
    return list(model.state_dict().values())


def error_of(function, *args):
    """What it raised, in words, and after how many seconds."""
    start = time.monotonic()
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "", time.monotonic() - start


# -- what the two processes do -----------------------------------------------------------------------------------


def fail_in(where, rank):
    """Calibrate; something goes wrong on rank 1 only. Then calibrate again, without."""
    imp = PROImportance()
    model = CASE.model()
    pruner = CASE.pruner(model, imp)
    before = calibrated(imp, batches(rank), model)

    def loop():
        with imp.observe(pruner):
            for x, labels in batches(rank):
                if rank == 1 and where == "no_grad":
                    torch.set_grad_enabled(False)
                try:
                    loss = F.cross_entropy(model(x), labels)
                finally:
                    torch.set_grad_enabled(True)
                if rank == 1 and where == "loop":
                    raise Boom("disk full\nand more")
                (loss * (float("nan") if rank == 1 and where == "nan" else 1.0)).backward()

    if where == "empty":
        error = error_of(lambda: imp.calibrate(pruner, batches(rank) if rank == 0 else [], progress=False))
    else:
        error = error_of(loop)
    kept = scores_of(imp, pruner)
    imp.calibrate(pruner, batches(rank), loss_fn=F.cross_entropy, progress=False)
    return error, before, kept, scores_of(imp, pruner)


def other_model(rank):
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(4, 6 + 2 * rank), nn.Linear(6 + 2 * rank, 3)

        def forward(self, x):
            return self.fc(self.a(x).relu())

    model, imp = Wider(), PROImportance()
    pruner = make_pruner(model, torch.randn(1, 4), imp, [model.fc])
    return error_of(lambda: imp.calibrate(pruner, [torch.randn(5, 4)], progress=False))


def through_ddp(estimator, target, rank, sync=True):
    """The user's loop calls the DDP wrapper; ``sync=False``: without reducing gradients."""
    imp = PROImportance(estimator)
    model = CASE.model()
    ddp = DistributedDataParallel(model)
    pruner = CASE.pruner(model, imp)
    with imp.observe(pruner if target == "pruner" else ddp):
        for x, labels in batches(rank)[-1:]:  # as DDP demands, every rank has as many batches
            for _ in range(2):
                with nullcontext() if sync else ddp.no_sync():
                    F.cross_entropy(ddp(x), labels).backward()
    scores = scores_of(imp, pruner)
    F.cross_entropy(ddp(x), labels).backward()  # and training goes on
    return scores, [p.grad.clone() for p in model.parameters()]


def calibrate_ddp(rank):
    imp = PROImportance()
    model = CASE.model()
    pruner = CASE.pruner(model, imp)
    imp.calibrate(DistributedDataParallel(model), batches(rank), loss_fn=F.cross_entropy, progress=False)
    return scores_of(imp, pruner)


def pruner_on_ddp(rank):
    imp = PROImportance()
    model = CASE.model()
    pruner = make_pruner(DistributedDataParallel(model), CASE.inputs(1)[0], imp, [model.fc])
    return error_of(lambda: imp.calibrate(pruner, batches(rank), progress=False))


def prune_and_wrap_again(rank):
    model, imp = CASE.model(torch.float32), PROImportance()
    pruner = CASE.pruner(model, imp, global_pruning=True)
    x, labels = batches(rank)[-1]
    imp.calibrate(pruner, [(x.float(), labels)], progress=False)
    pruner.step()
    pruned = [p.clone() for p in model.parameters()]
    ddp = DistributedDataParallel(model)
    F.cross_entropy(ddp(x.float()), labels).backward()
    return pruned, [p.grad for p in model.parameters()]


def noise(rank):
    """What calibrate() differentiates when it is given no loss, for the same outputs on both ranks."""
    logits = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
    PROImportance()._default_loss()(logits, None).backward()
    return logits.grad


def sizes(rank):
    """Image sizes of each rank's batches: none in common."""
    torch.manual_seed(rank)
    return [torch.randn(2, 3, n, n, dtype=torch.float64) for n in ((8, 12) if rank == 0 else (16,))]


def images_of_other_sizes(name, rank):
    imp = IMPORTANCES[name]()
    pruner = CASE.pruner(CASE.model(), imp, global_pruning=True)
    data = [
        (x, torch.zeros(2, dtype=torch.long)) for r in ([rank] if rank is not None else [0, 1]) for x in sizes(r)
    ]
    imp.calibrate(pruner, data, loss_fn=F.cross_entropy, progress=False)
    return scores_of(imp, pruner)


def die(rank):
    """Rank 1 dies in its calibration, as if it ran out of memory."""
    imp = PROImportance()
    pruner = CASE.pruner(CASE.model(), imp)
    x, labels = CASE.inputs()

    def loop():
        with imp.observe(pruner):
            if rank == 1:
                os._exit(0)
            F.cross_entropy(pruner.model(x), labels).backward()

    return error_of(loop)


SCENARIOS = {
    **{f"scores {name}": lambda r, name=name: scores(name, r) for name in IMPORTANCES},
    "scores global": lambda r: calibrated(PROImportance(), batches(r), global_pruning=True),
    "compensation": lambda r: compensated(batches(r)),
    "compensation ridge": lambda r: compensated(batches(r), ridge=1e-3),
    **{f"fail {where}": lambda r, where=where: fail_in(where, r) for where in ("loop", "no_grad", "nan", "empty")},
    "other model": other_model,
    **{
        f"ddp {estimator} {target}": lambda r, e=estimator, t=target: through_ddp(e, t, r)
        for estimator, target in (("expected", "pruner"), ("expected", "wrapper"), ("paper", "wrapper"))
    },
    "ddp no_sync": lambda r: through_ddp("paper", "pruner", r, sync=False),
    "ddp reduces": lambda r: error_of(through_ddp, "paper", "pruner", r),
    "calibrate ddp": calibrate_ddp,
    "pruner on ddp": pruner_on_ddp,
    "prune and wrap again": prune_and_wrap_again,
    **{f"sizes {n}": lambda r, n=n: images_of_other_sizes(n, r) for n in ("expected", "paper", "spasp")},
    "noise": noise,
    "death": die,  # the last one
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for name, scenario in SCENARIOS.items():
        results[name] = scenario(rank)
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each scenario returned on rank 0 and on rank 1; all of them run in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return {name: (first[name], second.get(name)) for name in SCENARIOS}


def assert_equal(a, b):
    assert len(a) == len(b) > 0
    assert all(map(torch.equal, a, b))


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


# -- the same statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMPORTANCES)
def test_ranks_agree_to_the_bit_and_with_one_process(ranks, name):
    first, second = ranks[f"scores {name}"]
    assert_equal(first, second)
    assert_close(first, scores(name))
    with pytest.raises(AssertionError):  # half of the data would not do
        assert_close(first, scores(name, 0))


def test_costs_agree_as_well(ranks):
    first, second = ranks["scores global"]
    assert_equal(first, second)
    assert_close(first, calibrated(PROImportance(), batches(), global_pruning=True))


@pytest.mark.parametrize(("name", "options"), [("compensation", {}), ("compensation ridge", {"ridge": 1e-3})])
def test_compensation_agrees_to_the_bit_and_with_one_process(ranks, name, options):
    first, second = ranks[name]
    assert_equal(first, second)
    assert_close(first, compensated(batches(), **options))


@pytest.mark.parametrize("name", ["expected", "paper", "spasp"])
def test_ranks_whose_images_have_other_sizes(ranks, name):
    first, second = ranks[f"sizes {name}"]
    assert_equal(first, second)
    assert_close(first, images_of_other_sizes(name, None))


# -- the same errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "own", "told"),
    [
        ("loop", "Boom: disk full", "rank 1.*Boom: disk full$"),
        ("no_grad", "ObservationError: the forward pass runs under", "rank 1.*no_grad"),
        ("nan", "ObservationError: the statistics hold NaN", "rank 1.*NaN or inf"),
        ("empty", "ValueError: the loader is empty", "rank 1.*the loader is empty"),
    ],
)
def test_where_one_rank_fails_all_raise_and_keep_what_they_had(ranks, where, own, told):
    (good, *scores_0), (bad, *scores_1) = ranks[f"fail {where}"]
    assert bad[0].startswith(own)
    with pytest.raises(ObservationError, match=told):
        raise ObservationError(good[0].removeprefix("ObservationError: "))
    assert good[1] < 30
    for before, kept, again in (scores_0, scores_1):
        assert_equal(before, kept)
        assert_equal(before, again)


def test_ranks_with_different_models_are_told(ranks):
    for error, _ in ranks["other model"]:
        assert error.startswith("ObservationError: rank 1 calibrated other groups or widths than rank 0")


def test_where_a_process_dies_the_backend_ends_the_others(ranks):
    (error, seconds), _ = ranks["death"]
    assert error.startswith("RuntimeError")  # of the backend: the connection is gone
    assert seconds < 60


# -- DistributedDataParallel -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "scenario"),
    [
        ("expected", "ddp expected pruner"),
        ("expected", "ddp expected wrapper"),
        ("paper", "ddp paper wrapper"),
        ("paper", "ddp no_sync"),
    ],
)
def test_a_loop_through_ddp_gives_the_same_scores(ranks, estimator, scenario):
    (first, grads_0), (second, grads_1) = ranks[scenario]
    assert_equal(first, second)
    two = batches()[1:]
    assert_close(first, calibrated(PROImportance(estimator), [*two, *two]))
    assert_equal(grads_0, grads_1)  # reduced by DDP, as without us


def test_weight_gradients_that_ddp_would_reduce_are_refused(ranks):
    for error, _ in ranks["ddp reduces"]:
        assert error.startswith("ObservationError: this estimator takes gradients of weights")
        assert "no_sync" in error


def test_ddp_wrappers_are_looked_through_where_that_is_safe(ranks):
    first, second = ranks["calibrate ddp"]
    assert_equal(first, second)
    assert_close(first, calibrated(PROImportance(), batches()))
    for error, _ in ranks["pruner on ddp"]:
        assert "ObservationError: the pruner was built on a DistributedDataParallel" in error
        assert "ddp.module" in error


def test_a_pruned_model_can_be_wrapped_again(ranks):
    (pruned_0, grads_0), (pruned_1, grads_1) = ranks["prune and wrap again"]
    assert_equal(pruned_0, pruned_1)
    assert_equal(grads_0, grads_1)
    assert sum(p.numel() for p in pruned_0) < sum(p.numel() for p in CASE.model().parameters())


# -- the example -------------------------------------------------------------------------------------------------


def test_the_script_of_the_docs_runs_through_torchrun(tmp_path):
    root = Path(__file__).parents[1]
    (script,) = re.findall(r"```py\n(.*?)```", (root / "docs" / "howto" / "ddp.md").read_text(), re.DOTALL)
    (tmp_path / "prune.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "prune.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    told = re.findall(r"rank (\d) of 2: (\d+) parameters", result.stdout)
    assert sorted(rank for rank, _ in told) == ["0", "1"], result.stdout
    (left,) = {int(count) for _, count in told}
    assert left < 11e6  # of 11.2 million


def test_ranks_draw_noise_of_their_own(ranks):
    first, second = ranks["noise"]
    assert first.norm() > 0
    assert not torch.allclose(first, second)
