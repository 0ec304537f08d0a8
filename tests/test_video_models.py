"""Video models: sizes, timm's contract, clips of any size, and inflated image models."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden_models import golden, relative_error, save
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from fused_na import na3d
from nat_models.backbone import Backbone
from nat_models.checkpoints import load_image_weights
from nat_models.clip_layers import ClipAttention, rotary_angles, rotate
from nat_models.complexity import multiply_adds
from nat_models.layers import Block, TubeletConv
from nat_models.nat3d import NAT3D

TARGETS = {  # clip, millions of parameters with 400 classes, 10^9 multiply-adds of a view at 224 x 224
    "nat3d_mini": (32, 19.6, 58),
    "nat3d_tiny": (32, 27.5, 89),
    "nat3d_tiny_strided": (32, 27.5, 89),
    "nat3d_small": (32, 50, 155),
    "nat3d_base": (32, 89, 261),
    "dinat3d_tiny": (32, 27.5, 89),
    "dinat3d_small": (32, 50, 155),
    "dinat3d_base": (32, 89, 261),
    "nat_divided_tiny": (32, 38, 95),
    "nat_iso3d_small": (16, 22, 38),
}
SMALL = ["nat3d_base", "dinat3d_tiny", "nat_divided_tiny", "nat_iso3d_small"]  # all that differ in more than size


def small(name: str, **kwargs: Any) -> nn.Module:
    """The named model with few channels and blocks and neighborhoods of 3 x 5 x 5."""
    config: dict[str, Any] = dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 1, 1, 2), kernel_size=(3, 5, 5))
    if "iso" in name:
        config = dict(embed_dim=16, depth=3, num_heads=1, kernel_size=(3, 5, 5))
    elif name.startswith("dinat3d"):
        config["dilations"] = [[(2, 1, 1), (1, 2, 2)], 1, 1, 1]
    torch.manual_seed(0)
    return timm.create_model(name, **dict(num_classes=10) | config | kwargs)


def clips(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "position"), [*((name, "rpb") for name in TARGETS), ("nat3d_tiny", "rope")])
def test_size(name: str, position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nat_models.layers.packed_neighborhood_attention", lambda qkv, *arguments: qkv[..., 0, :, :])
    num_frames, parameters, gflops = TARGETS[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=400, position=position).eval()
    assert model.num_frames == num_frames
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.02)
    assert multiply_adds(model, (3, num_frames, 224, 224)) / 1e9 == pytest.approx(gflops, rel=0.02)


def test_dilations_alternate_between_time_and_space() -> None:
    with torch.device("meta"):
        model = timm.create_model("dinat3d_tiny")
    dilations = [[block.attn.dilation for block in stage.blocks[:3]] for stage in model.stages]
    assert dilations == [[(2, 1, 1), (1, d, d), (2, 1, 1)] for d in (8, 4, 2, 1)]


def test_the_strided_preset_shares_neighborhoods() -> None:
    with torch.device("meta"):
        model, default = timm.create_model("nat3d_tiny_strided"), timm.create_model("nat3d_tiny")
    attention = [module for module in model.modules() if isinstance(module, ClipAttention)]
    assert {(module.kernel_size, module.stride) for module in attention} == {((7, 7, 7), (2, 4, 4))}
    assert [p.shape for p in model.parameters()] == [p.shape for p in default.parameters()]


# --- attention -------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 2), st.booleans())
def test_short_clips_have_all_their_frames_as_neighborhood(
    frames: int, kernel_size: int, dilation: int, is_causal: bool
) -> None:
    module = ClipAttention(
        4, 1, kernel_size=(kernel_size, 1, 1), dilation=(dilation, 1, 1), is_causal=(is_causal, False, False)
    ).double()
    nn.init.normal_(module.temporal_rpb)
    x = torch.randn(1, frames, 1, 1, 4, dtype=torch.float64)
    query, key, value = module.qkv(x).flatten(1, 3)[0].chunk(3, -1)
    for t, output in enumerate(module(x)[0, :, 0, 0]):
        group = list(range(t % dilation, frames, dilation))
        index = group.index(t)
        smallest = kernel_size if is_causal else min(kernel_size, max(frames // dilation, 1))
        start = index - smallest + 1 if is_causal else min(max(index - smallest // 2, 0), len(group) - smallest)
        window = range(max(start, 0), index + 1 if is_causal else start + smallest)
        keys = [group[j] for j in window]
        bias = torch.stack([module.temporal_rpb[0, j - index + kernel_size - 1] for j in window])
        weights = (key[keys] @ query[t] / 2 + bias).softmax(0)
        torch.testing.assert_close(output, module.proj(weights @ value[keys]))


def test_biases_add_up() -> None:
    module = ClipAttention(8, 2, kernel_size=(3, 3, 5)).double()
    nn.init.normal_(module.temporal_rpb)
    x = torch.randn(1, 4, 6, 5, 8, dtype=torch.float64)
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    rpb = torch.stack([module.rpb + module.temporal_rpb[:, i, None, None] for i in range(5)], 1)
    expected = module.proj(na3d(query, key, value, (3, 3, 5), rpb=rpb, backend="reference").flatten(-2))
    torch.testing.assert_close(module(x), expected)
    expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (module.rpb, module.temporal_rpb))


def test_rotary_embeddings_tell_relative_positions() -> None:
    query, key = torch.randn(2, 24), torch.randn(2, 24)
    scores = []
    for shift in (0, 3, 11):
        grid = [torch.arange(3) + shift, torch.arange(4) + 2 * shift, torch.arange(5) + 5 * shift]
        angles = rotary_angles(grid, 24)
        assert angles.shape == (3, 4, 5, 12)
        turned = [rotate(x.expand(1, 3, 4, 5, 2, 24), angles) for x in (query, key)]
        scores.append(torch.einsum("bthwnd,bijknd->nthwijk", *turned))
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-4, rtol=1e-4)
    for axis in range(3):  # and each axis counts
        assert (scores[0].select(1 + axis, 0) - scores[0].select(1 + axis, 1)).abs().max() > 0.1


def test_tubelet_convolution() -> None:
    conv = TubeletConv(3, 4, (2, 3, 3), (2, 2, 2), (0, 1, 1))
    clip = clips(2, 3, 5, 9, 8)
    expected = F.conv3d(clip, conv.weight, conv.bias, (2, 2, 2), (0, 1, 1))
    torch.testing.assert_close(conv(clip), expected)


# --- timm's contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*SMALL, pytest.param("nat3d_rope", id="rope"), pytest.param("nat3d_strided", id="strided")]
)
def test_training_step(name: str) -> None:
    options = {"nat3d_rope": dict(position="rope"), "nat3d_strided": dict(stride=[(2, 2, 2), 1, 1, 2])}.get(name, {})
    model = small("nat3d_tiny" if options else name, **options).train()
    output = model(clips(2, 3, 8, 32, 40))
    assert output.shape == (2, 10) and output.isfinite().all()
    output.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 33, 47), (5, 40, 32), (9, 32, 65)])
@pytest.mark.parametrize("name", SMALL)
def test_any_clip_size(name: str, shape: tuple[int, int, int]) -> None:
    model = small(name).eval()
    with torch.no_grad():
        features = model.forward_features(clips(1, 3, *shape))
    frames = -(-shape[0] // 2)
    reduction = 16 if "iso" in name else 32
    assert model.output_fmt == "NTHWC"
    expected = (1, frames, *(-(-n // reduction) for n in shape[1:]), model.num_features)
    assert features.shape == expected and features.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_changes_nothing(name: str) -> None:
    plain = small(name, drop_path_rate=0.0)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    batch = clips(1, 3, 4, 32, 32)
    plain(batch).square().mean().backward()
    checkpointed(batch).square().mean().backward()
    for (key, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=key)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
@pytest.mark.parametrize("name", SMALL)
def test_features_are_the_intermediates(name: str, feature_cls: str) -> None:
    model, batch = small(name, features_only=True, feature_cls=feature_cls).eval(), clips(1, 3, 4, 32, 64)
    assert model.output_fmt == ("NCTHW" if feature_cls == "getter" else "NTHWC")
    outputs = model(batch)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    whole = small(name).eval()
    expected = whole.forward_intermediates(batch, len(outputs), output_fmt=model.output_fmt, intermediates_only=True)
    torch.testing.assert_close(outputs, expected)
    for output, channels, reduction in zip(
        outputs, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        size = (2, 32 // reduction, 64 // reduction)
        assert output.shape == ((1, channels, *size) if feature_cls == "getter" else (1, *size, channels))


@pytest.mark.parametrize("name", SMALL)
def test_forward_intermediates(name: str) -> None:
    model, batch = small(name).eval(), clips(1, 3, 4, 64, 32)
    final, maps = model.forward_intermediates(batch)
    torch.testing.assert_close(final, model.forward_features(batch))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [tuple(m.shape) for m in maps] == [
        (1, channels, 2, 64 // reduction, 32 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    last = model.forward_intermediates(batch, 1, norm=True, output_fmt="NTHWC", intermediates_only=True)
    torch.testing.assert_close(last, [final])
    with pytest.raises(ValueError, match="output_fmt must be 'NCTHW' or 'NTHWC', got 'NLC'"):
        model.forward_intermediates(batch, output_fmt="NLC")


@pytest.mark.parametrize("name", SMALL)
def test_classifier_can_be_reset(name: str) -> None:
    model, batch = small(name).eval(), clips(2, 3, 4, 32, 32)
    assert isinstance(model, Backbone)
    features = model.forward_features(batch)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((1, 2, 3)))
    model.reset_classifier(7)
    assert model(batch).shape == (2, 7)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(batch), features)


@pytest.mark.parametrize("name", SMALL)
def test_layer_decay_and_weight_decay(name: str) -> None:
    model = small(name)
    biases = {key for key, _ in model.named_parameters() if key.endswith("rpb")}
    assert biases and model.no_weight_decay() == biases
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = len([module for module in model.modules() if isinstance(module, Block)])
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.patch_embed.norm.weight)] == pytest.approx(0.5 ** (blocks + 1))


def test_input_channels() -> None:
    for name in ("nat3d_tiny", "nat_iso3d_small"):
        assert small(name, in_chans=2)(clips(1, 2, 2, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", [*SMALL, "nat_stream_tiny"])
def test_fx_tracing_and_export(name: str) -> None:
    depths: dict[str, Any] = dict(depth=1) if "iso" in name else dict(depths=(1, 1), num_heads=(1, 1), dilations=[2, 1])
    model, batch = small(name, **depths).eval(), clips(2, 3, 5, 32, 32)
    leaves = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    options: dict[str, Any] = dict(tracer_kwargs=leaves, suppress_diff_warning=True)
    node = get_graph_node_names(model, **options)[1][-1]
    exported = torch.export.export(model, (batch,), dynamic_shapes=[{0: torch.export.Dim("batch", max=8)}]).module()
    with torch.no_grad():
        expected = model(batch)
        torch.testing.assert_close(create_feature_extractor(model, [node], **options)(batch)[node], expected)
        torch.testing.assert_close(exported(batch), expected)
        torch.testing.assert_close(exported(batch[:1]), expected[:1])


@pytest.mark.parametrize("position", ["rpb", "rope"])
def test_compiles_without_graph_breaks(position: str) -> None:
    torch.compiler.reset()
    model = small("nat3d_tiny", depths=(1, 1), num_heads=(1, 1), position=position).eval()
    batch = clips(1, 3, 5, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(batch), model(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_frames=0), "num_frames must be an integer, at least 1, got 0"),
        (dict(num_frames=2.5), "num_frames must be an integer, at least 1, got 2.5"),
        (dict(embed_dim=0), "embed_dim must be an integer, at least 2, got 0"),
        (dict(in_chans=0), "in_chans must be an integer, at least 1, got 0"),
        (dict(kernel_size="7"), "kernel_size must be an integer, or three, or either for each stage, got '7'"),
        (dict(kernel_size=[3, "7", 3, 3]), "kernel_size must be an integer, or three, for time, .* got '7'"),
        (dict(dilations=[[1.5], 1, 1, 1]), "dilation must be an integer, or three, for time, .* got 1.5"),
        (dict(kernel_size=(3, 5)), "kernel_size must hold one entry for each of the 4 stages"),
        (dict(stride=(4, 1, 1)), "stride must be between 1 and kernel_size"),
        (dict(stride=[(6, 1, 1), 1, 1, 1]), "stride must be between 1 and kernel_size"),
        (dict(position="absolute"), "position must be one of 'rpb', 'rope', got 'absolute'"),
        (dict(position="rope", num_heads=(2, 4, 8, 16), embed_dim=14), "needs an even head_dim .* got 14 / 2 = 7"),
        (dict(position="rope", num_heads=(4, 4, 4, 4)), "needs an even head_dim .* at least 6, .* got 16 / 4 = 4"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("nat3d_tiny", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kernel_size=[(3, 0, 3), 3, 3, 3]), r"kernel_size must be at least 1, got \(3, 0, 3\)"),
        (dict(kernel_size=3, stride=4), "stride must be between 1 and kernel_size 3, got 4"),
        (dict(dilations=[0, 1, 1, 1]), "dilation must be at least 1, got 0"),
    ],
)
def test_divided_attention_names_arguments_as_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("nat_divided_tiny", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(patch_size=16), "patch_size must be three integers, of frames, rows and columns, got 16"),
        (dict(patch_size=(2, 16.0, 16)), r"patch_size must be three integers, .* got \(2, 16.0, 16\)"),
        (dict(kernel_size="7"), "kernel_size must be an integer, or three, for time, .* got '7'"),
        (dict(embed_dim=0), "embed_dim must be an integer, at least 1, got 0"),
        (dict(depth=1.5), "depth must be an integer, at least 1, got 1.5"),
        (dict(drop_path_rate=2), "drop_path_rate must be a number, at least 0 and at most 1, got 2"),
        (dict(num_frames=2.5), "num_frames must be an integer, at least 1, got 2.5"),
    ],
)
def test_wrong_arguments_of_isotropic_models_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("nat_iso3d_small", **arguments)


def test_three_numbers_for_three_stages_must_be_told_apart() -> None:
    three: dict[str, Any] = dict(depths=(1, 1, 1), num_heads=(1, 1, 1), kernel_size=3)
    for name, value in (("stride", (1, 2, 2)), ("kernel_size", [3, 5, 7])):
        with pytest.raises(ValueError, match=f"{name}=.* may be of time, height and width or of the three stages"):
            small("nat3d_tiny", **three | {name: value})
    assert small("nat3d_tiny", **three, stride=[1, 1, 1]).levels[2].blocks[0].attn.stride == (1, 1, 1)
    model = small("nat3d_tiny", **three | dict(kernel_size=[3, (1, 5, 5), 7]))
    assert [level.blocks[0].attn.kernel_size for level in model.levels] == [(3, 3, 3), (1, 5, 5), (7, 7, 7)]


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 2, 4, 32, 32), (1, 3, 0, 32, 32)])
@pytest.mark.parametrize("name", ["nat3d_tiny", "nat_iso3d_small", "nat_stream_tiny"])
def test_what_is_no_clip_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"clips must be \[B, 3, T, H, W\] .* got \["):
        small(name)(torch.zeros(shape))


# --- inflation -------------------------------------------------------------------------------------------------------


INFLATED = [  # golden image model, its video model, frames of the clip
    ("nat", "nat3d_mini", 1),
    ("nat", "nat_divided_tiny", 5),
    ("nat_layerscale", "nat3d_mini", 5),
    ("dinat", "dinat3d_tiny", 8),
    ("dinat_small_input", "dinat3d_tiny", 3),
    ("nat_isotropic", "nat_iso3d_small", 5),
    ("dinat_isotropic", "nat_iso3d_small", 2),
]


def video_config(name: str) -> dict[str, Any]:
    """The image model's constructor arguments for a video model that attends to 3 frames."""
    config = dict(golden(name)[0])
    kernel = config.get("kernel_size", 7)
    if "isotropic" in name:
        config.pop("img_size", None)
        dilation = config.pop("dilation", 1)
        patch = config.get("patch_size", 16)
        return config | dict(
            kernel_size=(3, kernel, kernel), dilation=(1, dilation, dilation), patch_size=(2, patch, patch)
        )
    dilations = config.get("dilations")
    if dilations:
        config["dilations"] = [[(1 + i % 2, d, d) for i, d in enumerate(turns)] for turns in dilations]
    return config | dict(kernel_size=(3, kernel, kernel))


@pytest.mark.parametrize(("name", "video_name", "frames"), INFLATED)
def test_inflated_models_see_a_static_clip_as_the_image(
    name: str, video_name: str, frames: int, tmp_path: Path
) -> None:
    _, state, expected = golden(name)
    path = save(state, tmp_path / "weights.pth")
    overlay = dict(file=str(path), num_classes=golden(name)[0]["num_classes"])
    model = timm.create_model(video_name, pretrained=True, pretrained_cfg_overlay=overlay, **video_config(name)).eval()
    clip = expected["input"][:1].unsqueeze(2).repeat_interleave(frames, 2)
    with torch.no_grad():
        assert relative_error(model(clip), expected["logits"][:1]) < 1e-4
    report = model.load_report
    assert set(report.inflated) == {key for key, value in model.state_dict().items() if value.dim() == 5}
    assert set(report.reinitialised) == {key for key in model.state_dict() if ".temporal_" in key}
    assert len(report.matched) + len(report.inflated) + len(report.reinitialised) == len(model.state_dict())


def test_image_weights_for_other_heads_channels_windows_and_positions(tmp_path: Path) -> None:
    path = save(golden("nat")[1], tmp_path / "weights.safetensors")
    config = video_config("nat") | dict(num_classes=3, in_chans=1, kernel_size=(3, 5, 5))
    overlay = dict(file=str(path))
    with pytest.warns(UserWarning, match=r"this NAT3D will not answer as the image model .* \(levels.0.blocks.0"):
        model = timm.create_model("nat3d_mini", pretrained=True, pretrained_cfg_overlay=overlay, **config)
    report = model.load_report
    assert {"head.weight", "head.bias"} <= set(report.reinitialised)
    assert {"patch_embed.proj.0.weight", "levels.0.blocks.0.attn.rpb"} <= set(report.resized)
    image = golden("nat")[1]["patch_embed.proj.0.weight"]
    torch.testing.assert_close(model.patch_embed.proj[0].weight[:, :, 0], image.sum(1, keepdim=True))
    with pytest.warns(UserWarning, match=r"biases of attention were left out for rotary .* \(levels.0.blocks.0"):
        rotary = timm.create_model(
            "nat3d_mini", pretrained=True, pretrained_cfg_overlay=overlay, **config | dict(position="rope")
        )
    assert rotary.load_report.ignored and all(key.endswith(".rpb") for key in rotary.load_report.ignored)


def test_full_attention_inflates_to_neighborhoods_of_the_map_or_with_a_warning(tmp_path: Path) -> None:
    small: dict[str, Any] = dict(embed_dim=8, depth=1, num_heads=1, num_classes=5)
    image_model = timm.create_model("vitrpb_small", img_size=64, **small).eval()
    nn.init.normal_(image_model.layers[0].attn.rpb)
    overlay = dict(file=str(save(image_model.state_dict(), tmp_path / "weights.pth")), num_classes=5)
    image = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = timm.create_model(
            "nat_iso3d_small", pretrained=True, pretrained_cfg_overlay=overlay, kernel_size=(3, 4, 4), **small
        ).eval()
    clip = image.unsqueeze(2).repeat_interleave(4, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(clip), image_model(image), atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="this NATIso3D will not answer as the image model"):
        timm.create_model("nat_iso3d_small", pretrained=True, pretrained_cfg_overlay=overlay, **small)


def test_inflation_into_a_model_already_built(tmp_path: Path) -> None:
    path = save(golden("nat")[1], tmp_path / "weights.pth")
    model = timm.create_model("nat3d_mini", **video_config("nat")).eval()
    report = load_image_weights(model, path)
    expected = golden("nat")[2]
    with torch.no_grad():
        assert relative_error(model(expected["input"][:1].unsqueeze(2)), expected["logits"][:1]) < 1e-4
    assert report is model.load_report and report.inflated
    other = timm.create_model("nat3d_mini", **video_config("nat") | dict(num_classes=4))
    before = other.head.weight.clone()
    assert "head.weight" in load_image_weights(other, path).reinitialised
    assert torch.equal(other.head.weight, before)
    with pytest.raises(ValueError, match="create_model, without features_only, got a FeatureListNet"):
        load_image_weights(small("nat3d_tiny", features_only=True), path)
    with pytest.raises(ValueError, match="create_model, without features_only, got a NAT3D"):
        load_image_weights(NAT3D(depths=(1,), num_heads=(1,)), path)
    with pytest.raises(ValueError, match="do not fit this NAT3D; missing keys"):
        load_image_weights(small("nat3d_tiny"), save(golden("nat_isotropic")[1], tmp_path / "isotropic.pth"))


def test_video_weights_load_as_they_are(tmp_path: Path) -> None:
    trained = small("nat_divided_tiny").eval()
    for parameter in trained.parameters():
        nn.init.normal_(parameter, std=0.05)
    config = dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 1, 1, 2), kernel_size=(3, 5, 5), num_classes=10)
    overlay = dict(file=str(save(trained.state_dict(), tmp_path / "video.pth")))
    model = timm.create_model("nat_divided_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **config).eval()
    assert model.load_report.matched == list(trained.state_dict())
    longer = timm.create_model(
        "nat_divided_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **config | dict(kernel_size=(5, 5, 5))
    )
    assert longer.load_report.resized == [key for key in trained.state_dict() if "temporal_attn.temporal_rpb" in key]
    batch = clips(1, 3, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), trained(batch))
        assert relative_error(longer(batch), model(batch)) > 1e-3
