"""timm names that timm does not export; nothing else in the project imports a private timm module."""

from timm.models._features import feature_take_indices as feature_take_indices
