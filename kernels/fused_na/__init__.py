"""Fused neighborhood attention in one, two and three dimensions: `fused_na.na2d(query, key, value, kernel_size=7)`."""

from fused_na.functional import (
    available_backends,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    packed_neighborhood_attention,
)

__all__ = [
    "available_backends",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "packed_neighborhood_attention",
]
