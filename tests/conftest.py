"""Settings for all tests."""

from hypothesis import settings

# The same examples in every run; `pytest --hypothesis-profile=explore` searches further.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=150)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")
