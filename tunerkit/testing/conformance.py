"""The conformance tests of a method: plugin authors run every check on the models they choose.

::

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
    @pytest.mark.parametrize("case", matrix.cases())
    def test_conforms(check, case, tmp_path):
        check(case, "my-method", {"rank": 2}, tmp_path)

Every check takes the same arguments: a case, the method's name, its config as a mapping, and a folder for files. A
check raises `AssertionError` if the method does not conform. Each check builds its own models, so you can run any
subset in any order. Dropout must be off in the case's model, because the checks compare outputs.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

import tunerkit
from tunerkit.layers import plain_form

STEPS = 12
# In fp32, two ways of computing the same output may differ by this share of its largest absolute value.
TOLERANCE = 1e-5


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
    """

    name: str
    build: Callable[[], nn.Module]
    output: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module], Tensor]
    settings: Mapping[str, object] = attrs.Factory(dict)
    start_training: Callable[[nn.Module], object] = nn.Module.train


Check = Callable[[Case, str, Mapping[str, object], Path], None]


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
    return tunerkit.wrap(case.build(), method, {**case.settings, **config}, seed=0)


def train(model: nn.Module, case: Case, *, steps: int = STEPS, lr: float = 1e-2) -> list[float]:
    """Attach AdamW to the model's adapters and train.

    Args:
        model: A wrapped model of ``case``. It is left in training mode.
        case: Provides the loss and the training mode.
        steps: The number of optimizer steps.
        lr: The learning rate.

    Returns:
        The loss before each step.
    """
    case.start_training(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
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


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Assert that two outputs are equal, up to `TOLERANCE` times the largest absolute value expected.

    Args:
        found: The output to check.
        expected: The reference output, of the same shape.
        what: What is compared, for the message.
    """
    worst = float((found - expected).abs().max())
    limit = TOLERANCE * float(expected.abs().max())
    assert worst <= limit, f"{what}: outputs differ by {worst:.3g}, allowed {limit:.3g}"


def assert_base_untouched(model: nn.Module, case: Case) -> None:
    """Assert that wrapping and training left the base model alone.

    Every tensor of the original model must be in ``model`` under the same name, with the same bits. Every module must
    have its original type.

    Args:
        model: The model to check, wrapped or not.
        case: Builds the original model.
    """
    original = case.build()
    state, types = model.state_dict(), {path: _type(module) for path, module in model.named_modules()}
    for name, tensor in original.state_dict().items():
        assert torch.equal(state[name], tensor), f"base tensor {name} changed"
    for path, module in original.named_modules():
        assert types[path] is _type(module), f"type at {path} changed"


def _type(module: nn.Module) -> type[nn.Module]:
    # Each build creates a new class for a module with a parametrization, such as weight norm.
    return type_before_parametrizations(module)


def check_wrap_changes_no_output(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """`wrap` returns the same object and keeps names, types and output; the output is bit-identical."""
    model = case.build().eval()
    before = case.output(model)
    assert tunerkit.wrap(model, method, {**case.settings, **config}, seed=0) is model
    assert torch.equal(case.output(model), before)
    assert_base_untouched(model, case)


def check_trains_only_the_adapter(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Only the tuner's parameters are trainable. Training lowers the loss and changes no base tensor."""
    model = wrapped(case, method, config)
    own = {id(p) for p in tunerkit.tuner(model).parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    before = case.output(model.eval())
    losses = train(model, case)
    assert losses[-1] < losses[0]
    assert not torch.equal(case.output(model.eval()), before)
    assert_base_untouched(model, case)


def check_meets_the_budget(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """After training, the budget is the schedule's final one. If it counts ranks, the live ranks sum to it exactly."""
    model = wrapped(case, method, config)
    tuner = tunerkit.tuner(model)
    # If the budget counts something else, such as parameters, the ranks do not sum to it at the start.
    counts_ranks = sum(tuner.ranks().values()) == tuner.budget()
    train(model, case)
    assert tuner.budget() == tuner.budget(STEPS)
    if counts_ranks:
        live = sum(tuner.ranks().values())
        assert live == tuner.budget(), f"the live ranks sum to {live}, the budget is {tuner.budget()}"
    for change in tuner.history[-1:]:
        assert (change.budget, change.ranks) == (tuner.budget(), tuner.ranks())


def check_disabled_shows_the_base(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Inside ``disabled`` the output is bit-identical to the base model's, merged or not; then it is adapted again."""
    expected = case.output(case.build().eval())
    model = trained(case, method, config)
    adapted = case.output(model)
    with tunerkit.disabled(model), tunerkit.disabled(model):
        assert torch.equal(case.output(model), expected)
    assert torch.equal(case.output(model), adapted)
    tunerkit.merge(model)
    with tunerkit.disabled(model):
        assert torch.equal(case.output(model), expected)


def check_loads_what_was_saved(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """A new base model with the saved adapter has the trained model's output and ranks, and can be saved again."""
    model = trained(case, method, config)
    path = tunerkit.save(model, tmp_path / "out")
    loaded = tunerkit.load(case.build(), path).eval()
    assert_same(case.output(loaded), case.output(model), "loaded against trained")
    assert tunerkit.tuner(loaded).ranks() == tunerkit.tuner(model).ranks()
    assert not any(p.requires_grad for p in loaded.parameters())
    tunerkit.save(loaded, tmp_path / "again")
    again = tunerkit.load(case.build(), tmp_path / "again").eval()
    assert torch.equal(case.output(again), case.output(loaded))


def check_merges_and_unmerges(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Merging keeps the output. Unmerging restores every base tensor bit for bit. A merged model can be saved."""
    model = trained(case, method, config)
    adapted = case.output(model)
    tunerkit.merge(model)
    assert_same(case.output(model), adapted, "merged against adapted")
    loaded = tunerkit.load(case.build(), tunerkit.save(model, tmp_path / "merged")).eval()
    assert_same(case.output(loaded), adapted, "saved while merged")
    tunerkit.unmerge(model)
    assert torch.equal(case.output(model), adapted)
    assert_base_untouched(model, case)


def check_unwraps(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """`unwrap` restores the base model and its ``requires_grad`` flags. ``keep_merged`` keeps the adapted output."""
    original = case.build()
    model = trained(case, method, config)
    adapted = case.output(model)
    merged = tunerkit.unwrap(copy.deepcopy(model), keep_merged=True)
    assert_same(case.output(merged), adapted, "kept merged")
    assert list(merged.state_dict()) == list(original.state_dict())
    tunerkit.unwrap(model)
    assert list(model.state_dict()) == list(original.state_dict())
    assert_base_untouched(model, case)
    flags = {name: p.requires_grad for name, p in original.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(case.output(model), case.output(original.eval()))


def check_fused_is_plain(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """In float64, the fused low-rank product has the plain form's output and gradients, to 1e-10."""
    model = wrapped(case, method, config).double()
    model.register_forward_pre_hook(_doubled, with_kwargs=True)
    case.start_training(model)
    own = list(tunerkit.tuner(model).parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # move away from the initial values, at which most terms are 0
        for parameter in own:
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    fused = _values_and_gradients(case, model, own)
    with plain_form():
        plain = _values_and_gradients(case, model, own)
    for found, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * max(1.0, float(expected.abs().max())))


def _values_and_gradients(case: Case, model: nn.Module, own: list[nn.Parameter]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):  # the method may use dropout: draw the same mask each time
        torch.manual_seed(1)
        loss = case.loss(model)
        output = case.output(model).detach()
    gradients = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
    return [output, loss.detach(), *gradients]


def _doubled(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert a case's floating-point inputs to float64."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in (*args, *kwargs.values())]
    return tuple(wide[: len(args)]), dict(zip(kwargs, wide[len(args) :], strict=True))


CHECKS: tuple[Check, ...] = (
    check_wrap_changes_no_output,
    check_fused_is_plain,
    check_trains_only_the_adapter,
    check_meets_the_budget,
    check_disabled_shows_the_base,
    check_loads_what_was_saved,
    check_merges_and_unmerges,
    check_unwraps,
)
