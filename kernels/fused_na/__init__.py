"""Fused neighborhood attention in one, two and three dimensions.

    from fused_na import na2d
    output = na2d(query, key, value, kernel_size=7, dilation=2)  # tensors are [B, H, W, heads, head_dim]
"""

from fused_na.functional import merge_attentions, na1d, na2d, na3d, neighborhood_attention

__all__ = ["merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention"]
