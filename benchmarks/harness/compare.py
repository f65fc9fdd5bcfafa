"""``compare``: the grid of criteria, MACs targets, scopes, cost terms and seeds on one task; one JSON per cell."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from benchmarks.criteria.registry import find_criterion
from benchmarks.errors import UsageError
from benchmarks.harness.arm import ArmRunner, Settings
from benchmarks.harness.cells import UNPRUNED, Cell, as_dict, read_finished, write_json
from benchmarks.harness.finetune import Recipe
from benchmarks.harness.prune import PruneConfig
from benchmarks.harness.scores import kappa_of
from benchmarks.models.checkpoints import fingerprint
from benchmarks.tasks import Task, TaskConfig, build_task, defaults_of


@dataclass(frozen=True)
class CompareConfig(TaskConfig):
    """Compare criteria at matched MACs. Fields left empty take the task's own defaults."""

    out: Path = Path("runs/compare")
    """Folder of the results; several tasks may share one. A second run only adds what is missing."""
    criteria: tuple[str, ...] = ()
    """Arms, for example: l1 taylor pro pro-paper-lam0.01."""
    targets: tuple[float, ...] = ()
    """Remaining MACs as fractions of the unpruned network's."""
    scopes: tuple[Literal["local", "global"], ...] = ()
    """local: the same ratio in each layer; global: one ranking over all layers."""
    seeds: tuple[int, ...] = ()
    """Seeds of the calibration sample, of random scores and of fine-tuning."""
    seed: int | None = None
    """Short for a single --seeds."""
    cost: tuple[Literal["none", "macs", "params"], ...] = ()
    """Divide each group's scores by what its channels cost (global scope only: locally it changes nothing)."""
    depletion: tuple[str, ...] = ()
    """none; log: scores rise as their group is emptied (``estimators.ranking``; global scope only, and not for
    scores with a sign); coupled: besides, by how channels go together (``estimators.coupling``), for arms that
    know it; coupled0.5: by another kappa than the package's."""
    cost_exponent: float | None = None
    """Power of the cost; by default half the criterion's degree: 0.5 for scores like absolute values."""
    compensate: tuple[Literal["none", "fold", "recover", "mean", "folding", "gram"], ...] = ("none",)
    """fold: refit each layer to what it gave before the cut (``ippro_tp.Compensation``); recover: after that,
    distil the unpruned network on the calibration images, without labels (``ippro_tp.Recovery``); mean (VBP's),
    folding and gram (GRAIL's): what others do, in our implementation (``criteria/repairs.py``)."""
    recovery_steps: int = 0
    """Steps of the recovery; 0 for the package's default."""
    schedule: tuple[Literal["once", "front"], ...] = ("once",)
    """front: the same widths, but group by group, front to back, with a new calibration for each."""
    block_epochs: int = 0
    """Epochs of fine-tuning after each group of ``--schedule front``."""
    widths: tuple[Literal["scores", "measured"], ...] = ("scores",)
    """measured: search for a factor of each group's scores, so that the pruned network predicts what the unpruned
    one does on the calibration images (global scope only)."""
    width_tries: int = 120
    """Networks that are pruned and tried for ``--widths measured``."""
    calibration_images: int = 0
    """Training images for calibration and BatchNorm re-estimation; 0 for the task's default."""
    test_images: int = 0
    """A fixed random part of the test images; 0 for the task's default, -1 for all."""
    split: Literal["test", "heldout"] = "test"
    """heldout: the part of train that nothing else sees, for choosing hyper-parameters."""
    tolerance: float = 0.01
    """A cell is a hit if its MACs are this near to the target, as a fraction of the unpruned network's."""
    max_pruning_ratio: float = 0.9
    """Largest ratio."""
    round_to: int = 0
    """Widths are multiples of this; 0 for any."""
    bn_augmented: bool = False
    """Re-estimate BatchNorm on the calibration images as training shows them, instead of as evaluation does."""
    finetune_epochs: int = 0
    """Epochs of the common fine-tuning; 0 for none."""
    lr: float = 0.01
    """Learning rate of the fine-tuning."""
    from_scratch: bool = False
    """Also train a network of the same shape from new weights, with the schedule of the fine-tuning."""
    workers: int = 2
    """Processes, each with one thread; 1 stays in this process with all threads."""


def run(config: CompareConfig) -> None:
    """Run all cells that are missing under ``config.out``."""
    begin = time.perf_counter()
    defaults = defaults_of(config.task)
    names = config.criteria or defaults.criteria
    for name in names:
        find_criterion(name)
    cells, settings = _grid(config, names), _settings(config)
    task = build_task(config)
    jobs = _pending(config, settings, task, cells)
    total = sum(len(cells) for _, cells in jobs)
    if total:
        _execute(config, settings, task, jobs, total)
    print(f"{total} cells computed in {time.perf_counter() - begin:.0f} s; results in {config.out}")
    failed = [path for name, cells in jobs for path, _, _ in cells if '"status": "failed"' in path.read_text()]
    if failed:
        print(f"{len(failed)} cells failed; the report lists them. The first: {failed[0]}")


def _settings(config: CompareConfig) -> Settings:
    defaults = defaults_of(config.task)
    return Settings(
        calibration_images=config.calibration_images or defaults.calibration_images,
        test_images=max(config.test_images or defaults.test_images, 0),
        split=config.split,
        batch_size=config.batch_size,
        tolerance=config.tolerance,
        cost_exponent=config.cost_exponent,
        prune=PruneConfig(config.max_pruning_ratio, config.round_to),
        recipe=Recipe(epochs=config.finetune_epochs, learning_rate=config.lr),
        block_epochs=config.block_epochs,
        from_scratch=config.from_scratch,
        bn_augmented=config.bn_augmented,
        width_tries=config.width_tries,
        recovery_steps=config.recovery_steps,
        device=config.device,
    )


def _grid(config: CompareConfig, names: tuple[str, ...]) -> list[Cell]:
    defaults = defaults_of(config.task)
    seeds = (config.seed,) if config.seed is not None else config.seeds or defaults.seeds
    for target in config.targets:
        if not 0 < target < 1:
            raise UsageError(f"--targets are fractions of the unpruned MACs between 0 and 1; got {target:g}")
    cells = [Cell(UNPRUNED, "none", "all", 1.0, seed) for seed in seeds]
    for name in names:
        for seed in seeds:
            for scope in config.scopes or defaults.scopes:
                costs = (config.cost or defaults.costs) if scope == "global" else ("none",)
                measured = config.widths if scope == "global" else ("scores",)
                arm = find_criterion(name)
                ranked = scope == "global" and not arm.signed
                depletions = (config.depletion or defaults.depletions) if ranked else ("none",)
                depletions = tuple(h for h in depletions if kappa_of(h) is None or h == "log" or arm.coupled)
                cells += [
                    Cell(name, cost, scope, target, seed, compensation, schedule, widths, depletion)
                    for cost in costs
                    for depletion in depletions
                    for compensation in config.compensate
                    for schedule in config.schedule
                    for widths in measured
                    for target in config.targets or defaults.targets
                ]
    return cells


def _pending(config: CompareConfig, settings: Settings, task: Task, cells: list[Cell]) -> list[tuple[str, list]]:
    """Return for each arm its unfinished cells with their paths and configurations, the slow arms first."""
    common = as_dict(settings) | {
        "task": task.name,
        "model": task.model_name,
        "weights": fingerprint(task.model),
        "crop_pct": config.crop_pct,
        "train_images": len(task.train),
        "all_test_images": len(task.test),
    }
    del common["device"]
    for option in ("block_epochs", "from_scratch", "bn_augmented", "recovery_steps"):
        if not common[option]:
            del common[option]  # cells from before the option are the same
    jobs: dict[str, list] = {}
    for cell in cells:
        path, wanted = cell.path(config.out, task.name, task.model_name), common | cell.varied
        if cell.widths == "scores":
            del wanted["width_tries"]
        if not read_finished(path, wanted):
            jobs.setdefault(cell.criterion, []).append((path, wanted, cell))
    cheap = {name: name == UNPRUNED or not find_criterion(name).seeded for name in jobs}
    return sorted(jobs.items(), key=lambda job: cheap[job[0]])


def _run_job(runner: ArmRunner, cells: list, tick=None) -> None:
    for path, config, cell in cells:
        write_json(path, {"config": config} | runner.run(cell))
        if tick:
            tick()
    runner.forget()


def _execute(config: CompareConfig, settings: Settings, task: Task, jobs: list, total: int) -> None:
    with tqdm(total=total, desc=f"{task.name} {task.model_name}", unit="cell", smoothing=0.05) as bar:
        if config.workers <= 1:
            runner = ArmRunner(task, settings)
            for name, cells in jobs:
                bar.set_postfix_str(name)
                _run_job(runner, cells, bar.update)
            return
        begin = time.time()
        paths = [path for _, cells in jobs for path, _, _ in cells]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config.workers, context, _start_worker, (config, settings)) as pool:
            running = {pool.submit(_run_in_worker, cells) for _, cells in jobs}
            while running:
                finished, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                bar.update(sum(p.exists() and p.stat().st_mtime >= begin for p in paths) - bar.n)
                for job in finished:
                    job.result()


_worker: ArmRunner | None = None


def _start_worker(config: CompareConfig, settings: Settings) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = ArmRunner(build_task(config), settings)


def _run_in_worker(cells: list) -> None:
    _run_job(_worker, cells)
