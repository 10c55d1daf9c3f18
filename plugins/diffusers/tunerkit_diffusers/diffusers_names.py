"""diffusers' names of tensors: a part of the pipeline, a module's path, and what the tensor is."""

from collections.abc import Iterable
from typing import Final

from torch import nn

from tunerkit_diffusers.components import COMPONENTS, TEXT_ENCODERS
from tunerkit_diffusers.keys import Key
from tunerkit_diffusers.kohya_names import full_path

_MODERN: Final = {".lora_A.weight": "down", ".lora_B.weight": "up", ".alpha": "alpha"}
_TEXT: Final = {".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up"}
_MIDDLE: Final = {".lora.down.weight": "down", ".lora.up.weight": "up"}
# The oldest name the adapters of an attention's processor: "attn1.processor.to_q_lora.down.weight".
_OLDEST: Final = {"_lora.down.weight": "down", "_lora.up.weight": "up"}
_PARTS: Final = _MODERN | _TEXT | _MIDDLE | _OLDEST
_OLD_LEAVES: Final = {"to_out": "to_out.0"}
_OLD_TEXT_LEAVES: Final = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Parts that tunerkit cannot adapt are told apart too, for the message.
_HEADS: Final = (*COMPONENTS, "text_encoder_3", "transformer_2", "controlnet", "prior")

EXPECTED: Final = (
    "a part of the pipeline, a module's path, and .lora_A.weight or .lora_B.weight (or an older spelling of them), "
    "such as 'unet.conv_in.lora_A.weight'"
)


def is_diffusers(name: str) -> bool:
    """Check whether a file with this key is one of diffusers'."""
    head, _, rest = name.partition(".")
    return head in _HEADS and any(rest.endswith(suffix) for suffix in _PARTS if suffix != ".alpha")


def parse(name: str) -> Key | None:
    """Say what a key means. The part of the pipeline is ``""`` if the key begins with the path."""
    head, _, rest = name.partition(".")
    component, rest = (head, rest) if head in _HEADS else ("", name)
    suffix = next((suffix for suffix in _PARTS if rest.endswith(suffix)), None)
    if suffix is None:
        return None
    path = rest.removesuffix(suffix).replace(".processor.", ".")
    if suffix in _OLDEST:
        owner, _, leaf = path.rpartition(".")
        leaves = _OLD_TEXT_LEAVES if component in TEXT_ENCODERS else _OLD_LEAVES
        path = f"{owner}.{leaves.get(leaf, leaf)}"
    return Key(component, path, _PARTS[suffix])


def names_of(path: str, component: str, model: nn.Module) -> tuple[str, str]:
    """Return the names of both tensors of a module, as diffusers' own functions write them.

    For text encoders, diffusers 0.42 does not find the newer spelling outside attention.
    """
    place = f"{component}.{full_path(path, component, model)}"
    down, up = _TEXT if component in TEXT_ENCODERS else tuple(_MODERN)[:2]
    return place + down, place + up


def spellings_of(paths: Iterable[str], component: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the path that each module's name in a file stands for."""
    component = component or "text_encoder"  # names without a part may be those of any
    return {name: (path,) for path in paths for name in (full_path(path, component, model), path)}
