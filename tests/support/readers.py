"""Who reads MySQL's rows in a test: the fixture `parser`, whose second reader is for the slow run where many tests ask
for both."""

from __future__ import annotations

import pytest

by_both = pytest.mark.parametrize("parser", ["compiled", pytest.param("python", marks=pytest.mark.slow)], indirect=True)
"""The test is run with both readers: with the one in Python only where slow tests are run, too."""

BY_BOTH = [pytest.mark.usefixtures("parser"), by_both]
"""For `pytestmark`: each test of the module is."""
