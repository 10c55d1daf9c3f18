"""Run two adapters on the same inputs, and measure how far the outputs are apart."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import TunerkitError
from tunerkit.errors import ConfigError
from tunerkit_cli.converting.opening import collected, load_adapter
from tunerkit_transformers.adapter_files import base_facts, holds_adapter
from tunerkit_transformers.base_choice import choose_base
from tunerkit_transformers.bases import refuse_other_type, whole

Inputs = dict[str, Any]
_LENGTHS = (16, 9, 12)  # tokens of the three inputs
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions")
_NO_EFFECT = "{} changes no output of the base, so equal outputs say little: is it trained?"
_RUNNING = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError)


@attrs.frozen
class Verified:
    """How far outputs are apart on random inputs: also relative to the largest one, and to what ``one`` changes."""

    one: str
    other: str
    difference: float
    relative: float  # to the largest output of ``one``
    of_effect: float | None  # relative to its largest change of the base's outputs; None if it makes none
    largest: float
    outputs: int
    tolerance: float
    remarks: tuple[str, ...]
    is_equal: bool  # within the tolerance


def verify_adapters(one: str, other: str, *, base: str | None, task: str | None, tolerance: float) -> Verified:
    """Compare the outputs of two adapters, or of one and a merged model, in fp32 on the CPU."""
    if not 0 <= tolerance < math.inf:
        raise ConfigError([f"--tolerance: expected a number from 0, got {tolerance}"])
    merged = not holds_adapter(other) and (Path(other) / "config.json").is_file()
    with collected() as remarks:
        chosen = choose_base(one, base=base, task=task, beside=None if merged else other)
        # Before the base is loaded, which takes long.
        if merged:
            refuse_other_type(other, chosen.source)
        else:
            base_facts(other)
        model = whole(chosen)
        inputs = random_inputs(model)
        plain = _outputs(model, inputs, chosen.source)
        first = _outputs(load_adapter(model, one, chosen), inputs, one)
        tunerkit.unwrap(model)
        elsewhere = attrs.evolve(chosen, source=other, revision=None)
        second = _outputs(whole(elsewhere) if merged else load_adapter(model, other, chosen), inputs, other)
    if [each.shape for each in first] != [each.shape for each in second]:
        raise TunerkitError(
            f"{one} and {other} give outputs of different shapes, {tuple(first[0].shape)} and "
            f"{tuple(second[0].shape)}: they are not of one model and task"
        )
    largest, gap = max(float(each.abs().max()) for each in first), _gap(first, second)
    relative = gap / largest if largest else float(gap > 0)
    comparable = [each.shape for each in first] == [each.shape for each in plain]
    effect = _gap(first, plain) if comparable else None  # a head with more classes has no counterpart in the base
    return Verified(
        one=one,
        other=other,
        difference=gap,
        relative=relative,
        of_effect=gap / effect if effect else None,
        largest=largest,
        outputs=sum(each.numel() for each in first),
        tolerance=tolerance,
        remarks=(*remarks, *([_NO_EFFECT.format(one)] if effect == 0 else [])),
        is_equal=relative <= tolerance,
    )


def _gap(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Sequence[Inputs], name: str) -> list[Tensor]:
    """The main output for each input: logits, or hidden states without a head. Random parts see the same numbers."""
    found = []
    model.eval()
    with torch.random.fork_rng(devices=[]):
        for each in inputs:
            torch.manual_seed(0)
            try:
                found.append(_main(model(**each)).float())
            except _RUNNING as problem:
                reason = " ".join(str(problem).split())[:300]
                raise TunerkitError(
                    f"{name} cannot be run on random inputs ({', '.join(each)}) as {type(model).__name__}: {reason}"
                ) from problem
    if not all(bool(torch.isfinite(each).all()) for each in found):
        raise TunerkitError(f"{name} gives NaN or inf for random inputs, so there is nothing to compare")
    return found


def _main(outputs: Any) -> Tensor:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    if isinstance(values, Tensor):
        return values
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError("its forward returns no tensor of numbers")


# --- random inputs, by what a model's config says that it takes ---


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
            side = getattr(config, "image_size", None) or 224
            height, width = side if isinstance(side, list | tuple) else (side, side)
            size = 1, int(getattr(config, "num_channels", 3)), int(height), int(width)
            found = {"pixel_values": torch.randn(size, generator=generator)}
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
