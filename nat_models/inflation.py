"""Inflation: weights of an image model -> those of the video model of its dimensions.

- Convolutions get the weights for each of the frames that they join, divided by their number.
- What only video models have starts new, at zero: biases of distances in time, and the output of attention in time.
- The rest stays, biases of distances in space included.

On a clip that stands still the video model then answers as the image model does.

Source: Quo Vadis, Action Recognition?, https://arxiv.org/abs/1705.07750, section 2.4.
"""

from collections.abc import Mapping

from torch import Tensor


def is_of_images(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether `weights` have convolutions over images where the model's, `expected`, go over clips."""
    return any(
        value.dim() == 4 and expected[key].dim() == 5
        for key, value in weights.items()
        if key.endswith(".weight") and key in expected
    )


def inflate(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights with convolutions over clips.

    Args:
        weights: of an image model, by their original names.
        expected: the video model's state dict, of which only shapes matter.

    Returns:
        The weights; the names of those that were inflated; the names of biases that were left out, as a model with
        rotary embeddings has no use for them.
    """
    left_out = [key for key in weights if key.endswith(".rpb") and key not in expected]
    result = {key: value for key, value in weights.items() if key not in left_out}
    inflated = [key for key in result if result[key].dim() == 4 and key in expected and expected[key].dim() == 5]
    for key in inflated:
        frames = expected[key].shape[2]
        result[key] = result[key].unsqueeze(2).repeat_interleave(frames, 2) / frames
    return result, inflated, left_out


def temporal_parameters(expected: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that only video models have, all called `temporal_...`."""
    return [key for key in expected if ".temporal_" in key]
