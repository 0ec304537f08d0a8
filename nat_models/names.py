"""Checking the names of models before anything is built."""

import timm

import nat_models  # noqa: F401  registers the models with timm
from nat_models.settings import names_hint


def check_model_name(model_name: str, argument: str = "model.model_name") -> None:
    """Raises ValueError, with the nearest names, unless timm knows `model_name` and its pretrained tag, if any.

    Args:
        model_name: name in timm's registry; those with a source (`hf-hub:...`, `local-dir:...`) are left to timm.
        argument: what to call it in the error.
    """
    if ":" in model_name:
        return
    if timm.is_model(model_name):
        try:
            timm.get_pretrained_cfg(model_name)
        except RuntimeError as error:
            raise ValueError(f"{argument}={model_name!r}: {error}") from error
        return
    raise ValueError(f"{argument}={model_name!r} is not a registered model{names_hint(model_name, timm.list_models())}")
