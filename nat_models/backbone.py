"""What all families share: timm's interface of a classifier and backbone around a tokenizer and a sequence of stages.

A family sets `patch_embed`, the stages (an `nn.Sequential` under the name `stages_name`), `feature_info`, and calls
`init_head`. timm's contract for these methods: https://huggingface.co/docs/timm/feature_extraction.
"""

from typing import Any, ClassVar

from timm.layers import global_pool_nlc, trunc_normal_
from torch import Tensor, nn

from nat_models._timm import feature_take_indices
from nat_models.layers import Block
from nat_models.settings import check_number

GLOBAL_POOLS = ("avg", "max", "avgmax", "")


class Backbone(nn.Module):
    """Base of the families: classification head, features, pruning, parameter groups.

    Maps are channels-last (`output_fmt`); the children are registered in the order of the computation, so that timm's
    `FeatureListNet` can run them one after the other.
    """

    output_fmt: ClassVar[str] = "NHWC"
    stages_name: ClassVar[str]
    stage_pattern: ClassVar[list[tuple[str, tuple[int, ...] | None]]]
    """Regular expressions for the parameters of a block below `stages_name.<i>`, and timm's ordinal suffix."""

    patch_embed: nn.Module
    norm: nn.Module
    head: nn.Module
    feature_info: list[dict[str, Any]]
    num_features: int

    def init_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Adds final norm, dropout and classifier, then initialises the linear layers as the original code does.

        Args:
            num_features: channels of the last stage.
            num_classes: outputs of the classifier; 0 leaves it out.
            global_pool: "avg", "max", "avgmax" (their mean), or "" for no pooling.
            drop_rate: dropout rate before the classifier.

        Raises:
            ValueError: an unknown `global_pool`, or a number out of its range.
        """
        check_number("drop_rate", drop_rate, 0, 1)
        self.num_features = self.head_hidden_size = num_features
        self.norm = nn.LayerNorm(num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(_init_weights)
        self.reset_classifier(num_classes, global_pool)

    @property
    def stages(self) -> nn.Sequential:
        """The stages, from the largest map to the smallest."""
        return getattr(self, self.stages_name)

    def get_classifier(self) -> nn.Module:
        """The classifier: `nn.Linear`, or `nn.Identity` without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new, randomly initialised classifier in place.

        Args:
            num_classes: its outputs; 0 leaves it out.
            global_pool: new pooling, see `init_head`; None keeps the present one.
        """
        check_number("num_classes", num_classes, 0, whole=True)
        if global_pool is not None:
            if global_pool not in GLOBAL_POOLS:
                raise ValueError(
                    f"global_pool must be one of {', '.join(map(repr, GLOBAL_POOLS))}, got {global_pool!r}"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, *spatial]` -> normalised map of the last stage `[B, *spatial, num_features]`."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map -> logits `[B, num_classes]`, or with `pre_logits` the pooled features `[B, num_features]`."""
        if self.global_pool:
            x = global_pool_nlc(x.flatten(1, -2), self.global_pool, num_prefix_tokens=0)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, *spatial]` -> logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of chosen stages.

        Args:
            x: images `[B, in_chans, *spatial]`.
            indices: stages to return; an int means that many last ones, None all.
            norm: apply the final norm to the last stage's map, and to all of an isotropic model.
            stop_early: leave out the stages after the last chosen one.
            output_fmt: format of the maps, channels-first ("NCHW", of clips also "NCTHW") or channels-last ("NHWC",
                "NTHWC").
            intermediates_only: return the list of maps alone.

        Returns:
            The final map (channels-last, as `forward_features` returns it) and the list of maps.
        """
        channels_first = f"NC{self.output_fmt[1:-1]}"
        output_fmt = {"NCHW": channels_first, "NHWC": self.output_fmt}.get(output_fmt, output_fmt)
        if output_fmt not in (channels_first, self.output_fmt):
            raise ValueError(f"output_fmt must be {channels_first!r} or {self.output_fmt!r}, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        is_isotropic = len({stage["num_chs"] for stage in self.feature_info}) == 1
        x = self.patch_embed(x)
        intermediates = []
        for i, stage in enumerate(list(self.stages)[: max_index + 1 if stop_early else None]):
            x = stage(x)
            if i in take_indices:
                features = x[0] if isinstance(x, tuple) else x
                features = self.norm(features) if norm and (i == last or is_isotropic) else features
                intermediates.append(features.movedim(-1, 1).contiguous() if output_fmt == channels_first else features)
        if intermediates_only:
            return intermediates
        if isinstance(x, tuple):  # stopped early, before the next stage's map
            x = x[0]
        elif not stop_early or max_index == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the chosen stages do not need; norm and head always go when later stages do.

        Args:
            indices: stages to keep; an int means that many last ones.
            prune_norm: drop the final norm.
            prune_head: drop the classifier and the pooling.

        Returns:
            The kept indices, counted from the first stage.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        if shortened:
            setattr(self, self.stages_name, self.stages[: max_index + 1])
            if hasattr(self.stages[-1], "downsample"):
                self.stages[-1].downsample = None  # type: ignore[assignment]
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if shortened or prune_norm:
            self.norm = nn.Identity()
        if shortened or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks keep only their input for the backward pass and compute the rest again."""
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters make one layer, for layer-wise learning-rate decay: stages if `coarse`, else blocks."""
        stage = rf"^{self.stages_name}\.(\d+)"
        blocks = [(stage + pattern, suffix) for pattern, suffix in self.stage_pattern]
        return {"stem": r"^patch_embed", "blocks": stage if coarse else [*blocks, (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Names of the relative positional biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
