"""A vision model zoo of Neighborhood Attention Transformers for images and video, registered with timm on import."""

from nat_models import dinat_s as dinat_s
from nat_models import nat as nat
from nat_models import nat3d as nat3d
from nat_models import nat_iso3d as nat_iso3d
from nat_models import nat_isotropic as nat_isotropic
from nat_models import nat_stream as nat_stream
