"""The backends against each other, and the reference against attention written out query by query."""

from dataclasses import replace
from itertools import product
from math import exp, log

import pytest
import torch
from attention_problems import Problem, assert_close, attend_with_gradients, problems
from hypothesis import given

from fused_na import blocked, na2d, neighborhood_attention, packed_neighborhood_attention

SMALL = Problem((6, 7), (3, 4), (2, 1), (2, 1), (False, True), heads=4, head_dim_v=5, has_rpb=True, additional=2)


@given(problem=problems())
def test_blocked_equals_reference(problem: Problem) -> None:
    inputs = problem.inputs()
    expected = attend_with_gradients(problem, inputs, "reference")
    assert_close(attend_with_gradients(problem, inputs, "blocked"), expected, tolerance=1e-10)


@given(problem=problems(max_tokens=60))
def test_blocked_in_many_chunks_equals_reference(problem: Problem) -> None:
    inputs = problem.inputs()
    expected = attend_with_gradients(problem, inputs, "reference")
    for scores in (1, 300):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocked, "CHUNK_SCORES", scores)
            assert_close(attend_with_gradients(problem, inputs, "blocked"), expected, tolerance=1e-10)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize(
    "problem",
    [
        SMALL,
        Problem((40,), (9,), (4,), (3,), (True,), has_rpb=True, layout="packed"),
        Problem((4, 9, 10), (2, 3, 5), (1, 2, 3), (2, 3, 1), (True, False, False), heads=4, layout="heads first"),
    ],
    ids=["2d", "1d", "3d"],
)
def test_lower_precisions(problem: Problem, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    """Against the reference in float64 on the same, already rounded inputs."""
    inputs = problem.inputs(dtype)
    actual = attend_with_gradients(problem, inputs, backend)
    assert actual["output"].dtype == dtype and actual["lse"].dtype == torch.float32
    assert all(actual[f"gradient of {name}"].dtype == dtype for name in inputs)
    expected = attend_with_gradients(problem, {name: x.double() for name, x in inputs.items()}, "reference")
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_float32_bias_with_bfloat16_inputs(backend: str) -> None:
    inputs = SMALL.inputs(torch.bfloat16)
    inputs["rpb"] = SMALL.inputs(torch.float32)["rpb"]
    actual = attend_with_gradients(SMALL, inputs, backend)
    assert actual["gradient of rpb"].dtype == torch.float32
    expected = attend_with_gradients(SMALL, {name: x.double() for name, x in inputs.items()}, "reference")
    assert_close(actual, expected, tolerance=2e-2)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    problem = Problem((4, 3), (2, 3), (2, 1), (2, 1), (True, False), 1, 2, 1, 2, 1, has_rpb=True, additional=1)
    inputs = {name: x.requires_grad_() for name, x in problem.inputs().items()}

    def attend(*tensors: torch.Tensor):
        arguments = dict(zip(inputs, tensors, strict=True))
        return neighborhood_attention(**arguments, **problem.options, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


def test_reference_equals_attention_query_by_query() -> None:
    """Both axes from the definition for odd windows without stride, written out in Python floats."""
    height, width, kernel_size, dilation, heads, heads_kv, scale = 7, 5, (3, 5), (2, 1), 2, 1, 0.7
    problem = Problem(
        (height, width), kernel_size, (1, 1), dilation, (False, False), 1, heads, heads_kv, 3, 2, scale, True, 2
    )
    inputs = problem.inputs()
    output, lse = neighborhood_attention(**inputs, **problem.options, return_lse=True, backend="reference")
    query, key, value, rpb, extra_key, extra_value = (x.tolist() for x in inputs.values())

    def neighbors(x: int, length: int, k: int, d: int) -> list[int]:
        group = list(range(x % d, length, d))
        start = min(max(group.index(x) - k // 2, 0), len(group) - k)
        return group[start : start + k]

    for y, x, h in product(range(height), range(width), range(heads)):
        q = query[0][y][x][h]
        terms = []
        for i, j in product(neighbors(y, height, 3, 2), neighbors(x, width, 5, 1)):
            bias = rpb[h][(i - y) // 2 + 2][j - x + 4]
            terms.append((key[0][i][j][0], bias, value[0][i][j][0]))
        terms += [(k[0], 0.0, v[0]) for k, v in zip(extra_key[0], extra_value[0], strict=True)]
        weights = [exp(scale * sum(a * b for a, b in zip(q, k, strict=True)) + bias) for k, bias, _ in terms]
        expected = [sum(w * v[c] for w, (_, _, v) in zip(weights, terms, strict=True)) / sum(weights) for c in range(2)]
        assert output[0, y, x, h].tolist() == pytest.approx(expected, rel=1e-10)
        assert lse[0, y, x, h].item() == pytest.approx(log(sum(weights)), rel=1e-10)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_empty_batch(backend: str) -> None:
    problem = replace(SMALL, batch=0)
    results = attend_with_gradients(problem, problem.inputs(), backend)
    assert results["output"].shape == (0, 6, 7, 4, 5) and results["lse"].shape == (0, 6, 7, 4)
    assert results["gradient of query"].shape == (0, 6, 7, 4, 8)
    assert results["gradient of rpb"].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_only_the_wanted_gradients(backend: str) -> None:
    inputs = SMALL.inputs()
    inputs["rpb"].requires_grad_()
    output = neighborhood_attention(**inputs, **SMALL.options, backend=backend)
    output.square().sum().backward()
    assert inputs["rpb"].grad is not None
    assert all(x.grad is None for name, x in inputs.items() if name != "rpb")


@pytest.mark.parametrize("backend", ["reference", "blocked", None])
@pytest.mark.parametrize("spatial", [(9,), (6, 7), (3, 4, 5)], ids=str)
def test_query_key_and_value_in_one_tensor(spatial: tuple[int, ...], backend: str | None) -> None:
    qkv = torch.randn(2, *spatial, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, *[5] * len(spatial), dtype=torch.float64, requires_grad=True)
    results = []
    for output in (
        packed_neighborhood_attention(qkv, 3, 2, 1, True, 0.7, rpb, backend),
        neighborhood_attention(*qkv.unbind(-3), 3, 2, 1, True, 0.7, rpb, backend=backend),
    ):
        results.append((output, *torch.autograd.grad(output.sin().sum(), (qkv, rpb))))
    torch.testing.assert_close(*results)


def test_int_options_hold_for_all_axes() -> None:
    query, key, value = torch.randn(3, 1, 8, 9, 2, 4).unbind()
    torch.testing.assert_close(
        na2d(query, key, value, 3, 2, 2, True),
        na2d(query, key, value, kernel_size=[3, 3], stride=(2, 2), dilation=(2, 2), is_causal=(True, True)),
        rtol=0,
        atol=0,
    )


def test_large_scores_do_not_overflow() -> None:
    inputs = SMALL.inputs(torch.float32)
    inputs["query"] *= 1e4
    expected = attend_with_gradients(SMALL, inputs, "reference")
    actual = attend_with_gradients(SMALL, inputs, "blocked")
    assert all(x.isfinite().all() for x in actual.values())
    assert_close({"output": actual["output"]}, {"output": expected["output"]}, tolerance=1e-4)
