"""What ``prune()`` returns: the pruned model, its measured size, and a table of the changes."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..compensation.recovery import RecoveryReport
from .counter import Counts
from .saving import save_pruned
from .steps import GroupChange, StepRecord


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned model and a record of how it was pruned; ``print(result)`` shows a table.

    Attributes:
        model: the pruned model; its modules are in the same train/eval modes as in the model that was given.
        macs: remaining multiply-accumulates as a fraction of the unpruned model's, measured.
        params: remaining parameters, as a fraction.
        latency: time of a forward pass, as a fraction, measured; ``None`` unless it was the target.
        before, after: absolute MACs and parameters, on the example inputs.
        steps: what each step did to each group and layer.
        scope, importance, seed: the options of the call.
        recovered: the report of the recovery; ``None`` if there was none.
        example_inputs: those of the call, which :meth:`save` checks the saved model with; ``None`` if the model
            is not called with them directly.
    """

    model: nn.Module
    macs: float
    params: float
    latency: float | None
    before: Counts = field(repr=False)
    after: Counts = field(repr=False)
    steps: tuple[StepRecord, ...] = field(repr=False)
    scope: str = "global"
    importance: str = "PROImportance"
    seed: int = 0
    recovered: RecoveryReport | None = None
    example_inputs: Any = field(default=None, repr=False)

    @property
    def predicted_latency(self) -> float | None:
        """The latency table's prediction of :attr:`latency`; ``None`` unless it was the target."""
        return self.steps[-1].predicted

    @property
    def groups(self) -> tuple[GroupChange, ...]:
        """The change of each group over all steps, in the order of the model's modules."""
        first = {group.key: group for group in self.steps[0].groups}
        last = {group.key: group for group in self.steps[-1].groups}
        return tuple(
            GroupChange(
                key,
                group.layers,
                group.before,
                last[key].after if key in last else group.after,
                group.units,
                reason=last[key].reason if key in last else group.reason,
            )
            for key, group in first.items()
        )

    @property
    def left_whole(self) -> dict[str, str]:
        """The groups that keep all of their channels, with the reason, by key."""
        return {group.key: group.reason for group in self.groups if group.reason}

    @property
    def skipped(self) -> dict[str, str]:
        """The layers that lost inputs and were not refitted in the last step, with the reason."""
        refitted = self.steps[-1].refitted
        return {} if refitted is None else {row.name: row.skipped for row in refitted.rows if row.skipped}

    def save(
        self,
        directory: str | os.PathLike[str],
        source: Mapping[str, Any] | None = None,
        builder: Callable[[], nn.Module] | None = None,
        *,
        example_inputs: Any = None,
    ) -> Path:
        """Write the model to ``directory``; :func:`ippro_tp.load_pruned` restores it bit for bit.

        Args:
            directory: created if it does not exist.
            source: see :func:`ippro_tp.save_pruned`. Without ``source`` and ``builder``, all classes of the model
                must be importable in the process that loads it.
            builder: see :func:`ippro_tp.save_pruned`.
            example_inputs: the saved model is loaded and run on them, and must give the same outputs as this one;
                by default those given to :func:`~ippro_tp.prune`.

        Returns:
            ``directory``.
        """
        example = self.example_inputs if example_inputs is None else example_inputs
        return save_pruned(self.model, directory, source, builder, example_inputs=example)

    # -- shown -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        rows = [("group", "channels", "left", "", "layers"), *(_row(g) for g in self.groups if not g.reason)]
        lines = [self.headline, "", *_table(rows)]
        whole, skipped = self.left_whole, self.skipped
        if whole:
            lines += ["", "left whole:", *(f"  {key}: {reason}" for key, reason in whole.items())]
        refitted = self.steps[-1].refitted
        if refitted is None:
            lines += ["", "not compensated"]
        else:
            lines += ["", f"refitted: {len(refitted.rows) - len(skipped)} layers"]
            lines += [f"  not refitted: {name}: {reason}" for name, reason in skipped.items()]
        if self.recovered is not None:
            lines += ["", f"recovered: {self.recovered}"]
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """Sizes before and after, and the options, in one line."""
        sizes = [
            f"MACs {self.before.macs / 1e6:.4g} M -> {self.after.macs / 1e6:.4g} M ({self.macs:.1%})",
            f"parameters {self.before.params / 1e6:.4g} M -> {self.after.params / 1e6:.4g} M ({self.params:.1%})",
        ]
        if self.latency is not None:
            predicted = "" if self.predicted_latency is None else f" (predicted {self.predicted_latency:.1%})"
            sizes.append(f"latency {self.latency:.1%}{predicted}")
        how = f"{self.importance}, {self.scope}, {len(self.steps)} step{'s' * (len(self.steps) > 1)}"
        return f"{type(self.model).__name__}: {', '.join(sizes)}; {how}, seed {self.seed}"

    def _repr_html_(self) -> str:
        def cells(values: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

        body = "".join(cells(_row(group), "td") for group in self.groups if not group.reason)
        parts = [
            f"<p>{html.escape(self.headline)}</p>",
            f"<table>{cells(('group', 'channels', 'left', '', 'layers'), 'th')}{body}</table>",
        ]
        for title, reasons in (("left whole", self.left_whole), ("not refitted", self.skipped)):
            items = "".join(f"<li>{html.escape(f'{key}: {reason}')}</li>" for key, reason in reasons.items())
            parts += [f"<p>{title}:</p><ul>{items}</ul>"] if items else []
        return "".join(parts)


def _row(group: GroupChange) -> tuple[str, ...]:
    others = f"{group.layers[0]} +{len(group.layers) - 1}" if len(group.layers) > 1 else "".join(group.layers)
    share = group.after / group.before if group.before else 1.0
    return group.key, str(group.before), str(group.after), f"{share:.0%}", others


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if 0 < number < 4 else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
