"""The models that a method is checked on, and what all checks do with one: wrap, train, compare."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

import tunerkit
from tunerkit.plugin import AdapterConfig
from tunerkit_testing.small import trainable

STEPS = 12
SEED = 0  # of every adapter that is built
# How far two ways of computing the same output may differ, as a share of its largest absolute value, after the few
# layers of a small model: in 16 bits, four units of rounding.
TOLERANCES: Final[Mapping[torch.dtype, float]] = MappingProxyType(
    {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
)
TOLERANCE = TOLERANCES[torch.float32]

Found = TypeVar("Found")


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


@attrs.frozen(eq=False)
class Trial:
    """A method with its config on a model: what a check is given.

    Attributes:
        case: The model.
        method: The method's name.
        config: Its settings.
        folder: Where a check may write files.
        kept: What `once` has computed.
    """

    case: Case
    method: str
    config: Mapping[str, object]
    folder: Path
    kept: dict[object, Any] = attrs.field(factory=dict, repr=False)

    @property
    def build(self) -> Callable[[], nn.Module]:
        return self.case.build

    @property
    def output(self) -> Callable[[nn.Module], Tensor]:
        return self.case.output

    @property
    def loss(self) -> Callable[[nn.Module], Tensor]:
        return self.case.loss

    @property
    def lr(self) -> float:
        return self.case.lr

    @property
    def settings(self) -> dict[str, object]:
        """What the method is configured with: its config takes precedence over what the model needs."""
        return {**self.case.settings, **self.config}

    def structured(self) -> AdapterConfig:
        """Build the config."""
        return tunerkit.structure(self.method, self.settings)

    def wrapped(self) -> nn.Module:
        """Build the model with an untrained adapter."""
        return tunerkit.wrap(self.build(), self.method, self.settings, seed=SEED)

    def trained(self) -> nn.Module:
        """Build the model, train it for `STEPS` steps, and return it in eval mode."""
        model = self.wrapped()
        train(model, self.case)
        return model.eval()

    def start_training(self, model: nn.Module) -> None:
        """Put a model into the case's training mode."""
        self.case.start_training(model)

    def on(self, case: Case) -> "Trial":
        """Return the trial on another model."""
        return attrs.evolve(self, case=case, kept={})

    def but(self, **config: object) -> "Trial":
        """Return the trial with other settings."""
        return attrs.evolve(self, config={**self.config, **config}, kept={})

    def in_dtype(self, dtype: torch.dtype) -> "Trial":
        """Return the trial with the model, and its floating-point inputs, in another dtype."""
        return self.on(in_dtype(self.case, dtype))

    def in_fp64(self) -> "Trial":
        """Return the trial with model and adapters in fp64."""
        return self.in_dtype(torch.float64).but(adapter_dtype="float64")

    def once(self, compute: Callable[["Trial"], Found]) -> Found:
        """Return what a function finds here. It is called once for all checks, and its result must not be changed."""
        if compute not in self.kept:
            self.kept[compute] = compute(self)
        found: Found = self.kept[compute]
        return found


# A check of a method. It raises `AssertionError` if the method fails, and `unittest.SkipTest` if there is nothing to
# check. It may return a remark about what it measured.
Check = Callable[[Trial], str | None]


def name_of(thing: object) -> str:
    """Return a short test id.

    Args:
        thing: A case or a check.
    """
    name: str = getattr(thing, "__name__", "") or getattr(thing, "name", "") or str(thing)
    return name.removeprefix("check_")


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Return the case with its model, and the floating-point inputs, in another dtype."""

    def build() -> nn.Module:
        return with_inputs(case.build().to(dtype), lambda x: x.to(dtype) if x.is_floating_point() else x)

    return attrs.evolve(case, build=build)


def with_inputs(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """Convert the tensors that a model is called with, and return the model."""

    def converted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        found = [convert(each) if isinstance(each, Tensor) else each for each in (*args, *kwargs.values())]
        return tuple(found[: len(args)]), dict(zip(kwargs, found[len(args) :], strict=True))

    model.register_forward_pre_hook(converted, with_kwargs=True)
    return model


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
    optimizer = optimizer_of(trainable(model), case.lr if lr is None else lr)
    tunerkit.attach(model, optimizer, total_steps=steps)
    losses = []
    for _ in range(steps):
        loss = case.loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def tolerance_of(*dtypes: torch.dtype) -> float:
    """Return the share of the largest output by which two outputs may differ: the least precise dtype counts."""
    return max(TOLERANCES[dtype] for dtype in dtypes)


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
    limit = tolerance_of(found.dtype, *adapters) * float(expected.abs().max())
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
