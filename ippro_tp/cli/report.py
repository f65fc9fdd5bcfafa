"""``report.md`` of one run, from its records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from .figures import phase_names


def markdown(result: dict[str, Any], figures: list[Path]) -> str:
    """Return the report of ``results.json`` with links to ``figures`` (in the folder ``figures/``)."""
    plan, times = result["plan"], result["latency"]
    names = phase_names(result)
    base = result["quality"]["unpruned"]
    quality = [
        [name, f"{100 * result['quality'][p]:.2f}", f"{100 * (result['quality'][p] - base):+.2f}"]
        for p, name in names.items()
    ]
    before, after = times["unpruned"]["median_seconds"], times["pruned"]["median_seconds"]
    sizes = [
        ["MACs (M)", f"{plan['macs_before'] / 1e6:.2f}", f"{plan['macs'] / 1e6:.2f}",
         f"{plan['macs_fraction']:.1%}"],
        ["parameters (M)", f"{plan['params_before'] / 1e6:.3f}", f"{plan['params'] / 1e6:.3f}",
         f"{plan['params_fraction']:.1%}"],
        ["latency (ms)", f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{after / before:.1%}"],
    ]  # fmt: skip
    how = times["pruned"]
    parts = [
        f"# {result['title']}\n",
        tabulate(quality, ["phase", f"{result['metric']} (%)", "difference"], tablefmt="github",
                 disable_numparse=True, colalign=("left", "right", "right")) + "\n",
        f"{result['images']['val']} validation images, {result['images']['classes']} classes.{_advice(result)}\n",
        tabulate(sizes, ["", "unpruned", "pruned", "left"], tablefmt="github", disable_numparse=True,
                 colalign=("left", "right", "right", "right")) + "\n",
        f"MACs as torch counts FLOPs (half of them), of one input {'x'.join(map(str, how['shape']))}. "
        f"Latency: median of {how['runs']} forward passes on {how['device']}, "
        f"{how['threads']} thread{'s' if how['threads'] > 1 else ''} "
        "(torch.utils.benchmark). Fewer MACs are not always less time.\n",
        "![Quality and size](figures/summary.png)\n",
        "## How it was pruned\n",
        _steps(result) + "\n",
        "![Widths](figures/widths.png)\n",
        "![Scores](figures/scores.png)\n",
    ]  # fmt: skip
    others = [p for p in figures if p.stem not in ("summary", "widths", "scores")]
    parts += [f"![{p.stem}](figures/{p.name})\n" for p in others]
    if result["compensation"]:
        rows = "\n".join(f"- {line}" for line in result["compensation"])
        parts += [
            "## Compensation\n",
            f"Per layer, of the last step; power as a share of the layer's output.\n\n{rows}\n",
        ]
    parts += [
        "## Use it\n",
        f"```python\n{result['snippet']}\n```\n",
        *_onnx(result),
        "## Made by\n",
        f"```\n{result['command']}\n```\n",
    ]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    parts.append(f"Seconds: {seconds}. Versions: {_versions(result['environment'])}.\n")
    return "\n".join(parts)


def _onnx(result: dict[str, Any]) -> list[str]:
    if "onnx_difference" not in result:
        return []
    difference = result["onnx_difference"]
    return [
        "`model.onnx` takes any number of images; onnxruntime's logits differ from PyTorch's by at most "
        f"{difference:.0e} of the largest.\n"
    ]


def _advice(result: dict[str, Any]) -> str:
    """What to change if fine-tuning took more than a point: large steps leave the optimum of the compensation."""
    *_, before, after = result["quality"].values()
    if "finetuned" not in result["quality"] or after >= before - 0.01:
        return ""
    return " Fine-tuning lowered the quality: choose a lower --lr, --norm-statistics frozen, or more epochs."


def _steps(result: dict[str, Any]) -> str:
    rows = []
    plan = result["plan"]
    for number, step in enumerate(plan["steps"], 1):
        groups = [group for group in step["groups"] if not group["reason"]]
        total = sum(group["channels"] for group in groups)
        gone = total - sum(group["kept"] for group in groups)
        touched = f"{sum(bool(group['removed']) for group in groups)} of {len(groups)}"
        rows.append([number, f"{gone} of {total}", touched, f"{step['left']:.1%}", step["tries"]])
    head = ["step", "channels removed", "groups touched", f"{result['unit']} left", "sizes measured"]
    text = f"{result['how']}\n\n" + tabulate(rows, head, tablefmt="github", disable_numparse=True)
    whole = [f"- {group['root']}: {group['reason']}" for group in plan["steps"][-1]["groups"] if group["reason"]]
    return text + ("\n\nLeft whole:\n\n" + "\n".join(whole) if whole else "")


def _versions(environment: dict[str, Any]) -> str:
    versions = [f"{name} {value}" for name, value in environment["versions"].items() if value]
    return ", ".join([f"Python {environment['python']}", *versions])
