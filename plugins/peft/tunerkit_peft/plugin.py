"""The format that this plugin brings, and what cannot be done with a model into which peft has put layers."""

from collections.abc import Iterable

from tunerkit.plugin import Format, Restriction, hookimpl
from tunerkit_peft.config_objects import settings_of
from tunerkit_peft.folders import sniff
from tunerkit_peft.reading import describe, read
from tunerkit_peft.writing import PeftOptions, write


@hookimpl
def tunerkit_formats() -> Iterable[Format]:
    """Register the format."""
    return [
        Format("peft", sniff=sniff, read=read, write=write, options=PeftOptions, describe=describe, config=settings_of)
    ]


_UNLOAD = (
    "Call unload() on the PeftModel, then tunerkit.thaw(model, 'default'), since peft froze your adapter. A second one "
    "is wrap(..., adapter='second'), without peft_config"
)
LAYERS_OF_PEFT = Restriction(
    "peft",
    classes=(
        "peft.peft_model.PeftModel",
        "peft.tuners.tuners_utils.BaseTunerLayer",
        "peft.utils.other.AuxiliaryTrainingWrapper",
    ),
    refused={
        "wrap": "this is a PeftModel, or holds layers of one, so an adapter would be put on top of peft's. Call "
        "merge_and_unload() on it to keep what peft trained, or unload() to drop that, and wrap what it returns",
        "attach": f"peft has put layers of its own into the wrapped model. {_UNLOAD}",
        "save": f"peft has put layers of its own in, and the file would fit no base. {_UNLOAD}",
    },
)


@hookimpl
def tunerkit_restrictions() -> Iterable[Restriction]:
    """Register what is refused."""
    return [LAYERS_OF_PEFT]
