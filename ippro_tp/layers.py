"""Kinds of layers that the rooms have to tell apart."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

# Normalisations that work channel by channel (or on few channels): they take the scale of the filter before
# them away, so the affine parameters after them are the filter. A LayerNorm mixes all channels and is none.
CHANNEL_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
NOT_PRODUCERS = (nn.LayerNorm, nn.PReLU)
# Torch-Pruning prunes their inputs and outputs with one function, as it does for element-wise layers; yet they
# write channels of their own.
WRITERS = (*CHANNEL_NORMS, _ConvNd, nn.MultiheadAttention, nn.Embedding)
