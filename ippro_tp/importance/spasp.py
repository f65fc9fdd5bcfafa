"""SpaSPImportance: i-SpaSP (PMLR v168) as an importance criterion for every Torch-Pruning pruner."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..calibration.calibrated import LossFn
from ..calibration.inputs import InputObservation
from ..calibration.losses import cross_entropy
from ..errors import StaleStatisticsError
from ..estimators import spasp_ranking as ranking
from ..estimators.spasp_consumers import Consumer, Summed, gram
from ..estimators.spasp_math import Response
from ..estimators.sums import Sums
from ..graph.following import norm_after
from ..graph.units import Ties, ties_of
from ..records import GroupRecord, Layer
from .binding import Bound

Signed = Literal["sum", "abs", "gated"]


class SpaSPImportance(Bound, tp.importance.Importance):  # type: ignore[misc]
    r"""Importance of channels by i-SpaSP: how much their summed activations matter to the layers that read them.

    Source: Wolfe and Kyrillidis, "i-SpaSP: Structured Neural Pruning via Sparse Signal Recovery", PMLR v168,
    Algorithms 1 and 2. It needs forward passes only; all groups are calibrated in one pass over the data.

    For a local pruner, in its step or given to ``observe``, ``calibrate`` or :meth:`bind`, the channels that are
    kept are exactly the paper's set S for the size that the step leaves. For a global pruner, or without one,
    channels are ordered by the fraction of all target sizes whose S contains them. Up to a pruning ratio of 0.5
    the paper's algorithm *is* the ranking by summed activations: the 2 s candidates are then all channels,
    whatever the weights. The same holds for ``iterative_steps`` that each keep half or more.

    Extensions of the paper: ``signed="abs"`` and ``"gated"``; the scale that makes orders of different groups
    comparable, the relative error of the consumers' mean output (see
    :func:`estimators.spasp_math.removal_scores`); several consumers, whose squared residuals are added.

    Args:
        iterations: largest number of iterations of Algorithm 1; it stops when S repeats, usually after 2 or 3.
        bias: whether the first residual is the consumer's whole output, as in the authors' code: with its bias,
            the shift of its BatchNorm and the contribution of other, concatenated channels. ``False`` takes only
            the contribution of the group's channels, which is Algorithm 1 as published.
        signed: how activations of either sign (GELU, linear streams) are treated. ``"sum"``: as in the paper,
            which assumes ReLU. ``"abs"``: the threshold is on the sum of magnitudes. ``"gated"``: importance is
            the inner product of a channel's contribution with the residual, sample by sample, and the threshold
            is on the contribution's energy. This needs second moments: calibration takes longer, and memory grows
            with the square of ``channels * kernel size``.

    Raises:
        ValueError: an option is unknown.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3),
        ...     torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5))
        >>> imp = SpaSPImportance()
        >>> pruner = tp.pruner.BasePruner(model, torch.randn(1, 3, 8, 8), importance=imp, pruning_ratio=0.5,
        ...     ignored_layers=[model[6]])
        >>> _ = imp.calibrate(pruner, [torch.randn(4, 3, 8, 8)], progress=False)
        >>> pruner.step()
        >>> model[0].out_channels, model[2].out_channels
        (4, 2)
    """

    needs_gradients = False

    def __init__(self, iterations: int = 20, *, bias: bool = True, signed: Signed = "sum") -> None:
        super().__init__()
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations={iterations!r}; it must be a positive integer")
        if signed not in get_args(Signed):
            raise ValueError(f"signed={signed!r}; choose one of {', '.join(map(repr, get_args(Signed)))}")
        self.iterations, self.bias, self.signed = iterations, bool(bias), signed

    # -- calibration -------------------------------------------------------------------------------------------

    def _asked_by(self, target: Any) -> None:
        self.bind(target if isinstance(target, tp.pruner.BasePruner) else None)

    def _observation(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        **options: Any,
    ) -> InputObservation:
        if options:
            raise TypeError(f"unknown option {next(iter(options))!r}; SpaSPImportance.observe() takes none")
        return InputObservation(model, groups, self._add)

    def _add(self, sums: Sums, name: str, module: nn.Module, x: Tensor) -> None:
        """Add one input of a consumer: the sum over samples (Linear: and all axes before the last), in float64."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        if isinstance(module, _ConvNd):
            x = x if x.dim() == len(module.kernel_size) + 2 else x[None]
            size = "x".join(map(str, x.shape[2:]))
        else:
            x, size = x.reshape(-1, x.shape[-1]), "rows"
        sums.add(f"sum/{name}/{size}", _summed(x, wide))
        sums.add(f"count/{name}/{size}", torch.full((), x.shape[0], dtype=wide, device=x.device))
        if self.signed == "abs":
            sums.add(f"abs/{name}", x.abs().sum([0, *range(2, x.dim())], dtype=wide))
        elif self.signed == "gated":
            sums.add(f"gram/{name}", gram(name, module, x).to(wide))

    def _commit(self, observation: InputObservation) -> None:
        wrong = [record for record in observation.records if record.problems]
        if wrong:
            warnings.warn(
                f"{len(wrong)} groups get no score and will not be pruned. {wrong[0].key!r}: Torch-Pruning's "
                f"index map is impossible ({wrong[0].problems[0]}). ippro_tp.prune() follows each channel.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _default_loss(self) -> LossFn:
        return cross_entropy  # never called: there is no backward pass

    def _settings(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "signed": self.signed}

    def _how_to_calibrate(self) -> str:
        return (
            f"{type(self).__name__} has no statistics yet. Before pruner.step(), run\n"
            "    importance.calibrate(pruner, loader)\n"
            "or, around your own loop,\n"
            "    with importance.observe(pruner), torch.no_grad():\n"
            "        for images, labels in loader:\n"
            "            model(images)"
        )

    # -- scores ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """Scores of a group's channels.

        Args:
            group: a ``torch_pruning`` group, full or partial.
            **_: ignored; older versions of Torch-Pruning pass more arguments.

        Returns:
            ``(len(group[0].idxs),)`` float32 on the device of the group's layers, finite; higher = keep. ``None``
            only if no Conv or Linear layer that ran during calibration reads the group: the paper scores a layer
            by the one after it.

        Raises:
            NotCalibratedError: there are no statistics for this group.
            StaleStatisticsError: the model was pruned after calibration.
        """
        found = self._lookup(group)
        if found is None:
            return None
        record, positions = found
        graph = group._DG
        device = next(iter(graph.model.get_submodule(record.producers[0].name).parameters())).device
        total: Tensor | None = None
        for ties in ties_of(self._pruner_of(graph), group, record, positions):
            response = self._response(record, ties, graph)
            if response is None:
                return None
            if ties.kept is not None:
                scores = ranking.cut_scores(response, ties.kept, self.iterations)
            else:
                scores = ranking.removal_scores(response, self.iterations)
            scores = scores[ties.unit.to(scores.device)]
            total = scores if total is None else total + scores
        assert total is not None
        return total[positions.to(total.device)].float().to(device)

    def _response(self, record: GroupRecord, ties: Ties, graph: Any) -> Response | None:
        """What the group's consumers answer; ``None`` if there is none that was seen during calibration."""
        sums = self._sums
        assert sums is not None
        response: Response | None = None
        for layer in record.consumers:
            module = graph.model.get_submodule(layer.name)
            weight = module.weight
            device = torch.device("cpu") if weight.device.type == "mps" else weight.device
            inputs = self._inputs(layer.name, device)
            if not inputs:
                continue
            self._check_consumer(layer, module, graph, inputs)
            response = Response.zero(ties.units, device) if response is None else response
            consumer = Consumer.of(module, norm_after(graph, module), graph.get_out_channels(module), device)
            index, root = layer.index.to(device), layer.root.to(device)
            unit = ties.unit.to(device)[root]
            if self.signed == "gated":
                moments = sums[f"gram/{layer.name}"].to(device, torch.float64)
                consumer.add_gated(response, moments, inputs, index, unit, self.bias)
                continue
            consumer.add(response, inputs, index, unit, self.bias)
            if self.signed == "abs":
                activation = sums[f"abs/{layer.name}"].to(device, torch.float64)
            else:
                activation = torch.stack([total.reshape(len(total), -1).sum(1) for total, _ in inputs]).sum(0)
            response.activation.index_add_(0, unit, activation[index])
        if response is not None and self.signed == "gated":
            assert response.matrix is not None
            response.activation = response.matrix.diagonal().clone()
        return response

    def _inputs(self, name: str, device: torch.device) -> list[Summed]:
        """Summed inputs of a layer, one entry for each size it was called with."""
        assert self._sums is not None
        prefix = f"sum/{name}/"
        sizes = [key.removeprefix(prefix) for key in self._sums if key.startswith(prefix)]
        keys = [(f"sum/{name}/{size}", f"count/{name}/{size}") for size in sizes]
        return [
            (self._sums[total].to(device, torch.float64), self._sums[count].to(device, torch.float64))
            for total, count in keys
        ]

    @staticmethod
    def _check_consumer(layer: Layer, module: nn.Module, graph: Any, inputs: list[Summed]) -> None:
        now, then = graph.get_in_channels(module), inputs[0][0].shape[0]
        if now != then:
            raise StaleStatisticsError(
                f"{layer.name!r} reads {now} channels but read {then} during calibration: the model has been "
                "pruned since. Calibrate again before the next step."
            )


def _summed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.sum(0)`` in ``dtype``; maps in float32 on the CPU are added by eights before they are widened.

    Widening every sample costs a fifth of a forward pass; by eights the sum is off by 1e-7 at most, less than the
    rounding of the activations themselves.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() < 3:
        return x.to(dtype).sum(0) if x.device.type == "cpu" else x.sum(0, dtype=dtype)
    total = torch.zeros(x.shape[1:], dtype=dtype)
    for samples in x.split(8):
        total += samples.sum(0)
    return total
