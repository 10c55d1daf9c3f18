"""The options of writing."""

from typing import Literal

import attrs

from tunerkit.plugin import setting

_COMPONENT = "the part of the pipeline that the model is; 'auto' takes it from the model's class"


@attrs.frozen(kw_only=True)
class DiffusersOptions:
    """The options of format ``"diffusers"``. The ``doc`` of each field explains it."""

    component: Literal["auto", "unet", "transformer", "text_encoder", "text_encoder_2"] = setting(
        "auto", doc=_COMPONENT
    )
    form: Literal["uniform", "compact"] = setting(
        "uniform",
        doc="'uniform' gives every module one rank, padded with zeros, which every version of diffusers reads; "
        "'compact' keeps each module's rank, and needs a diffusers that reads the file's metadata",
    )


@attrs.frozen(kw_only=True)
class KohyaOptions:
    """The options of format ``"kohya"``. The ``doc`` of each field explains it."""

    component: Literal["auto", "unet", "text_encoder", "text_encoder_2"] = setting("auto", doc=_COMPONENT)
