"""``overhead``: time and memory of calibration and scoring, beside the same forwards and backwards without us."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch_pruning as tp
import torchvision
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from benchmarks.criteria import baselines
from benchmarks.errors import UsageError
from benchmarks.harness.cells import environment
from benchmarks.harness.prune import build_pruner
from benchmarks.harness.scores import prunable_groups
from benchmarks.overhead.latency import latency
from benchmarks.overhead.memory import counted_reads, keep_freed_memory, peak_bytes, read_bandwidth, synchronize
from benchmarks.overhead.phases import phases
from benchmarks.tasks.base import Batch
from ippro_tp import Compensation, LogitNoise, PROImportance, SpaSPImportance
from ippro_tp.cli.cifar_resnet import DEPTHS, CifarResNet
from ippro_tp.graph.groups import groups_of, read_group
from ippro_tp.tracing.extension import require_grad

FORWARD, BOTH, ACTIVATIONS = "forward", "forward + backward", "gradients of activations"
MODELS = ("resnet56", "resnet50", "mobilenet_v2", "convnext_tiny", "vit_small_patch16_224")
DEPTH = ("resnet20", "resnet32", "resnet44", "resnet56")
WIDTH = ("resnet50:width_per_group=32", "resnet50", "resnet50:width_per_group=128")
LARGEST = ("resnet152", "regnety_160", "convnext_base", "vit_base_patch16_224", "densenet121", "efficientnet_b5")
SCORED = ("resnet56", "resnet50", "resnet152", "densenet121", "densenet201", "vit_small_patch16_224")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class OverheadConfig:
    """What calibration costs: arms interleaved in one process, random weights and images, no data needed."""

    models: tuple[str, ...] = ()
    """resnet20/32/44/56 (CIFAR), or a model of torchvision or timm; ``name:key=value`` sets a number of it."""
    arms: tuple[str, ...] = ()
    """Part of the name of each arm to run; empty for all."""
    image_size: int = 0
    """Height and width; 0 for 32 (CIFAR) and 128 (others)."""
    batch_size: int = 0
    """Images per batch; 0 for 50 (CIFAR) and 8 (others)."""
    batches: int = 4
    """Batches per measurement."""
    rounds: int = 5
    """Measurements of each arm; the first round warms up and is not counted."""
    threads: int = 1
    """Threads of PyTorch; 0 for its default."""
    clock: str = "wall"
    """wall; or cpu, the process's own time, for one thread on a busy machine."""
    device: str = "cpu"
    """Where networks run: cpu, cuda, cuda:1."""
    amp: str = "none"
    """Autocast of all arms: none, bfloat16 or float16."""
    channels_last: bool = False
    """Memory format of images and weights."""
    scaling: bool = False
    """Instead: cost against the number of batches, depth and width, and the largest models."""
    scoring: bool = False
    """Instead: time to score all groups, beside TP Taylor's scores of the same groups."""
    latency: float = 0.0
    """Instead: this fraction of the time of a forward pass asked of prune(), predicted, and measured; 0.6, say."""
    phases: bool = False
    """Instead: where the time of prune() goes."""


@dataclass
class Subject:
    """A network, its pruner and random batches."""

    name: str
    model: nn.Module
    pruner: tp.pruner.BasePruner
    batches: list[Batch]
    config: OverheadConfig

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of all arms."""
        dtype = AMP[self.config.amp]
        return torch.autocast(torch.device(self.config.device).type, dtype) if dtype else contextlib.nullcontext()

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.model.parameters())


@dataclass(frozen=True)
class Arm:
    """Something that is timed: it gathers what scores need and returns the importance, if there is one."""

    base: str
    run: Callable[[Subject], Callable | None]


def _forward(subject: Subject) -> None:
    with torch.no_grad():
        for images, _ in subject.batches:
            subject.model(images)


def _backward(subject: Subject) -> tp.importance.Importance:
    baselines.accumulate_gradients(subject.model, subject.batches)
    return tp.importance.TaylorImportance()


def _activations(subject: Subject) -> None:
    """Forward and backward without gradients of weights: the passes that PRO's default makes, without taps."""
    first = next(m for m in subject.model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    hook = first.register_forward_hook(lambda module, args, output: require_grad(output))
    subject.model.requires_grad_(False)
    try:
        for images, labels in subject.batches:
            F.cross_entropy(subject.model(images), labels).backward()
    finally:
        hook.remove()
        subject.model.requires_grad_(True)


def _hessian(subject: Subject) -> tp.importance.Importance:
    importance = baselines.AccumulatedHessian()
    baselines.per_sample_hessian(importance, subject.model, subject.batches)
    return importance


def _ours(make: Callable, subject: Subject, **options) -> Callable:
    return make().calibrate(subject.pruner, subject.batches, progress=False, **options)


def _default(subject: Subject) -> Callable:
    """White noise on the logits: those of deep random networks saturate the softmax of FisherNoise."""
    return _ours(PROImportance, subject, loss_fn=LogitNoise())


ARMS: dict[str, Arm] = {
    FORWARD: Arm(FORWARD, _forward),
    BOTH: Arm(BOTH, lambda subject: _backward(subject) and None),
    ACTIVATIONS: Arm(BOTH, _activations),
    "TP Taylor": Arm(BOTH, _backward),
    "TP Hessian (corrected)": Arm(BOTH, _hessian),
    'PRO "paper"': Arm(BOTH, functools.partial(_ours, functools.partial(PROImportance, estimator="paper"))),
    "PRO (default)": Arm(BOTH, _default),
    "i-SpaSP": Arm(FORWARD, functools.partial(_ours, SpaSPImportance)),
    "Compensation": Arm(FORWARD, lambda subject: _ours(Compensation, subject) and None),
}
"""A run without scores returns None: plain passes, and Compensation, which has none."""


def run(config: OverheadConfig) -> None:
    """Print tables of time, memory and distance to the floor, model by model."""
    if config.amp not in AMP:
        raise UsageError(f"--amp {config.amp!r}; choose one of {', '.join(AMP)}")
    if min(config.batches, config.rounds) < 1:
        raise UsageError("--batches and --rounds must be at least 1")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.clock not in CLOCKS or (config.clock == "cpu" and torch.device(config.device).type != "cpu"):
        raise UsageError(f"--clock {config.clock!r}; choose wall, or cpu for --device cpu")
    if not 0 <= config.latency < 1:
        raise UsageError(f"--latency {config.latency}; give a fraction between 0 and 1")
    report = next((r for asked, r in _other_reports(config) if asked), comparison)
    kept = keep_freed_memory()
    print(f"{_conditions(config)}, freed memory {'kept' if kept else 'given back'}\n", flush=True)
    for part in report(config):
        print(part + "\n", flush=True)


def _other_reports(config: OverheadConfig):
    """Pairs of whether a report is asked for and the report."""
    clock = CLOCKS[config.clock]
    return (
        (config.scaling, scaling),
        (config.scoring, scoring),
        (config.latency, lambda c: latency(c, _build_model)),
        (config.phases, lambda c: phases(c, _build_model, clock)),
    )


# -- subjects --------------------------------------------------------------------------------------------------


def build_subject(name: str, config: OverheadConfig, scope: str = "local") -> Subject:
    """Return the network called ``name`` with random weights and images, and a pruner over all of its groups.

    In the global ``scope`` scores are divided by costs and depleted, and take longest.

    Raises:
        UsageError: No such network.
    """
    torch.manual_seed(0)
    model, size, batch_size = _build_model(name, config.image_size)
    form = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(config.device, memory_format=form).eval()
    with torch.no_grad():
        classes = model(torch.zeros(1, 3, size, size, device=config.device)).shape[1]
    batches = []
    for _ in range(config.batches):
        images = torch.randn(config.batch_size or batch_size, 3, size, size)
        labels = torch.randint(classes, (len(images),))
        batches.append((images.to(config.device, memory_format=form), labels.to(config.device)))
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1:]
    example = torch.randn(1, 3, size, size, device=config.device)
    pruner = build_pruner(model, example, tuple(last), lambda group: None, scope=scope)
    return Subject(name, model, pruner, batches, config)


def _build_model(name: str, size: int) -> tuple[nn.Module, int, int]:
    """Return the network, its image size and its usual batch size."""
    base, *options = name.split(":")
    try:
        given = {key: int(value) for key, value in (option.split("=") for option in options)}
    except ValueError as error:
        raise UsageError(f"--models {name!r}: options are key=number ({error})") from error
    depth = base.removeprefix("resnet")
    if depth.isdigit() and int(depth) in DEPTHS:
        return CifarResNet(int(depth), **given), size or 32, 50
    size = size or 128
    if base in torchvision.models.list_models(module=torchvision.models) and not base.startswith("vit"):
        return torchvision.models.get_model(base, weights=None, **given), size, 8
    if timm.is_model(base):
        fixed = timm.get_pretrained_cfg(base).fixed_input_size
        return timm.create_model(base, **({"img_size": size} if fixed else {}), **given), size, 8
    raise UsageError(f"--models {name!r} is no CIFAR ResNet and known neither to torchvision nor to timm")


# -- measuring -------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One arm: seconds of each counted round, peak memory and seconds to score all groups."""

    seconds: list[float]
    peak: int = 0
    scoring: float | None = None


def measure(subject: Subject, arms: dict[str, Arm]) -> dict[str, Measured]:
    """Run all arms in turn, beginning with another one in each round; memory is taken in a last round."""
    groups = list(prunable_groups(subject.pruner))
    config = subject.config
    found = {name: Measured([]) for name in arms}
    names = list(arms)
    for number in range(config.rounds + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds, importance = timed(lambda arm=arms[name]: _run(arm, subject), config)
            if number:
                found[name].seconds.append(seconds)
                if importance is not None and number == config.rounds:
                    found[name].scoring = timed(lambda imp=importance: score(imp, groups), config)[0]
            del importance
            subject.model.zero_grad()
    for name, arm in arms.items():
        found[name].peak = peak_bytes(lambda arm=arm: _run(arm, subject), config.device)
        subject.model.zero_grad()
    return found


def _run(arm: Arm, subject: Subject) -> Callable | None:
    with subject.autocast():
        return arm.run(subject)


def score(importance: Callable, groups: list) -> list:
    """Return the scores of all groups."""
    return [importance(group) for group in groups]


def timed(function: Callable, config: OverheadConfig) -> tuple[float, object]:
    """Return the seconds that ``function`` takes, and what it returns."""
    clock = CLOCKS[config.clock]
    synchronize(config.device)
    begin = clock()
    result = function()
    synchronize(config.device)
    return clock() - begin, result


def quartiles(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of ``value / base`` over rounds, the middle one second."""
    ratios = [value / plain for value, plain in zip(values, base, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def table(found: dict[str, Measured], arms: dict[str, Arm]) -> str:
    """Return the arms with their ratios to the plain run of the same round."""
    rows = []
    for name, measured in found.items():
        base = found[arms[name].base]
        low, middle, high = quartiles(measured.seconds, base.seconds)
        seconds, peak = statistics.median(measured.seconds), measured.peak / 2**20
        relative = measured.peak / base.peak if base.peak else float("nan")
        scores = "" if measured.scoring is None else f"{measured.scoring:.3f}"
        times = (f"{seconds:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
        rows.append((name, arms[name].base, *times, f"{peak:.1f}", f"{relative:.2f}", scores))
    headers = ("arm", "beside", "seconds", "ratio", "quartiles", "peak MiB", "ratio", "scoring s")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


# -- reports ---------------------------------------------------------------------------------------------------


def comparison(config: OverheadConfig):
    """Yield a table of all arms, and the distance to the floor, for each model."""
    arms = chosen_arms(config.arms)
    bandwidth = read_bandwidth(config.device, CLOCKS[config.clock])
    for name in config.models or MODELS:
        subject = build_subject(name, config)
        found = measure(subject, arms)
        images = subject.batches[0][0]
        once = timed(lambda subject=subject: [read_group(g) for g in groups_of(subject.pruner)], config)[0]
        yield (
            f"{name}: {subject.parameters / 1e6:.1f} M parameters, {len(subject.batches)} batches of "
            f"{len(images)} at {images.shape[-1]} x {images.shape[-1]}. Reading Torch-Pruning's groups, which "
            f"PRO and i-SpaSP do once however many batches follow, takes {once:.3f} s.\n\n{table(found, arms)}"
            f"{_floor(subject, found, arms, bandwidth)}"
        )


def chosen_arms(parts: tuple[str, ...]) -> dict[str, Arm]:
    """Return the arms whose name contains one of ``parts``, in any case, and the plain runs; all for none.

    Raises:
        UsageError: A part is in no name.
    """
    unknown = [part for part in parts if not any(part.lower() in name.lower() for name in ARMS)]
    if unknown:
        raise UsageError(f"--arms {unknown[0]!r} is in no name; known: {', '.join(ARMS)}")
    plain = (FORWARD, BOTH, ACTIVATIONS)
    wanted = [n for n in ARMS if not parts or n in plain or any(part.lower() in n.lower() for part in parts)]
    return {name: ARMS[name] for name in wanted}


def _floor(subject: Subject, found: dict[str, Measured], arms: dict[str, Arm], bandwidth: float) -> str:
    """Return how far PRO is from reading gradient and value of each tap once, and doing nothing else."""
    lines = []
    for name, base in (('PRO "paper"', BOTH), ("PRO (default)", ACTIVATIONS)):
        if name not in found:
            continue
        with counted_reads() as reads:
            _run(arms[name], subject)
        extra = statistics.median(
            ours - plain for ours, plain in zip(found[name].seconds, found[base].seconds, strict=True)
        )
        floor = sum(reads) / bandwidth
        lines.append(
            f"{name}: {len(reads) // len(subject.batches)} taps read {sum(reads) / 2**20:.0f} MiB, "
            f"{floor:.3f} s at {bandwidth / 1e9:.1f} GB/s; measured {extra:.3f} s beyond {base!r}, "
            f"{extra / floor:.1f} times the floor."
        )
    return "\n\n" + "\n".join(lines) if lines else ""


def scaling(config: OverheadConfig):
    """Yield cost against batches, depth, width, and the largest models."""
    arms = {name: ARMS[name] for name in (BOTH, 'PRO "paper"', "PRO (default)")}

    def rows(names, configs):
        for name, one in zip(names, configs, strict=True):
            subject = build_subject(name, one)
            found = measure(subject, arms)
            plain = found[BOTH]
            row = [name, f"{subject.parameters / 1e6:.1f}", one.batches, f"{statistics.median(plain.seconds):.3f}"]
            for arm in list(arms)[1:]:
                ratio = quartiles(found[arm].seconds, plain.seconds)[1]
                row += [f"{statistics.median(found[arm].seconds):.3f}", f"{ratio:.3f}"]
            yield [*row, *(f"{found[arm].peak / 2**20:.1f}" for arm in arms)]

    headers = ("model", "M params", "batches", "plain s", "paper s", "ratio", "default s", "ratio")
    headers += ("plain MiB", "paper MiB", "default MiB")

    def report(title, names, configs):
        return f"{title}\n\n" + tabulate(rows(names, configs), headers, tablefmt="github", disable_numparse=True)

    base = config.models or DEPTH[-1:]
    for name in base:
        counts = [config.batches * 2**i for i in range(3)]
        yield report("Batches", [name] * len(counts), [replace(config, batches=count) for count in counts])
    if config.models:
        return
    yield report("Depth", DEPTH, [config] * len(DEPTH))
    small = replace(config, batches=2, rounds=min(config.rounds, 3))
    yield report("Width", WIDTH, [small] * len(WIDTH))
    large = replace(small, image_size=config.image_size or 64)
    yield report("Large models", LARGEST, [large] * len(LARGEST))


def scoring(config: OverheadConfig):
    """Yield seconds to score all groups for a global ranking, after one calibration: first call, and again."""
    rows = []
    for name in config.models or SCORED:
        subject = build_subject(name, replace(config, batches=1, image_size=config.image_size or 64), "global")
        groups = list(prunable_groups(subject.pruner))
        ours = {arm: _run(ARMS[arm], subject) for arm in ('PRO "paper"', "PRO (default)")}
        importances = {"TP Taylor": _run(ARMS["TP Taylor"], subject), **ours}
        first = {n: timed(functools.partial(score, i, groups), config)[0] for n, i in importances.items()}
        again: dict[str, list[float]] = {n: [] for n in importances}
        for _ in range(config.rounds):
            for n, importance in importances.items():
                again[n].append(timed(functools.partial(score, importance, groups), config)[0])
        usual = {n: statistics.median(values) for n, values in again.items()}
        for n in importances:
            taylor = usual["TP Taylor"]
            row = (f"{1e3 * first[n]:.1f}", f"{taylor / first[n]:.1f}", f"{1e3 * usual[n]:.1f}")
            rows.append((name, len(groups), sum(map(len, groups)), n, *row, f"{taylor / usual[n]:.1f}"))
    headers = ("model", "groups", "items", "importance", "first ms", "Taylor is", "again ms", "Taylor is")
    yield tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _conditions(config: OverheadConfig) -> str:
    """Return versions and machine, from the run itself."""
    now = environment()
    versions = ", ".join(f"{name} {version}" for name, version in now["versions"].items())
    load = Path("/proc/loadavg")
    busy = f", load {load.read_text().split()[0]}" if load.exists() else ""
    return (
        f"{now['machine']}, {now['cores']} cores{busy}; {torch.get_num_threads()} threads; {config.clock} clock, "
        f"device {config.device}, "
        f"amp {config.amp}, channels last {config.channels_last}; {config.rounds} rounds\n{versions}, "
        f"python {now['python']}, git {now['git']}"
    )
