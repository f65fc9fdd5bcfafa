"""Bytes: the peak of a run's live tensors, how fast memory is read, and what taps have to read."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from ippro_tp.tracing import extension


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Return by how many bytes live tensor memory rises at most while ``function`` runs.

    On the CPU every allocation and release of PyTorch's allocator is recorded by the profiler, temporaries inside
    operations included; memory that a library takes elsewhere (oneDNN's scratchpads) is not. On CUDA it is
    ``max_memory_allocated``.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def keep_freed_memory() -> bool:
    """Keep glibc from giving freed memory back to the system; return whether that was possible.

    It gives back what lies free at the top of the heap, which depends on where the last small object happens to
    be: the same passes then take none or a hundred thousand page faults, a tenth of their time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_threshold, 32 * 2**20))


def read_bandwidth(
    device: str = "cpu", clock: Callable[[], float] = time.perf_counter, megabytes: int = 128
) -> float:
    """Return bytes per second at which a tensor too large for any cache is read: the median of seven sums."""
    x = torch.ones(megabytes << 18, device=device)
    seconds = []
    for _ in range(8):
        synchronize(device)
        begin = clock()
        x.sum()
        synchronize(device)
        seconds.append(clock() - begin)
    return x.nbytes / statistics.median(seconds[1:])


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Collect, while entered, the bytes of the gradient and of the values that each tap has to read once."""
    found: list[int] = []
    original = extension.Tap._on_grad

    def counting(tap, grad):
        if tap.terms:
            found.append(grad.nbytes + sum(term.value.nbytes for term in tap.terms))
        return original(tap, grad)

    with mock.patch.object(extension.Tap, "_on_grad", counting):
        yield found


def synchronize(device: str) -> None:
    """Wait until ``device`` has done what it was asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
