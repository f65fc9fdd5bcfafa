import gc

import torch

from ippro_tp.tracing.tensormap import TensorMap


def test_values_go_with_their_tensors():
    known = TensorMap()
    x = torch.ones(2)
    known[x] = "first"
    known[x] = "second"
    assert known.get(x) == "second"
    assert len(known) == 1
    del x
    gc.collect()
    assert len(known) == 0


def test_a_new_tensor_never_inherits_a_value():
    """Numbers of objects are used again."""
    known = TensorMap()
    for number in range(1000):
        x = torch.ones(2)
        assert x not in known
        known[x] = number


def test_discard_takes_what_is_not_there():
    known, x = TensorMap(), torch.ones(2)
    known.discard(x)
    known[x] = 1
    known.discard(x)
    assert x not in known
