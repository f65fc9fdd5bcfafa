"""Operations along some axes: pooling, sums and means, softmax, scans, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .labels import varying
from .masks import reduced
from .meetings import pointwise
from .rules import rule

if TYPE_CHECKING:
    from .provenance import Provenance


SPATIAL = {
    "max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "adaptive_avg_pool1d": 1, "_adaptive_avg_pool2d": 2,
    "adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool1d": 1,
    "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
    "upsample_linear1d": 1, "upsample_trilinear3d": 3, "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "_upsample_nearest_exact2d": 2, "upsample_nearest3d": 3, "grid_sampler_2d": 2,
}  # fmt: skip


@rule(*SPATIAL)
def spatial(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Positions are mixed along the last axes, channels are not."""
    out = func(*args, **kwargs)
    axes = SPATIAL[func._schema.name.removeprefix("aten::")]
    for result in out if isinstance(out, (tuple, list)) else [out]:
        planes = []
        for plane in mode.planes(args[0]):
            small = mode.canonical(plane)
            mixed = [a for a in varying(small) if a >= small.dim() - axes]
            if mixed:
                mode.fix(small, f"{func._schema.name} mixes its positions")
            else:
                planes.append(small)
        mode.put(result, planes)
    return out


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "max",
    "min",
    "linalg_vector_norm",
    "norm",
    "logsumexp",
    "prod",
    "any",
    "all",
    "var_mean",
    "std_mean",
    "median",
    reads=True,
)
def reduce(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Positions are summed up; removed channels are left out of means, maxima and norms."""
    x = args[0]
    if not isinstance(x, Tensor) or (len(args) > 1 and isinstance(args[1], Tensor)):
        return pointwise(mode, func, args, kwargs)
    axes = reduced_axes(func, args, kwargs, x.dim())
    alive = mode.alive(x)
    out = func(*args, **kwargs) if alive is None else reduced(func, args, kwargs, x, alive, axes)
    kept = [a for a in range(x.dim()) if a not in axes]
    for result in out if isinstance(out, (tuple, list)) else [out]:
        planes = []
        for plane in mode.planes(x):
            small = mode.canonical(plane)
            inside = [a for a in varying(small) if a in axes]
            there = small if not inside else mode.consumed(small, axes)
            if there is None or not bool(there.any()):
                continue
            there = there.narrow(0, 0, there.shape[0])
            planes.append(there if result.dim() == x.dim() else there.reshape([there.shape[a] for a in kept]))
        mode.put(result, [p for p in planes if result.dim()])
    return out


def reduced_axes(func: Any, args: Any, kwargs: Any, rank: int) -> list[int]:
    """The axes that a reduction reduces."""
    given = kwargs.get("dim")
    names = [a.name for a in func._schema.arguments]
    if given is None and "dim" in names and names.index("dim") < len(args):
        given = args[names.index("dim")]
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return list(range(rank))
    return sorted({a % max(1, rank) for a in (given if isinstance(given, (list, tuple)) else [given])})


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", reads=True)
def softmax(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Removed channels along the axis get no weight."""
    x, axis = args[0], args[1] % args[0].dim()
    alive = mode.alive(x)
    if alive is not None and alive.shape[axis] > 1:
        out = func(x.masked_fill(~alive, float("-inf")), *args[1:], **kwargs).nan_to_num(0.0)
    else:
        out = func(*args, **kwargs)
    mode.put(out, [mode.canonical(p) for p in mode.planes(x)])
    return out


@rule("cumsum", "cumprod", "logcumsumexp")
def scan(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """As a move along other axes than that of the channels."""
    axis = args[1] % args[0].dim()
    out = func(*args, **kwargs)
    planes = []
    for plane in mode.planes(args[0]):
        small = mode.canonical(plane)
        if axis in varying(small):
            mode.fix(small, f"{func._schema.name} runs along it")
        else:
            planes.append(small)
    mode.put(out, planes)
    return out


@rule("embedding")
def embedding(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows are picked by their number, which nobody may change."""
    out = func(*args, **kwargs)
    planes = []
    for plane in mode.planes(args[0]):
        small = mode.canonical(plane)
        if 0 in varying(small):
            mode.fix(small, "rows of a table are looked up by number")
        else:
            planes.append(small.reshape([1] * (out.dim() - 1) + [small.shape[-1]]))
    mode.put(out, planes)
    return out
