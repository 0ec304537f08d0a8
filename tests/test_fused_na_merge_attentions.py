"""Partial attentions merge to attention over the union of their keys."""

import pytest
import torch
from attention_problems import Problem, assert_close

from fused_na import merge_attentions, neighborhood_attention

PROBLEM = Problem((7, 6), (3, 5), (1, 2), (2, 1), (False, True), heads=4, head_dim_v=5, has_rpb=True, additional=6)


def with_gradients(attend, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output, lse = attend(**leaves)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (output, lse)]
    gradients = torch.autograd.grad((output, lse), tuple(leaves.values()), incoming)
    return {"output": output.detach(), "lse": lse.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("splits", [[6], [2, 4], [1, 2, 3]], ids=str)
def test_merged_equals_attention_over_all_keys(splits: list[int], backend: str) -> None:
    """The window together with 6 additional tokens, against the window alone merged with attention to the others."""

    def at_once(**inputs: torch.Tensor):
        return neighborhood_attention(**inputs, **PROBLEM.options, return_lse=True, backend=backend)

    def merged(additional_keys: torch.Tensor, additional_values: torch.Tensor, **inputs: torch.Tensor):
        partial = [neighborhood_attention(**inputs, **PROBLEM.options, return_lse=True, backend=backend)]
        query = inputs["query"]
        scale = query.shape[-1] ** -0.5
        for keys, values in zip(additional_keys.split(splits, 1), additional_values.split(splits, 1), strict=True):
            keys, values = (x.repeat_interleave(2, dim=2) for x in (keys, values))
            scores = torch.einsum("bxyhd,bmhd->bxyhm", query, keys) * scale
            partial.append((torch.einsum("bxyhm,bmhd->bxyhd", scores.softmax(-1), values), scores.logsumexp(-1)))
        return merge_attentions(*zip(*partial, strict=True))

    inputs = PROBLEM.inputs()
    assert_close(with_gradients(merged, inputs), with_gradients(at_once, inputs), tolerance=1e-10)


def test_one_attention_is_left_as_it_is() -> None:
    output, lse = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4)
    merged, merged_lse = merge_attentions([output], [lse])
    torch.testing.assert_close(merged, output)
    torch.testing.assert_close(merged_lse, lse)


def test_low_precision_outputs_keep_their_dtype() -> None:
    """With float32 log-sum-exps, as the backends return; weights are not rounded."""
    outputs, lses = torch.randn(3, 2, 5, 4, 8).bfloat16(), torch.randn(3, 2, 5, 4)
    merged, lse = merge_attentions(outputs.unbind(), lses.unbind())
    assert merged.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = (lses.softmax(0)[..., None] * outputs.float()).sum(0)
    torch.testing.assert_close(merged, expected.bfloat16())


def test_no_keys_at_all_count_nothing() -> None:
    """A log-sum-exp of -inf says that a partial attention saw no key."""
    output, lse = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4)
    nothing = torch.full_like(lse, float("-inf"))
    merged, merged_lse = merge_attentions([torch.zeros_like(output), output], [nothing, lse])
    torch.testing.assert_close(merged, output)
    torch.testing.assert_close(merged_lse, lse)


OUTPUT, LSE = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], ["outputs and lses", "at least one", "0 outputs"]),
        ([OUTPUT], [LSE, LSE], ["outputs and lses", "1 outputs and 2"]),
        ([OUTPUT, OUTPUT[:1]], [LSE, LSE[:1]], ["outputs", "shape", "[1, 5, 4, 8]", "[2, 5, 4, 8]"]),
        ([OUTPUT, OUTPUT.half()], [LSE, LSE], ["outputs", "dtype", "float16", "float32"]),
        ([OUTPUT], [LSE[..., :3]], ["lses", "[2, 5, 4]", "[2, 5, 3]"]),
        ([OUTPUT, OUTPUT], [LSE, LSE.to("meta")], ["lses", "device", "meta", "cpu"]),
        ([OUTPUT, OUTPUT.to("meta")], [LSE, LSE], ["outputs", "device", "meta", "cpu"]),
    ],
    ids=["none", "unequal numbers", "shapes", "dtypes", "lse shape", "lse device", "devices"],
)
def test_illegal_arguments(outputs: list, lses: list, message: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        merge_attentions(outputs, lses)
    for part in message:
        assert part in str(error.value)
