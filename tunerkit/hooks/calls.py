"""Call the hooks: one typed function for each hook that core calls.

Most call only the plugin that owns the method. If it does not implement the hook, they return None or an empty value.
`ranks_changed`, and the functions at the end of this file, ask all plugins. Each answer is checked here, once.

An exception of a plugin keeps its class, because a method's own message explains best what is wrong, and a caller may
catch torch's out-of-memory error. It gets a note with the plugin, the hook and the adapter or target. What would end
the program without a word (SystemExit, a cancelled task) becomes a `PluginError`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.config import AdapterConfig
from tunerkit.engine import Engine
from tunerkit.errors import AdapterError, PluginError
from tunerkit.hooks import answers, specs
from tunerkit.hooks.answers import Question
from tunerkit.hooks.discovery import error_text
from tunerkit.hooks.interrupts import is_from_signal
from tunerkit.hooks.registry import registry
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.layers import Adapter, BaseLayer, low_rank_delta, misfit
from tunerkit.paths import few
from tunerkit.records import Delta, Factors, ParamGroup, RankChange, State, Statistics, Target

A = TypeVar("A")


# Any: the arguments are those of the hook's spec, which pluggy passes by name.
def _ask(question: Question, check: Callable[[Question, object], A], **arguments: Any) -> A:
    """Call the plugin that owns the method, and check its answer."""
    try:
        return check(question, registry.call(question.hook, question.method, **arguments))
    except (PluginError, KeyboardInterrupt):  # the first names the plugin already
        raise
    except Exception as error:
        error.add_note(f"raised by {question.hook_of_plugin}, for {question.place}")
        raise
    except BaseException as error:
        if is_from_signal(error):
            raise
        raise PluginError(f"{question.hook_of_plugin} raised {error_text(error)} for {question.place}") from error


def has_shared(method: str) -> bool:
    """Whether the method's adapters may share a module."""
    return registry.implements(specs.tunerkit_shared, method)


def shared(
    method: str, targets: Sequence[Target], bases: Sequence[BaseLayer], config: AdapterConfig
) -> nn.Module | None:
    """Build what all adapters of the method use; None for nothing."""
    question = Question(specs.tunerkit_shared, method, targets)
    return _ask(question, partial(answers.shared, targets=targets), targets=targets, bases=bases, config=config)


def build_adapter(
    method: str, target: Target, base: BaseLayer, config: AdapterConfig, shared: nn.Module | None = None
) -> Adapter:
    """Build one adapter with the method's plugin. Raises `PluginError` if the result is not an adapter."""
    question = Question(specs.tunerkit_build_adapter, method, target.path)
    check = partial(answers.adapter, target=target, shared=shared)
    return _ask(question, check, target=target, base=base, config=config, shared=shared)


def calibrate(tuner: TunerView, statistics: Mapping[str, Statistics]) -> Mapping[str, int] | None:
    """Let the method set its start. Returns the ranks by target path if they changed."""
    question = Question(specs.tunerkit_calibrate, tuner.method, tuner)
    return _ask(question, partial(answers.ranks, targets=tuner.targets), tuner=tuner, statistics=statistics)


def param_groups(tuner: TunerView) -> list[ParamGroup]:
    """Return the parameters that the method wants to train with settings of their own."""
    question = Question(specs.tunerkit_param_groups, tuner.method, tuner)
    return _ask(question, partial(answers.param_groups, tuner=tuner), tuner=tuner)


def start(tuner: TunerView, total_steps: int | None, optimizer: Optimizer | None) -> object | None:
    """Return the method's initial training state."""
    # The spec says which methods may get None, which means that the length is unknown.
    question = Question(specs.tunerkit_start, tuner.method, tuner)
    return _ask(question, answers.anything, tuner=tuner, total_steps=total_steps, optimizer=optimizer)


def before_step(tuner: TunerView, step: int, grad_scale: Tensor | None) -> list[Tensor]:
    """Notify the method that its gradients are complete; the parameters that this step must not move."""
    question = Question(specs.tunerkit_before_step, tuner.method, tuner)
    return _ask(question, answers.parameters, tuner=tuner, step=step, grad_scale=grad_scale)


def after_step(tuner: TunerView, step: int) -> Mapping[str, int] | None:
    """Notify the method that its weights were updated. Returns the ranks by target path if it made an allocation."""
    question = Question(specs.tunerkit_after_step, tuner.method, tuner)
    return _ask(question, partial(answers.ranks, targets=tuner.targets), tuner=tuner, step=step)


def finish(tuner: TunerView) -> Mapping[str, int] | None:
    """Let the method make its final allocation. Returns the ranks by target path if it did."""
    question = Question(specs.tunerkit_finish, tuner.method, tuner)
    return _ask(question, partial(answers.ranks, targets=tuner.targets), tuner=tuner)


def budget(tuner: TunerView, step: int | None) -> int | None:
    """Return the budget in force after ``step`` optimizer steps (None: now). None: it is the sum of the live ranks."""
    question = Question(specs.tunerkit_budget, tuner.method, tuner)
    return _ask(question, answers.budget, tuner=tuner, step=step)


def ranks_changed(tuner: TunerView, change: RankChange) -> None:
    """Notify every plugin of an allocation."""
    registry.notify_all(specs.tunerkit_ranks_changed, tuner=tuner, change=change)


def changes_gradients(method: str) -> bool:
    """Whether the method acts before a step, when the gradients are complete."""
    return registry.implements(specs.tunerkit_before_step, method)


def watches_steps(method: str) -> bool:
    """Whether the method acts in each step, so that a step without its hooks is another training."""
    return registry.implements(specs.tunerkit_after_step, method) or changes_gradients(method)


def has_delta(method: str) -> bool:
    """Whether the method can return what it adds as a dense matrix."""
    return registry.implements(specs.tunerkit_delta, method) or has_factors(method)


def has_factors(method: str) -> bool:
    """Whether the method can return what it adds as a product."""
    return registry.implements(specs.tunerkit_factors, method)


def adds_products(method: str) -> bool:
    """Whether the method's adapters add products and nothing else, so that the factors say all."""
    return has_factors(method) and not registry.implements(specs.tunerkit_delta, method)


def takes_factors(method: str) -> bool:
    """Whether the method can build adapters from products."""
    return registry.implements(specs.tunerkit_from_factors, method)


def delta(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Delta:
    """Return what an adapter adds to its base layer: ``weight`` (out, in) and ``bias`` (out,).

    Raises `PluginError` for a wrong type, shape or device.
    """
    if not registry.implements(specs.tunerkit_delta, method):
        product = factors(path, method, adapter, base)
        return Delta(weight=low_rank_delta(base, q=product.q, p=product.p, scale=1.0))
    question = Question(specs.tunerkit_delta, method, path)
    return _ask(question, partial(answers.delta, adapter=adapter, base=base), adapter=adapter, base=base)


def factors(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Factors:
    """Return what an adapter adds to its base layer's weight as a product. Raises `PluginError` if it is wrong."""
    question = Question(specs.tunerkit_factors, method, path)
    return _ask(question, partial(answers.factors, adapter=adapter, base=base), adapter=adapter, base=base)


def from_factors(
    method: str, targets: Sequence[Target], bases: Sequence[BaseLayer], products: Mapping[str, Factors]
) -> tuple[AdapterConfig, Mapping[str, Adapter]]:
    """Build a config and adapters, by target path, that add the given products.

    Args:
        method: The method's name.
        targets: The targets.
        bases: Their base layers, in the same order.
        products: The product for each target, by its path.

    Raises:
        AdapterError: There is no target, or a product is missing, has another shape, or is not finite.
    """
    _refuse_unfit(targets, bases, products)
    question = Question(specs.tunerkit_from_factors, method, targets)
    check = partial(answers.built_from_factors, targets=targets, config=registry.get(method).config)
    return _ask(question, check, targets=targets, factors=products)


def _refuse_unfit(targets: Sequence[Target], bases: Sequence[BaseLayer], products: Mapping[str, Factors]) -> None:
    paths = [target.path for target in targets]
    if not paths or products.keys() != set(paths):
        raise AdapterError(
            f"expected one product for each of {len(paths)} targets ({few(paths, shown=5)}), got "
            f"{len(products)} ({few([*products], shown=5)})"
        )
    for path, base in zip(paths, bases, strict=True):
        if (shapes := misfit(base, products[path])) is not None:
            found, needed = shapes
            raise AdapterError(f"the product for {path!r} has {found}; expected {needed}")
        if not all(bool(factor.isfinite().all()) for factor in products[path]):
            raise AdapterError(f"the product for {path!r} contains NaN or inf")


def state(tuner: TunerView) -> State:
    """Return what training needs to resume, in addition to the adapter's weights."""
    return _ask(Question(specs.tunerkit_state, tuner.method, tuner), answers.state, tuner=tuner)


def restore(tuner: TunerView, saved: State) -> None:
    """Restore what `state` returned."""
    _ask(Question(specs.tunerkit_restore, tuner.method, tuner), answers.nothing, tuner=tuner, state=saved)


def attached_by_plugin(
    tuners: Sequence[TunerView], candidate: object, total_steps: int | None, data_parallel: bool | None
) -> bool:
    """Let plugins attach adapters to a trainer that they know. Returns whether one did."""
    return bool(
        registry.first(
            specs.tunerkit_attach,
            bool,
            tuners=tuners,
            candidate=candidate,
            total_steps=total_steps,
            data_parallel=data_parallel,
        )
    )


def wrapped(model: nn.Module) -> None:
    """Tell every plugin that a model has its first adapter."""
    registry.first(specs.tunerkit_wrapped, _never, model=model)


def unwrapped(model: nn.Module) -> None:
    """Tell every plugin that a model, or a copy of a part of one, is to be without adapters."""
    registry.first(specs.tunerkit_unwrapped, _never, model=model)


def _never(answer: object) -> bool:
    return False  # so that all are asked


def engine(
    tuners: Sequence[TunerView], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object] | None:
    """What the processes of a training do together, and what takes the step hooks; None if no plugin says."""
    return registry.first(
        specs.tunerkit_engine,
        partial(answers.is_pair, "an engine and what takes the step hooks", has="before_step_"),
        tuners=tuners,
        model=model,
        candidate=candidate,
        data_parallel=data_parallel,
    )


def open_run(path: Path, base: str | None) -> tuple[nn.Module, object] | None:
    """Load the model and the processor of a run's folder; None if no plugin knows it."""
    is_pair = partial(answers.is_pair, "a model and its processor", has="named_modules")
    return registry.first(specs.tunerkit_open_run, is_pair, path=path, base=base)
