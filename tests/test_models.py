"""Every registered model: the original's numbers, the published size, and what timm's own tests ask of a model."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
from golden_models import MODELS, ZOO, golden, load, relative_error, save
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath, get_channel_dim, get_spatial_dim
from timm.models import FeatureGraphNet, FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from nat_models.backbone import Backbone
from nat_models.checkpoints import resize_rpb
from nat_models.complexity import multiply_adds
from nat_models.dinat_s import PatchMerging
from nat_models.layers import Block, NeighborhoodAttention2D
from nat_models.nat_isotropic import MapAttention

FAMILIES = ["nat", "dinat_s", "nat_isotropic"]
NAMES = timm.list_models(module=FAMILIES)
PUBLISHED = {entry["name"]: entry for entry in ZOO}
SMALL = [  # all that differ in more than width and depth
    "nat_mini",
    "nat_base",
    "dinat_tiny",
    "dinat_large_384_11x11",
    "dinat_s_tiny",
    "nat_isotropic_small",
    "dinat_isotropic_small",
    "vitrpb_small",
]


def small(name: str, **kwargs: Any) -> nn.Module:
    """The named model with few channels and blocks; kernel size, dilations and layer scale stay."""
    config: dict[str, Any] = dict(embed_dim=16, depths=(2, 1, 2, 1), num_heads=(1, 2, 2, 4))
    if PUBLISHED[name]["family"] == "isotropic":
        config = dict(embed_dim=32, depth=6, num_heads=2)
    torch.manual_seed(0)
    return timm.create_model(name, **config | kwargs)


def full(name: str, **kwargs: Any) -> nn.Module:
    """The named model in its own size, without memory or arithmetic."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- the original models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_original_weights_give_the_original_logits(name: str, suffix: str, tmp_path) -> None:
    _, state, expected = golden(name)
    model = load(name, save(state, tmp_path / f"weights{suffix}"))
    assert model.state_dict().keys() == {key for key in state if "relative_position_index" not in key}
    with torch.no_grad():
        features = model.forward_features(expected["input"])
        assert relative_error(model.forward_head(features, pre_logits=True), expected["features"]) < 1e-4
        assert relative_error(model(expected["input"]), expected["logits"]) < 1e-4


def test_every_published_model_is_registered() -> None:
    assert set(NAMES) == set(PUBLISHED)
    assert set(timm.list_models(pretrained=True, module=FAMILIES)) == {f"{name}.{tag(name)}" for name in NAMES}


def tag(name: str) -> str:
    return "in22k" if "21k" in name else "in22k_ft_in1k" if "pretrain" in PUBLISHED[name] else "in1k"


def published_blocks(entry: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """`(channels, heads, kernel size, dilation)` of every block."""
    if entry["family"] == "isotropic":
        dilations = [1, 2] if entry.get("dilation") == "1,2 alternating" else [1, 1]
        kernel = entry.get("kernel", entry["res"] // entry["patch"])
        return [(entry["embed_dim"], entry["num_heads"], kernel, dilations[i % 2]) for i in range(entry["depth"])]
    dilations = entry.get("dilations", [[1]] * len(entry["depths"]))
    return [
        (entry["embed_dim"] * 2**i, entry["num_heads"][i], entry["kernel"], dilations[i][j % len(dilations[i])])
        for i, depth in enumerate(entry["depths"])
        for j in range(depth)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_architecture_is_the_published_one(name: str) -> None:
    model, entry = full(name), PUBLISHED[name]
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block, (dim, heads, kernel, dilation) in zip(blocks, published_blocks(entry), strict=True):
        assert block.norm1.normalized_shape == (dim,)
        assert block.attn.num_heads == heads
        assert block.attn.kernel_size == (kernel, kernel)
        assert block.attn.dilation == (dilation, dilation)
        assert block.mlp.fc1.out_features == dim * entry["mlp_ratio"]
        assert (block.gamma1 is not None) == ("layer_scale" in entry)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, entry["drop_path"], len(blocks)))


@pytest.mark.parametrize("name", NAMES)
def test_layer_scale_starts_at_the_published_value(name: str) -> None:
    gammas = [parameter for key, parameter in small(name).named_parameters() if "gamma" in key]
    assert len(gammas) == (12 if "layer_scale" in PUBLISHED[name] else 0)
    assert all((gamma == PUBLISHED[name]["layer_scale"]).all() for gamma in gammas)


def within_rounding(actual: float, published: float) -> bool:
    digits = len(str(published).partition(".")[2])
    return abs(actual - published) <= 0.5 * 10**-digits + 0.01 * published


@pytest.mark.parametrize("name", NAMES)
def test_size_is_the_published_one(name: str) -> None:
    model, entry = full(name, num_classes=1000), PUBLISHED[name]  # the published sizes have a head for 1000 classes
    assert within_rounding(sum(p.numel() for p in model.parameters()) / 1e6, entry["params_M"])
    if "gflops" in entry:
        assert within_rounding(multiply_adds(model, (3, entry["res"], entry["res"])) / 1e9, entry["gflops"])


def test_multiply_adds_counts_what_a_layer_does() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 5))
    assert multiply_adds(layers, (3, 8, 8)) == 8 * 16 * 27 + 8 * 16 * 5
    attention = NeighborhoodAttention2D(8, num_heads=2, kernel_size=3, dilation=2)  # a 5 x 7 map becomes 6 x 7
    projections = 6 * 7 * 8 * 24 + 5 * 7 * 8 * 8
    assert multiply_adds(attention, (5, 7, 8)) == projections + 2 * 6 * 7 * 9 * 8


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg(name: str) -> None:
    model, entry = full(name), PUBLISHED[name]
    cfg = model.pretrained_cfg
    assert cfg["url"] == entry["url"]
    assert cfg["architecture"] == name and cfg["tag"] == tag(name)
    assert cfg["input_size"] == (3, entry["res"], entry["res"])
    assert cfg["crop_pct"] == (1.0 if entry["res"] == 384 else 0.875)
    assert cfg["interpolation"] == "bicubic" and cfg["license"] == "mit"
    assert cfg["paper_ids"] == ("arXiv:2204.07143" if entry["family"] == "nat" else "arXiv:2209.15001")
    assert cfg["num_classes"] == model.num_classes == (21841 if "21k" in name else 1000)
    assert timm.data.resolve_model_data_config(model)["input_size"] == cfg["input_size"]


# --- timm's contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_full_size_forward_agrees_with_the_cfg(name: str) -> None:
    model = full(name)
    cfg, batch = model.pretrained_cfg, torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    features = model.forward_features(batch)
    assert model.output_fmt == "NHWC"
    assert tuple(features.shape) == (1, *cfg["pool_size"], model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model(batch).shape == (1, model.num_classes)
    for layer in (cfg["classifier"], cfg["first_conv"]):
        assert f"{layer}.weight" in model.state_dict()
    model.reset_classifier(0)
    assert model(batch).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert (
        model(batch).shape == full(f"{name}.{tag(name)}", num_classes=0, global_pool="")(batch).shape == features.shape
    )


@pytest.mark.parametrize("name", NAMES)
def test_training_step(name: str) -> None:
    model = small(name, num_classes=42).train()
    output = model(images(2, 3, 64, 96))
    assert output.shape == (2, 42) and output.isfinite().all()
    output.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_changes_nothing(name: str) -> None:
    plain = small(name, drop_path_rate=0.0)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    batch = images(2, 3, 64, 64)
    plain(batch).square().mean().backward()
    checkpointed(batch).square().mean().backward()
    for (key, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=key)
    assert all(module.grad_checkpointing for module in checkpointed.modules() if isinstance(module, Block))
    checkpointed.set_grad_checkpointing(False)
    assert not any(module.grad_checkpointing for module in checkpointed.modules() if isinstance(module, Block))


def test_grad_checkpointing_computes_blocks_again() -> None:
    model = small("nat_mini")
    calls = []
    model.stages[0].blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        model(images(1, 3, 64, 64)).sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("name", SMALL)
def test_classifier_can_be_reset(name: str) -> None:
    model, batch = small(name).eval(), images(2, 3, 64, 64)
    pooled = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(batch).shape == (2, 7)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2) and not model.head.bias.any()
    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(batch), pooled)
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(batch), model.forward_features(batch).amax(dim=(1, 2)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(batch), model.forward_features(batch))
    headless = small(name, num_classes=0, global_pool="").eval()
    torch.testing.assert_close(headless(batch), model(batch))


@pytest.mark.parametrize("feature_cls", [None, "list", "getter"])
@pytest.mark.parametrize("name", NAMES)
def test_full_size_features_agree_with_their_info(name: str, feature_cls: str | None) -> None:
    model = full(name, features_only=True, **({} if feature_cls is None else {"feature_cls": feature_cls}))
    channel_axis, spatial_axes = get_channel_dim(model.output_fmt), get_spatial_dim(model.output_fmt)
    outputs = model(torch.empty(2, 3, 128, 192, device="meta"))
    assert len(outputs) == len(model.feature_info.channels()) >= 3
    for output, count, reduction in zip(
        outputs, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert output.shape[channel_axis] == count
        assert [output.shape[axis] for axis in spatial_axes] == [128 // reduction, 192 // reduction]


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
@pytest.mark.parametrize("name", SMALL)
def test_features_are_the_intermediates(name: str, feature_cls: str) -> None:
    model, batch = small(name, features_only=True, feature_cls=feature_cls).eval(), images(1, 3, 64, 96)
    outputs = model(batch)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    fmt = model.output_fmt.value
    expected = small(name).eval().forward_intermediates(batch, len(outputs), output_fmt=fmt, intermediates_only=True)
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("feature_cls", ["list", "hook", "getter"])
@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (-2, -1), 2])
@pytest.mark.parametrize("name", ["nat_small", "dinat_s_tiny", "nat_isotropic_small"])
def test_features_of_chosen_stages(name: str, out_indices: Any, feature_cls: str) -> None:
    model = small(name, features_only=True, out_indices=out_indices, feature_cls=feature_cls).eval()
    batch = images(2, 3, 64, 64)
    stages = len(small(name).stages)
    chosen = range(stages)[-out_indices:] if isinstance(out_indices, int) else [i % stages for i in out_indices]
    fmt = model.output_fmt.value
    maps = small(name).eval().forward_intermediates(batch, output_fmt=fmt, intermediates_only=True)
    for output, i in zip(model(batch), chosen, strict=True):
        torch.testing.assert_close(output, maps[i])
    if name == "nat_isotropic_small":
        assert (model.feature_info.channels(), model.feature_info.reduction()) == (
            [32] * len(chosen),
            [16] * len(chosen),
        )
    else:
        assert model.feature_info.channels() == [16 * 2**i for i in chosen]
        assert model.feature_info.reduction() == [4 * 2**i for i in chosen]


def test_features_train_with_checkpointing() -> None:
    model = small("dinat_tiny", features_only=True)
    model.set_grad_checkpointing()
    sum(output.mean() for output in model(images(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_forward_intermediates(name: str) -> None:
    model, batch = small(name).eval(), images(2, 3, 64, 96)
    final, maps = model.forward_intermediates(batch)
    torch.testing.assert_close(final, model.forward_features(batch))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    last = model.forward_intermediates(batch, [-1], norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(last, [final])
    torch.testing.assert_close(model.forward_intermediates(batch, 2, intermediates_only=True), maps[-2:])
    _, normalised = model.forward_intermediates(batch, norm=True)
    is_isotropic = len(set(info.channels())) == 1
    for i, (with_norm, without) in enumerate(zip(normalised, maps, strict=True)):
        expected = model.norm(without.movedim(1, -1)).movedim(-1, 1) if is_isotropic or i == len(maps) - 1 else without
        torch.testing.assert_close(with_norm, expected)
    model.train().set_grad_checkpointing()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    torch.testing.assert_close(model.forward_intermediates(batch, intermediates_only=True), maps)
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(batch, [len(model.stages)])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(batch, output_fmt="NLC")


def test_forward_intermediates_can_stop_early() -> None:
    model, batch = small("dinat_mini").eval(), images(1, 3, 64, 64)
    later = []
    model.stages[2].register_forward_hook(lambda *_: later.append(1))
    final, (early,) = model.forward_intermediates(batch, [1], stop_early=True)
    assert not later
    torch.testing.assert_close(final.movedim(-1, 1), early)
    torch.testing.assert_close(early, model.forward_intermediates(batch, intermediates_only=True)[1])
    final, _ = model.forward_intermediates(batch, [3], stop_early=True)
    torch.testing.assert_close(final, model.forward_features(batch))


@pytest.mark.parametrize("name", SMALL)
def test_prune_intermediate_layers(name: str) -> None:
    model, batch = small(name).eval(), images(2, 3, 64, 64)
    expected = model.forward_intermediates(batch, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(model.forward_intermediates(batch, [0, 1], intermediates_only=True), expected)
    assert len(model.stages) == 2 and model.num_classes == 0
    assert model.num_features == model.feature_info[1]["num_chs"]
    assert model(batch).shape == (2, *expected[1].shape[2:], model.num_features)
    model.reset_classifier(3, "avg")
    assert model(batch).shape == (2, 3)
    model.reset_classifier(0, "")
    sum(m.mean() for m in model.train().forward_intermediates(batch, intermediates_only=True)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pruning_keeps_what_is_asked_for() -> None:
    model = small("nat_mini")
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert isinstance(model.norm, nn.LayerNorm) and model.num_classes == 1000
    model.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    assert isinstance(model.norm, nn.Identity) and model.num_classes == 1000


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups_follow_the_depth(name: str) -> None:
    model = small(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    blocks = [layers[f"{key}.norm1.weight"] for key, m in model.named_modules() if isinstance(m, Block)]
    assert blocks == list(range(1, len(blocks) + 1))
    assert all(layers[key] == 0 for key in layers if key.startswith("patch_embed"))
    assert layers["norm.weight"] == blocks[-1] and layers["head.weight"] == blocks[-1] + 1
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) == len(model.stages) + 1


def test_downsampling_belongs_to_the_stage_before() -> None:
    model = small("nat_mini")
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["levels.0.downsample.reduction.weight"] == layers["levels.0.blocks.1.norm1.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_and_weight_decay(name: str) -> None:
    model = small(name)
    biases = {key for key, _ in model.named_parameters() if key.endswith(".rpb")}
    assert len(biases) == 6 and model.no_weight_decay() == biases
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == {id(p) for key, p in model.named_parameters() if p.ndim < 2 or key in biases}
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.patch_embed.norm.weight)] == pytest.approx(0.5**7)


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (75, 40), (224, 32)])
@pytest.mark.parametrize("name", SMALL)
def test_any_input_size(name: str, size: tuple[int, int]) -> None:
    model = small(name).eval()
    with torch.no_grad():
        logits = model(images(1, 3, *size))
    assert logits.shape == (1, model.num_classes) and logits.isfinite().all()


@pytest.mark.parametrize("in_chans", [1, 2, 4])
@pytest.mark.parametrize("name", SMALL)
def test_input_channels(name: str, in_chans: int) -> None:
    model = small(name, in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(images(1, in_chans, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(name: str) -> None:
    model, batch = small(name).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model(batch), expected) < 0.05
        assert relative_error(model.bfloat16()(batch.bfloat16()).float(), expected) < 0.05


@pytest.mark.parametrize("name", SMALL)
def test_fx_tracing(name: str) -> None:
    model, batch = small(name).eval(), images(1, 3, 64, 64)
    leaves = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    options: dict[str, Any] = dict(tracer_kwargs=leaves, suppress_diff_warning=True)
    nodes = get_graph_node_names(model, **options)[1]
    traced = create_feature_extractor(model, return_nodes=[nodes[-1]], **options)
    with torch.no_grad():
        torch.testing.assert_close(traced(batch)[nodes[-1]], model(batch))


@pytest.mark.parametrize("name", SMALL)
def test_fx_training(name: str) -> None:
    model = small(name, num_classes=42, drop_path_rate=0.0).train()
    leaves = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    options: dict[str, Any] = dict(tracer_kwargs=leaves, suppress_diff_warning=True)
    nodes = get_graph_node_names(model, **options)
    traced = create_feature_extractor(
        model, train_return_nodes=nodes[0][-1:], eval_return_nodes=nodes[1][-1:], **options
    )
    (output,) = traced(images(2, 3, 64, 64)).values()
    torch.testing.assert_close(output, model(images(2, 3, 64, 64)))
    output.square().mean().backward()
    assert traced.state_dict().keys() == model.state_dict().keys()
    assert all(parameter.grad is not None for parameter in traced.parameters())


@pytest.mark.parametrize("feature_cls", ["fx", "FX", FeatureGraphNet])
def test_features_of_a_traced_graph_are_refused(feature_cls: Any) -> None:
    with pytest.raises(ValueError, match=f"feature_cls must be 'list', .* or 'getter', got {feature_cls!r}"):
        small("nat_mini", features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_images(name: str) -> None:
    model, batch = small(name).eval(), images(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(batch)
        actual = model.to(memory_format=torch.channels_last)(batch.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dinat_tiny", dict(depths=(1, 1), num_heads=(1, 2), dilations=(8, 1))),
        ("dinat_s_tiny", dict(depths=(1, 1), num_heads=(1, 2), dilations=(4, 1))),
        ("vitrpb_small", dict(depth=2)),
    ],
)
def test_compiles_without_graph_breaks(name: str, config: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = small(name, **config).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((48, 64), (96, 80)):
        batch = images(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch), model(batch))


# --- one family only -------------------------------------------------------------------------------------------------


def test_patch_merging_takes_swin_s_order() -> None:
    merging, x = PatchMerging(3), torch.randn(2, 5, 6, 3)
    padded = torch.zeros(2, 6, 6, 3)
    padded[:, :5] = x
    corners = [padded[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    expected = F.linear(F.layer_norm(torch.cat(corners, -1), (12,)), merging.reduction.weight)
    torch.testing.assert_close(merging(x), expected)


def full_attention(module: MapAttention, x: Tensor) -> Tensor:
    """Every token attends to every other, with the bias of their distance."""
    height, width, dim = x.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down = rows.flatten()[None] - rows.flatten()[:, None] + module.kernel_size[0] - 1
    right = columns.flatten()[None] - columns.flatten()[:, None] + module.kernel_size[1] - 1
    query, key, value = (
        y.reshape(len(x), height * width, module.num_heads, -1).transpose(1, 2) for y in module.qkv(x).chunk(3, -1)
    )
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=module.rpb[:, down, right])
    return module.proj(output.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("size", [(4, 6), (2, 6), (3, 1)])
def test_full_attention_covers_the_map(size: tuple[int, int]) -> None:
    module = MapAttention(8, num_heads=2, kernel_size=(4, 6))
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(module(x), full_attention(module, x))


def test_set_input_size_of_full_attention() -> None:
    model, batch = small("vitrpb_small").eval(), images(2, 3, 96, 160)
    before = model.layers[0].attn.rpb
    model.set_input_size((96, 160))
    assert model.layers[0].attn.kernel_size == (6, 10)
    torch.testing.assert_close(model.layers[0].attn.rpb, resize_rpb(before, (11, 19)))
    again = small("vitrpb_small", img_size=(96, 160)).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(batch), again(batch))
    assert timm.models.get_model_input_config(model)["input_size"] == (3, 96, 160)


def test_neighborhoods_need_no_input_size() -> None:
    model, batch = small("nat_isotropic_small").eval(), images(1, 3, 96, 160)
    before = model(batch)
    model.set_input_size(384)
    torch.testing.assert_close(model(batch), before)


# --- the constructor -------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(st.integers(1, 2), min_size=1, max_size=4), st.data())
def test_any_number_of_stages(depths: list[int], data: st.DataObject) -> None:
    per_stage = dict(min_size=len(depths), max_size=len(depths))
    kernel_size = data.draw(st.one_of(st.integers(1, 5), st.lists(st.integers(1, 5), **per_stage)))
    turns = st.one_of(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=2))
    dilations = data.draw(st.one_of(st.none(), st.lists(turns, **per_stage)))
    model = timm.create_model(
        "nat_mini", embed_dim=8, depths=depths, num_heads=[2] * len(depths), kernel_size=kernel_size,
        dilations=dilations, num_classes=3,
    )  # fmt: skip
    assert model.num_features == 8 * 2 ** (len(depths) - 1)
    assert model(images(1, 3, 64, 64)).shape == (1, 3)
    kernels = [kernel_size] * len(depths) if isinstance(kernel_size, int) else kernel_size
    for stage, kernel in zip(model.stages, kernels, strict=True):
        assert all(block.attn.kernel_size == (kernel, kernel) for block in stage.blocks)


def test_dilations_repeat_or_are_given_in_full() -> None:
    def dilations(value: Any) -> list[int]:
        model = small("nat_mini", depths=(3, 2, 1, 1), dilations=value)
        return [module.dilation[0] for module in model.modules() if isinstance(module, NeighborhoodAttention2D)]

    assert dilations([[1, 8], 2, [3], [1, 1]]) == [1, 8, 1, 2, 2, 3, 1]
    assert dilations([[1, 2, 3], [4, 5], [6], [7]]) == [1, 2, 3, 4, 5, 6, 7]


def test_drop_rates_act_in_training_only() -> None:
    model = small("nat_mini", drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5)
    batch = images(2, 3, 32, 32)
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), model(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=()), "depths must hold at least one stage"),
        (dict(depths=3), "depths must hold at least one stage .* got 3"),
        (dict(depths=(1, 0, 1, 1)), "depths must hold .* at least one block each, .* got"),
        (dict(depths=(1, 2.0, 1, 1)), r"at least one block each, in integers, got \(1, 2.0, 1, 1\)"),
        (dict(num_heads=(1, 2)), "num_heads must hold one entry for each of the 4 stages of depths, got"),
        (dict(num_heads=(1, 2, 3, 5)), "num_heads must divide the 64 channels, got 3"),
        (dict(kernel_size=(7, 7)), "kernel_size must hold one entry for each of the 4 stages"),
        (dict(num_heads=(1, 2, 2.0, 4)), "num_heads must be an integer, at least 1, got 2.0"),
        (dict(mlp_ratio=0), "mlp_ratio must be a number, above 0, got 0"),
        (dict(kernel_size=0), "kernel_size must be at least 1, got 0"),
        (dict(kernel_size=7.0), r"kernel_size must be one integer or one per axis \(2\), got 7.0"),
        (dict(dilations=[1, 2]), "dilations must hold one entry for each of the 4 stages"),
        (dict(dilations=[1, 2, [], 1]), "dilations must hold at least one dilation per stage"),
        (dict(dilations=[1, 2, 0, 1]), "dilation must be at least 1, got 0"),
        (dict(global_pool="mean"), "global_pool must be one of 'avg', 'max', 'avgmax', '', got 'mean'"),
        (dict(num_classes=-1), "num_classes must be an integer, at least 0, got -1"),
        (dict(num_classes="10"), "num_classes must be an integer, at least 0, got '10'"),
        (dict(in_chans=0), "in_chans must be an integer, at least 1, got 0"),
        (dict(embed_dim=1), "embed_dim must be an integer, at least 2, got 1"),
        (dict(drop_path_rate=2), "drop_path_rate must be a number, at least 0 and at most 1, got 2"),
        (dict(drop_rate=-0.1), "drop_rate must be a number, at least 0 and at most 1, got -0.1"),
        (dict(proj_drop_rate=2), "proj_drop must be a number, at least 0 and at most 1, got 2"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("nat_mini", **arguments)


def test_wrong_arguments_of_isotropic_models_are_named() -> None:
    with pytest.raises(ValueError, match="depth must be an integer, at least 1, got 0"):
        small("nat_isotropic_small", depth=0)
    for name in ("nat_isotropic_small", "vitrpb_small"):
        with pytest.raises(ValueError, match="img_size must be an integer, at least 1, got 0"):
            small(name, img_size=0)
        with pytest.raises(ValueError, match=r"img_size must be one integer or \(height, width\), got \(1, 2, 3\)"):
            small(name, img_size=(1, 2, 3))
        with pytest.raises(ValueError, match="img_size must be an integer, at least 1, got 224.5"):
            small(name).set_input_size(224.5)


def test_pooling() -> None:
    x = images(2, 3, 64, 64)
    pooled = {}
    for kind in ("avg", "max", "avgmax"):
        model = small("nat_mini", global_pool=kind, num_classes=0).eval()
        assert isinstance(model, Backbone)
        pooled[kind] = model(x)
    torch.testing.assert_close(pooled["avgmax"], (pooled["avg"] + pooled["max"]) / 2)
    assert (pooled["max"] > pooled["avg"]).all()


def test_initial_weights_are_the_original_ones() -> None:
    model = small("nat_mini", embed_dim=64)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), key
            assert module.bias is None or not module.bias.any(), key
        if isinstance(module, NeighborhoodAttention2D):
            assert module.rpb.std().item() == pytest.approx(0.02, rel=0.3), key
        if isinstance(module, nn.Conv2d):  # left as PyTorch initialises them
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.abs().max().item() == pytest.approx(bound, rel=0.1), key
