"""Image datasets, decoding, transforms and the data module. Imports neither models nor the engine."""

from nat_models.data.datamodule import ImageDataModule
from nat_models.data.datasets import UndecodableImageError, create_source

__all__ = ["ImageDataModule", "UndecodableImageError", "create_source"]
