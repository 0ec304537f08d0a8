"""The tests of torchcodec, on the FFmpeg libraries that PyAV's wheel carries.

torchcodec asks the system's loader for FFmpeg's libraries by their plain names, and those of a wheel have others. Links
with the plain names in a folder where the loader looks will do, if the loader knows of it when the process starts: so
the tests run in a process of their own.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import av
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's variable is that of Linux")
@pytest.mark.skipif(find_spec("torchcodec") is None, reason="torchcodec is not installed")
def test_torchcodec(tmp_path: Path) -> None:
    for library in (Path(av.__file__).parent.parent / "av.libs").glob("lib*.so.*"):
        if plain := re.match(r"(lib\w+)-\w+(\.so\.\d+)\.", library.name):
            (tmp_path / "".join(plain.groups())).symlink_to(library)
    tests = str(Path(__file__).with_name("test_video_decoding.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "torchcodec", tests]
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout
