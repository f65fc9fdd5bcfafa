"""What does not hold yet; each entry goes with the change that makes it hold."""

import pytest

PENDING = (
    "test_the_same_channels_go[global-heads-graph]",
    "test_the_same_channels_go[global-heads-model]",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "situations" in item.nodeid and any(item.name.startswith(name) for name in PENDING):
            item.add_marker(pytest.mark.xfail(strict=True, reason="does not hold yet"))
