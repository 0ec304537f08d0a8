"""Settings for all tests."""

import pytest
from hypothesis import settings

from fused_na.triton import geometry

# The same examples in every run; `pytest --hypothesis-profile=explore` searches further.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=150)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


@pytest.fixture
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has small windows take other kernels than those of columns."""
    monkeypatch.setattr(geometry, "fits_columns", lambda workload: False)
