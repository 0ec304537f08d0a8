"""timm's image transforms, repaired where a recent Pillow no longer does what they count on."""

from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform

__all__ = ["create_transform"]


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    """timm's posterize for 0 bits too, which RandAugment asks for at its highest level: a black image.

    Pillow made one until it came to refuse 0 bits; the published recipes were trained with it.
    """
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


auto_augment.NAME_TO_OP |= {"Posterize": _posterize, "PosterizeIncreasing": _posterize}
