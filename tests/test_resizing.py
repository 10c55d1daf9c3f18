"""Resizing parameters in place, and the optimizers that allow it."""

import socket
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tunerkit import Cut, resize_, shrink_


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
def test_a_graph_that_is_still_alive_does_not_keep_the_old_shape(dtype: torch.dtype) -> None:
    """Autograd's accumulation node would expect the old shape: the next backward must not fail."""
    parameter = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    alive = parameter.sum()
    resize_(parameter, torch.full((2, 3), 2, dtype=dtype))
    parameter.square().sum().backward()
    assert torch.equal(parameter.grad, torch.full((2, 3), 4, dtype=dtype))  # type: ignore[arg-type]
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
        (lambda p: OwnStep(p, lr=0.1), "OwnStep is not known"),
        (OddState, "OddState keeps rows"),
    ],
    ids=["factored", "orthogonalised", "unknown step", "unknown state"],
)
def test_an_optimizer_that_may_look_at_whole_tensors_keeps_every_shape(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], words: str
) -> None:
    """The reason is returned and nothing is resized, not even the tensors that could be."""
    parameter, optimizer = stepped(make)
    plain = nn.Parameter(torch.arange(4.0))
    reason = shrink_([Cut(plain, 0, torch.tensor([0])), Cut(parameter, 0, torch.tensor([0]))], optimizer)
    assert reason is not None
    assert words in reason
    assert (plain.shape, parameter.shape) == ((4,), (4, 3))


@pytest.fixture
def _process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_in_a_process_group_shapes_stay() -> None:
    """DDP's reducer and FSDP's shards rely on the initial shapes."""
    parameter, optimizer = stepped(adamw)
    assert "DDP" in str(shrink_([Cut(parameter, 0, torch.tensor([0]))], optimizer))
    assert parameter.shape == (4, 3)


class Tagged(Tensor):
    """A tensor subclass, like DTensor and quantised tensors."""


def test_a_tensor_subclass_keeps_its_shape() -> None:
    """Only the subclass knows the meaning of its storage."""
    parameter = nn.Parameter(torch.ones(4).as_subclass(Tagged))
    assert "Tagged" in str(shrink_([Cut(parameter, 0, torch.tensor([0]))], None))
