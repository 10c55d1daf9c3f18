"""Random inputs for a model, by what its config says that it takes."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import TunerkitError

Inputs = dict[str, Any]
_LENGTHS = (16, 9, 12)  # tokens of the three inputs
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions")


def random_inputs(model: nn.Module) -> list[Inputs]:
    """Return three inputs for a model of transformers, each a batch of one: some take no padding."""
    taken = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    try:
        return [_inputs(model, taken, length, generator) for length in _LENGTHS]
    except (AttributeError, TypeError, ValueError) as problem:  # its config lacks a field, or has another kind of value
        raise _unknown(model, f"inputs that its config does not describe ({problem})") from problem


def _inputs(model: Any, taken: Mapping[str, object], length: int, generator: torch.Generator) -> Inputs:
    config: Any = getattr(model, "config", None)
    match getattr(model, "main_input_name", None):
        case "input_ids":
            limits = [getattr(config, name, None) for name in _POSITIONS]
            length = min([length, *(limit - 4 for limit in limits if isinstance(limit, int) and limit > 5)])
            found = {"input_ids": _ids(config, length, generator)}
        case "pixel_values":
            found = {"pixel_values": _picture(config, generator)}
        case name:
            raise _unknown(model, name or "inputs of its own")
    if "decoder_input_ids" in taken:
        found["decoder_input_ids"] = _ids(config, length, generator)
    return found


def _unknown(model: nn.Module, what: object) -> TunerkitError:
    return TunerkitError(
        f"{type(model).__name__} takes {what}, for which tunerkit makes no random values; load both adapters in "
        "Python, and compare the outputs there"
    )


def _ids(config: Any, length: int, generator: torch.Generator) -> Tensor:
    """Ids of ordinary tokens (1, length), with the end token last: some classifiers read its place."""
    size = int(config.get_text_config().vocab_size)
    # Padding, ends, and the places of pictures, which a text alone must not have.
    found = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    tokens = [token for value in found for token in (value if isinstance(value, list) else [value])]
    special = {token for token in tokens if isinstance(token, int)}
    ordinary = torch.tensor([token for token in range(size) if token not in special] or [0])
    ids = ordinary[torch.randint(len(ordinary), (1, length), generator=generator)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < size:
        ids[:, -1] = end
    return ids


def _picture(config: Any, generator: torch.Generator) -> Tensor:
    side = getattr(config, "image_size", None) or 224
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return torch.randn(1, int(getattr(config, "num_channels", 3)), int(height), int(width), generator=generator)
