"""Operations besides training on a wrapped model: copy, move, reload, unusual calls."""

import copy
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import attached, fit, pickled
from tests.support.toys import Toys
from tunerkit.errors import StepError
from tunerkit.injection import walk
from tunerkit.plugin import Adapter
from tunerkit_testing.small import trainable

METHODS = ["toy-low-rank", "toy-shift"]


def wrapped(toys: "Toys", method: str, **changes: Any) -> Any:
    return tunerkit.wrap(toys.net(), method, {**toys.full, **changes}, seed=3)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def all_equal(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


# --- Copies ----------------------------------------------------------------------------------------------------------


def through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, through_a_file])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_half_trained_model_trains_independently(toys: "Toys", method: str, before: int, way: Any) -> None:
    """The copy's tuner refers only to the copy; each of the two trains as it would alone, also from its start."""
    model = wrapped(toys, method)
    optimizer = attached(model)
    fit(model, optimizer, toys.x(), before)
    twin = way(model)
    tuner, modules = tunerkit.tuner(twin), set(twin.modules())
    assert tuner.model is twin
    assert tuner.steps == before
    assert {place.module for place in (*tuner.targets, *tuner.copies, *tuner.biases)} <= modules
    assert {slots.base.module for _, _, slots in walk(twin) if slots.base is not None} <= modules
    assert not {id(p) for p in tuner.parameters()} & {id(p) for p in model.parameters()}
    unchanged = values(model)
    assert same(values(twin), unchanged)
    fit(twin, attached(twin), -toys.x(), 4)
    assert same(values(model), unchanged)
    assert (tunerkit.tuner(model).steps, tuner.steps) == (before, 4)
    apart = values(twin)
    fit(model, optimizer, toys.x(), 2)
    assert same(values(twin), apart)
    assert (tunerkit.tuner(model).steps, tuner.steps) == (before + 2, 4)
    alone = wrapped(toys, method)
    fit(alone, attached(alone), toys.x(), before + 2)
    assert same(values(model), values(alone))
    output = model(toys.x())
    with tunerkit.disabled(twin):
        assert torch.equal(model(toys.x()), output)
    assert torch.equal(tunerkit.unwrap(twin)(toys.x()), toys.net()(toys.x()))
    assert torch.equal(model(toys.x()), output)


def test_a_shallow_copy_is_the_same_model(toys: "Toys") -> None:
    """`copy.copy` shares every module, as for any model: the same adapters and tuner."""
    model = toys.trained()
    twin = copy.copy(model)
    assert torch.equal(twin(toys.x()), model(toys.x()))
    assert tunerkit.tuner(twin) is tunerkit.tuner(model)


def replica_of(model: nn.Module) -> nn.Module:
    """A replica as `nn.DataParallel` makes it per device: modules copied flat, parameters as plain tensors."""
    replicas: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
    return replicas[model]


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_of_data_parallel_does_what_the_model_does(toys: "Toys", method: str) -> None:
    """Its parameters are plain tensors: outputs are equal, and gradients reach adapters, copies and biases."""
    model = toys.fill_(wrapped(toys, method))
    replica = replica_of(model)
    assert torch.equal(replica(toys.x()), model(toys.x()))
    replica(toys.x()).square().mean().backward()
    found = [p.grad for p in trainable(model)]
    model.zero_grad()
    model(toys.x()).square().mean().backward()
    assert all_equal(found, [p.grad for p in trainable(model)])


# --- Moves and reloads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_continues_after_a_change_of_dtype(toys: "Toys", method: str, dtype: torch.dtype) -> None:
    """`model.to(dtype)` during training converts base and adapters, and keeps the optimizer's parameters."""
    model = wrapped(toys, method)
    optimizer = attached(model)
    fit(model, optimizer, toys.x(), 2)
    output = model(toys.x())
    model.to(dtype)
    before = values(model)
    assert (model(toys.x().to(dtype)) - output).abs().max() <= (0.1 if dtype == torch.bfloat16 else 1e-5) * output.max()
    fit(model, optimizer, toys.x().to(dtype), 2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert tunerkit.tuner(model).steps == 4
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert any("adapter" in name for name in moved)
    assert all("tunerkit" in name for name in moved)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_weights_come_back_from_meta(toys: "Toys", method: str, assign: bool) -> None:
    """to("meta"), then state_dict with assign=True or into to_empty: the adapters are restored with the model."""
    source = toys.fill_(wrapped(toys, method))
    model = wrapped(toys, method).to("meta")
    if not assign:
        model.to_empty(device="cpu")
    assert not list(model.load_state_dict(source.state_dict(), strict=True, assign=assign).missing_keys)
    assert same(values(model), values(source))
    assert torch.equal(model.eval()(toys.x()), source(toys.x()))
    fit(model, attached(model), toys.x())
    assert tunerkit.tuner(model).steps == 1


def test_a_state_dict_lacks_or_has_too_much_as_ever(toys: "Toys") -> None:
    """strict=True names missing and unexpected keys, including adapters' keys; strict=False loads the rest."""
    model, base = toys.trained(), toys.net()
    with pytest.raises(RuntimeError, match=r"Missing key.*conv\.tunerkit\.default\.adapter\.a"):
        model.load_state_dict(base.state_dict())
    found = model.load_state_dict(base.state_dict(), strict=False)
    assert all(".tunerkit." in name for name in found.missing_keys)
    assert not found.unexpected_keys
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv\.tunerkit\.default\.adapter\.a"):
        base.load_state_dict(model.state_dict())


def test_attaching_a_model_frozen_by_hand_is_refused(toys: "Toys") -> None:
    """`requires_grad_(False)` freezes adapters too; if the user unfreezes everything, the whole model is trained."""
    model = wrapped(toys, "toy-shift").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StepError, match="frozen"):
        tunerkit.attach(model, optimizer, total_steps=3)
    model.requires_grad_(True)
    tunerkit.attach(model, optimizer, total_steps=3)
    before = values(model)
    fit(model, optimizer, toys.x())
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {"conv.weight", "conv.tunerkit.default.adapter.v"} <= set(moved)


def test_apply_reaches_base_layers_and_adapters_by_their_types(toys: "Toys") -> None:
    """`model.apply(fn)` works as in torch: an initialisation by type changes the base's layers, and no other type."""
    model = toys.trained()

    def zero(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | Adapter):
            for parameter in module.parameters(recurse=False):
                nn.init.zeros_(parameter)

    linear = model.layers[0].weight.clone()
    model.apply(zero)
    assert not any(p.any() for adapter in tunerkit.tuner(model).adapters().values() for p in adapter.parameters())
    assert not model.conv.weight.any()
    assert torch.equal(model.layers[0].weight, linear)


# --- Calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_functional_call_uses_the_parameters_it_is_given(toys: "Toys", method: str) -> None:
    """Output and gradients of `functional_call` are those of a model with these parameters."""
    model = wrapped(toys, method)
    other = toys.fill_(copy.deepcopy(model))
    given = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, given, (toys.x(),)), other(toys.x()))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, parameters, (toys.x(),))
        return found.square().mean()

    grads = torch.func.grad(loss)(given)
    other(toys.x()).square().mean().backward()
    trained = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert len(trained) == len(trainable(model))
    assert all(torch.allclose(grads[name], grad, rtol=1e-5, atol=1e-7) for name, grad in trained.items())


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_without_gradients_changes_nothing(toys: "Toys", method: str, quiet: Callable[[], Any]) -> None:
    """Outputs are equal, there is no graph, and training continues unaffected."""
    model, alone = wrapped(toys, method), wrapped(toys, method)
    optimizer = attached(model)
    expected = model(toys.x())
    with quiet():
        found = model(toys.x())
    assert not found.requires_grad
    assert torch.equal(found, expected)
    fit(model, optimizer, toys.x(), 2)
    fit(alone, attached(alone), toys.x(), 2)
    assert same(values(model), values(alone))


@pytest.mark.parametrize("first", ["plain", "wrapped"])
def test_code_compiled_for_a_model_without_adapters_is_not_run_for_one_with_some(toys: "Toys", first: str) -> None:
    """Two models of one class, frozen and compiled after wrapping (one without adapters), in any order."""
    importlib.import_module("torch._dynamo").reset()
    plain = toys.net().requires_grad_(False)
    wrapped = toys.fill_(tunerkit.wrap(toys.net(), "toy-low-rank", toys.full))
    models = {"plain": plain, "wrapped": wrapped}
    compiled: Any = {name: torch.compile(model, backend="eager") for name, model in models.items()}
    for name in sorted(models, key=lambda name: name != first):
        assert toys.close(compiled[name](toys.x()), models[name](toys.x()))
