"""What does not hold yet; each entry goes with the change that makes it hold."""

import pytest

PENDING = (
    "test_samples_that_mix_are_refused_or_told",
    "test_counts_that_make_no_sense[PROImportance-1.5]",
    "test_counts_that_make_no_sense[SpaSPImportance-1.5]",
    "test_counts_that_make_no_sense[Compensation-1.5]",
    "test_an_importance_given_as_a_class",
    "test_a_detector_that_needs_targets_is_told_of",
    "test_custom_layers_in_a_global_ranking[{}]",
    "test_custom_layers_in_a_global_ranking[{'cost': 'params'}]",
    "test_custom_layers_in_a_global_ranking[{'depletion': None}]",
    "test_the_same_channels_go[global-plain",
    "test_the_same_channels_go[global-groups-graph]",
    "test_the_same_channels_go[global-groups-model]",
    "test_the_same_channels_go[global-heads",
    "test_two_models_of_the_same_shapes_are_an_error",
    "test_options_changed_after_calibration_take_effect_or_are_refused[option3]",
    "test_a_group_without_importance_is_pruned_to_the_maximum[0.4]",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "situations" in item.nodeid and any(item.name.startswith(name) for name in PENDING):
            item.add_marker(pytest.mark.xfail(strict=True, reason="does not hold yet"))
