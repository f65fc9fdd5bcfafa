"""What does not hold yet; each entry goes with the change that makes it hold."""

import pytest

PENDING = (
    "test_samples_that_mix_are_refused_or_told",
    "test_counts_that_make_no_sense[PROImportance-1.5]",
    "test_counts_that_make_no_sense[SpaSPImportance-1.5]",
    "test_counts_that_make_no_sense[Compensation-1.5]",
    "test_an_importance_given_as_a_class",
    "test_a_detector_that_needs_targets_is_told_of",
    "test_the_same_channels_go[global-heads-graph]",
    "test_the_same_channels_go[global-heads-model]",
    "test_two_models_of_the_same_shapes_are_an_error",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "situations" in item.nodeid and any(item.name.startswith(name) for name in PENDING):
            item.add_marker(pytest.mark.xfail(strict=True, reason="does not hold yet"))
