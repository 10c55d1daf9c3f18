"""Which type of adapter a PEFT folder holds, and who reads it: this plugin itself, or the names that a method gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tunerkit.errors import closest, shown
from tunerkit.plugin import FileError
from tunerkit_peft.declaration import Declared, declarations, declared_by

_OWN: Final = ("LORA", "ADALORA")
# The types that methods of tunerkit-methods read.
IN_METHODS: Final = (
    *("LOHA", "LOKR", "VERA", "IA3", "OFT", "BOFT", "HRA", "RANDLORA", "VBLORA", "FOURIERFT", "C3A", "MISS", "ROAD"),
    *("SHIRA", "DELORA", "TINYLORA", "LN_TUNING", "TRAINABLE_TOKENS"),
)
# The types of peft 0.21 that no method reads.
_OF_PEFT: Final = (
    *("ADAMSS", "BEFT", "LILY", "FROD", "PVERA", "GLORA", "UNILORA", "HIRA", "WAVEFT", "OSF", "GRALORA", "PSOFT"),
    *("PEANUT", "SUPERTUNING", "DEFT", "POLY", "XLORA"),
)
# Those that change no weight, so that they cannot be merged.
_PROMPTS: Final = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
    "SHADOW",
)
BRINGS: Final = "tunerkit-methods brings one: install tunerkit[methods]"


def declared_for(found: Mapping[str, Any], source: str | Path) -> Declared | None:
    """Return the method whose names the settings of a PEFT adapter need; None for a LoRA or an AdaLoRA.

    A LoRA belongs to another method if that declares ``use_dora`` to be true, and so do the settings.

    Args:
        found: The settings by name.
        source: What an error is about.

    Raises:
        FileError: No installed method declares this type.
        PluginError: The declaration is wrong.
    """
    kind, declared = found.get("peft_type"), installed_for(found)
    if declared is None and kind not in _OWN:
        raise FileError(_unknown(source, kind))
    return declared


def installed_for(found: Mapping[str, Any]) -> Declared | None:
    """Return the method whose names the settings need; None for a LoRA or an AdaLoRA, or if none is installed.

    Of several methods for one type, it is the one that computes what the settings say.
    """
    kind = found.get("peft_type")
    if kind == "ADALORA" or (kind == "LORA" and not found.get("use_dora")):
        return None
    candidates = [each for method, given in declarations() if given == kind and (each := declared_by(method))]
    if kind == "LORA":
        candidates = [each for each in candidates if each.names.constants.get("use_dora")]
    return min(
        candidates,
        key=lambda each: sum(found.get(name) != value for name, value in each.names.constants.items()),
        default=None,
    )


def _unknown(source: str | Path, kind: object) -> str:
    if kind is None:
        return f"{source} is no PEFT adapter: it has no 'peft_type'; expected 'LORA' or 'ADALORA'"
    known = sorted({given for _, given in declarations()} - {*_OWN})
    if kind in IN_METHODS:
        return f"{source}: 'peft_type' is {shown(kind)}, and no installed method reads it. {BRINGS}"
    reads = f"tunerkit reads LORA and ADALORA{', and by installed methods ' + ', '.join(known) if known else ''}"
    if kind in _PROMPTS:
        return (
            f"{source}: 'peft_type' is {shown(kind)}, which adds no weights to layers, and tunerkit has adapters of "
            f"layers alone. Use this adapter in PEFT, or train another type; {reads}"
        )
    hint = "" if kind in _OF_PEFT else closest(str(kind), (*_OWN, *known, *IN_METHODS))
    return (
        f"{source}: 'peft_type' is {shown(kind)}, a type that tunerkit does not read{hint or '.'} Merge the adapter in "
        f"PEFT (merge_and_unload), if that type can be merged, and use the merged model as the base; {reads}"
    )
