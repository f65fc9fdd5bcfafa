"""What a loader gives: batches taken apart, cut, moved, and turned into the arguments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tracing.passes import batch_size, is_images


def batches_of(
    loader: Iterable[Any],
    device: torch.device,
    max_samples: int | None,
    progress: bool,
    title: str,
    note: Callable[[], str] = str,
) -> Iterator[tuple[Any, Any]]:
    """Yield ``(inputs, targets)`` of each batch, on ``device``. Batches without samples are left out.

    Args:
        loader: iterable of ``(inputs, targets)``, or of inputs alone.
        device: where tensors are moved to.
        max_samples: stop after so many samples; the last batch is cut.
        progress: show a progress bar if tqdm is installed.
        title: of the progress bar.
        note: asked after each batch for what to show beside the bar.

    Raises:
        ValueError: the loader is empty, a batch is none, or ``max_samples`` is no positive whole number.
        TypeError: the loader is none.
    """
    if max_samples is not None:
        max_samples = whole_number("max_samples", max_samples, "of samples, or None for all")
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        what = "one tensor, whose rows would be batches" if isinstance(loader, Tensor) else repr(loader)
        raise TypeError(f"the loader is {what}; give an iterable of batches, [images] for a single one")
    seen = 0
    for batch in _with_progress(loader, progress, title, note):
        inputs, targets = _unpack(batch)
        size = _samples(inputs)
        if size == 0:
            continue
        if max_samples is not None and seen + size > max_samples:
            left = max_samples - seen
            inputs, targets, size = cut(inputs, left, size), cut(targets, left, size), left
        seen += size
        yield _moved(inputs, device), _moved(targets, device)
        if seen == max_samples:
            break
    if seen == 0:
        raise ValueError("the loader is empty: calibration needs at least one batch of samples.")


def whole_number(name: str, value: Any, of_what: str = "") -> int:
    """``value`` as a positive integer.

    Raises:
        ValueError: it is none, and names the argument.
    """
    try:
        if value == (whole := int(value)) and whole > 0:
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name}={value!r}; give a positive whole number {of_what}".rstrip())


def as_call(inputs: Any, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call.

    A tuple (or list) holds several inputs, a dict holds them by name, and so does a named tuple whose fields are
    parameters of the model's ``forward``. A list of images is one input.

    Args:
        inputs: what a batch holds for the model.
        model: the model that will be called, whose ``forward`` tells a list of images from several inputs.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, (tuple, list)):
        return (inputs,), {}
    names = _parameters(model)
    fields = getattr(inputs, "_fields", None)
    if fields and names is not None and set(fields) <= set(names):
        return (), dict(zip(fields, inputs, strict=True))
    return ((inputs,), {}) if _is_one_input(inputs, names) else (tuple(inputs), {})


def called(model: nn.Module, inputs: Any) -> Any:
    """The outputs of ``model`` for the inputs of a batch.

    Raises:
        ValueError: the inputs do not fit its ``forward``.
    """
    args, kwargs = as_call(inputs, model)
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as unfit:
            given = "names " + ", ".join(map(repr, kwargs)) if kwargs else f"{len(args)} inputs"
            raise ValueError(
                f"the batch does not fit the model: its forward takes {signature}, the batch gives {given} "
                f"({unfit}). A tensor is passed as it is, a tuple by position, a dict by name. Give (inputs, "
                "targets) batches of that kind, ((images, targets), None) to a model that wants its targets, or "
                "run your own loop within observe()."
            ) from error
        raise


def cut(value: Any, samples: int, batch: int) -> Any:
    """The first ``samples`` of ``batch`` samples, in all tensors and lists of nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list)) and len(value) == batch and _holds_samples(value):
        return _like(value, list(value[:samples]))
    if isinstance(value, Tensor):
        return value[:samples] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {key: cut(v, samples, batch) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, [cut(v, samples, batch) for v in value])
    return value


def _holds_samples(values: Any) -> bool:
    return is_images(values) or all(isinstance(v, (Mapping, str)) for v in values)


def _parameters(model: nn.Module | None) -> dict[str, inspect.Parameter] | None:
    try:
        return None if model is None else dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return None


def _is_one_input(values: Any, parameters: Mapping[str, inspect.Parameter] | None) -> bool:
    """Whether a list is one list of images rather than several inputs."""
    if not all(isinstance(v, Tensor) and v.dim() == 3 for v in values) or not values:
        return False
    plain = [p for p in (parameters or {}).values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if plain and not any(p.kind is p.VAR_POSITIONAL for p in (parameters or {}).values()):
        if len(values) > len(plain):
            return True
        if sum(p.default is p.empty for p in plain) > 1:
            return False
    return _looks_like_images(values)


def _looks_like_images(values: Any) -> bool:
    return all(v.shape[0] in (1, 3, 4) for v in values) or len({v.shape[0] for v in values}) > 1


def _unpack(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 0:
            return batch, None
        raise ValueError(
            f"a batch of {len(batch)} parts is ambiguous: give (inputs, targets), with inputs a tuple if the "
            "model takes several, or (images, None) for a list of images."
        )
    return batch, None


def _samples(inputs: Any) -> int:
    if is_images(list(inputs) if isinstance(inputs, tuple) else inputs) and not _looks_like_images(inputs):
        inputs = inputs[0]  # several inputs of as many samples
    size = 0 if isinstance(inputs, list) and not inputs else batch_size(inputs)
    if size is None:
        raise ValueError("the loader's batches hold no input tensor with a batch dimension.")
    return size


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {key: _map(v, fn) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, [_map(v, fn) for v in value])
    return value


def _like(value: Any, items: list[Any]) -> Any:
    """``items`` in a tuple or list like ``value``."""
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def _moved(value: Any, device: torch.device) -> Any:
    return _map(value, lambda t: t.to(device, non_blocking=True))


def _with_progress(loader: Iterable[Any], progress: bool, title: str, note: Callable[[], str]) -> Iterator[Any]:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            progress = False
    if not progress:
        yield from loader
        return
    shown = ""
    with tqdm(loader, desc=title, unit="batch", leave=False) as bar:
        for batch in bar:
            yield batch
            if (text := note()) != shown:
                shown = text
                bar.set_postfix_str(text)
