"""Streaming models: frame by frame, in chunks and offline the same; nothing sees the future; memory is bounded."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden_models import golden, relative_error, save
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nat_models.complexity import multiply_adds
from nat_models.nat_stream import NATStream, StreamState

SIZE = (33, 46)
WIDE = [dict(), dict(position="rope"), dict(dilations=[[(2, 1, 1), (1, 2, 2)], 1]), dict(kernel_size=(1, 3, 3))]


def small(**kwargs: Any) -> NATStream:
    """Two stages with neighborhoods of 3 x 3 x 3, and a head over 6 frames."""
    config: dict[str, Any] = dict(
        embed_dim=8, depths=(2, 1), num_heads=(1, 2), kernel_size=3, num_classes=5, num_frames=6, layer_scale=None
    )
    torch.manual_seed(0)
    model = timm.create_model("nat_stream_tiny", **config | kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rpb"):
                parameter.normal_()
            elif parameter.dim() == 2:
                parameter.mul_(4)  # so that the logits differ by more than rounding
    return model


def clips(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stream(model: NATStream, clip: Tensor, chunks: list[int]) -> tuple[Tensor, StreamState]:
    state = model.init_state(len(clip), *clip.shape[3:])
    outputs = []
    for chunk in clip.split(chunks, 2):
        output, state = model.step(chunk, state)
        outputs.append(output)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("name", ["nat_stream_tiny", "nat_stream_small"])
def test_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nat_models.layers.packed_neighborhood_attention", lambda qkv, *arguments: qkv[..., 0, :, :])
    parameters, gflops = {"nat_stream_tiny": (27.5, 89), "nat_stream_small": (50, 155)}[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=400).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.02)
    assert multiply_adds(model, (3, 32, 224, 224)) / 1e9 == pytest.approx(gflops, rel=0.02)


@pytest.mark.parametrize("options", WIDE)
def test_frame_by_frame_is_offline(options: dict[str, Any]) -> None:
    model, clip = small(**options), clips(2, 3, 15, *SIZE)  # 8 maps, of which layers see 3 and the head 3
    with torch.no_grad():
        expected = model.forward_frames(clip)
        torch.testing.assert_close(model(clip), expected[:, -1])
    assert expected.shape == (2, 15, 5) and expected.std(1).max() > 0.01
    outputs, state = stream(model, clip, [1] * 15)
    assert relative_error(outputs, expected) < 1e-4
    assert state.frames.tolist() == [15, 15]


@settings(max_examples=5)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_chunks_of_any_length(chunks: list[int]) -> None:
    model, clip = small(), clips(1, 3, sum(chunks), 32, 32)
    with torch.no_grad():
        expected = model.forward_frames(clip)
    assert relative_error(stream(model, clip, chunks)[0], expected) < 1e-4


@settings(max_examples=5)
@given(st.lists(st.integers(1, 4), min_size=3, max_size=5), st.data())
def test_streams_start_anew_on_their_own(chunks: list[int], data: st.DataObject) -> None:
    """Each stream answers as if it had been alone and begun where it was reset."""
    model, clip = small(dilations=[[(2, 1, 1)], 1]), clips(3, 3, sum(chunks), 32, 32)
    starts, at, outputs, state = [0, 0, 0], 0, [], model.init_state(3, 32, 32)
    begun = [[] for _ in starts]
    with torch.no_grad():
        for chunk in chunks:
            resets = data.draw(st.lists(st.integers(0, 2), unique=True))
            if resets:
                state = state.reset(resets)
            for i in resets:
                starts[i] = at
            for i, start in enumerate(starts):
                begun[i] += [start] * chunk
            output, state = model.step(clip[:, :, at : at + chunk], state)
            outputs.append(output)
            at += chunk
        for i, firsts in enumerate(begun):
            actual = torch.cat(outputs, 1)[i]
            for start in set(firsts):
                during = [t for t, first in enumerate(firsts) if first == start]
                alone = model.forward_frames(clip[i : i + 1, :, start : during[-1] + 1])[0, during[0] - start :]
                assert relative_error(actual[during], alone) < 1e-4


@pytest.mark.parametrize("options", WIDE[:3])
def test_the_future_never_changes_the_past(options: dict[str, Any]) -> None:
    model, clip = small(**options), clips(1, 3, 10, *SIZE)
    with torch.no_grad():
        before = model.forward_frames(clip)
        features = model.forward_features(clip)
        for t in (0, 3, 4, 9):
            changed = clip.clone()
            changed[:, :, t] += 1
            after = model.forward_frames(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            first = -(-t // 2)  # frame t enters map ceil(t / 2), which is there after frame 2 * ceil(t / 2)
            assert torch.equal(model.forward_features(changed)[:, :first], features[:, :first])
            assert first == 5 or (after[:, 2 * first] != before[:, 2 * first]).any()


def test_memory_stays_over_a_thousand_frames() -> None:
    model = small(depths=(1,), num_heads=(1,), embed_dim=4)
    state, clip = model.init_state(1, 8, 8), clips(1, 3, 5, 8, 8)

    def sizes(state: StreamState) -> list[int]:
        tensors = [state.frames, state.stem, *state.past, state.pooled]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)  # no view of something larger
        return [x.nbytes for x in tensors]

    before = sizes(state)
    with torch.no_grad():
        for _ in range(200):
            output, state = model.step(clip, state)
            assert sizes(state) == before
    assert output.isfinite().all() and state.frames.tolist() == [1000]


def test_a_static_stream_is_the_image(tmp_path: Path) -> None:
    config, weights, expected = golden("nat")
    overlay = dict(file=str(save(weights, tmp_path / "weights.pth")), num_classes=config["num_classes"])
    options = config | dict(kernel_size=(3, 7, 7))
    model = timm.create_model("nat_stream_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    assert model.load_report.inflated
    clip = expected["input"][:1, :, None].expand(-1, -1, 3, -1, -1)
    outputs, _ = stream(model, clip, [1, 2])
    for output in outputs[0]:
        assert relative_error(output, expected["logits"][0]) < 1e-4


def test_steps_compile() -> None:
    torch.compiler.reset()
    model, clip = small(depths=(1,), num_heads=(1,)), clips(1, 3, 6, 32, 32)
    with torch.no_grad():
        expected = model.forward_frames(clip)
        step = torch.compile(model.step, backend="aot_eager", fullgraph=True)
        state, outputs = model.init_state(1, 32, 32), []
        for frame in clip.split(1, 2):
            output, state = step(frame, state)
            outputs.append(output)
    assert relative_error(torch.cat(outputs, 1), expected) < 1e-4


def test_steps_compile_twice_for_frames_and_a_few_times_for_chunks() -> None:
    """Frames add a map or none; chunks of any length share their graphs."""
    model, clip = small(depths=(1,), num_heads=(1,)), clips(1, 3, 50, 32, 32)
    for chunks, dynamic, most in (([1] * 4, False, 2), ([2, 3, 5, 4, 6], True, 4)):
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        step = torch.compile(model.step, backend=graphs, fullgraph=True, dynamic=dynamic)
        state = model.init_state(1, 32, 32)
        with torch.no_grad():
            for chunk in clip[:, :, : sum(chunks)].split(chunks, 2):
                state = step(chunk, state)[1].clone()  # as with CUDA graphs
        assert graphs.frame_count <= most, (chunks, graphs.frame_count)


def test_states_move_and_forget_their_history() -> None:
    model, clip = small(depths=(1,), num_heads=(1,)), clips(2, 3, 3, 32, 32)
    expected, state = model.step(clip, model.init_state(2, 32, 32))
    assert state.pooled.requires_grad and state.past[0].requires_grad
    detached = state.detach()
    assert not any(x.requires_grad for x in (detached.stem, *detached.past, detached.pooled))
    model.step(clip, detached)[0].sum().backward()
    half = state.to(dtype=torch.bfloat16)
    assert {x.dtype for x in (half.stem, *half.past, half.pooled)} == {torch.bfloat16}
    assert torch.equal(half.frames, state.frames) and half.frames.dtype == torch.int64 and half.phase == state.phase
    moved = state.to("meta")
    assert {x.device.type for x in (moved.frames, moved.stem, *moved.past, moved.pooled)} == {"meta"}
    double = model.double().step(clip.double(), model.init_state(2, 32, 32).to("cpu", torch.float64))[0]
    assert relative_error(double, expected) < 1e-4


def test_wrong_calls_of_streams_are_named() -> None:
    model, clip = small(depths=(1,), num_heads=(1,)), clips(3, 3, 2, 32, 32)
    with torch.no_grad():
        state = model.step(clip, model.init_state(3, 32, 32))[1]
        with pytest.raises(ValueError, match=r"as the state, got \[3, 3, 0, 32, 32\]; T is from 1 up"):
            model.step(clip[:, :, :0], state)
        for streams in ([3], [-1], torch.tensor([True, False]), 1, [0.5], [[0, 1]], torch.tensor([1.0, 0.0, 1.0])):
            with pytest.raises(ValueError, match=r"streams must be integers below 3 or a mask \[3\] of bools, got"):
                state.reset(streams)
        unchanged = state.reset([])
    assert all(map(torch.equal, (unchanged.stem, *unchanged.past), (state.stem, *state.past)))


def test_training_step_and_bfloat16() -> None:
    model, clip = small().train(), clips(2, 3, 6, 32, 32)
    model(clip).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model.forward_frames(clip)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = stream(model, clip, [2, 1, 3])
    assert relative_error(outputs, expected) < 0.1 and state.past[0].dtype == torch.bfloat16


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"stride in time must be 1 in streams, got \(2, 1, 1\)"):
        small(stride=(2, 1, 1))
    model = small()
    with pytest.raises(ValueError, match="height must be an integer, at least 1, got 0"):
        model.init_state(1, 0, 32)
    state = model.init_state(2, 32, 40)
    for shape in ((1, 3, 1, 32, 40), (2, 3, 1, 40, 32), (2, 1, 1, 32, 40), (2, 3, 32, 40)):
        with pytest.raises(ValueError, match=r"frames must be \[2, 3, T, 32, 40\] .* as the state, got"):
            model.step(torch.zeros(shape), state)
    frame = torch.zeros(2, 3, 1, 32, 40)
    for dtype in (torch.uint8, torch.float64):
        with pytest.raises(ValueError, match=f"frames must be torch.float32 as the model, got {dtype}"):
            model.step(frame.to(dtype), state)
    for options in (dict(embed_dim=16), dict(depths=(2, 2)), dict(kernel_size=5), dict(num_frames=8)):
        with pytest.raises(ValueError, match="state must be from init_state or step of this model"):
            model.step(frame, small(**options).init_state(2, 32, 40))
    model.reset_classifier(0, "")
    with pytest.raises(ValueError, match="step needs a model with global_pool"):
        model.step(frame, state)
    with pytest.raises(ValueError, match="forward_frames needs a model with global_pool"):
        model.forward_frames(frame)
