"""Every illegal argument is one ValueError that names it, the value given and what is allowed, before any work."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fused_na import (
    available_backends,
    blocked,
    functional,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    packed_neighborhood_attention,
    reference,
)


def call(**changes) -> None:
    """A legal call on a map of 6 x 8 tokens, but for the changes."""
    arguments = {
        "query": torch.zeros(2, 6, 8, 4, 16),
        "key": torch.zeros(2, 6, 8, 2, 16),
        "value": torch.zeros(2, 6, 8, 2, 8),
        "kernel_size": (3, 4),
        "rpb": torch.zeros(4, 5, 7),
        "additional_keys": torch.zeros(2, 5, 2, 16),
        "additional_values": torch.zeros(2, 5, 2, 8),
    }
    neighborhood_attention(**(arguments | changes))


def test_the_call_without_changes_is_legal() -> None:
    call()


ILLEGAL = [
    ({"query": torch.zeros(2, 4, 16)}, ["query", "1 to 3 spatial axes", "[2, 4, 16]"]),
    ({"query": torch.zeros(())}, ["query", "1 to 3 spatial axes", "[]"]),
    ({"query": torch.zeros(2, 2, 3, 3, 3, 4, 16)}, ["query", "1 to 3 spatial axes", "[2, 2, 3, 3, 3, 4, 16]"]),
    ({"query": torch.zeros(2, 6, 8, 4, 16, dtype=torch.int64)}, ["query", "float32", "int64"]),
    ({"query": None}, ["query", "tensor", "NoneType"]),
    ({"key": [0.0]}, ["key", "tensor", "list"]),
    ({"value": torch.zeros(2, 6, 8, 2, 8).numpy()}, ["value", "tensor", "ndarray"]),
    ({"query": torch.zeros(2, 6, 8, 0, 16)}, ["query", "at least one head", "[2, 6, 8, 0, 16]"]),
    (
        {"query": torch.zeros(2, 6, 8, 4, 0), "key": torch.zeros(2, 6, 8, 2, 0)},
        ["query", "head_dim", "[2, 6, 8, 4, 0]"],
    ),
    ({"value": torch.zeros(2, 6, 8, 2, 0)}, ["value", "head_dim", "[2, 6, 8, 2, 0]"]),
    ({"key": torch.zeros(2, 6, 8, 2, 16).double()}, ["key", "dtype", "float64", "float32"]),
    ({"key": torch.zeros(2, 6, 8, 2, 16, device="meta")}, ["key", "device", "meta", "cpu"]),
    ({"key": torch.zeros(2, 6, 7, 2, 16)}, ["key", "spatial", "[2, 6, 7, 2, 16]", "[2, 6, 8, 4, 16]"]),
    ({"key": torch.zeros(1, 6, 8, 2, 16)}, ["key", "batch", "[1, 6, 8, 2, 16]"]),
    ({"key": torch.zeros(2, 6, 8, 2, 12)}, ["key", "head_dim", "16", "12"]),
    ({"key": torch.zeros(2, 6, 8, 4, 16)}, ["key and value", "heads", "4", "2"]),
    ({"value": torch.zeros(2, 6, 8, 2, 8).half()}, ["value", "dtype", "float16", "float32"]),
    ({"value": torch.zeros(2, 6, 8, 2, 8, device="meta")}, ["value", "device", "meta", "cpu"]),
    ({"value": torch.zeros(2, 8, 6, 2, 8)}, ["value", "spatial", "[2, 8, 6, 2, 8]"]),
    ({"value": torch.zeros(2, 48, 2, 8)}, ["value", "spatial", "[2, 48, 2, 8]"]),
    (
        {"key": torch.zeros(2, 6, 8, 3, 16), "value": torch.zeros(2, 6, 8, 3, 8)},
        ["heads of key and value", "divide", "4", "3"],
    ),
    (
        {"key": torch.zeros(2, 6, 8, 0, 16), "value": torch.zeros(2, 6, 8, 0, 8)},
        ["heads of key and value", "divide", "4", "0"],
    ),
    ({"kernel_size": 0}, ["kernel_size", "at least 1", "0"]),
    ({"kernel_size": (3, -1)}, ["kernel_size", "at least 1", "-1", "axis 1"]),
    ({"kernel_size": 7}, ["kernel_size", "7", "6", "axis 0"]),
    ({"kernel_size": (3, 9)}, ["kernel_size", "9", "8", "axis 1"]),
    ({"kernel_size": 3.0}, ["kernel_size", "int", "3.0"]),
    ({"kernel_size": "3"}, ["kernel_size", "int", "'3'"]),
    ({"kernel_size": None}, ["kernel_size", "int", "None"]),
    ({"kernel_size": True}, ["kernel_size", "int", "True"]),
    ({"kernel_size": torch.tensor(3)}, ["kernel_size", "int", "tensor(3)"]),
    ({"kernel_size": (3,)}, ["kernel_size", "per spatial axis", "2", "(3,)"]),
    ({"kernel_size": [3, 3, 3]}, ["kernel_size", "per spatial axis", "2", "[3, 3, 3]"]),
    ({"kernel_size": ()}, ["kernel_size", "per spatial axis", "2", "()"]),
    ({"stride": 0}, ["stride", "between 1 and kernel_size 3", "0"]),
    ({"stride": (1, 5)}, ["stride", "between 1 and kernel_size 4", "5", "axis 1"]),
    ({"stride": 1.5}, ["stride", "int", "1.5"]),
    ({"stride": (1, 1, 1)}, ["stride", "per spatial axis", "(1, 1, 1)"]),
    ({"dilation": 0}, ["dilation", "at least 1", "0"]),
    ({"dilation": 3}, ["kernel_size * dilation", "3 * 3 = 9", "length 6", "axis 0"]),
    ({"dilation": (2, "1")}, ["dilation", "int", "(2, '1')"]),
    ({"dilation": [1]}, ["dilation", "per spatial axis", "[1]"]),
    ({"is_causal": 1}, ["is_causal", "bool", "1"]),
    ({"is_causal": (True, None)}, ["is_causal", "bool", "(True, None)"]),
    ({"is_causal": (True, False, False)}, ["is_causal", "per spatial axis", "(True, False, False)"]),
    ({"scale": "1"}, ["scale", "number", "'1'"]),
    ({"scale": float("nan")}, ["scale", "finite", "nan"]),
    ({"rpb": True}, ["rpb", "tensor or None", "bool"]),
    ({"rpb": torch.zeros(4, 5, 5)}, ["rpb", "[4, 5, 7]", "[4, 5, 5]"]),
    ({"rpb": torch.zeros(2, 5, 7)}, ["rpb", "[4, 5, 7]", "[2, 5, 7]"]),
    ({"rpb": torch.zeros(4, 5, 7).double()}, ["rpb", "float32", "float64"]),
    ({"rpb": torch.zeros(4, 5, 7, device="meta")}, ["rpb", "device", "meta", "cpu"]),
    ({"additional_keys": None}, ["additional_keys", "additional_values", "together"]),
    ({"additional_values": 5}, ["additional_values", "tensor or None", "int"]),
    ({"additional_values": None}, ["additional_keys", "additional_values", "together"]),
    ({"additional_keys": torch.zeros(2, 5, 4, 16)}, ["additional_keys", "[2, M, 2, 16]", "[2, 5, 4, 16]"]),
    ({"additional_keys": torch.zeros(5, 2, 16)}, ["additional_keys", "[2, M, 2, 16]", "[5, 2, 16]"]),
    ({"additional_values": torch.zeros(1, 5, 2, 8)}, ["additional_values", "[2, M, 2, 8]", "[1, 5, 2, 8]"]),
    ({"additional_values": torch.zeros(2, 4, 2, 8)}, ["additional_keys and additional_values", "5", "4"]),
    ({"additional_keys": torch.zeros(2, 5, 2, 16).double()}, ["additional_keys", "dtype", "float64"]),
    ({"additional_values": torch.zeros(2, 5, 2, 8, device="meta")}, ["additional_values", "device", "meta"]),
    ({"backend": "cuda"}, ["backend", "'triton'", "'blocked'", "'reference'", "'cuda'"]),
    ({"backend": "triton"}, ["backend='triton'", "cpu"]),
]


@pytest.mark.parametrize(
    ("changes", "message"), ILLEGAL, ids=[f"{i}-{'-'.join(changes)}" for i, (changes, _) in enumerate(ILLEGAL)]
)
def test_illegal_arguments(changes: dict, message: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(blocked, "attend", fail)
    monkeypatch.setattr(reference, "attend", fail)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as error:
        call(**changes)
    for part in message:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "shape", [(3, 2, 4), (2, 3, 2, 4), (2, 6, 2, 2, 4), (2, 3, 3, 3, 3, 3, 2, 4), (2, 6, 3, 0, 4)], ids=str
)
def test_tensors_that_do_not_hold_query_key_and_value(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"qkv must be \[B, \*spatial, 3, .*{re.escape(str([*shape]))}"):
        packed_neighborhood_attention(torch.zeros(shape), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 7}, "kernel_size .* 7"),
        ({"rpb": torch.zeros(2, 5, 3)}, r"rpb .*\[2, 5, 5\]"),
        ({"qkv": [1.0]}, "qkv must be a tensor"),
        ({"qkv": torch.zeros(2, 6, 8, 3, 2, 16).long()}, "qkv must be .*float32.* got int64"),
        ({"rpb": True}, "rpb must be a tensor or None"),
        ({"scale": "1"}, "scale .*'1'"),
        ({"backend": "triton"}, "backend='triton'.*cpu"),
    ],
    ids=str,
)
def test_illegal_arguments_beside_packed_tensors(changes: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        packed_neighborhood_attention(**({"qkv": torch.zeros(2, 6, 8, 3, 2, 16), "kernel_size": 3} | changes))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_autocast_casts_floating_point_alone(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 5, 2, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="query must be float16"):
        na1d(x, x, x, kernel_size=3)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="backend='triton'.*not installed"):
        call(backend="triton")


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype", "device", "reason"),
    [
        (8, 256, torch.float16, "meta", None),
        (8, 8, torch.float32, "cpu", "NVIDIA GPU.*cpu"),
        (8, 8, torch.float64, "meta", "float64"),
        (12, 8, torch.bfloat16, "meta", "head_dim must be a multiple of 8 from 8 to 256, got 12"),
        (8, 264, torch.bfloat16, "meta", "head_dim_v .*264"),
    ],
)
def test_available_backends(
    head_dim: int, head_dim_v: int, dtype: torch.dtype, device: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said to run does, and what is said not to is refused for the same reason."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 8, 2, head_dim, dtype=dtype, device=device)
    value = torch.zeros(1, 8, 2, head_dim_v, dtype=dtype, device=device)
    reasons = available_backends(query, query, value)
    assert list(reasons) == ["triton", "blocked", "reference"]
    for backend, why_not in reasons.items():
        if why_not is None:
            assert na1d(query, query, value, 3, backend=backend).shape == value.shape
        else:
            assert reason is not None and re.search(reason, why_not)
            with pytest.raises(ValueError, match=f"backend='triton'.*{re.escape(why_not)}"):
                na1d(query, query, value, 3, backend=backend)
    assert (reasons["triton"] is None) == (reason is None)


def test_gpus_that_are_not_nvidias_have_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch calls AMD's GPUs "cuda" as well, and the kernels hold NVIDIA's assembly."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(functional, "HAS_TRITON", True)
    with FakeTensorMode():
        x = torch.empty(1, 8, 2, 16, device="cuda")
        reasons = available_backends(x, x, x)
        assert reasons["triton"] is not None and "NVIDIA" in reasons["triton"] and reasons["blocked"] is None
        assert functional._backend(None, x, x) is blocked.attend


@pytest.mark.parametrize("attend", [na1d, na2d, na3d])
@pytest.mark.parametrize("dimensions", range(3, 8))
def test_each_function_takes_its_number_of_axes(attend, dimensions: int) -> None:
    x = torch.zeros([1] * dimensions)
    expected = {na1d: 4, na2d: 5, na3d: 6}[attend]
    with pytest.raises(ValueError, match="query must be a tensor, got NoneType"):
        attend(None, None, None, kernel_size=1)
    if dimensions == expected:
        assert attend(x, x, x, kernel_size=1).shape == x.shape
    else:
        with pytest.raises(
            ValueError, match=f"{attend.__name__}: query .*{expected} dim.*{re.escape(str([*x.shape]))}"
        ):
            attend(x, x, x, kernel_size=1)
