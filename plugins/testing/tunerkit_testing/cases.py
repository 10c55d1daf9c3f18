"""The models that a method is checked on, and what all checks do with one: wrap, train, compare."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

import tunerkit
from tunerkit_testing import tolerances

STEPS = 12
SEED = 0  # of every adapter that is built
# In fp32, two ways of computing the same output may differ by this share of its largest absolute value.
TOLERANCE = tolerances.of_output(torch.float32)


@attrs.frozen
class Case:
    """A model to check a method on.

    Attributes:
        name: The test id.
        build: Builds the model. Every call must return the same weights, so seed it.
        output: Runs the model on fixed inputs and returns one tensor.
        loss: Runs the model on fixed training data and returns a scalar.
        settings: Settings of `AdapterConfig` that this model needs, such as its targets. The config that a check is
            called with takes precedence.
        start_training: Puts the model into training mode. With batch norms, keep those in eval mode: training would
            change the running statistics of the base model.
        lr: The learning rate of AdamW at which a few steps lower the loss.
    """

    name: str
    build: Callable[[], nn.Module]
    output: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module], Tensor]
    settings: Mapping[str, object] = attrs.Factory(dict)
    start_training: Callable[[nn.Module], object] = nn.Module.train
    lr: float = 1e-2


class Advice(Exception):
    """What a check raises if a method keeps the contract and could do better: its status is then "advice"."""


# A check of a method, by its name and config, on a case, with a folder for files. It raises `AssertionError` if the
# method fails, and `unittest.SkipTest` if there is nothing to check. It may return a remark about what it measured.
Check = Callable[[Case, str, Mapping[str, object], Path], str | None]


def name_of(thing: object) -> str:
    """Return a short test id.

    Args:
        thing: A case or a check.
    """
    name: str = getattr(thing, "__name__", "") or getattr(thing, "name", "") or str(thing)
    return name.removeprefix("check_")


def wrapped(case: Case, method: str, config: Mapping[str, object]) -> nn.Module:
    """Build the model of ``case`` and add an untrained adapter.

    Args:
        case: The model.
        method: The method's name.
        config: The method's config as a mapping; it takes precedence over ``case.settings``.
    """
    return tunerkit.wrap(case.build(), method, {**case.settings, **config}, seed=SEED)


def optimizer_of(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return AdamW for some parameters, with an epsilon that is not 0 in their dtype.

    In fp16, 1e-8 is 0, and so is the square of a small gradient: each step would divide by 0.

    Args:
        parameters: What to train.
        lr: The learning rate.
    """
    trained = list(parameters)
    eps = 1e-4 if any(parameter.dtype == torch.float16 for parameter in trained) else 1e-8
    return torch.optim.AdamW(trained, lr=lr, eps=eps)


def train(model: nn.Module, case: Case, *, steps: int = STEPS, lr: float | None = None) -> list[float]:
    """Attach AdamW to the model's adapters and train.

    Args:
        model: A wrapped model of ``case``. It is left in training mode.
        case: Provides the loss and the training mode.
        steps: The number of optimizer steps.
        lr: The learning rate; None takes the case's.

    Returns:
        The loss before each step.
    """
    case.start_training(model)
    optimizer = optimizer_of((p for p in model.parameters() if p.requires_grad), case.lr if lr is None else lr)
    tunerkit.attach(model, optimizer, total_steps=steps)
    losses = []
    for _ in range(steps):
        loss = case.loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trained(case: Case, method: str, config: Mapping[str, object]) -> nn.Module:
    """Wrap a model, train it for `STEPS` steps, and return it in eval mode.

    Args:
        case: The model.
        method: The method's name.
        config: The method's config as a mapping.
    """
    model = wrapped(case, method, config)
    train(model, case)
    return model.eval()


def assert_same(
    found: Tensor,
    expected: Tensor,
    what: str,
    hint: str = "both must be the same function",
    *,
    adapters: Iterable[torch.dtype] = (),
) -> None:
    """Assert that two outputs are equal, up to a share of the largest absolute value expected: `TOLERANCE` in fp32.

    Args:
        found: The output to check.
        expected: The reference output, of the same shape.
        what: What is compared, for the message.
        hint: What to do about a difference, for the message.
        adapters: The dtypes of the adapters, if the two outputs round in them differently. Less precise ones than the
            outputs' allow a larger difference.
    """
    worst = float((found - expected).abs().max())
    limit = tolerances.of_output(found.dtype, *adapters) * float(expected.abs().max())
    assert worst <= limit, f"{what}: outputs differ by {worst:.3g}, allowed {limit:.3g}; {hint}"


def assert_base_untouched(model: nn.Module, case: Case, hint: str = "leave the base model as it is") -> None:
    """Assert that wrapping and training left the base model alone.

    Every tensor of the original model must be in ``model`` under the same name, with the same bits. Every module must
    have its original type.

    Args:
        model: The model to check, wrapped or not.
        case: Builds the original model.
        hint: What to do about a change, for the message.
    """
    original = case.build()
    state, types = model.state_dict(), {path: _type(module) for path, module in model.named_modules()}
    for name, tensor in original.state_dict().items():
        assert torch.equal(state[name], tensor), f"base tensor {name} changed; {hint}"
    for path, module in original.named_modules():
        assert types[path] is _type(module), f"type at {path} changed; {hint}"


def _type(module: nn.Module) -> type[nn.Module]:
    # Each build creates a new class for a module with a parametrization, such as weight norm.
    return type_before_parametrizations(module)
