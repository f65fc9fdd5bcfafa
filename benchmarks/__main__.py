"""Command line of the benchmark: ``python -m benchmarks COMMAND --help``."""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from benchmarks.errors import UsageError
from benchmarks.harness import compare, report
from benchmarks.overhead import command as overhead
from benchmarks.overhead import refit
from benchmarks.paper import calibration_size, correlation, curves, lam, magnitude, mnist_two_layer, reconstruction
from benchmarks.product import command as product
from benchmarks.product import figure as product_figure
from benchmarks.product import table as product_table
from benchmarks.robustness import run as robustness
from benchmarks.scan import command as scan
from benchmarks.tasks import export

COMMANDS: dict[str, tuple[type, Callable]] = {
    "compare": (compare.CompareConfig, compare.run),
    "report": (report.ReportConfig, report.run),
    "export": (export.ExportConfig, export.run),
    "overhead": (overhead.OverheadConfig, overhead.run),
    "refit": (refit.RefitConfig, refit.run),
    "reconstruction": (reconstruction.ReconstructionConfig, reconstruction.run),
    "mnist": (mnist_two_layer.MnistConfig, mnist_two_layer.run),
    "curves": (curves.CurvesConfig, curves.run),
    "lam": (lam.LamConfig, lam.run),
    "magnitude": (magnitude.MagnitudeConfig, magnitude.run),
    "correlation": (correlation.CorrelationConfig, correlation.run),
    "calibration-size": (calibration_size.CalibrationSizeConfig, calibration_size.run),
    "robustness": (robustness.RobustnessConfig, robustness.run),
    "product": (product.ProductConfig, product.run),
    "product-figure": (product_figure.FigureConfig, product_figure.run),
    "product-table": (product_table.ProductTableConfig, product_table.run),
    "scan": (scan.ScanConfig, scan.run),
}
"""Each command is a frozen dataclass of its flags and a function of that dataclass."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input ends in one line on stderr and exit code 2."""
    configs = {name: config for name, (config, _) in COMMANDS.items()}
    config = tyro.extras.subcommand_cli_from_dict(
        configs, prog="python -m benchmarks", args=arguments, config=(tyro.conf.OmitArgPrefixes,)
    )
    run = next(function for kind, function in COMMANDS.values() if type(config) is kind)
    try:
        run(config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
