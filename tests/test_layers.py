"""The building blocks against the same computation written out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.nn import functional as F

from fused_na import neighborhood_attention
from nat_models.layers import (
    Block,
    ConvDownsampler,
    ConvTokenizer,
    Mlp,
    NeighborhoodAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    PatchEmbed,
)

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}


def by_hand(module: NeighborhoodAttention, x: Tensor) -> Tensor:
    """What the module computes, with separate projections, explicit padding and the dense oracle."""
    spatial = x.shape[1:-1]
    size = [max(n, k * d) for n, k, d in zip(spatial, module.kernel_size, module.dilation, strict=True)]
    padded = x.new_zeros(len(x), *size, x.shape[-1])
    region = (slice(None), *(slice(n) for n in spatial))
    padded[region] = x
    head_dim = x.shape[-1] // module.num_heads
    biases = [None] * 3 if module.qkv.bias is None else module.qkv.bias.chunk(3)
    projected = [F.linear(padded, w, b) for w, b in zip(module.qkv.weight.chunk(3), biases, strict=True)]
    query, key, value = (y.reshape(*y.shape[:-1], module.num_heads, head_dim) for y in projected)
    output = neighborhood_attention(
        query, key, value, module.kernel_size, module.stride, module.dilation, module.is_causal,
        scale=module.qk_scale, rpb=module.rpb, backend="reference",
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return F.linear(output[region].reshape(x.shape), module.proj.weight, module.proj.bias)


@settings(max_examples=40)
@given(st.integers(1, 3), st.data())
def test_attention_module(rank: int, data: st.DataObject) -> None:
    def per_axis(values: Any) -> list[Any]:
        return data.draw(st.lists(values, min_size=rank, max_size=rank))

    kernel_size = per_axis(st.integers(1, 4))
    module = MODULES[rank](
        12,
        num_heads=data.draw(st.sampled_from([1, 3])),
        kernel_size=kernel_size,
        stride=[data.draw(st.integers(1, k)) for k in kernel_size],
        dilation=per_axis(st.integers(1, 2)),
        is_causal=per_axis(st.booleans()),
        rel_pos_bias=data.draw(st.booleans()),
        qkv_bias=data.draw(st.booleans()),
        qk_scale=data.draw(st.sampled_from([None, 0.7])),
    ).double()
    assert (module.rpb is not None) == any(name == "rpb" for name, _ in module.named_parameters())
    x = torch.randn(2, *per_axis(st.integers(1, 7)), 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), by_hand(module, x))


def test_one_number_holds_for_all_axes() -> None:
    module = NeighborhoodAttention3D(8, 2, kernel_size=3, stride=2, dilation=2, is_causal=True)
    assert (module.kernel_size, module.stride) == ((3, 3, 3), (2, 2, 2))
    assert (module.dilation, module.is_causal) == ((2, 2, 2), (True, True, True))
    assert module.rpb is not None and module.rpb.shape == (2, 5, 5, 5)


def test_padding_reaches_the_projection() -> None:
    """Upstream pads before the projection, so that padded tokens have keys and values: their bias."""
    module = NeighborhoodAttention1D(4, 1, kernel_size=3, rel_pos_bias=False)
    nn.init.zeros_(module.qkv.weight)
    nn.init.zeros_(module.proj.bias)
    with torch.no_grad():
        module.qkv.bias.copy_(torch.arange(12.0))
        module.proj.weight.copy_(torch.eye(4))
    torch.testing.assert_close(module(torch.zeros(1, 1, 4)), torch.tensor([[[8.0, 9.0, 10.0, 11.0]]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3), "num_heads must divide the 8 channels, got 3"),
        (dict(num_heads=0), "num_heads must be an integer, at least 1, got 0"),
        (dict(kernel_size=(3, 3, 3)), r"kernel_size must be one integer or one per axis \(2\), got \(3, 3, 3\)"),
        (dict(kernel_size=7.0), r"kernel_size must be one integer or one per axis \(2\), got 7.0"),
        (dict(dilation=(1, 2.0)), r"dilation must be one integer or one per axis \(2\), got \(1, 2.0\)"),
        (dict(kernel_size=(3, 0)), r"kernel_size must be at least 1, got \(3, 0\)"),
        (dict(dilation=0), "dilation must be at least 1, got 0"),
        (dict(stride=4), "stride must be between 1 and kernel_size 3, got 4"),
        (dict(is_causal=(True,)), "is_causal must be one bool or one per axis"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(**(dict(dim=8, num_heads=2, kernel_size=3) | arguments))


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_block(layer_scale: float | None) -> None:
    block = Block(8, nn.Linear(8, 8), mlp_ratio=3, layer_scale=layer_scale).double()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    scale = 1.0 if layer_scale is None else layer_scale
    attended = x + scale * block.attn(F.layer_norm(x, (8,)))
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    assert fc1.out_features == 24
    expected = attended + scale * fc2(F.gelu(fc1(F.layer_norm(attended, (8,)))))
    torch.testing.assert_close(block(x), expected, rtol=1e-6, atol=1e-6)  # the factor is stored in float32


def test_block_drops_a_sample_s_branches() -> None:
    torch.manual_seed(0)
    block = Block(4, nn.Linear(4, 4), drop_path=0.5)
    x = torch.randn(64, 3, 4)
    kept = (block.train()(x) == x).flatten(1).all(1)
    assert 6 <= kept.sum() <= 26  # both branches of a quarter of the samples
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def trained(mlp: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    output = forward(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), (x, *mlp.parameters()))]


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_mlp_is_timm_s_bit_by_bit(drop: float, compiled: bool) -> None:
    torch.manual_seed(0)
    mlp, expected = Mlp(8, 24, drop=drop), TimmMlp(8, 24, drop=drop)
    expected.load_state_dict(mlp.state_dict())
    x = torch.randn(2, 3, 4, 8)
    for training in (True, False):
        results = []
        for module in (mlp, expected):
            module.train(training)
            torch.manual_seed(1)
            forward = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
            results.append(trained(module, forward, x))
        assert all(map(torch.equal, *results))


def test_mlp_keeps_the_hidden_layer_once() -> None:
    """In training."""

    def kept(module: nn.Module) -> int:
        tensors: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.setdefault(x.data_ptr(), x), lambda x: x):
            module(torch.randn(5, 8, requires_grad=True))
        return sum(tensor.shape == (5, 24) for tensor in tensors.values())

    assert (kept(Mlp(8, 24)), kept(TimmMlp(8, 24))) == (1, 2)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_checkpointed_block_compiles(drop: float) -> None:
    """A checkpoint of a block around the one of its MLP."""
    block = Block(8, NeighborhoodAttention2D(8, 2, 3), proj_drop=drop)
    block.grad_checkpointing = True
    x = torch.randn(1, 4, 5, 8)
    results = []
    for forward in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        results.append(trained(block, forward, x))
    if not drop:  # compiled code draws other numbers
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_tokenizer_and_downsampler_in_two_axes() -> None:
    images = torch.randn(2, 3, 33, 40)
    tokenizer = ConvTokenizer(3, 8)
    tokens = tokenizer(images)
    assert tokens.shape == (2, 9, 10, 8)
    first, second = tokenizer.proj
    expected = F.conv2d(F.conv2d(images, first.weight, first.bias, 2, 1), second.weight, second.bias, 2, 1)
    torch.testing.assert_close(tokens, F.layer_norm(expected.permute(0, 2, 3, 1), (8,)))
    downsampler = ConvDownsampler(8)
    assert downsampler.reduction.bias is None
    expected = F.conv2d(tokens.permute(0, 3, 1, 2), downsampler.reduction.weight, None, 2, 1)
    torch.testing.assert_close(downsampler(tokens), F.layer_norm(expected.permute(0, 2, 3, 1), (16,)))
    assert downsampler(tokens).shape == (2, 5, 5, 16)


def test_tokenizer_and_downsampler_in_three_axes() -> None:
    tokenizer = ConvTokenizer(3, 8, kernel_sizes=((1, 3, 3), (2, 3, 3)), strides=((1, 2, 2), (2, 2, 2)))
    tokens = tokenizer(torch.randn(2, 3, 8, 32, 48))
    assert tokens.shape == (2, 4, 8, 12, 8)
    downsampler = ConvDownsampler(8, kernel_size=(1, 3, 3), stride=(1, 2, 2))
    assert downsampler(tokens).shape == (2, 4, 4, 6, 16)


@pytest.mark.parametrize("tokenizer", [ConvTokenizer(3, 8), PatchEmbed(3, 8)], ids=["overlapping", "patches"])
def test_convolutions_keep_channels_side_by_side(tokenizer: nn.Module) -> None:
    """From an image as it comes on: nothing turns the map around later."""
    convolved: list[Tensor] = []
    hook = tokenizer.proj.register_forward_hook(lambda *results: convolved.append(results[-1]))
    tokenizer(torch.randn(2, 3, 32, 48))
    hook.remove()
    assert convolved[0].is_contiguous(memory_format=torch.channels_last) and not convolved[0].is_contiguous()


def test_patch_embed_pads_to_whole_patches() -> None:
    embed = PatchEmbed(3, 8, patch_size=(4, 4))
    images = torch.randn(2, 3, 10, 15)
    padded = torch.zeros(2, 3, 12, 16)
    padded[..., :10, :15] = images
    patches = padded.reshape(2, 3, 3, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3)
    expected = F.layer_norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias), (8,))
    torch.testing.assert_close(embed(images), expected)
    assert PatchEmbed(3, 8, patch_size=(2, 16, 16))(torch.randn(1, 3, 5, 32, 32)).shape == (1, 3, 2, 2, 8)
