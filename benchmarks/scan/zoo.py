"""Which models the scan looks at, and how a small copy of each is made.

A model is named ``torchvision/NAME``, ``timm/NAME`` or ``MODULE:FUNCTION`` (any callable that returns a model).
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from benchmarks.errors import UsageError
from benchmarks.harness.cells import write_json
from ippro_tp import attention_heads

SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")
SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384)
"""Sizes of the square input that are tried, in this order."""
FIRST_SIDE = {"inception_v3": 96, "ssdlite320_mobilenet_v3_large": 320}
"""Where a smaller input runs but leaves nothing to look at."""
VARIANTS = 4
"""How many variants of a timm family are tried before it is given up."""
SMALL = ("18", "xxs", "xxt", "0_5", "050", "atto", "lite", "mini", "nano", "pico", "s0", "small", "t0", "tiny")
"""Parts of the names of small models; only the speed of the search depends on them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A model to examine.

    Attributes:
        name: ``torchvision/NAME``, ``timm/NAME`` or ``MODULE:FUNCTION``.
        family: ``torchvision/MODULE`` or ``timm/MODULE``, the file that defines the architecture.
        params: Number of parameters as the library builds it; None where it could not be counted.
    """

    name: str
    family: str
    params: int | None

    def path(self, out: Path, folder: str = "models") -> Path:
        """Return the JSON file of this model under ``out``."""
        return out / folder / f"{self.name.replace('/', '__').replace(':', '__')}.json"


@dataclass
class Subject:
    """A model that is ready to be pruned.

    Attributes:
        model: With random weights, in eval mode.
        inputs: Positional arguments of a forward pass with one sample, and with a batch.
        batch: See ``inputs``.
        ignored: Layers that keep their outputs.
        num_heads: Fused attention projections and their number of heads, as Torch-Pruning wants them.
        side: Height and width of the images.
        detector: Whether the model takes a list of images.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    batch: Callable[[int], tuple[Any, ...]]
    ignored: list[nn.Module]
    num_heads: dict[nn.Module, int]
    side: int
    detector: bool = False


# -- which models ---------------------------------------------------------------------------------------------


class WeightsOnMeta(TorchFunctionMode):
    """Context in which ``torch.empty``, and so every layer's weight, allocates nothing.

    ``with torch.device("meta")`` goes further: models that compute their widths with tensors cannot be built.

    Args:
        limit: Raise :class:`OverflowError` when more numbers than this have been asked for.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self._limit = limit
        self._asked = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Move ``torch.empty`` to the meta device."""
        if func is not torch.empty:
            return func(*args, **(kwargs or {}))
        out = func(*args, **{**(kwargs or {}), "device": "meta"})
        self._asked += out.numel()
        if self._asked > self._limit:
            raise OverflowError(f"more than {self._limit:g} parameters")
        return out


def count_parameters(build: Callable[[], nn.Module], limit: float = math.inf) -> int | None:
    """Return the number of parameters of the model that ``build`` returns, without allocating them.

    Returns:
        None where the model cannot be built like this; it is examined all the same, after those with a count.

    Raises:
        OverflowError: The layers have more than ``limit`` weights.
    """
    try:
        with WeightsOnMeta(limit):
            return sum(p.numel() for p in build().parameters())
    except OverflowError:
        raise
    except Exception as error:  # a constructor can raise anything
        print(f"cannot count parameters: {type(error).__name__}: {error}")
        return None


def torchvision_names() -> dict[str, str]:
    """Return all classification models and the chosen segmentation and detection models, with their families."""
    from torchvision import models

    names = [*models.list_models(module=models), *SEGMENTATION, *DETECTION]
    modules = (models.get_model_builder(name).__module__ for name in names)
    return {n: f"torchvision/{module.rpartition('.')[2]}" for n, module in zip(names, modules, strict=True)}


def torchvision_entries(counts: Counts, names: dict[str, str]) -> list[Entry]:
    """Return entries of torchvision models, smallest first."""
    entries = [
        Entry(f"torchvision/{n}", family, _count(counts, f"torchvision/{n}", lambda n=n: _torchvision_model(n)))
        for n, family in names.items()
    ]
    return sorted(entries, key=_size)


def _count(counts: Counts, name: str, build: Callable[[], nn.Module]) -> int | None:
    return counts.of(name, lambda: count_parameters(build))


def _size(entry: Entry) -> tuple[float, str]:
    return (entry.params if entry.params is not None else math.inf), entry.name


def timm_families() -> list[str]:
    """Return the architecture files of timm, as ``timm/MODULE``."""
    import timm

    return [f"timm/{module}" for module in timm.list_modules() if timm.list_models(module=module)]


def timm_variants(family: str, counts: Counts) -> list[Entry]:
    """Return the smallest models of an architecture file, smallest first."""
    import timm

    def smallest() -> dict[str, int | None]:
        names = timm.list_models(module=family.partition("/")[2])
        found: list[Entry] = []
        # Likely small ones first: a model is given up while it is built as soon as it is larger than those found.
        for name in sorted(names, key=lambda n: not any(hint in n for hint in SMALL)):
            sizes = [e.params for e in sorted(found, key=_size)[:VARIANTS] if e.params is not None]
            # Some weights are replaced while a model is built: more are asked for than remain.
            limit = 1.5 * sizes[-1] if len(sizes) == VARIANTS else math.inf
            try:
                params = count_parameters(lambda name=name: timm.create_model(name), limit)
            except OverflowError:
                continue
            found.append(Entry(f"timm/{name}", family, params))
        return {e.name: e.params for e in sorted(found, key=_size)[:VARIANTS]}

    return [Entry(name, family, params) for name, params in counts.of(family, smallest, dict).items()]


class Counts:
    """Parameter counts in a JSON file: counting all models takes minutes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, name: str, count: Callable[[], T], kind: type = object) -> T:
        """Return what is stored under ``name`` if it is a ``kind``, or store and return what ``count`` returns."""
        if name not in self._counts or not isinstance(self._counts[name], kind):
            self._counts[name] = count()
            write_json(self._path, self._counts)
        return self._counts[name]


def resolve(name: str, counts: Counts) -> list[Entry]:
    """Return the models that a user calls ``name``; a bare name is looked up in both libraries.

    Raises:
        UsageError: There is no such model.
    """
    if ":" in name:
        _factory(name)
        return [Entry(name, name.partition(":")[0], None)]
    library, _, bare = name.rpartition("/")
    found = []
    if library in ("", "torchvision"):
        found += torchvision_entries(counts, {n: f for n, f in torchvision_names().items() if n == bare})
    if library in ("", "timm"):
        import timm

        for module in timm.list_modules():
            if bare in timm.list_models(module=module):
                params = _count(counts, f"timm/{module}/{bare}", lambda: timm.create_model(bare))
                found.append(Entry(f"timm/{bare}", f"timm/{module}", params))
                break
    if not found:
        raise UsageError(f"no model {name!r}; use torchvision/NAME, timm/NAME or MODULE:FUNCTION")
    return found


# -- how they are made ----------------------------------------------------------------------------------------


def subject(name: str, side: int | None = None) -> Subject:
    """Return ``name`` with random weights and the smallest input that it accepts; the same at every call.

    Args:
        name: As in :class:`Entry`.
        side: Size of the input; None tries :data:`SIDES`.

    Raises:
        RuntimeError: The model runs with none of the sizes.
    """
    detector = name.rpartition("/")[2] in DETECTION
    problem: Exception | None = None
    first = FIRST_SIDE.get(name.rpartition("/")[2], 0)
    for size in [side] if side is not None else [s for s in SIDES if s >= first]:
        torch.manual_seed(0)
        try:
            model = _build(name, size)
            batch = _batches(_channels(model), size, detector)
            spread_constants(model)
            settle(model, batch(4))
            model.eval()
            with torch.no_grad():
                model(*batch(1))
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, ZeroDivisionError) as error:
            problem = problem or error
            continue
        return Subject(model, batch(1), batch, _heads(name, model), attention_heads(model), size, detector)
    raise RuntimeError(f"no input size works: {type(problem).__name__}: {problem}") from problem


def spread_constants(model: nn.Module) -> None:
    """Add noise to parameters that are initialised to one number: as they are, most of their gradients vanish.

    Zero-initialised branches, LayerScale of 1e-6 and scales of 1 are those of no trained network.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.flatten()
            if parameter.is_floating_point() and flat.numel() > 1 and bool((flat == flat[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def settle(model: nn.Module, batch: tuple[Any, ...]) -> None:
    """Set BatchNorm statistics to those of one batch, so that activations have the scale of a trained network.

    Boxes of a detector whose scores are all the same would be picked by their rounding.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    model.eval()
    try:
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(*batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.zero_()


def _build(name: str, side: int) -> nn.Module:
    if ":" in name:
        return _factory(name)()
    library, _, bare = name.partition("/")
    if library == "torchvision":
        return _torchvision_model(bare, side)
    import timm

    try:
        return timm.create_model(bare, img_size=side)
    except TypeError:  # it takes no image size
        return timm.create_model(bare)


def _torchvision_model(name: str, side: int | None = None) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    if name in SEGMENTATION or name in DETECTION:
        options["weights_backbone"] = None
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = False  # minutes of scipy for inception_v3
    if side is not None and name.startswith("vit_"):
        options["image_size"] = side
    if side is not None and name.startswith("maxvit"):
        options["input_size"] = (side, side)
    if side is not None and name.startswith("fasterrcnn"):
        options |= {"min_size": side, "max_size": side}
    if name.startswith("fasterrcnn"):
        options["box_score_thresh"] = 0.0  # random weights find nothing otherwise, and there would be no output
    return models.get_model(name, **options)


def _factory(name: str) -> Callable[[], nn.Module]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"no model {name!r}: {error}") from error


def _channels(model: nn.Module) -> int:
    config = getattr(model, "pretrained_cfg", None)
    if config:
        return config["input_size"][0]
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    return first.in_channels if first is not None else 3


def _batches(channels: int, side: int, detector: bool) -> Callable[[int], tuple[Any, ...]]:
    def batch(samples: int) -> tuple[Any, ...]:
        images: Tensor = torch.randn(
            samples, channels, side, side, generator=torch.Generator().manual_seed(samples)
        )
        return (list(images.sigmoid()),) if detector else (images,)

    return batch


def _heads(name: str, model: nn.Module) -> list[nn.Module]:
    """Layers whose outputs are the model's: classifiers, and the heads of detectors."""
    bare = name.rpartition("/")[2]
    if bare in DETECTION:
        parts = ("head", "rpn", "roi_heads", "backbone.fpn")
        found = [m for part in parts if (m := _submodule(model, part)) is not None]
    elif name.startswith("timm/"):
        classifier = model.get_classifier()
        found = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    else:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
        width = _outputs(layers[-1]) if layers else 0
        classes = 21 if bare in SEGMENTATION else width
        found = [m for m in layers if _outputs(m) == classes] if name.startswith("torchvision/") else layers[-1:]
    return [m for m in found if isinstance(m, nn.Module)]


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
