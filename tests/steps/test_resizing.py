"""Resizing parameters in place, and the optimizers that allow it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tunerkit import grow_
from tunerkit.errors import AdapterError
from tunerkit.plugin import Cut, Growth, resize_, resize_obstacle, shrink_


def stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter (4, 3) with a gradient and the optimizer state of two steps."""
    parameter = nn.Parameter(torch.arange(12.0).reshape(4, 3))
    optimizer = make([parameter])
    for _ in range(2):
        parameter.grad = torch.arange(12.0).reshape(4, 3) / 10
        optimizer.step()
    return parameter, optimizer


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


@pytest.mark.parametrize(("dim", "kept"), [(0, [1, 3]), (1, [2]), (0, []), (1, [0, 1, 2])])
def test_values_gradient_and_state_are_cut_alike(dim: int, kept: list[int]) -> None:
    """The Parameter object stays; each tensor becomes the selected part, in storage of its own size."""
    parameter, optimizer = stepped(adamw)
    assert parameter.grad is not None
    state = optimizer.state[parameter]
    index = torch.tensor(kept, dtype=torch.int64)
    tensors = [parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
    expected = [tensor.index_select(dim, index).clone() for tensor in tensors]
    identity, step = id(parameter), float(state["step"])
    assert shrink_([Cut(parameter, dim, index)], optimizer) is None
    found = [parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in found)
    assert (id(parameter), float(state["step"])) == (identity, step)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grows", [False, True])
def test_a_graph_that_is_still_alive_does_not_keep_the_old_shape(dtype: torch.dtype, grows: bool) -> None:
    """Autograd's accumulation node would expect the old shape: the next backward must not fail."""
    parameter = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    alive = parameter.sum()
    if grows:
        assert grow_([Growth(parameter, 0, torch.full((1, 3), 2.0))], None) is None
    else:
        resize_(parameter, torch.full((2, 3), 2, dtype=dtype))
    assert parameter.dtype == dtype
    parameter.square().sum().backward()
    assert torch.equal(parameter.grad[-1], torch.full((3,), 4, dtype=dtype))  # type: ignore[index]
    assert alive.requires_grad


def test_without_an_optimizer_the_parameter_alone_is_cut() -> None:
    """Without an optimizer there is no state to resize. Selecting everything is no error."""
    parameter = nn.Parameter(torch.arange(4.0))
    assert shrink_([Cut(parameter, 0, torch.tensor([2]))], None) is None
    assert torch.equal(parameter.detach(), torch.tensor([2.0]))
    assert shrink_([], None) is None


class OwnStep(torch.optim.SGD):
    """A custom step, which may do anything."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return super().step(closure)


class OddState(torch.optim.SGD):
    """SGD's own step, with additional state per row."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)
        self.state[parameters[0]]["rows"] = torch.ones(4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.Adafactor(p), "Adafactor is not known"),
        (lambda p: torch.optim.Muon(p), "Muon is not known"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS is not known"),
        (lambda p: OwnStep(p, lr=0.1), "OwnStep is not known"),
        (OddState, "OddState keeps rows"),
    ],
    ids=["factored", "orthogonalised", "second order", "unknown step", "unknown state"],
)
def test_what_may_look_at_whole_tensors_keeps_every_shape(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], words: str
) -> None:
    """The reason is the same for less and for more, can be asked for, and not even the other tensors are resized."""
    parameter, plain = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.arange(4.0))
    optimizer = make([parameter])
    reason = resize_obstacle([parameter], optimizer)
    assert reason is not None
    assert words in reason
    cuts = [Cut(plain, 0, torch.tensor([0])), Cut(parameter, 0, torch.tensor([0]))]
    assert shrink_(cuts, optimizer) == reason
    assert grow_([Growth(plain, 0, torch.ones(1)), Growth(parameter, 0, torch.ones(1, 3))], optimizer) == reason
    assert (plain.shape, parameter.shape) == ((4,), (4, 3))


@pytest.mark.usefixtures("group_of_one")
def test_in_a_process_group_shapes_stay() -> None:
    """DDP's reducer and FSDP's shards rely on the initial shapes."""
    parameter, optimizer = stepped(adamw)
    assert "DDP" in str(resize_obstacle(iter([parameter]), optimizer))
    assert "DDP" in str(shrink_([Cut(parameter, 0, torch.tensor([0]))], optimizer))
    assert "DDP" in str(grow_([Growth(parameter, 0, torch.ones(1, 3))], optimizer))
    assert parameter.shape == (4, 3)


class Tagged(Tensor):
    """A tensor subclass, like DTensor and quantised tensors."""


def test_a_tensor_subclass_keeps_its_shape() -> None:
    """Only the subclass knows the meaning of its storage."""
    parameter = nn.Parameter(torch.ones(4).as_subclass(Tagged))
    assert "Tagged" in str(shrink_([Cut(parameter, 0, torch.tensor([0]))], None))


# Growing

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
    "AdamW loop": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, lambd=0.0, t0=2.0),
}
ROWS = torch.arange(9.0).reshape(3, 3) / 7
NEW = torch.tensor([[0.5, -0.25, 2.0]])


def gradients(size: int) -> list[Tensor]:
    """The gradients of six steps, (3 or 4, 3): in the first three, those of a new row are 0."""
    found = [torch.randn(4, 3, generator=torch.Generator().manual_seed(number)) for number in range(6)]
    for gradient in found[:3]:
        gradient[3] = 0
    return [gradient[:size] for gradient in found[:3]] + found[3:]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_growing_equals_having_had_the_entries_from_the_start_untouched(name: str, after: int) -> None:
    """Also before the first step; the later steps of both are equal, bit for bit, in values and in state."""
    grown, whole = nn.Parameter(ROWS.clone()), nn.Parameter(torch.cat([ROWS, NEW]))
    optimizers = [OPTIMIZERS[name]([parameter]) for parameter in (grown, whole)]
    for number, gradient in enumerate(gradients(4)):
        if number == after:
            identity = id(grown)
            assert grow_([Growth(grown, 0, NEW)], optimizers[0]) is None
            assert id(grown) == identity
        for parameter, optimizer in zip((grown, whole), optimizers, strict=True):
            parameter.grad = gradient[: len(parameter)].clone()
            if number < after:
                parameter.grad[3:] = 0
            optimizer.step()
    assert torch.equal(grown, whole)
    if name == "ASGD":  # its average, which nothing reads while it trains
        ax = [optimizer.state[parameter]["ax"] for optimizer, parameter in zip(optimizers, (grown, whole), strict=True)]
        assert torch.equal(*ax)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_values_gradient_and_state_grow_alike(dim: int) -> None:
    """The old entries keep all of theirs; the new ones have the given values and a gradient of 0."""
    parameter, optimizer = stepped(adamw)
    shape = [4, 3]
    shape[dim] = 2
    before = {"value": parameter.detach().clone(), "grad": parameter.grad, **optimizer.state[parameter]}
    assert grow_([Growth(parameter, dim, torch.full(shape, 7.0))], optimizer) is None
    after = {"value": parameter.detach(), "grad": parameter.grad, **optimizer.state[parameter]}
    for name, new in {"value": 7.0, "grad": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}.items():
        old, found = before[name], after[name]
        assert old is not None
        assert found is not None
        assert torch.equal(found.narrow(dim, 0, old.shape[dim]), old)
        assert torch.equal(found.narrow(dim, old.shape[dim], 2), torch.full(shape, new))
    assert after["step"] == before["step"]
    optimizer.step()


@pytest.mark.parametrize(
    ("dim", "shape"), [(0, (1, 4)), (1, (1, 3)), (0, (3,)), (2, (4, 3)), (-3, (4, 3)), (0, (1, 3, 1)), (0, ())]
)
def test_entries_of_another_shape_are_refused(dim: int, shape: tuple[int, ...]) -> None:
    """Both shapes and the dimension are in the error, and nothing has grown."""
    plain, parameter = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4, 3))
    growths = [Growth(plain, 0, torch.ones(1)), Growth(parameter, dim, torch.ones(shape))]
    with pytest.raises(AdapterError, match=rf"shape \(4, 3\) along dimension {dim}"):
        grow_(growths, None)
    assert plain.shape == (2,)


def test_a_parameter_grows_once_in_a_call() -> None:
    """The shape that a second growth must fit would depend on the first: it is refused, and two calls do."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    growths = [Growth(parameter, 0, torch.ones(1, 2)), Growth(parameter, 1, torch.ones(2, 1))]
    with pytest.raises(AdapterError, match="listed twice"):
        grow_(growths, None)
    assert parameter.shape == (2, 2)
    assert grow_(growths[:1], None) is None
    assert grow_([Growth(parameter, 1, torch.ones(3, 1))], None) is None
    assert parameter.shape == (3, 3)
    assert grow_([], None) is None
