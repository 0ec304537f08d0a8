"""Image and video datasets, decoding, transforms and the data modules. Imports neither models nor the engine."""

from nat_models.data.datamodule import ImageDataModule
from nat_models.data.datasets import UndecodableImageError, create_source
from nat_models.data.video.datamodule import VideoDataModule
from nat_models.data.video.decoding import VideoError

DataModule = ImageDataModule | VideoDataModule

__all__ = [
    "DataModule",
    "ImageDataModule",
    "UndecodableImageError",
    "VideoDataModule",
    "VideoError",
    "create_source",
]
