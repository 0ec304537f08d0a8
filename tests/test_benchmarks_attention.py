"""The attention benchmarks: what they check, what they count, and that they run, tiny and on the CPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_problems import Problem as Drawn
from attention_problems import problems as drawn_problems
from hypothesis import given, settings
from torch import Tensor

from fused_na import packed_neighborhood_attention
from fused_na.reference import axis_tables
from fused_na.window import Axis

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from block import error_of, parts  # noqa: E402
from problems import NATTEN_MS, SUITES, Problem, random_problem  # noqa: E402
from providers import Attend, Unsupported, flex, fused_na, masked_sdpa, rule, sdpa, sequence  # noqa: E402
from timing import errors, measure  # noqa: E402

CPU = torch.device("cpu")
PROBLEM = Problem(2, (Axis(5, 3), Axis(6, 4)), 2, 8)


def pairs(axes: tuple[Axis, ...]) -> tuple[Tensor, Tensor]:
    """Of all pairs of flat tokens: whether they attend, and their place in the flattened bias."""
    attends, places = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    for axis in axes:
        table, place = axis_tables(axis)
        attends = (attends[:, None, :, None] & table[None, :, None, :]).flatten(2).flatten(0, 1)
        size = 2 * axis.kernel_size - 1
        places = (places[:, None, :, None] * size + place[None, :, None, :]).flatten(2).flatten(0, 1)
    return attends, places


@settings(max_examples=60)
@given(drawn=drawn_problems(max_tokens=60))
def test_rules_of_the_benchmarks(drawn: Drawn) -> None:
    """What FlexAttention computes in its kernels, and what results are checked against, is the neighborhood."""
    axes = tuple(map(Axis, drawn.spatial, drawn.kernel_size, drawn.stride, drawn.dilation, drawn.is_causal))
    expected, places = pairs(axes)
    problem = Problem(1, axes, 1, 8)
    token = torch.arange(problem.tokens)
    attends, place = rule(axes)
    assert attends(token, token, token[:, None], token[None, :]).equal(expected)
    assert place(token[:, None], token[None, :])[expected].equal(places[expected])
    for query in range(problem.tokens):
        keys, key_places = problem.neighbors(query)
        order = keys.argsort()
        assert keys[order].equal(expected[query].nonzero().flatten())
        assert key_places[order].equal(places[query, expected[query]])
    assert problem.pairs == expected.sum()


def test_cases() -> None:
    names = [name for suite in SUITES.values() for name in suite]
    assert len(names) == len(set(names)) and set(NATTEN_MS) < set(names)
    for problem in (problem for suite in SUITES.values() for problem in suite.values()):
        assert all(x.stride <= x.kernel_size and x.kernel_size * x.dilation <= x.length for x in problem.axes)
    image = SUITES["image"]["img_s1"]
    assert image.pairs == 56 * 56 * 49
    assert image.flops(backward=False) == 4 * 128 * 2 * 56 * 56 * 49 * 32
    assert image.bytes(backward=False, itemsize=2) == 4 * 128 * 56 * 56 * 2 * 32 * 2


def test_random_problems_are_legal_and_always_the_same() -> None:
    found = [random_problem(seed) for seed in range(60)]
    assert found == [random_problem(seed) for seed in range(60)] and len(set(found)) == len(found)
    for problem in found:
        assert all(x.stride <= x.kernel_size and x.kernel_size * x.dilation <= x.length for x in problem.axes)
        assert problem.bytes(backward=False, itemsize=2) < 300e6 and problem.flops(backward=False) < 3e12
    axes = [axis for problem in found for axis in problem.axes]
    assert any(x.stride > 1 for x in axes) and any(x.dilation > 1 for x in axes) and any(x.is_causal for x in axes)


def test_inputs_are_slices_of_one_projection() -> None:
    query, key, value, rpb, incoming = PROBLEM.inputs(torch.float32, CPU, has_rpb=True, seed=0)
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert query.shape == (2, 5, 6, 2, 8) and query.stride()[:4] == (5 * 6 * 48, 6 * 48, 48, 8)
    assert rpb is not None and rpb.shape == (2, 5, 7) and incoming.shape == query.shape and incoming.is_contiguous()


@pytest.mark.parametrize("provider", [fused_na, sdpa, masked_sdpa, sequence], ids=lambda provider: provider.__name__)
def test_providers_are_right(provider) -> None:
    attend, solved = provider(PROBLEM, torch.float32, CPU, False)
    found = errors(solved, attend, PROBLEM.inputs(torch.float32, CPU, False, 0), with_gradients=True)
    assert found.keys() == {"out", "dq", "dk", "dv"} and max(found.values()) < 1e-5


@pytest.mark.parametrize("name", SUITES["smoke"])
@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
def test_flex_is_right(has_rpb: bool, name: str) -> None:
    """Its forward; PyTorch has no backward of it on the CPU."""
    problem = SUITES["smoke"][name]
    attend, solved = flex(problem, torch.float32, CPU, has_rpb)
    found = errors(solved, attend, problem.inputs(torch.float32, CPU, has_rpb, 0), with_gradients=False)
    assert max(found.values()) < 1e-5


def changed(change) -> Attend:
    """fused_na with its output changed."""
    attend, _ = fused_na(PROBLEM, torch.float32, CPU, True)
    return lambda *inputs: change(attend(*inputs), *inputs)


def nan_in_one_row(output: Tensor, *inputs: Tensor) -> Tensor:
    mask = torch.zeros(output.shape[:-2], dtype=torch.bool)
    mask[1, 4, 5] = True
    return output.masked_fill(mask[..., None, None], torch.nan)


WRONG = {
    "out": lambda output, *inputs: output * 1.001,
    "dq": lambda output, query, key, value, rpb: output + 0.01 * (query - query.detach()),
    "dk": lambda output, query, key, value, rpb: output + 0.01 * (key - key.detach()),
    "dv": lambda output, query, key, value, rpb: output + 0.01 * (value - value.detach()),
    "drpb": lambda output, query, key, value, rpb: output + 0.01 * (rpb.sum() - rpb.sum().detach()),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_found(name: str) -> None:
    inputs = PROBLEM.inputs(torch.float32, CPU, has_rpb=True, seed=0)
    assert max(errors(PROBLEM, changed(lambda output, *inputs: output), inputs, True).values()) < 1e-5
    found = errors(PROBLEM, changed(WRONG[name]), inputs, True)
    assert found[name] > 5e-4
    assert all(error < 1e-5 for other, error in found.items() if other != name and name != "out")
    assert set(errors(PROBLEM, changed(nan_in_one_row), inputs, True).values()) == {float("inf")}


def test_what_is_wrong_or_fails_is_not_timed() -> None:
    def wrong(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
        attend, _ = fused_na(problem, dtype, device, has_rpb)
        return lambda *inputs: 1.01 * attend(*inputs), problem

    def failing(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
        raise RuntimeError("no kernel\nand a long trace")

    def unsupported(
        problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool
    ) -> tuple[Attend, Problem]:
        raise Unsupported("no such thing")

    for provider, status in [
        (wrong, "wrong: out 1.0e-02, dq 1.0e-02, dk 1.0e-02, dv 1.0e-02"),
        (failing, "failed: RuntimeError: no kernel"),
        (unsupported, "skipped: no such thing"),
    ]:
        results = measure(PROBLEM, provider, ("fwd", "bwd"), torch.float32, CPU)
        for result in results.values():
            assert result["status"] == status and "ms" not in result


def test_inputs_that_do_not_fit_fail_like_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small GPU the other cases of a suite are still timed."""

    def inputs(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Problem, "inputs", inputs)
    results = measure(PROBLEM, fused_na, ("fwd",), torch.float32, CPU)
    assert results == {"fwd": {"status": "failed: OutOfMemoryError: CUDA out of memory"}}


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--device", "cpu", "--quick", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_attention_script(tmp_path: Path) -> None:
    out = tmp_path / "times.csv"
    arguments = ["--case", "tiny,tiny_3d", "--providers", "fused_na,sdpa", "--dtype", "float32,bfloat16"]
    printed = run("attention.py", *arguments, "--commit", "abc", "--out", str(out))
    rows = read(out)
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # cases, dtypes, biases, providers, passes
    for row in rows:
        assert row["commit"] == "abc" and row["device"] and row["torch"] and row["command"].startswith("python ")
        if row["provider"] == "fused_na":
            assert row["status"] == "ok" and float(row["max_error"]) < 1e-2
            assert row["pass"] == "bwd" or float(row["ms"]) > 0
    plain = [row for row in rows if row["case"] == "tiny" and row["rpb"] == "without" and row["pass"] == "fwd"]
    times = {row["provider"]: float(row["ms"]) for row in plain if row["dtype"] == "float32"}
    ratio = next(float(row["x_sdpa"]) for row in plain if row["provider"] == "fused_na" and row["dtype"] == "float32")
    assert ratio == pytest.approx(times["sdpa"] / times["fused_na"])
    assert "tiny_3d" in printed and "skipped: full attention has no relative positional bias" in printed


def test_attention_script_names_what_it_does_not_know() -> None:
    command = [sys.executable, str(BENCHMARKS / "attention.py"), "--case", "img_s9"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "'img_s9' is none of img_s1" in result.stderr


def test_block_script(tmp_path: Path) -> None:
    out = tmp_path / "times.csv"
    run("block.py", "--case", "tiny_1d,tiny_3d", "--dtype", "float32", "--out", str(out))
    rows = read(out)
    assert len(rows) == 2 * 2 * 2 and {row["status"] for row in rows} == {"ok"}
    assert all(float(row["max_error"]) < 1e-5 for row in rows)


@pytest.mark.parametrize("name", ["attention", "block"])
def test_a_wrong_part_of_a_block_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, _, (shape, dtype) = parts(PROBLEM, torch.float32, CPU)[name]
    inputs = torch.randn(shape, dtype=dtype)
    incoming = torch.randn_like(part(inputs))
    assert error_of(part, inputs, incoming) < 1e-5

    def another_attention(qkv: Tensor, kernel_size: tuple, *rule: object) -> Tensor:
        return packed_neighborhood_attention(qkv, kernel_size, *rule) + 0.1 * qkv.select(-3, 2)

    for module in ("block", "nat_models.layers"):
        monkeypatch.setattr(f"{module}.packed_neighborhood_attention", another_attention)
    assert error_of(part, inputs, incoming) > 1e-2


def test_local_attention_script(tmp_path: Path) -> None:
    out = tmp_path / "times.csv"
    run("local_attention.py", "--ways", "fused_na", "masked", "sequence", "--dtype", "float32", "--out", str(out))
    rows = read(out)
    assert len(rows) == 2 * 3 * 2 and {row["status"] for row in rows} == {"ok"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_scores_that_the_ways_of_local_attention_execute() -> None:
    """The table in docs/kernel-budget.md."""
    pytest.importorskip("triton")
    from local_attention import PROBLEMS

    from fused_na.reference import axis_tables
    from fused_na.triton.tiles import Workload, as_three_axes, choose_tiles, executed_scores

    def in_blocks(axes: tuple[Axis, ...]) -> int:
        """Scores of the blocks of 128 x 128 flattened tokens with a pair of the neighborhood in them."""
        mask = torch.ones(1, 1)
        for axis in axes:
            mask = torch.kron(mask, axis_tables(axis)[0].float())
        pooled = torch.nn.functional.max_pool2d(mask[None], 128, ceil_mode=True)
        return 128**2 * int(pooled.sum())

    def executed(axes: tuple[Axis, ...], head_dim: int) -> int:
        query, key, *_ = choose_tiles("forward", Workload(axes, head_dim, head_dim, 2))
        return executed_scores(as_three_axes(axes), query, key, over_keys=True)

    document = (BENCHMARKS.parent / "docs" / "kernel-budget.md").read_text()
    for name, problem in PROBLEMS.items():
        row = Axis(problem.tokens, problem.pairs // problem.tokens)
        masked, flex, ours, in_a_row = (
            scores / problem.pairs
            for scores in (
                problem.tokens**2,
                in_blocks(problem.axes),
                executed(problem.axes, problem.head_dim),
                executed((row,), problem.head_dim),
            )
        )
        cells = next(line for line in document.splitlines() if line.startswith(f"| {name.partition(': ')[2]} |")).split(
            "|"
        )
        expected = [f"{masked:.0f}", f"{flex:.1f}", f"{ours:.1f}", f"{in_a_row:.1f}"]
        assert [cell.strip() for cell in cells[2:6]] == expected


def test_the_fitted_line() -> None:
    from scaling import fit_line

    rows: list[dict] = [{"tokens": tokens, "ms": 0.004 + 1e-6 * tokens} for tokens in (1000, 4000, 16000)]
    fit_line(rows)
    assert [row["start_us"] for row in rows] == pytest.approx([4] * 3)
    assert [row["ns_per_token"] for row in rows] == pytest.approx([1] * 3)
    rows[1]["ms"] *= 1.5
    fit_line(rows)
    assert rows[1]["times_line"] > 1.2 and rows[0]["times_line"] < 1


def test_scaling_script(tmp_path: Path) -> None:
    out = tmp_path / "scaling.csv"
    run("scaling.py", "--dtype", "float32", "--out", str(out))
    rows = read(out)
    assert len(rows) == 2 * 2 and {row["status"] for row in rows} == {"ok"}
    assert [float(row["times_line"]) for row in rows] == pytest.approx([1.0] * 4)  # a line goes through two points
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_report_script(tmp_path: Path) -> None:
    """The recorded times, whose table docs/kernel-budget.md holds."""
    root, picture = BENCHMARKS.parent, tmp_path / "times.png"
    command = [sys.executable, str(BENCHMARKS / "attention_report.py"), "results/attention-h100.csv", str(picture)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for text in output.strip().split("\n\n"):
        assert text in (root / "docs" / "kernel-budget.md").read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
