"""Layers that read one input compute its gradient together: which do, and that nothing else changes."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tunerkit
from tunerkit.layers import fused, plain_form

if TYPE_CHECKING:
    from tests.support.toys import Toys

WIDTH = 6


class Block(nn.Module):
    """q, k and v of different widths read one tensor, and o what comes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3, bias=False)
        self.v, self.o = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        mixed = self.q(h).unflatten(-1, (2, 3)).sum(-2) * self.k(h).sigmoid() + self.v(h)
        return x + self.o(torch.tanh(mixed))


class Branching(nn.Module):
    """What each of three layers reads is decided at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, way: str) -> Tensor:
        if way == "shared":
            return self.a(x) * self.b(x) + self.c(x)
        if way == "one is left out":
            return self.a(x) * self.c(x)
        if way == "another input":
            return self.a(x) * self.b(x + 1) + self.c(x)
        if way == "in a chain":
            return self.c(self.b(self.a(x)))
        return self.a(x) * self.a(x) + self.b(x)  # twice


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small."""
    monkeypatch.setattr(fused, "LEAST_WIDTH", 0)
    monkeypatch.setattr(fused, "LEAST_NUMBERS", 0)


def wrapped(toys: "Toys", model: nn.Module, *patterns: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with trained adapters, in fp64."""
    torch.manual_seed(0)
    model = tunerkit.wrap(model.to(dtype), "toy-low-rank", {"targets": patterns or "re:.*[abcqkvo]"}, seed=0).to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@contextmanager
def no_groups() -> Iterator[None]:
    """Each layer computes the gradient of its input alone."""
    with mock.patch.object(fused, "join", return_value=None):
        yield


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model: nn.Module, x: Tensor, *call: Any) -> list[Tensor | None]:
    """Output, then the gradients of the input and of all parameters."""
    y = model(x, *call)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained(model)], allow_unused=True)]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Outputs bit for bit, gradients up to the order of sums."""
    for ours, other in zip(found, expected, strict=True):
        if ours is None or other is None:
            assert ours is other
        else:
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-13)


def inputs(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)


def test_what_reads_one_input_is_one_group(toys: "Toys") -> None:
    """q, k and v; o is alone. The tuner counts them; gradients are those of each layer alone, and of the plain form."""
    model, x = wrapped(toys, nn.Sequential(Block(), Block())), inputs(2, 3)
    tuner = tunerkit.tuner(model)
    assert tuner.groups() == {"layers without a low-rank product so far, or only compiled": 8}
    found = gradients(model, x)
    assert tuner.groups() == {"groups of 3": 2, "layers alone": 2}
    with no_groups():
        alone = gradients(model, x)
    assert found[0] is not None
    assert alone[0] is not None
    assert torch.equal(found[0], alone[0])
    same(found, alone)
    with plain_form():
        same(found, gradients(model, x))
        assert tuner.groups() == {"layers in the plain form": 8}
    same(gradients(model, x), found)


def test_fifty_steps_end_at_the_same_weights(toys: "Toys") -> None:
    """With AdamW, which turns small differences of small gradients into steps."""

    def train() -> list[Tensor]:
        torch.manual_seed(2)
        model = wrapped(toys, nn.Sequential(Block(), Block()))
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for step in range(50):
            torch.manual_seed(step)
            model(torch.randn(4, WIDTH, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in trained(model)]

    together = train()
    with no_groups():
        alone = train()
    for ours, other in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:these adapters never ran")
@pytest.mark.parametrize(
    ("way", "groups"),
    [
        ("shared", {"groups of 3": 1}),
        ("one is left out", {"groups of 2": 1, "layers alone": 1}),  # b as it ran before
        ("another input", {"layers alone": 3}),  # b comes between a and c
        ("in a chain", {"layers alone": 3}),
        ("twice", {"groups of 3": 1, "layers alone": 1}),  # c as it ran before
    ],
)
def test_a_model_that_branches_has_right_gradients_in_the_same_forward(
    toys: "Toys", way: str, groups: dict[str, int]
) -> None:
    """Whatever it did before: groups are those of this forward."""
    model, x = wrapped(toys, Branching()), inputs(4)
    with plain_form():
        expected = gradients(model, x, way)
    for before in ("shared", "another input", "in a chain"):
        gradients(model, x, before)
        same(gradients(model, x, way), expected)
        same(gradients(model, x, way), expected)
    assert tunerkit.tuner(model).groups() == groups


def test_a_group_waits_for_few_outputs(toys: "Toys") -> None:
    """Cross-attention reads one input in all layers: one group would keep all gradients until the last is there."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))
    model, x = wrapped(toys, layers, r"re:\d"), inputs(3)

    def found() -> list[Tensor | None]:
        loss = torch.stack([layer(x).square().sum() for layer in layers]).sum()
        return [*torch.autograd.grad(loss, [x, *trained(model)])]

    together = found()
    assert tunerkit.tuner(model).groups() == {"groups of 4": 2, "layers alone": 1}
    with plain_form():
        same(together, found())


def test_other_scales_of_one_group_are_each_layers_own(toys: "Toys") -> None:
    """Two adapters with other scales at layers that read one input."""
    model, x = wrapped(toys, Branching(), "a", "b", "c"), inputs(4)
    for number, adapter in enumerate(tunerkit.tuner(model).adapters().values()):
        vars(adapter)["scale"] = number + 0.5
    found = gradients(model, x, "shared")
    with plain_form():
        same(found, gradients(model, x, "shared"))


def test_second_derivatives_go_through_a_group(toys: "Toys") -> None:
    """The group's sum is differentiable, as everything else of the fused form."""
    model, x = wrapped(toys, Block()), inputs(2)

    def second() -> list[Tensor | None]:
        first = torch.autograd.grad(model(x).square().sum(), [x, *trained(model)], create_graph=True)
        return [*torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), [x, *trained(model)])]

    found = second()
    with plain_form():
        same(found, second())


def test_some_gradients_may_be_asked_for_alone_and_again(toys: "Toys") -> None:
    """Of one layer, without the input's; then all, on the same graph, twice."""
    model, x = wrapped(toys, Block()), inputs(2)
    expected = gradients(model, x)[1:]
    loss = model(x).square().sum()
    own = [*model.get_submodule("k").parameters()][1:]
    alone = torch.autograd.grad(loss, own, retain_graph=True)
    twice = [torch.autograd.grad(loss, [x, *trained(model)], retain_graph=again) for again in (True, False)]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    places = [at for at, name in enumerate(names) if name.startswith("k.")]
    same([*alone], [expected[1 + at] for at in places])
    for found in twice:
        same([*found], expected)


def test_a_backward_that_failed_leaves_nothing_behind(toys: "Toys") -> None:
    """What some layers had handed over is not added to the next backward of the same graph."""
    model, x = wrapped(toys, Branching()), inputs(4)
    expected = gradients(model, x, "shared")[1:]
    failing = [True]

    def fail(_: Tensor) -> None:
        if failing:
            failing.clear()
            raise ZeroDivisionError("once")

    y = model.get_submodule("a")(x)
    others = model.get_submodule("b")(x), model.get_submodule("c")(x)
    y.register_hook(fail)  # autograd runs the last layers first
    loss = (y * others[0] + others[1]).square().sum()
    with pytest.raises(ZeroDivisionError):
        torch.autograd.grad(loss, [x, *trained(model)], retain_graph=True)
    same([*torch.autograd.grad(loss, [x, *trained(model)])], expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["the block", "one layer of the group"])
def test_checkpointing_recomputes_a_group_or_one_layer_of_it(toys: "Toys", what: str, reentrant: bool) -> None:
    """The saved tensors are the same in a group and alone, so neither kind of checkpointing sees a difference."""
    block = Block()
    model = wrapped(toys, nn.Sequential(Block(), block))
    x = inputs(2, 3)
    expected = gradients(model, x)
    inner: nn.Module = block if what == "the block" else block.k
    forward = inner.forward
    call: Callable[..., Any] = inner.__call__

    class Recomputed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(call, x, use_reentrant=reentrant)

    if what == "the block":
        model[1] = Recomputed()  # type: ignore[operator]
        assert forward is not None
        parameters = [*trained(model[0]), *trained(block)]  # type: ignore[index]
    else:
        block.k = Recomputed()  # type: ignore[assignment]
        parameters = [*trained(model[0]), *trained(block.q), *trained(inner), *trained(block.v), *trained(block.o)]  # type: ignore[index]
    for _ in range(2):
        y = model(x)
        found = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])] if not reentrant else None
        if found is None:
            for own in (x, *parameters):
                own.grad = None
            y.square().sum().backward()
            found = [y.detach(), x.grad, *(parameter.grad for parameter in parameters)]
        same(found, expected)


def test_a_loss_that_is_kept_does_not_keep_the_inputs(toys: "Toys") -> None:
    """As before: after backward, and once another layer has run, nothing of a group holds its input."""
    model = wrapped(toys, nn.Sequential(Block(), Block()))
    inside: list[weakref.ref[Tensor]] = []
    model[0].norm.register_forward_hook(lambda module, args, y: inside.append(weakref.ref(y)))  # type: ignore[union-attr,operator,index]
    loss = model(inputs(2, 3)).square().sum()
    loss.backward()
    gc.collect()
    assert inside[0]() is None
    assert loss.grad_fn is not None


def wait(turn: threading.Barrier) -> None:
    turn.wait(timeout=60)


def test_forwards_in_two_threads_have_groups_of_their_own(toys: "Toys") -> None:
    """Between two layers of a group in one thread, another thread runs its own."""
    model, x = wrapped(toys, Branching()), inputs(4)
    expected = gradients(model, x, "shared")
    found: list[list[Tensor | None]] = []
    turn = threading.Barrier(2)
    for layer in (model.a, model.b):
        layer.register_forward_pre_hook(lambda module, args: wait(turn))  # type: ignore[operator,union-attr]
    threads = [threading.Thread(target=lambda: found.append(gradients(model, x, "shared"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for each in found:
        same(each, expected)


@pytest.mark.parametrize(("limit", "value"), [("LEAST_WIDTH", WIDTH + 1), ("LEAST_NUMBERS", 4 * WIDTH + 1)])
def test_small_inputs_have_no_group(toys: "Toys", limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to there, a group's own node takes longer than what it saves; the gradients are the same."""
    model, x = wrapped(toys, Branching()), inputs(4)
    found = gradients(model, x, "shared")
    monkeypatch.setattr(fused, limit, value)
    same(gradients(model, x, "shared"), found)
    assert tunerkit.tuner(model).groups() == {"layers with a small input": 3}


def test_groups_are_off_where_they_cannot_be(toys: "Toys") -> None:
    """Without gradients, with a trained base, under tracing; the tuner says why."""
    model, x = wrapped(toys, Branching()), inputs(4)
    tuner = tunerkit.tuner(model)
    with torch.no_grad():
        model(x, "shared")
    assert tuner.groups() == {"layers without a gradient of the input": 3}
    model.get_submodule("b").weight.requires_grad_()
    model(x, "shared")
    assert tuner.groups() == {"groups of 2": 1, "layers whose weight is trained, packed or of another dtype": 1}
    half = wrapped(toys, Branching(), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half(x.float(), "shared")
    assert tunerkit.tuner(half).groups() == {"layers whose input is cast by autocast": 3}
    torch.func.vjp(lambda x: model(x, "shared"), x.detach())
    assert tuner.groups() == {"layers in the plain form": 3}
