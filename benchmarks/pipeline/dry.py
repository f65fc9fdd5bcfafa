"""``--dry-run``: a table of what would be pruned."""

from __future__ import annotations

import statistics

from tabulate import tabulate

from benchmarks.pipeline.plan import Plan


def table(plan: Plan) -> str:
    """Return one line per group of the (last) step, and the size of the whole."""
    rows = []
    for group in plan.steps[-1].groups:
        scores = group.scores or []
        width, gone = len(scores), len(group.removed)
        spread = [f"{f(scores):.3g}" for f in (min, statistics.median, max)] if scores else ["", "", ""]
        others = len(group.layers) - 1
        rows.append([group.root + (f" +{others}" if others > 0 else ""), width, width - gone, gone,
                     f"{gone / width:.0%}" if width else "", *spread])  # fmt: skip
    head = ["group (root +layers)", "channels", "kept", "removed", "", "lowest score", "median", "highest"]
    size = (
        f"MACs {plan.base[0] / 1e6:.2f} M -> {plan.steps[-1].macs / 1e6:.2f} M ({plan.macs:.1%}), "
        f"parameters {plan.base[1] / 1e6:.3f} M -> {plan.steps[-1].params / 1e6:.3f} M ({plan.params:.1%}), "
        f"ratio {plan.steps[-1].ratio:.4f}"
    )
    return f"{tabulate(rows, head, tablefmt='simple')}\n\n{size}"
