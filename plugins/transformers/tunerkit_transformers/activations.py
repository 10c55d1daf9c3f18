"""Measure the bytes that a forward saves for backward on a few rows, and extrapolate them to a batch."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from math import ceil
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tunerkit_transformers.free_memory import give_back
from tunerkit_transformers.learned_positions import takes_positions

_LONGEST: Final = 256  # tokens of a row that is measured; what longer rows keep is extrapolated
_IMAGES: Final = 4  # that are measured at most
# Numbers in a layer's input: smaller inputs are multiplied in another way, which keeps other tensors.
_ENOUGH: Final = 2**17


@attrs.frozen
class Kept:
    """The bytes that a forward saves for backward, as linear functions of the number of rows.

    Each attribute is a tensor (4,): the bytes outside the layers that checkpointing recomputes, inside all of these
    layers, of their inputs, and inside the largest of them.

    Attributes:
        fixed: The bytes that do not depend on the batch, such as weights cast by autocast.
        each: The bytes per row.
    """

    fixed: Tensor
    each: Tensor

    def at(self, rows: int, logits: int, *, checkpointing: bool) -> int:
        """Return the bytes for ``rows`` rows and ``logits`` bytes of logits, freed before layers are recomputed."""
        outside, layers, inputs, largest = (self.fixed + rows * self.each).tolist()
        return int(outside + (inputs + max(largest, logits) if checkpointing else layers + logits))


def kept_by(model: Any, rows: int, shape: tuple[int, ...], precision: torch.dtype | None = None) -> Kept:
    """Measure the bytes that a forward in training saves for backward, without parameters and logits, on a few rows.

    Args:
        model: A model of transformers. Its modules' modes, its buffers and torch's random numbers stay as they are.
        rows: The rows of a batch.
        shape: The shape of a row: ``(tokens,)``, or ``(channels, height, width)`` of an image.
        precision: What matrix products are computed in under autocast; None without.
    """
    short = (min(shape[0], _LONGEST),) if len(shape) == 1 else shape
    wide = getattr(model.config.get_text_config(), "hidden_size", 1)
    few = min(rows, ceil(_ENOUGH / (short[0] * wide)) if len(shape) == 1 else _IMAGES)
    kept = _measured(model, few, short, precision)
    fixed, each = torch.zeros_like(kept), kept / few
    if precision is not None:
        each = (_measured(model, 2 * few, short, precision) - kept) / few
        fixed = kept - few * each
    if short != shape:  # attention may keep a number for each pair of tokens
        half = (_measured(model, 2 * few, (short[0] // 2,), precision) - fixed) / (2 * few)
        pairs = (2 * (each - 2 * half) / short[0] ** 2).clamp(min=0)
        each = (each / short[0] - pairs * short[0]) * shape[0] + pairs * shape[0] ** 2
    return Kept(fixed, each)


def _measured(model: Any, rows: int, shape: tuple[int, ...], precision: torch.dtype | None) -> Tensor:
    """Run a forward of ``rows`` rows, and return its four numbers of `Kept`. Each storage counts once."""
    device = next(model.parameters()).device
    own = {address(each) for each in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    held: list[tuple[int, list[Tensor]]] = []
    layers, inputs, whole, shared = [0], [0], [0], set[int]()

    def keep(tensor: Tensor) -> list[Tensor]:
        if (place := address(tensor)) not in seen:
            seen.add(place)
            whole[0] += 0 if place in own else _size(tensor)
        held.append((place, [tensor.detach()]))  # the output of a node that its own node keeps would never be freed
        return held[-1][1]

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held.clear()
        given = [*tensors_in((args, kwargs), set())]
        shared.update(map(address, given))
        inputs.append(next((each.nbytes for each in given), 0))
        layers.append(-whole[0])

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        layers[-1] += whole[0]
        shared.update(map(address, tensors_in(output, set())))
        others = shared | own
        # What only this layer keeps is counted now, and would add up over all layers.
        for place, tensors in held:
            if place not in others:
                tensors.clear()
                seen.discard(place)

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensors: tensors[0])
    autocast = nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)
    has_state = device.type not in ("cpu", "mps")  # torch keeps no state by device of mps
    random = torch.random.fork_rng([device], device_type=device.type) if has_state else torch.random.fork_rng([])
    with _in_training(model, begin, end), random, torch.enable_grad(), hooks, autocast:
        # As long as the output lives, what is kept outside layers is not given to others.
        output = model(**_batch(model, rows, shape, device))
    del output
    give_back()
    inside = sum(layers)
    return torch.tensor([whole[0] - inside, inside, sum(inputs), max(layers)], dtype=torch.float64)


def tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in nested records, mappings and sequences, without parameters and tensors of modules."""
    if id(value) in seen or isinstance(value, nn.Module | nn.Parameter):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif (kind := type(value)) and attrs.has(kind):
        inner = [getattr(value, field.name) for field in attrs.fields(kind)]
    for each in inner:
        yield from tensors_in(each, seen)


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; the identity of a tensor without one, such as a wrapper subclass."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except RuntimeError:
        return id(tensor)


def _size(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().nbytes()
    except RuntimeError:
        return tensor.nbytes


@contextmanager
def _in_training(model: Any, begin: Any, end: Any) -> Iterator[None]:
    """Inside the block, the model is in train mode without checkpointing and cache; its layers have the two hooks."""
    found = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    outer = [each for each in found if not any(each in {*other.modules()} for other in found if other is not each)]
    modes, were = [(each, each.training) for each in model.modules()], [each.gradient_checkpointing for each in found]
    # A forward in training changes statistics, as of batch norms, and tables of positions.
    buffers = [
        (m._buffers, name, t, t.clone()) for m in model.modules() for name, t in m._buffers.items() if t is not None
    ]
    cached = getattr(model.config, "use_cache", None)  # a Trainer switches it off
    with ExitStack() as stack:
        for layer in outer:
            stack.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(end, with_kwargs=True).remove)
        try:
            for layer in found:
                layer.gradient_checkpointing = False
            if cached is not None:
                model.config.use_cache = False
            yield model.train()
        finally:
            for layer, was in zip(found, were, strict=True):
                layer.gradient_checkpointing = was
            if cached is not None:
                model.config.use_cache = cached
            for module, mode in modes:
                module.training = mode
            for own, name, buffer, value in buffers:
                own[name] = buffer.copy_(value)


def _batch(model: Any, rows: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return a batch of images, or of texts with one padding token each: attention may save more with a mask."""
    if len(shape) > 1:
        return {"pixel_values": torch.zeros((rows, *shape), device=device)}
    ids = torch.ones((rows, *shape), dtype=torch.int64, device=device)
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and end < getattr(model.config.get_text_config(), "vocab_size", 0):
        ids[:, -1] = end  # some classifiers read their features there
    mask = torch.ones_like(ids)
    mask[:, 1:][:, -1:] = 0
    more: dict[str, Any] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    more |= {"logits_to_keep": 1} if takes_positions(type(model)) else {}
    return {"input_ids": ids, "attention_mask": mask, **more}
