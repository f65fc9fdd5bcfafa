"""Labels against brute force: channel i carries the value i, so values tell where channels went."""

import pytest
import torch
import torch.nn.functional as F

from ippro_tp.records import Label, Span
from ippro_tp.tracing.flow import ChannelFlow


def channels(axis, shape, start=0):
    """A tensor whose value at position i of ``axis`` is ``start + i``."""
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return torch.arange(start, start + shape[axis], dtype=torch.float32).view(view).expand(shape).clone()


def found(label, out):
    """What values the label says lie along its axis."""
    values = torch.full((out.shape[label.axis],), -1.0)
    for span in label.spans:
        values[span.positions()] = span.channels().float()
    return values


def actual(label, out):
    """What values lie there; all entries of a slice must agree."""
    rows = out.movedim(label.axis, 0).flatten(1)
    assert (rows == rows[:, :1]).all(), "channels were mixed along this axis"
    return rows[:, 0]


UNARY = {
    "pool": ((2, 6, 4, 4), 1, F.max_pool2d, (2,), {}),
    "flatten": ((2, 6, 4, 4), 1, torch.flatten, (1,), {}),
    "flatten tokens": ((2, 6, 4, 4), 1, torch.Tensor.flatten, (2,), {}),
    "view": ((2, 6, 4, 4), 1, torch.Tensor.view, (2, 6, 16), {}),
    "merge rows": ((2, 3, 4, 6), 3, torch.Tensor.reshape, (6, 4, 6), {}),
    "permute": ((2, 6, 4, 5), 1, torch.Tensor.permute, (0, 2, 3, 1), {}),
    "permute kw": ((2, 6, 4, 5), 1, torch.permute, ((0, 3, 1, 2),), {}),
    "transpose": ((2, 6, 4), 1, torch.Tensor.transpose, (1, 2), {}),
    "mean": ((2, 6, 4, 4), 1, torch.mean, ((2, 3),), {}),
    "mean tokens": ((2, 4, 6), 2, torch.Tensor.mean, (1,), {}),
    "mean keepdim": ((2, 6, 4, 4), 1, torch.Tensor.mean, ((2, 3),), {"keepdim": True}),
    "narrow": ((2, 6, 4), 1, torch.narrow, (1, 2, 3), {}),
    "slice": ((2, 6, 4), 1, torch.Tensor.__getitem__, ((slice(None), slice(1, 4)),), {}),
    "slice ellipsis": ((2, 4, 6), 2, torch.Tensor.__getitem__, ((Ellipsis, slice(2, 5)),), {}),
    "first token": ((2, 4, 6), 2, torch.Tensor.__getitem__, ((slice(None), 0),), {}),
    "select": ((2, 4, 6), 2, torch.select, (1, 0), {}),
    "movedim": ((2, 6, 4, 5), 1, torch.movedim, (1, 3), {}),
    "transpose kw": ((2, 6, 4), 1, torch.transpose, (), {"dim0": 1, "dim1": 2}),
    "flatten kw": ((2, 6, 4, 4), 1, torch.flatten, (), {"start_dim": 2}),
    "mT": ((2, 6, 4), 1, torch.Tensor.mT.__get__, (), {}),
    "rolled rows": ((2, 6, 4, 5), 1, torch.roll, ((1, 2), (2, 3)), {}),
    "padded": ((2, 6, 4, 5), 1, F.pad, ((1, 1, 2, 2),), {}),
    "chosen samples": ((2, 6, 4), 1, torch.Tensor.__getitem__, (torch.tensor([0]),), {}),
    "norm of rows": ((2, 6, 4), 1, torch.linalg.vector_norm, (2, 2), {}),
    "add number": ((2, 6, 4), 1, torch.add, (0,), {}),
    "squeeze": ((2, 6, 1, 1), 1, torch.Tensor.squeeze, (), {}),
}


@pytest.mark.parametrize("case", UNARY.values(), ids=UNARY.keys())
def test_channels_are_followed(case):
    shape, axis, func, args, kwargs = case
    flow, x = ChannelFlow(), channels(axis, shape)
    flow.set(x, Label(axis, (Span("layer", 0, shape[axis]),)))
    out = func(x, *args, **kwargs)
    flow.propagate(func, (x, *args), kwargs, out)
    label = flow[out]
    assert label is not None
    if "pad" not in func.__name__ and "norm" not in func.__name__:
        torch.testing.assert_close(found(label, out), actual(label, out))
    assert label.spans == (Span("layer", 0, 6),) or func not in (F.pad, torch.linalg.vector_norm)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.mean, ((1,),)),
        (torch.Tensor.__getitem__, ((slice(None), torch.tensor([1, 0, 2, 3, 4, 5])),)),
        (torch.roll, (1, 1)),
        (torch.flip, ((1,),)),
        (torch.softmax, (1,)),
        (torch.cumsum, (1,)),
        (F.linear, (torch.ones(3, 4),)),
        (torch.Tensor.view, (2, 24)),
        (torch.Tensor.__getitem__, ((slice(None), slice(0, 6, 2)),)),
    ],
)
def test_what_mixes_or_hides_channels_ends_the_label(func, args):
    x = channels(1, (2, 6, 4))
    flow = ChannelFlow()
    axis = 1 if func is not torch.Tensor.view else 2
    flow.set(x, Label(axis, (Span("layer", 0, x.shape[axis]),)))
    out = func(x, *args)
    flow.propagate(func, (x, *args), {}, out)
    assert flow[out] is None


def test_split_and_concat():
    flow, x, y = ChannelFlow(), channels(1, (2, 6, 4)), channels(1, (2, 3, 4), start=10)
    flow.set(x, Label(1, (Span("x", 0, 6),)))
    flow.set(y, Label(1, (Span("y", 10, 3),)))
    parts = torch.split(x, [2, 4], 1)
    flow.propagate(torch.split, (x, [2, 4], 1), {}, parts)
    for part in parts:
        torch.testing.assert_close(found(flow[part], part), actual(flow[part], part))
    tensors = [parts[1], y, parts[0]]
    out = torch.cat(tensors, dim=1)
    flow.propagate(torch.cat, (tensors,), {"dim": 1}, out)
    torch.testing.assert_close(found(flow[out], out), actual(flow[out], out))
    flat = out.flatten(1)
    flow.propagate(torch.Tensor.flatten, (out, 1), {}, flat)
    torch.testing.assert_close(found(flow[flat], flat), actual(flow[flat], flat))
    piece = flat.narrow(1, 8, 12)
    flow.propagate(torch.Tensor.narrow, (flat, 1, 8, 12), {}, piece)
    torch.testing.assert_close(found(flow[piece], piece), actual(flow[piece], piece))


def test_add_joins_labels_and_in_place_keeps_them():
    flow, x, y = ChannelFlow(), torch.ones(2, 6, 4), torch.ones(2, 6, 4)
    flow.set(x, Label(1, (Span("x", 0, 6),)))
    flow.set(y, Label(1, (Span("y", 0, 6),)))
    out = x + y
    flow.propagate(torch.add, (x, y), {}, out)
    assert {span.layer for span in flow[out].spans} == {"x", "y"}
    x += y
    flow.propagate(torch.Tensor.__iadd__, (x, y), {}, x)
    assert {span.layer for span in flow[x].spans} == {"x", "y"}


def test_labels_die_with_their_tensors():
    flow = ChannelFlow()
    x = torch.ones(2, 3)
    flow.set(x, Label(1, (Span("x", 0, 3),)))
    del x
    assert len(flow._labels) == 0


def test_a_tensor_that_only_lends_its_shape_lends_no_channels():
    """LeViT: BatchNorm of flattened tokens, shaped back like its input."""
    tokens = channels(2, (2, 4, 6))
    flow, flat = ChannelFlow(), tokens.flatten(0, 1)
    flow.set(tokens, Label(2, (Span("linear", 0, 6),)))
    flow.set(flat, Label(1, (Span("norm", 0, 6),)))
    out = flat.reshape_as(tokens)
    flow.propagate(torch.Tensor.reshape_as, (flat, tokens), {}, out)
    assert flow[out] == Label(2, (Span("norm", 0, 6),))
