"""The options of writing a GGUF file."""

from typing import Literal

import attrs

from tunerkit.plugin import setting


@attrs.frozen
class GgufOptions:
    """The options of ``tunerkit.export(model, path, format="gguf")``. The ``doc`` of each field explains it."""

    dtype: Literal["f32", "f16"] = setting("f32", doc="how numbers are stored; f16 halves the file and rounds")
