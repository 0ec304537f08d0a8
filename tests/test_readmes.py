"""The Python examples of the documents run as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    pytest.param(example, id=f"{document.relative_to(ROOT)}-{i}")
    for document in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"])
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_examples_were_found() -> None:
    assert len(EXAMPLES) >= 3
