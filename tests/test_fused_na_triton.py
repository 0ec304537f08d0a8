"""The Triton kernels on the CPU: runs `interpreted_triton.py` in a process of its own.

Triton's interpreter must be on before the kernels are imported, and it holds for a whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", str(cases)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0 and " skipped" not in result.stdout
