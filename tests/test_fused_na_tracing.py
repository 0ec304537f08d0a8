"""The op in torch.compile, torch.export, FakeTensorMode, on the meta device and under autocast."""

import pytest
import torch
from attention_problems import Problem, assert_close, attend_with_gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from fused_na import na2d, neighborhood_attention


class Attention(nn.Module):
    """Attention on a packed projection, as models use it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.rpb = nn.Parameter(torch.randn(2, 5, 7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        output = na2d(query, key, value, (3, 4), dilation=(2, 1), rpb=self.rpb, return_lse=True, backend="blocked")
        assert isinstance(output, tuple)
        return output


def run(function, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output, lse = function(x)
    loss = output.square().sum() + lse.sin().sum()
    gradients = torch.autograd.grad(loss, (x, *module.parameters()))
    return {"output": output.detach(), "lse": lse.detach()} | {str(i): g for i, g in enumerate(gradients)}


def batch(size: int) -> Tensor:
    return torch.randn(size, 7, 9, 16, generator=torch.Generator().manual_seed(size))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
def test_compile(dynamic: bool | None) -> None:
    module = Attention()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (3, 2):
        expected = run(module, module, batch(size))
        assert_close(run(compiled, module, batch(size)), expected, tolerance=1e-6)
        assert_close(run(module, module, batch(size)), expected, tolerance=0)  # the trace left nothing behind


def test_compile_once_for_all_batches() -> None:
    module = Attention()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in (3, 2, 5, 8):
        x = batch(size)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


def test_compile_under_autocast() -> None:
    module = Attention()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(module, module, batch(2))
        actual = run(compiled, module, batch(2))
    assert_close(actual, expected, tolerance=1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch(strict: bool) -> None:
    module = Attention()
    expected = {size: module(batch(size)) for size in (1, 2, 6)}
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(module, (batch(3),), dynamic_shapes=shapes, strict=strict)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fused_na" in name for name in operators)  # plain operators, for any runtime
    for size, results in expected.items():
        torch.testing.assert_close(program.module()(batch(size)), results)
        torch.testing.assert_close(module(batch(size)), results, rtol=0, atol=0)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        module, x = Attention(), torch.randn(2, 7, 9, 16)
        results = run(module, module, x)
    assert results["output"].shape == (2, 7, 9, 2, 8) and results["lse"].shape == (2, 7, 9, 2)
    real = Attention()
    assert_close(run(real, real, batch(2)), run(real, real, batch(2)), tolerance=0)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_meta_device(backend: str) -> None:
    problem = Problem((7, 9), (3, 4), (2, 1), (2, 1), (True, False), heads=4, head_dim_v=5, has_rpb=True, additional=3)
    on_cpu = attend_with_gradients(problem, problem.inputs(torch.float32), backend)
    on_meta = attend_with_gradients(problem, problem.inputs(torch.float32, "meta"), backend)
    for name, x in on_meta.items():
        assert x.is_meta and x.shape == on_cpu[name].shape and x.dtype == on_cpu[name].dtype


def test_meta_device_cuts_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As counting a large model's operations would take minutes."""
    pytest.importorskip("triton")
    monkeypatch.setattr("fused_na.blocked.attend", None)
    query = torch.empty(1, 96, 96, 6, 32, device="meta", requires_grad=True)
    output = na2d(query, query, query, 7, dilation=13)
    assert isinstance(output, Tensor) and output.is_meta and output.shape == query.shape
    assert torch.autograd.grad(output, query, output)[0].shape == query.shape


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_autocast_computes_as_on_rounded_inputs(backend: str) -> None:
    problem = Problem((7, 9), (3, 4), (2, 1), (2, 1), (True, False), heads=4, has_rpb=True, additional=3)
    inputs = problem.inputs(torch.float32)
    rounded = {name: x if name == "rpb" else x.bfloat16() for name, x in inputs.items()}
    expected = neighborhood_attention(**rounded, **problem.options, return_lse=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = neighborhood_attention(**inputs, **problem.options, return_lse=True, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32


def test_autocast_around_backward() -> None:
    problem = Problem((7, 9), (3, 4), (1, 1), (2, 1), (False, False), has_rpb=True, additional=2)
    inputs = problem.inputs(torch.float32)
    rounded = {name: x if name == "rpb" else x.bfloat16() for name, x in inputs.items()}
    expected = attend_with_gradients(problem, rounded, "blocked")
    with torch.autocast("cpu", torch.bfloat16):
        actual = attend_with_gradients(problem, inputs, "blocked")
    for name in ("gradient of query", "gradient of key", "gradient of rpb", "gradient of additional_values"):
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name], expected[name].float(), rtol=0, atol=0)


def test_autocast_leaves_float64_alone() -> None:
    x = torch.randn(3, 1, 5, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert neighborhood_attention(*x.unbind(), kernel_size=3).dtype == torch.float64
