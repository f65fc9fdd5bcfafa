"""What a loader gives: batches taken apart, cut, moved, and turned into the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def batches_of(
    loader: Iterable[Any], device: torch.device, max_samples: int | None, progress: bool, title: str
) -> Iterator[tuple[Any, Any]]:
    """Yield ``(inputs, targets)`` of each batch, on ``device``.

    Args:
        loader: iterable of ``(inputs, targets)``, or of inputs alone.
        device: where tensors are moved to.
        max_samples: stop after so many samples; the last batch is cut.
        progress: show a progress bar if tqdm is installed.
        title: of the progress bar.

    Raises:
        ValueError: the loader is empty, or a batch is none.
    """
    seen = 0
    for batch in _with_progress(loader, progress, title):
        inputs, targets = _unpack(batch)
        size = _samples(inputs)
        if max_samples is not None and seen + size > max_samples:
            size = max_samples - seen
            inputs, targets = cut(inputs, size), cut(targets, size)
        if size == 0:
            break
        seen += size
        yield _moved(inputs, device), _moved(targets, device)
        if seen == max_samples:
            break
    if seen == 0:
        raise ValueError("the loader is empty: calibration needs at least one batch of samples.")


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple (or list) holds several inputs, a dict holds them by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def cut(value: Any, samples: int) -> Any:
    """The first ``samples`` samples of all tensors in nested tuples, lists and dicts."""
    return _map(value, lambda t: t[:samples] if t.dim() else t)


def _unpack(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise ValueError(
            f"a batch of {len(batch)} parts is ambiguous: give (inputs, targets), with inputs a tuple if the "
            "model takes several."
        )
    return batch, None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(_tensors(v) for v in value.values())
    elif isinstance(value, (tuple, list)):
        yield from chain.from_iterable(_tensors(v) for v in value)


def _samples(inputs: Any) -> int:
    first = next((t for t in _tensors(inputs) if t.dim() > 0), None)
    if first is None:
        raise ValueError("the loader's batches hold no input tensor with a batch dimension.")
    return first.shape[0]


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {key: _map(v, fn) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, fn) for v in value)
    return value


def _moved(value: Any, device: torch.device) -> Any:
    return _map(value, lambda t: t.to(device, non_blocking=True))


def _with_progress(loader: Iterable[Any], progress: bool, title: str) -> Iterable[Any]:
    if not progress:
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    bar: Iterable[Any] = tqdm(loader, desc=title, unit="batch", leave=False)
    return bar
