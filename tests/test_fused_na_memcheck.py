"""The Triton kernels under NVIDIA's `compute-sanitizer`, which sees every access to memory that was not allocated."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_na

TESTS = Path(__file__).with_name("test_fused_na_gpu.py")
SAMPLES = {
    "random 4": [f"test_random_problems[4-{precision}]" for precision in ("bfloat16", "float32")],
    "random 5": ["test_random_problems[5-float32]"],
    "random 6": ["test_random_problems[6-bfloat16]"],
    "random 7": ["test_random_problems[7-bfloat16]"],
    "random 8": ["test_random_problems[8-bfloat16]"],
    "random 9": ["test_random_problems[9-float32]"],
    "models": ["test_benchmark_workloads[img_s2-rpb]", "test_dilations_that_divide_lengths[map-rpb-packed]"],
    "wide windows": ["test_wide_windows[map, odd stride-packed, forced]"],
    "maps by columns": [
        f"test_columns[{problem}-bias, few programs-32]" for problem in ("ragged map", "dilated map", "strided")
    ],
    "columns": [
        f"test_columns[{problem}-bias, few programs-{tokens}]"
        for problem, tokens in (("high causal map", 64), ("clips of 13", 64), ("dilated clip", 32))
    ],
}
BEYOND = """
import torch
from fused_na.triton.bias_copy import bias_copy_kernel

rpb, copy = torch.zeros(100, device="cuda"), torch.zeros(1024, device="cuda")
bias_copy_kernel[(1,)](rpb, copy, 1.0, 0, 1000, BLOCK=1024, OVERLAP=False)
torch.cuda.synchronize()
"""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(
        shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit"
    ),
]


def memcheck(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs Python, with an allocation of its own for each tensor; status 9 tells of errors of our kernels.

    Only these are watched: PyTorch's would take most of the time.
    """
    sources = (Path(fused_na.__file__).parent / "triton").glob("*.py")
    kernels = {name for file in sources for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    command = ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=9"]
    command += [f"--kernel-name=kernel_substring={kernel}" for kernel in sorted(kernels)]
    return subprocess.run(
        [*command, sys.executable, *arguments],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,  # seconds
    )


def test_an_access_beyond_a_tensor_is_seen() -> None:
    """That of a kernel told of more biases than there are."""
    result = memcheck(["-c", BEYOND])
    assert result.returncode == 9 and "Invalid __global__ read" in result.stdout, result.stdout[-5000:]


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_kernel_leaves_its_tensors(sample: str) -> None:
    """On a sample of the GPU's tests."""
    tests = [f"{TESTS}::{name}" for name in SAMPLES[sample]]
    result = memcheck(["-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", *tests])
    assert result.returncode == 0, result.stdout[-5000:]
    assert f"{len(tests)} passed" in result.stdout and "ERROR SUMMARY: 0 errors" in result.stdout
