"""The options of writing a PEFT folder."""

from typing import Literal

import attrs

from tunerkit.plugin import setting


@attrs.frozen
class PeftOptions:
    """The options of ``tunerkit.export(model, folder, format="peft", ...)``. The ``doc`` of each field explains it."""

    form: Literal["own", "uniform", "compact", "adalora", "experts"] | None = setting(
        None,
        doc="own: PEFT's type of the method itself, if the method declares PEFT's names; uniform: a LoRA of one rank, "
        "padded with zeros, which every server reads; compact: a LoRA with the rank of each module; adalora: PEFT's "
        "AdaLoRA; experts: as uniform, with matrices for each expert of a stack, as engines read them; None: own if "
        "the method declares the names, else uniform",
    )
    rank: int | None = setting(
        None,
        ge=1,
        le=4096,
        doc="the rank of the uniform form; None: the next one above all ranks that servers allow",
    )
    base: str | None = setting(
        None, doc="the name of the base model in the files, which some servers compare; None: the one it came from"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", doc="the dtype of the adapter's matrices; the narrower ones round them"
    )
