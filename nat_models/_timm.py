"""timm names that timm does not export; nothing else in the project imports a private timm module."""

from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._input import update_model_input_size as update_model_input_size
