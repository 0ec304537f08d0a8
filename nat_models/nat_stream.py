"""NAT for streams: joint space-time neighborhood attention, causal in time, for live video of any length.

A model answers after every frame, from that frame and those before. Its two ways to compute agree: `forward` takes a
whole clip, for training, and `step` takes the next frames and a state of bounded size. Attention in time reaches
`(kernel_size - 1) * dilation` maps back per layer, so each layer keeps that many maps of keys and values.

Names and shapes of the parameters are those of `nat_models.nat3d`, and each other's weights load.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from timm.layers import global_pool_nlc, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from fused_na import merge_attentions, na2d
from nat_models.checkpoints import nat_cfg
from nat_models.clip_layers import ClipAttention, ClipTokenizer, check_clips, rotary_angles, rotate
from nat_models.layers import Block
from nat_models.nat3d import NAT3D, SMALL, TINY, create_nat3d
from nat_models.settings import check_number

__all__ = ["NATStream", "StreamState"]  # register_model adds the entry points


class StreamState(NamedTuple):
    """What `NATStream.step` remembers of a batch of independent streams; `B` is their number.

    Attributes:
        frames: frames that each stream has had, `[B]`.
        phase: the remainder of `frames` by 2 where all streams share it, else None.
        stem: the last frame after the first convolution, `[B, C, 1, H, W]`.
        past: per layer, keys and values of the maps in reach, `[B, reach, H, W, 2, heads, head_dim]`.
        pooled: features of the last `num_frames / 2` maps, each pooled over its positions, `[B, maps, C]`.
    """

    frames: Tensor
    phase: int | None
    stem: Tensor
    past: tuple[Tensor, ...]
    pooled: Tensor

    def clone(self) -> "StreamState":
        """A copy in memory of its own; CUDA graphs (`mode="reduce-overhead"` of torch.compile) use theirs again."""
        # Contiguous as the first state, lest compiled steps compile anew.
        return self._apply(lambda x: x.clone(memory_format=torch.contiguous_format))

    def detach(self) -> "StreamState":
        """The state without its history, so that gradients of later frames end here (truncated back-propagation)."""
        return self._apply(Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "StreamState":
        """The state on a device and, `frames` excepted, in a dtype; None keeps the present one."""
        return self._apply(lambda x: x.to(device, dtype if x.is_floating_point() else None))

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "StreamState":
        past = tuple(map(function, self.past))
        return StreamState(function(self.frames), self.phase, function(self.stem), past, function(self.pooled))

    def reset(self, streams: Tensor | Sequence[int]) -> "StreamState":
        """The state with some streams at their start; the others go on.

        Args:
            streams: their indices, none or several, or a mask `[B]`.

        Raises:
            ValueError: there are no such streams.
        """
        chosen = torch.zeros_like(self.frames, dtype=torch.bool)
        which = torch.as_tensor(streams, device=chosen.device)
        is_mask, count = which.dtype == torch.bool, len(chosen)
        if is_mask:
            is_legal = which.shape == chosen.shape
        else:  # of an empty list torch makes floats
            is_legal = which.dim() == 1 and all(type(i) is int and 0 <= i < count for i in which.tolist())
        if not is_legal:
            raise ValueError(f"streams must be integers below {count} or a mask [{count}] of bools, got {streams}")
        chosen[which if is_mask else which.long()] = True

        def clear(x: Tensor) -> Tensor:
            return x.masked_fill(chosen.view(-1, *[1] * (x.dim() - 1)), 0)

        frames = clear(self.frames)
        phases = (frames % 2).unique().tolist()
        phase = phases[0] if len(phases) == 1 else None
        return StreamState(frames, phase, clear(self.stem), tuple(map(clear, self.past)), clear(self.pooled))


@register_notrace_module
class CausalTokenizer(ClipTokenizer):
    """`ClipTokenizer` that joins each frame with the one before, and the first with itself.

    The map of frames `2 * i - 1` and `2 * i` is there once the latter is; frame `2 * i + 1` adds none.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, T, H, W]` -> `[B, ceil(T / 2), H / 4, W / 4, embed_dim]`."""
        check_clips(x, self.in_chans)
        x = self.proj[0](x)
        return self.norm(self.proj[1](torch.cat([x[:, :, :1], x], 2)).movedim(1, -1))

    def step(self, x: Tensor, state: StreamState) -> tuple[Tensor, Tensor, Tensor | None]:
        """The maps that new frames `x [B, in_chans, T, H, W]` add.

        Returns:
            The maps `[B, N, H / 4, W / 4, embed_dim]`; the last frame for the next state; and where streams differ in
            phase and `T` is odd a mask `[B]` of those whose last map is void, as they have one less.
        """
        num_frames = x.shape[2]
        x = self.proj[0](x)
        is_first = (state.frames == 0).view(-1, 1, 1, 1, 1)
        pairs = torch.cat([torch.where(is_first, x[:, :, :1], state.stem.to(x.dtype)), x], 2)
        idle = None
        if state.phase is not None:
            pairs = pairs[:, :, state.phase :]
        else:
            is_odd = state.frames % 2 == 1
            shifted = torch.cat([pairs[:, :, 1:], x[:, :, -1:]], 2)
            pairs = torch.where(is_odd.view(-1, 1, 1, 1, 1), shifted, pairs)
            idle = is_odd if num_frames % 2 else None
        last = x[:, :, -1:].clone()
        if pairs.shape[2] < 2:
            height, width = (-(-n // 2) for n in x.shape[3:])
            return x.new_empty(len(x), 0, height, width, self.norm.normalized_shape[0]), last, idle
        return self.norm(self.proj[1](pairs).movedim(1, -1)), last, idle


@register_notrace_module
class StreamAttention(ClipAttention):
    """`ClipAttention` that is causal in time; arguments likewise, but that `stride` in time must be 1."""

    def __init__(self, dim: int, num_heads: int, position: str = "rpb", **options: Any) -> None:
        super().__init__(dim, num_heads, position, is_causal=(True, False, False), **options)
        if self.stride[0] != 1:
            raise ValueError(f"stride in time must be 1 in streams, got {self.stride}")

    @property
    def reach(self) -> int:
        """How many maps back attention goes."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def padded(self, spatial: Sequence[int]) -> list[int]:
        """Height and width that a map `[H, W]` has in attention."""
        return [max(n, k * d) for n, k, d in zip(spatial, self.kernel_size[1:], self.dilation[1:], strict=True)]

    def step(self, x: Tensor, past: Tensor, seen: Tensor, idle: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `forward` computes for the new maps of a stream.

        A map's queries meet the keys of each map in reach as if these were further heads of attention in space; their
        answers are then merged into one softmax.

        Args:
            x: new maps `[B, N, H, W, dim]`, `N` at least 1.
            past: see `StreamState.past`.
            seen: maps that each stream has had, `[B]`.
            idle: see `CausalTokenizer.step`.

        Returns:
            `[B, N, H, W, dim]`, and the past for the next step.
        """
        spatial, (batch_size, new) = x.shape[2:4], x.shape[:2]
        padding = [p - n for p, n in zip(self.padded(spatial), spatial, strict=True)]
        if any(padding):
            x = F.pad(x, [0, 0, *chain.from_iterable((0, after) for after in reversed(padding))])
        query, *key_value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((1, 2), -3)
        joined = torch.cat([past.to(query.dtype), *key_value], 1)

        frames, distance = self.kernel_size[0], self.dilation[0]
        starts = [self.reach - i * distance for i in range(frames)]
        in_reach = torch.stack([joined[:, start : start + new] for start in starts], 4)
        key, value = in_reach.flatten(0, 1).unbind(4)  # each [B * N, H, W, frames, heads, head_dim]
        query = query.flatten(0, 1)
        if self.position == "rope":
            times = -distance * torch.arange(frames, device=x.device)
            grid = [torch.arange(n, device=x.device) for n in key.shape[1:3]]
            angles = rotary_angles([times, *grid], query.shape[-1]).movedim(0, 2)
            query, key = rotate(query, angles[:, :, :1]), rotate(key, angles)
        _, rpb = self.neighborhood([frames * distance, *spatial])
        if rpb is not None:
            rpb = rpb[:, :frames].flip(1).transpose(0, 1).flatten(0, 1)
        output, lse = na2d(
            query.expand_as(key).flatten(3, 4),
            key.flatten(3, 4),
            value.flatten(3, 4),
            self.kernel_size[1:],
            self.stride[1:],
            self.dilation[1:],
            scale=self.qk_scale,
            rpb=rpb,
            return_lse=True,
        )
        age = distance * torch.arange(frames, device=x.device) - torch.arange(new, device=x.device)[:, None]
        is_before_start = (age > seen[:, None, None]).view(-1, 1, 1, frames, 1)
        lse = lse.unflatten(3, (frames, -1)).masked_fill(is_before_start, float("-inf"))
        output, _ = merge_attentions(output.unflatten(3, (frames, -1)).unbind(3), lse.unbind(3))
        output = output[:, : spatial[0], : spatial[1]].flatten(-2).unflatten(0, (batch_size, new))
        return self.proj_drop(self.proj(output)), _keep_last(joined, self.reach, idle)


class NATStream(NAT3D):
    """Causal NAT for streams; arguments as for `NAT3D`, but that `stride` in time must be 1.

    Logits are those of the features' mean over the last `num_frames` frames, or all where there are less.
    """

    embed_layer: ClassVar[Callable[..., nn.Module]] = CausalTokenizer
    patch_embed: CausalTokenizer
    levels: Any

    def make_block(self, dim: int, attention: dict[str, Any], block: dict[str, Any]) -> nn.Module:
        """A block of `dim` channels, from the keywords of `StreamAttention` and of `Block`."""
        return Block(dim, StreamAttention(dim, **attention), **block)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of a clip -> logits `[B, num_classes]` after its last frame, or with `pre_logits` pooled features."""
        if not self.global_pool:
            return super().forward_head(x, pre_logits)
        x = self.head_drop(self._running_mean(self._pool(x))[:, -1])
        return x if pre_logits else self.head(x)

    def forward_frames(self, x: Tensor) -> Tensor:
        """Clips `[B, in_chans, T, H, W]` -> logits `[B, T, num_classes]` after each frame.

        Raises:
            ValueError: `x` is no clip for the model, or the model is without pooling.
        """
        self._check_pooling("forward_frames")
        means = self._running_mean(self._pool(self.forward_features(x)))
        return self.head(self.head_drop(means)).repeat_interleave(2, 1)[:, : x.shape[2]]

    def init_state(self, batch: int, height: int, width: int) -> StreamState:
        """The state before the first frame.

        Args:
            batch: number of independent streams.
            height: of the frames, in pixels.
            width: likewise.

        Raises:
            ValueError: a number below 1.
        """
        for name, value in (("batch", batch), ("height", height), ("width", width)):
            check_number(name, value, 1, whole=True)
        weight = self.patch_embed.norm.weight
        stem, *past, pooled = (weight.new_zeros(shape) for shape in self._state_shapes(batch, _halved((height, width))))
        frames = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return StreamState(frames, 0, stem, tuple(past), pooled)

    def _state_shapes(self, batch: int, spatial: list[int]) -> list[list[int]]:
        """Of a state's `stem`, whose height and width are `spatial`, each `past`, and `pooled`."""
        shapes = [[batch, self.embed_dim // 2, 1, *spatial]]
        for level in self.levels:
            spatial = _halved(spatial)
            for attn in (block.attn for block in level.blocks):
                head_dim = attn.proj.in_features // attn.num_heads
                shapes.append([batch, attn.reach, *attn.padded(spatial), 2, attn.num_heads, head_dim])
        return [*shapes, [batch, self._window, self.num_features]]

    def step(self, frames: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Takes the next frames of each stream.

        Args:
            frames: `[B, in_chans, T, H, W]`, `T` from 1 up. Attention takes memory for `T * kernel_size` maps, so long
                clips are for `forward_frames`.
            state: from `init_state` or the step before; remains valid.

        Returns:
            Logits `[B, T, num_classes]` after each frame, and the state for the next step.

        Raises:
            ValueError: a state of another model, frames that it is not for, or a model without pooling.
        """
        self._check_pooling("step")
        shapes = [list(x.shape) for x in (state.stem, *state.past, state.pooled)]
        if shapes != self._state_shapes(len(state.frames), shapes[0][3:]):
            raise ValueError("state must be from init_state or step of this model, got one of another model")
        is_legal = frames.dim() == 5 and frames.shape[:2] == (len(state.frames), self.in_chans) and frames.shape[2] > 0
        if not is_legal or _halved(frames.shape[3:]) != shapes[0][3:]:
            height, width = (2 * n for n in shapes[0][3:])
            raise ValueError(
                f"frames must be [{len(state.stem)}, {self.in_chans}, T, {height}, {width}] (or a pixel less) "
                f"as the state, got {list(frames.shape)}; T is from 1 up"
            )
        dtype, is_cast = self.patch_embed.norm.weight.dtype, torch.is_autocast_enabled(frames.device.type)
        if frames.dtype != dtype and not (is_cast and frames.is_floating_point()):
            raise ValueError(f"frames must be {dtype} as the model, got {frames.dtype}")
        num_frames, seen = frames.shape[2], (state.frames + 1) // 2
        x, stem, idle = self.patch_embed.step(frames, state)
        past = state.past
        if x.shape[1]:
            past, pasts = (), iter(state.past)
            for level in self.levels:
                for block in level.blocks:
                    branch, kept = block.attn.step(block.norm1(x), next(pasts), seen, idle)
                    x = block.add_branch(x, branch, block.gamma1)
                    x = block.add_branch(x, block.mlp(block.norm2(x)), block.gamma2)
                    past += (kept,)
                x = x if level.downsample is None else level.downsample(x)
            x = self._pool(self.norm(x))
        else:
            x = state.pooled[:, :0]
        joined = torch.cat([state.pooled.to(x.dtype), x], 1)
        logits = self.head(self.head_drop(self._window_means(joined, seen)))
        index = (torch.arange(num_frames, device=x.device) + 2 - state.frames[:, None] % 2) // 2  # maps so far
        # Not take_along_dim, which makes compiled steps specific to the number of frames.
        logits = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
        phase = None if state.phase is None else (state.phase + num_frames) % 2
        pooled = _keep_last(joined, self._window, idle)
        return logits, StreamState(state.frames + num_frames, phase, stem, past, pooled)

    def _check_pooling(self, method: str) -> None:
        if not self.global_pool:
            raise ValueError(f"{method} needs a model with global_pool, got global_pool=''")

    @property
    def _window(self) -> int:
        """Maps over which the head takes the mean."""
        return -(-self.num_frames // 2)

    def _pool(self, x: Tensor) -> Tensor:
        """Maps `[B, N, H, W, C]` -> `[B, N, C]`."""
        return global_pool_nlc(x.flatten(2, 3).flatten(0, 1), self.global_pool, num_prefix_tokens=0).unflatten(
            0, x.shape[:2]
        )

    def _running_mean(self, pooled: Tensor) -> Tensor:
        """Features `[B, N, C]` of a stream from its start -> their means after each map, of the same shape."""
        seen = torch.zeros(pooled.shape[0], dtype=torch.int64, device=pooled.device)
        return self._window_means(F.pad(pooled, (0, 0, self._window, 0)), seen)[:, 1:]

    def _window_means(self, pooled: Tensor, seen: Tensor) -> Tensor:
        """Means over windows of the features `[B, window + N, C]`, `[B, N + 1, C]`.

        Args:
            pooled: features, zero before the start of a stream.
            seen: maps `[B]` of each stream before the last `N`.
        """
        sums = F.avg_pool1d(pooled.mT, self._window, stride=1) * self._window
        count = seen[:, None] + torch.arange(sums.shape[-1], device=pooled.device)
        return sums.mT / count.clamp(1, self._window).unsqueeze(-1)


def _halved(spatial: Sequence[int]) -> list[int]:
    """Height and width after a convolution of stride 2."""
    return [-(-n // 2) for n in spatial]


def _keep_last(x: Tensor, count: int, idle: Tensor | None) -> Tensor:
    """The last `count` entries along axis 1 of `x [B, N, ...]`, without the very last where `idle [B]`."""
    start = x.shape[1] - count
    kept = x[:, start:]
    if idle is not None and count:
        kept = torch.where(idle.view(-1, *[1] * (x.dim() - 1)), x[:, start - 1 : -1], kept)
    return kept.clone()


default_cfgs = generate_default_cfgs(
    {
        "nat_stream_tiny.in1k": nat_cfg("nat_tiny.pth"),
        "nat_stream_small.in1k": nat_cfg("nat_small.pth"),
    }
)


@register_model
def nat_stream_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Stream-Tiny: 28 M parameters, causal NAT3D-Tiny."""
    return create_nat3d(NATStream, "nat_stream_tiny", pretrained, **dict(TINY, drop_path_rate=0.1) | kwargs)


@register_model
def nat_stream_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Stream-Small: 51 M parameters, layer scale, causal NAT3D-Small."""
    args = dict(SMALL, layer_scale=1e-5, drop_path_rate=0.2)
    return create_nat3d(NATStream, "nat_stream_small", pretrained, **args | kwargs)
