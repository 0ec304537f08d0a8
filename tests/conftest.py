"""Settings for all tests."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from fused_na.triton import tiles

# The same examples in every run; `pytest --hypothesis-profile=explore` searches further.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=150)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


@pytest.fixture
def prefers_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Called, has small windows take the kernels of columns of up to so many tokens, whatever else might be faster."""

    def prefer(tokens: int) -> None:
        candidates = [tiles.Candidate(n, 64, 1, 2, True, 1e6 * n, is_columns=True) for n in {32, tokens}]
        monkeypatch.setattr(tiles, "COLUMNS", dict.fromkeys(tiles.COLUMNS, candidates))
        tiles.choose_tiles.cache_clear()

    yield prefer
    tiles.choose_tiles.cache_clear()
