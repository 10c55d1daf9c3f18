"""Give parameters another size in place, with their gradients and optimizer state: the same Parameter objects."""

import inspect
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

# Each element of a parameter is updated from its own gradient and its own state alone, so cutting others away changes
# nothing for it. Not so where a step looks at the whole tensor: Adafactor, Muon, LBFGS, blocks of 8-bit states.
_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    optim.ASGD,
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.SGD,
)


@attrs.frozen(eq=False)
class Cut:
    """Of ``parameter``, keep the entries ``kept`` (k,) int64 along ``dim``."""

    parameter: nn.Parameter
    dim: int
    kept: Tensor


def shrink_(cuts: Sequence[Cut], optimizer: Optimizer | None) -> str | None:
    """Make all ``cuts``, or none of them and return why the shapes must stay.

    Parameter objects stay the same; their values, gradients and what ``optimizer`` keeps for their elements get
    storage of the new size.
    """
    reason = _obstacle([cut.parameter for cut in cuts], optimizer) if cuts else None
    if reason is None:
        for cut in cuts:
            _cut_(cut, optimizer)
    return reason


@torch.no_grad()
def resize_(parameter: nn.Parameter, values: Tensor) -> None:
    """Give ``parameter`` other values of any shape; its gradient, which has the old one, is dropped.

    While a loss of an earlier step is alive, autograd keeps the node that accumulates this parameter's gradient, and
    the node remembers the old shape. It is only forgotten when the data changes its type: hence the way round.
    """
    parameter.grad = None
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = values


def _obstacle(parameters: Sequence[nn.Parameter], optimizer: Optimizer | None) -> str | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is initialised, and DDP or FSDP keep the shapes that they were given"
    for parameter in parameters:
        if type(parameter.data) is not Tensor:
            return f"a parameter is a {type(parameter.data).__name__}, whose shape is not its own to change"
    if optimizer is None:
        return None
    name = type(optimizer).__name__
    if inspect.unwrap(type(optimizer).step) not in {inspect.unwrap(kind.step) for kind in _ELEMENTWISE}:
        return f"{name} is not known to update every element by itself"
    odd = {key for p in parameters for key, value in _state(optimizer, p).items() if not _is_known(value, p)}
    return f"{name} keeps {', '.join(sorted(odd))} in a shape of its own" if odd else None


def _is_known(value: object, parameter: nn.Parameter) -> bool:
    """Whether a piece of optimizer state is a number for the whole parameter, or one for each of its elements."""
    return not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape


def _state(optimizer: Optimizer | None, parameter: nn.Parameter) -> dict[str, object]:
    # `state` is a defaultdict: asking it makes an entry, which optimizers take for an initialised one.
    return optimizer.state[parameter] if optimizer is not None and parameter in optimizer.state else {}


@torch.no_grad()
def _cut_(cut: Cut, optimizer: Optimizer | None) -> None:
    parameter = cut.parameter
    kept = cut.kept.to(parameter.device)
    grad = parameter.grad
    state = _state(optimizer, parameter)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            state[key] = value.index_select(cut.dim, kept.to(value.device))
    resize_(parameter, parameter.data.index_select(cut.dim, kept))
    parameter.grad = None if grad is None else grad.index_select(cut.dim, kept)
