"""The Triton kernels under NVIDIA's `compute-sanitizer`, which sees every access to memory that was not allocated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).with_name("test_fused_na_gpu.py")
SAMPLE = [
    f"test_random_problems[{index}-{precision}]" for index in range(4, 10) for precision in ("bfloat16", "float32")
]
SAMPLE += ["test_benchmark_workloads[img_s2-rpb]", "test_wide_windows[map, odd stride-packed, forced]"]
SAMPLE += [
    f"test_query_and_bias_in_one_kernel[{problem}-few programs-lse]"
    for problem in ("ragged map", "causal clip", "dilated map", "ragged clips")
]
SAMPLE += ["test_dilations_that_divide_lengths[map-rpb-packed]"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit")
def test_no_kernel_leaves_its_tensors() -> None:
    """On a sample of the GPU's tests, with an allocation of its own for each tensor."""
    command = ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=9", "--kernel-name=kernel_substring=_kernel"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    result = subprocess.run(
        [*command, *(f"{TESTS}::{name}" for name in SAMPLE)],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-5000:]
    assert f"{len(SAMPLE)} passed" in report and "ERROR SUMMARY: 0 errors" in report
