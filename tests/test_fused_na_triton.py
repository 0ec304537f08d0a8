"""The Triton backend on a machine without a GPU.

The kernels' own tests are in `interpreted_triton.py` and run in a process of their own: Triton's interpreter must be on
before the kernels are imported, and it holds for a whole process.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from math import prod
from pathlib import Path

import pytest
import torch
from attention_problems import Problem, attend_with_gradients
from torch.utils.flop_counter import FlopCounterMode

from fused_na import neighborhood_attention, packed_neighborhood_attention
from fused_na.reference import axis_tables
from fused_na.window import Axis

PROBLEMS = [
    Problem((23,), (5,), (3,), (2,), (True,), heads=4, head_dim_v=16, additional=3),
    Problem((9, 10), (3, 4), (1, 2), (2, 1), (False, True), head_dim=24, has_rpb=True, layout="packed"),
    Problem((4, 5, 6), (2, 5, 3), (1, 1, 3), (2, 1, 1), (True, False, False), batch=3, heads=2, heads_kv=1),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["1d", "2d", "3d"])
def test_meta_device(problem: Problem) -> None:
    expected = attend_with_gradients(problem, problem.inputs(torch.float32), "reference")
    actual = attend_with_gradients(problem, problem.inputs(torch.float32, "meta"), "triton")
    for name, x in actual.items():
        assert x.is_meta and x.shape == expected[name].shape and x.dtype == expected[name].dtype


@pytest.mark.parametrize("problem", PROBLEMS, ids=["1d", "2d", "3d"])
def test_flop_counter_counts_useful_work(problem: Problem) -> None:
    """Two products of every query with the keys it attends to in forward, five in backward."""
    with FlopCounterMode(display=False) as counter:
        attend_with_gradients(problem, problem.inputs(torch.float32, "meta"), "triton")
    axes = map(Axis, problem.spatial, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    pairs = prod(axis_tables(axis)[0].sum().item() for axis in axes)
    pairs = problem.batch * problem.heads * (pairs + prod(problem.spatial) * (problem.additional or 0))
    d, d_v = problem.head_dim, problem.head_dim_v
    assert counter.get_total_flops() == 2 * pairs * (d + d_v) + 2 * pairs * (3 * d + 2 * d_v)


def test_flop_counter_counts_packed_tensors_alike() -> None:
    qkv, totals = torch.empty(2, 9, 10, 3, 4, 8, device="meta", requires_grad=True), []
    for attend in (packed_neighborhood_attention, lambda qkv, k: neighborhood_attention(*qkv.unbind(-3), k)):
        with FlopCounterMode(display=False) as counter:
            attend(qkv, (3, 4)).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    """In two processes at a time, since the interpreter uses one core."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
    command.append(str(Path(__file__).with_name("interpreted_triton.py")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen([*command, "-k", part], env=environment, stdout=subprocess.PIPE, text=True)
            )
            for part in ("windows or tensors", "not windows and not tensors")
        ]
        outputs = [process.communicate()[0] for process in processes]
    print(*outputs)
    assert all(process.returncode == 0 for process in processes)
    assert all(" passed" in output and " skipped" not in output for output in outputs)
