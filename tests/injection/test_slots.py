"""Slots by any name, stored originals, and biases in the shape of their module's."""

import copy
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import tunerkit
from tests.support.products import Product, adapted
from tunerkit.errors import AdapterError
from tunerkit.injection import Slot, Slots, slots_of
from tunerkit.injection.slots import apply_slots
from tunerkit.layers import Adapter, BaseLayer, as_base_layer, has_trainable_bias

# Modules that have a bias, and the shape of an input for each.
BIASED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "linear on sequences": (lambda: nn.Linear(3, 4), (2, 5, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), (2, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 3, 2), (2, 3, 5, 4)),
    "conv2d without batch": (lambda: nn.Conv2d(3, 3, 1), (3, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 4)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "batch norm 1d on sequences": (lambda: nn.BatchNorm1d(4), (3, 4, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 4, 4, 4)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 4)),
    "instance norm 1d without batch": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "instance norm 2d without batch": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 4, 4)),
}


@pytest.mark.parametrize("name", BIASED)
def test_a_trained_bias_does_what_the_modules_own_would(name: str) -> None:
    """The slot's output equals that of the module with the trained bias; untrained, bit for bit."""
    make, shape = BIASED[name]
    module, x = make().double(), torch.randn(shape).double()
    base = as_base_layer(module)
    assert has_trainable_bias(module, base)
    slot = Slot(bias=nn.Parameter(module.bias.detach().clone()))
    y = module(x)
    assert torch.equal(slot(module, base, (x,), {}, y), y)
    assert slot.bias is not None
    slot.bias.data += torch.arange(slot.bias.numel()).view_as(slot.bias)
    replaced = copy.deepcopy(module)
    replaced.bias.data.copy_(slot.bias)
    assert torch.allclose(slot(module, base, (x,), {}, y), replaced(x))


def test_a_bias_that_is_not_understood_is_not_trainable() -> None:
    """No bias, an unknown kind of module, or a norm with a custom forward: the answer is no."""

    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mT).mT

    patched: Any = nn.LayerNorm(3)
    patched.forward = lambda x: x
    for module in (
        nn.Linear(2, 2, bias=False),
        nn.LayerNorm(2, bias=False),
        nn.Bilinear(2, 2, 2),
        ChannelsFirst(3),
        patched,
    ):
        assert not has_trainable_bias(module, as_base_layer(module))


def test_an_attribute_is_not_taken_for_a_slot() -> None:
    """Looking up an adapter called "active" finds none unless one was added."""
    assert all(Slots(None).get(name) is None for name in ("active", "base", "training", "forward"))


def test_the_input_is_found_whether_named_or_not() -> None:
    """An adapter gets the base layer's input also if the caller passes it by keyword."""
    module = nn.Linear(2, 2)
    slots = Slots(as_base_layer(module))
    module.add_module("tunerkit", slots)

    class Echo(Adapter):
        def forward(self, base: BaseLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x

    slots.put("echo", Slot(adapter=Echo()))
    module.register_forward_hook(apply_slots, with_kwargs=True)
    x = torch.rand(2, 2)
    assert torch.equal(module(x), x)
    assert torch.equal(module(input=x), x)


def test_a_copy_of_an_embedding_that_was_resized_says_so() -> None:
    """A new id fits the module but not the copy, whose own error names neither. Other errors stay as they are."""
    module = nn.Embedding(4, 2)
    slots = Slots(None)
    module.add_module("tunerkit", slots)
    slots.put("one", Slot(copy=nn.Embedding(4, 2)))
    module.register_forward_hook(apply_slots, with_kwargs=True)
    with pytest.raises(IndexError):
        module(torch.tensor([4]))
    module.weight = nn.Parameter(torch.zeros(5, 2))
    module.num_embeddings = 5
    with pytest.raises(AdapterError, match=r"Embedding was resized after .* resize the model first"):
        module(torch.tensor([4]))
    assert module(torch.tensor([3])).shape == (1, 2)


def test_a_module_that_only_got_the_hook_says_what_happened() -> None:
    """Torch's dynamic quantisation copies the hooks of a module that it replaces, and calls them without kwargs."""
    module = nn.Linear(3, 3)
    module.register_forward_hook(apply_slots)
    with pytest.raises(AdapterError, match=r"Quantize the base before tunerkit\.wrap"):
        module(torch.ones(1, 3))


class Plus(Adapter):
    """Adds a number."""

    reads_output = False

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, base: BaseLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.number


CHANGES = st.one_of(
    st.tuples(st.just("put"), st.sampled_from("abc")),
    st.tuples(st.just("drop"), st.sampled_from("abc")),
    st.tuples(st.just("rename"), st.sampled_from("abc")),
    st.tuples(st.just("activate"), st.sets(st.sampled_from("abc"))),
    st.tuples(st.just("enabled"), st.booleans()),
    st.tuples(st.just("merged"), st.booleans()),
    st.tuples(st.just("see_as"), st.booleans()),
    st.tuples(st.just("copied"), st.just(True)),
)


@given(st.lists(CHANGES, max_size=12))
def test_a_forward_does_what_is_active_after_each_change(changes: list[tuple[str, Any]]) -> None:
    """What it does is chosen at the change; a plain record of what is there decides what it should be."""
    module = nn.Linear(2, 2)
    module.add_module("tunerkit", Slots(as_base_layer(module)))
    module.register_forward_hook(apply_slots, with_kwargs=True)
    x = torch.rand(2, 2)
    numbers: dict[str, float] = {}
    active: set[str] = set()
    for number, (what, value) in enumerate(changes, 1):
        slots = slots_of(module)
        assert slots is not None
        if what == "put" and value not in numbers:
            bias = nn.Parameter(module.bias + 100.0 * number) if number % 2 else None
            slots.put(value, Slot(adapter=Plus(number), bias=bias))
            numbers[value] = number + (100.0 * number if number % 2 else 0)
            active.add(value)
        elif what == "drop":
            slots.drop(value)
            numbers.pop(value, None)
            active.discard(value)
        elif what == "rename" and value in numbers and "d" not in numbers:
            slots.rename(value, "d")
            numbers["d"] = numbers.pop(value)
            active = {"d" if name == value else name for name in active}
        elif what == "activate":
            slots.activate(sorted(value))
            active = value & numbers.keys()
        elif what == "enabled":
            slots.enabled = value
        elif what == "merged":
            slots.merged = slots.active if value else ()
        elif what == "see_as":
            slots.see_as(as_base_layer(module) if value else None)
        elif what == "copied" and slots.enabled:  # a copy of a disabled one is enabled
            module = copy.deepcopy(module)
        slots = slots_of(module)
        assert slots is not None
        shown = sum(numbers[name] for name in active) if slots.enabled and not slots.merged else 0
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias) + shown)


def test_the_forward_of_a_small_input_takes_few_calls() -> None:
    """Above the layer's own: at most 30 calls of Python functions, of torch's too, in at most 5 files of ours."""
    own, x = adapted(nn.Linear(5, 4), lambda base: Product(base, 3)), torch.rand(2, 5)

    def called(layer: nn.Module) -> list[str]:
        found: list[str] = []

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                found.append(frame.f_code.co_filename)

        layer(x)
        sys.setprofile(note)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
        return found

    found, base = called(own), called(nn.Linear(5, 4))
    assert len(found) - len(base) <= 30
    folders = Path(str(tunerkit.__file__)).parent, Path(__file__).parents[1]
    files = {file for file in found if any(Path(file).is_relative_to(folder) for folder in folders)} - {__file__}
    assert len(files) <= 5


def test_a_layer_that_returns_its_output_with_more_is_adapted() -> None:
    """As Megatron's linear layers, which return their bias beside it: the adapter changes the first, the rest stays."""
    layer = adapted(nn.Linear(3, 3))
    x, y, more = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3)
    changed, rest = apply_slots(layer, (x,), {}, (y, more))
    assert rest is more
    assert torch.equal(changed, apply_slots(layer, (x,), {}, torch.zeros(2, 3)))
