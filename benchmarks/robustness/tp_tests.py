"""Torch-Pruning's own tests, as they are and with PRO in place of its magnitude criteria, side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.errors import UsageError
from benchmarks.robustness import tp_plugin

ROOT = Path(__file__).parents[2]


def report(checkout: Path, kept: Path | None = None) -> str:
    """Run both and compare, in Markdown.

    Args:
        checkout: of VainF/Torch-Pruning.
        kept: folder for the results, which are taken from there if they are there.

    Raises:
        UsageError: there are no tests in ``checkout``.
    """
    if not (checkout / "tests").is_dir():
        raise UsageError(f"{checkout} has no folder tests; give a checkout of VainF/Torch-Pruning")
    plain = results(checkout, False, kept)
    pro = results(checkout, True, kept, {name: plain[name] for name in plain if plain[name][0] == "skipped"})
    files = sorted({name.partition("::")[0] for name in (*plain, *pro)})
    rows = ["| file | as it is | with PRO |", "| --- | --- | --- |"]
    rows += [f"| {file} | {_counts(plain, file)} | {_counts(pro, file)} |" for file in files]
    ours = [
        name for name, (verdict, _) in pro.items() if verdict == "failed" and plain.get(name, ("",))[0] != "failed"
    ]
    theirs = [f"* {name}: {why}" for name, (verdict, why) in plain.items() if verdict == "failed"]
    told = [f"* {name}: {EXPLAINED.get(name, pro[name][1])}" for name in ours]
    left_out = {name.partition("::")[0]: why for name, (verdict, why) in pro.items() if verdict == "skipped"}
    skipped = [f"* {file}: {why}" for file, why in left_out.items()]
    run = sum(verdict != "skipped" for verdict, _ in plain.values())
    head = f"{run} tests run in the {len(files)} files that name a magnitude criterion; "
    head += f"{len(ours)} fail with PRO alone, {len(theirs)} as they are."
    parts = [head, "\n".join(rows), "With PRO alone:" if told else "", "\n".join(told)]
    parts += ["As they are:" if theirs else "", "\n".join(theirs)]
    parts += ["Not run with PRO:" if skipped else "", "\n".join(skipped)]
    return "\n\n".join(part for part in parts if part)


def results(
    checkout: Path, with_pro: bool, kept: Path | None = None, left_out: Mapping[str, tuple[str, str]] | None = None
) -> dict[str, tuple[str, str]]:
    """``{file::test: (passed | failed | skipped, reason)}``, a process for each file.

    Args:
        checkout: of VainF/Torch-Pruning.
        with_pro: put PRO in the place of magnitude.
        kept: folder for the results.
        left_out: files that are not run, and why.
    """
    found = dict(left_out or {})
    with tempfile.TemporaryDirectory() as folder:
        for file in magnitude_files(checkout):
            if f"tests/{file.name}::{file.stem}" in found:
                continue
            path = (kept or Path(folder)).absolute() / f"{'pro' if with_pro else 'plain'}-{file.stem}.xml"
            if not path.exists():
                _run(checkout, file, with_pro, path)
            root = ElementTree.parse(path).getroot()
            cases = list(root.iter("testcase"))
            found |= {f"tests/{file.name}::{case.get('name')}": _verdict(case) for case in cases}
            if not cases:
                reason = f"not done in {LIMIT} s" if root.get("stopped") else "holds no test for pytest"
                found[f"tests/{file.name}::{file.stem}"] = ("skipped", reason)
    return found


EXPLAINED = {
    "tests/test_importance_reduction.py::test_imp": "it compares the magnitudes of single layers with their mean "
    "and sum (`group_reduction=None`); PRO scores a group as a whole",
    "tests/test_serialization.py::test_serialization": "PRO refuses: torchvision's untrained ViT has a head of "
    "zeros, so all gradients of what is before it are zero",
}
"""Why tests fail that hold for the magnitude alone, or for nothing that reads gradients."""
LIMIT = 600
"""Seconds that a file of tests may take."""


def _run(checkout: Path, file: Path, with_pro: bool, path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        tp_plugin.WITH_PRO: "1" * with_pro,
    }
    options = ["-p", tp_plugin.__name__, "-p", "no:cacheprovider", f"--junitxml={path}"]
    command = [sys.executable, "-m", "pytest", f"tests/{file.name}", *options]
    try:
        subprocess.run(command, cwd=checkout, env=environment, check=False, stdout=sys.stderr, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        path.write_text('<testsuites stopped="yes"/>')


def magnitude_files(checkout: Path) -> list[Path]:
    """Files of tests that name a magnitude criterion: for the others nothing changes, and they are not run."""
    files = sorted((checkout / "tests").glob("test_*.py"))
    return [file for file in files if "MagnitudeImportance" in file.read_text()]


def _verdict(case: ElementTree.Element) -> tuple[str, str]:
    for tag, verdict in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            lines = [line for line in (found.text or "").splitlines() if line.startswith("E  ")]
            why = lines[-1][1:].strip() if lines else (found.get("message") or "").strip()
            return verdict, why[:160].replace("|", "\\|")
    return "passed", ""


def _counts(found: dict[str, tuple[str, str]], file: str) -> str:
    counts = Counter(verdict for name, (verdict, _) in found.items() if name.partition("::")[0] == file)
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))


if __name__ == "__main__":
    print(report(Path(sys.argv[1]), *map(Path, sys.argv[2:])))
