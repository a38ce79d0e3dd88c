"""Options of the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--damaged-files", type=int, default=2000, help="how many damaged files the reader of weights is tried on"
    )
