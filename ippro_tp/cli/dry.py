"""``--dry-run``: a table of what would be pruned."""

from __future__ import annotations

import statistics

from tabulate import tabulate

from .plan import Plan


def table(plan: Plan) -> str:
    """Return one line per group of the (last) step, and the size of the whole."""
    rows = []
    for group in plan.result.steps[-1].groups:
        scores = group.scores
        width, gone = group.before, group.before - group.after
        spread = [f"{f(scores):.3g}" for f in (min, statistics.median, max)] if scores else ["", "", ""]
        others = len(group.layers) - 1
        root = group.key.removesuffix(".out") + (f" +{others}" if others > 0 else "")
        rows.append([root, width, width - gone, gone, f"{gone / width:.0%}" if width else "", *spread])
    head = ["group (root +layers)", "channels", "kept", "removed", "", "lowest score", "median", "highest"]
    whole = [f"left whole: {key}: {reason}" for key, reason in plan.result.left_whole.items()]
    return "\n".join([tabulate(rows, head, tablefmt="simple"), "", *whole, plan.result.headline])
