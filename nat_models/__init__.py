"""A vision model zoo of Neighborhood Attention Transformers for images and video, registered with timm on import."""

from nat_models import nat as nat
