"""Resuming: the tests of `killed_runs.py`, in a process of their own.

They train in forked processes, which must not come from one that has computed gradients before.
"""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_go_on() -> None:
    tests = str(Path(__file__).with_name("killed_runs.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "--durations=5", tests]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    assert " passed" in result.stdout and " skipped" not in result.stdout
