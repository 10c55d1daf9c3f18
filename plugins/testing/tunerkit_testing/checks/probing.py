"""Looks at a wrapped model as several checks do: its adapters, the calls of its targets, its gradients."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

import tunerkit
from tunerkit import hooks, injection
from tunerkit.injection import Slot, Slots
from tunerkit.layers import Adapter, BaseLayer, torch_private
from tunerkit.plugin import Tuner
from tunerkit_testing.blaming import changed, lasting_values, values_in
from tunerkit_testing.cases import Case, Trial

_SHARED = "the shared module"
# What torch keeps in every module, and looks after.
_TORCH = frozenset(vars(nn.Module()))


def shared_in(tuner: Tuner) -> nn.Module | None:
    """Return the module that the method's adapters share, if there is one; see the hook `tunerkit_shared`."""
    return next((slot.shared for _, slot in injection.slots_in(tuner) if slot.shared is not None), None)


@attrs.frozen(eq=False)
class Call:
    """A call of a target, as the base model makes it.

    Attributes:
        path: The target's path.
        module: The module there.
        slots: What is injected there.
        slot: The adapter's slot there.
        args: The arguments of the call.
        kwargs: Its keyword arguments.
    """

    path: str
    module: nn.Module
    slots: Slots
    slot: Slot
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def base(self) -> BaseLayer:
        """The module as the method sees it."""
        assert self.slots.base is not None
        return self.slots.base

    @property
    def adapter(self) -> Adapter:
        """The method's adapter."""
        assert self.slot.adapter is not None
        return self.slot.adapter

    @property
    def x(self) -> Any:
        """The module's input."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def is_plain(self) -> bool:
        """Whether a tensor is all that the module is given: a block may be given masks or positions too."""
        return isinstance(self.x, Tensor) and len(self.args) + len(self.kwargs) == 1

    def run(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Call the module, with some of its tensors replaced, and return its output; of several, the first."""
        if tensors is None:
            found = self.module(*self.args, **self.kwargs)
        else:
            found = functional_call(self.module, dict(tensors), self.args, dict(self.kwargs))
        return first_of(found)

    def seeded(self, seed: int = 1) -> Tensor:
        """Call the module with a random state of its own, which gives the same dropout each time."""
        return seeded(lambda _: self.run(), self.module, seed)

    def with_input(self, x: Tensor) -> "Call":
        """Return the call with another input."""
        if self.args:
            return attrs.evolve(self, args=(x, *self.args[1:]))
        return attrs.evolve(self, kwargs={**self.kwargs, next(iter(self.kwargs)): x})


def first_of(output: Any) -> Tensor:
    """Return a module's output; of several, the first."""
    found: Tensor = output[0] if type(output) is tuple else output
    return found


@contextmanager
def in_training(call: Call, model: nn.Module) -> Iterator[None]:
    """Put the adapter of a call, and what it shares with others, into training mode for a block."""
    shared = shared_in(tunerkit.tuner(model))
    parts = [call.adapter] if shared is None else [call.adapter, shared]
    for part in parts:
        part.train()
    yield
    for part in parts:
        part.eval()


def drawing(call: Call) -> tuple[Tensor, bool]:
    """Return a layer's output, and whether random numbers were drawn for it."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        found = call.run()
        return found, not torch.equal(torch.get_rng_state(), before)


def placed(model: nn.Module) -> Iterator[tuple[str, Adapter, BaseLayer]]:
    """Yield each adapter of a model between the path of its target and the base layer there."""
    for path, _, slots in injection.walk(model):
        for slot in slots.applied:
            if slot.adapter is not None and slots.base is not None:
                yield path, slot.adapter, slots.base


def tiled(call: Call, samples: int) -> Call:
    """Return a call whose input is repeated until it has at least this many samples, if a tensor is all it is given."""
    if not call.is_plain:
        return call
    return call.with_input(call.x.repeat(-(-samples // len(call.x)), *[1] * (call.x.ndim - 1)))


def movable(call: Call, own: Mapping[str, Tensor]) -> tuple[Call, dict[str, Tensor]]:
    """Return the call with an input that takes gradients, and what takes them: that, and the target's own tensors."""
    prefixes = (f"{call.path}: ", f"{_SHARED}: ")
    moved = {name: tensor for name, tensor in own.items() if name.startswith(prefixes) and tensor.numel()}
    if not isinstance(call.x, Tensor) or not call.x.is_floating_point():
        return call, moved
    x = moved["the layer's input"] = call.x.detach().clone().requires_grad_()
    return call.with_input(x), moved


def random_like(of: Tensor) -> Tensor:
    """Return fixed random numbers in fp64, of a tensor's shape."""
    return torch.randn(of.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def calls_of(model: nn.Module, trial: Trial) -> list[Call]:
    """Run the base model and note the last call of each target; those that are bypassed are missing."""
    found: dict[str, Call] = {}
    places = [place for place in injection.walk(model) if any(slot.adapter is not None for slot in place[2].applied)]

    def noting(path: str, slots: Slots) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            slot = next(slot for slot in slots.applied if slot.adapter is not None)
            found[path] = Call(path, module, slots, slot, args, kwargs)

        return note

    with ExitStack() as stack:
        stack.enter_context(tunerkit.disabled(model))
        for path, module, slots in places:
            stack.callback(module.register_forward_pre_hook(noting(path, slots), with_kwargs=True).remove)
        trial.output(model)
    return list(found.values())


class _Alone(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


_PLACING: Final = ("targets", "exclude", "layers")
IN_LAYER: Final[Mapping[str, object]] = {"targets": ("layer",), "train_modules": ()}


def layers_of(trial: Trial) -> Iterator[Trial]:
    """Yield a target of each kind as a model of its own, which is cheaper. Its loss is the output's mean square."""
    base, kinds, config = trial.build().eval(), set(), {n: v for n, v in trial.config.items() if n not in _PLACING}
    for call in calls_of(trial.wrapped().eval(), trial):
        if type(call.module) not in kinds:
            kinds.add(type(call.module))
            layer, run = base.get_submodule(call.path), partial(_output, call)
            case = Case(call.path, partial(_alone, layer), torch.no_grad()(run), partial(_square, run), lr=trial.lr)
            yield attrs.evolve(trial, case=case, config={**config, **IN_LAYER}, kept={})


def _alone(layer: nn.Module) -> nn.Module:
    return _Alone(copy.deepcopy(layer))


def _output(call: Call, model: nn.Module) -> Tensor:
    return first_of(model(*call.args, **call.kwargs))


def _square(run: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    return run(model).square().mean()


@contextmanager
def one_code_path() -> Iterator[None]:
    """Keep torch from the fused inference of whole encoder layers, which it never uses where adapters are.

    Outputs that are compared bit for bit are then computed by the same operations.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def base_output(trial: Trial) -> Tensor:
    """Return the output of the base model in eval mode, frozen as under an adapter: torch picks kernels by that too."""
    return trial.output(trial.build().eval().requires_grad_(False))


def own_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the method's own modules by name: its adapters by path, and what they share."""
    tuner = tunerkit.tuner(model)
    shared = shared_in(tuner)
    return {**tuner.adapters(), **({} if shared is None else {_SHARED: shared})}


def unregistered(part: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield copies of what a module holds beyond a plain module's attributes; other modules are left out."""
    own = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    for path, module in part.named_modules():
        for name in vars(module).keys() - _TORCH:
            if id(vars(module)[name]) not in own:
                yield from values_in(vars(module)[name], f"{path}.{name}".lstrip("."))


def own_parameters(tuner: Tuner) -> dict[str, nn.Parameter]:
    """Return the parameters of the method itself by name: those of its adapters, and of what they share."""
    parts = own_parts(tuner.model)
    return {f"{path}: {name}": p for path, part in parts.items() for name, p in part.named_parameters()}


def trained_parameters(tuner: Tuner) -> dict[str, nn.Parameter]:
    """Return those of `own_parameters` that are trained."""
    return {name: parameter for name, parameter in own_parameters(tuner).items() if parameter.requires_grad}


def values_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the values of parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def without_copies(trial: Trial) -> nn.Module:
    """Build a wrapped model in training mode, in which only the method's own parameters are trained."""
    model = trial.wrapped()
    trial.start_training(model)
    own = {id(parameter) for parameter in own_parameters(tunerkit.tuner(model)).values()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return model


@torch.no_grad()
def fill_(model: nn.Module, share: float = 0.1) -> nn.Module:
    """Move all that adapters train away from its start, where most terms are 0, as training would."""
    generator = torch.Generator().manual_seed(7)
    for tuner in injection.tuners_of(model).values():
        for parameter in tuner.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                parameter.add_(share * noise.to(parameter.dtype))
    return model


def filled(trial: Trial) -> nn.Module:
    """Build a wrapped model in eval mode with `fill_`."""
    return fill_(trial.wrapped()).eval()


def copy_parts(source: nn.Module, goal: nn.Module) -> None:
    """Copy the parameters and persistent buffers of adapters and of what they share."""
    parts = own_parts(goal)
    for name, part in own_parts(source).items():
        parts[name].load_state_dict(part.state_dict())


@torch.no_grad()
def copy_state(source: nn.Module, goal: nn.Module) -> None:
    """Copy what files have: that of `copy_parts`, and what is trained beside it."""
    copy_parts(source, goal)
    goal_parameters = dict(goal.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            goal_parameters[name].copy_(parameter)


def outliving(model: nn.Module, adapter: str | None = None) -> dict[str, object]:
    """Copy what outlives the adapters of a model, by name: values of the plugin, of classes, of Python modules."""
    tuner = tunerkit.tuner(model, adapter)
    plugin = hooks.registry.loaded().owners[tuner.method].plugin
    return lasting_values(plugin, (*tuner.adapters().values(), shared_in(tuner)))


def meanwhile(before: Mapping[str, object], model: nn.Module, adapter: str | None = None) -> str:
    """Return what a message begins with: what `outliving` named before, and is another value now."""
    others = changed(before, outliving(model, adapter))
    told = f"{some(others)} changed meanwhile, which all adapters have in common, where nothing may count; "
    return told if others else ""


def some(names: Sequence[str]) -> str:
    """Return the first three names for a message, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def saved(model: nn.Module, folder: Path) -> Path:
    """Save an adapter that was not trained: a method that needs steps would refuse that."""
    tunerkit.tuner(model).progress.steps = 1
    return tunerkit.save(model, folder / "out")


def adapter_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes that the configs of a model's adapters ask for."""
    return {getattr(torch, tuner.config.adapter_dtype) for tuner in injection.tuners_of(model).values()}


def seeded(run: Callable[[nn.Module], Tensor], model: nn.Module, seed: int = 1) -> Tensor:
    """Run a model with a random state of its own: a method may use dropout, and two runs must draw the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return run(model)


def take_steps_(model: nn.Module, trial: Trial, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take steps, each with a random state of its own number."""
    trial.start_training(model)
    for step in steps:
        optimizer.zero_grad()
        seeded(trial.loss, model, step).backward()
        optimizer.step()


def gradients(loss: Tensor, tuner: Tuner) -> dict[str, Tensor]:
    """Return the gradients of the method's trained parameters by name; those that the loss does not reach are 0."""
    own = trained_parameters(tuner)
    found = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(own, found, strict=True))


def largest(tensors: Mapping[str, Tensor]) -> float:
    """Return the largest absolute value in some tensors."""
    return max((float(tensor.detach().abs().max()) for tensor in tensors.values() if tensor.numel()), default=0.0)


def assert_equal_sets(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], share: float, what: str) -> None:
    """Assert that tensors are equal by name, up to a share of the largest value of all."""
    limit = share * largest(expected)
    for name, tensor in expected.items():
        worst = largest({name: found[name].double() - tensor.double()})
        assert worst <= limit, f"{what} ({name}: {worst:.3g}, allowed {limit:.3g})"


def require_places(model: nn.Module) -> None:
    """Skip a check about merging if a delta has a bias and its base layer has none, so that merging is refused."""
    for path, adapter, base in placed(model):
        bias = hooks.delta(path, tunerkit.tuner(model).method, adapter, base).bias if base.has_weight else None
        if bias is not None and torch_private.own_parameters(base.module).get(base.bias_name) is None:
            raise SkipTest(f"the delta has a bias, and the layer at {path!r} has no place for one")


def require_delta(method: str) -> None:
    """Skip a check about merging for a method that adapts outputs, and need not be able to merge."""
    if hooks.registry.get(method).targets != "weights" and not hooks.has_delta(method):
        raise SkipTest("the method adapts outputs and has no delta")
