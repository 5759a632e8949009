"""Tests marked `browser` need Chromium; without one they are left out and the summary says so."""

import pytest
from browser import BINARY

LEFT_OUT: list[pytest.Item] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if BINARY is None:
        LEFT_OUT.extend(item for item in items if item.get_closest_marker("browser"))
        config.hook.pytest_deselected(items=LEFT_OUT)
        items[:] = [item for item in items if item not in LEFT_OUT]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEFT_OUT:
        terminalreporter.write_line(f"{len(LEFT_OUT)} browser tests left out: no chromium on the PATH")
