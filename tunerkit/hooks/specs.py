"""The hooks that a plugin implements, and when each one fires.

A plugin is a module (or an object) with functions marked ``@tunerkit.hookimpl`` and named like the hooks below. It may
leave out hooks and arguments that it does not need. *Discovery* declares the plugin's methods. The other three groups
follow the data flow: *Layer injection* builds adapters, *Step callbacks* train them, *Serialization* saves and merges
them. When they fire::

    tunerkit.wrap(model, "method", config)                # tunerkit_methods, once per process
                                                          # tunerkit_prepare; tunerkit_base_layers,
                                                          # tunerkit_weight_readers, tunerkit_default_targets,
                                                          # tunerkit_model_libraries:
                                                          # the model is scanned once
                                                          # tunerkit_shared, once; tunerkit_build_adapter per target
                                                          # tunerkit_wrapped, for the first adapter
                                                          # tunerkit_adapted; tunerkit_restrictions, also in the calls
                                                          # below
    tunerkit.calibrate(model, batches)                    # tunerkit_calibrate, if the method wants statistics
    reference = tunerkit.reference(model)                 # tunerkit_reference
    groups = tunerkit.param_groups(model, lr=1e-3)        # tunerkit_param_groups
    tunerkit.attach(model, optimizer, total_steps=1000)   # tunerkit_attach, if it is a trainer and no optimizer
                                                          # tunerkit_engine: how processes synchronize adapters
                                                          # tunerkit_start: nothing is trained yet
    for batch in batches:
        for part in batch.micro_batches():                # no hook fires per micro-batch
            loss(model, part).backward()
        clip_gradients(model)
        optimizer.step()                                  # tunerkit_before_step: gradients complete, weights as before
                                                          # (the optimizer updates the weights)
                                                          # tunerkit_after_step: weights updated, gradients kept
                                                          # tunerkit_ranks_changed, if ranks were allocated
        scheduler.step()
        optimizer.zero_grad()                             # no hook fires: the gradients are gone
    tunerkit.tuner(model).finish()                        # tunerkit_finish, tunerkit_ranks_changed
    tunerkit.save(model, path)                            # no hook fires: core saves the adapters' tensors
    tunerkit.save_state(model, path)                      # tunerkit_state
    model = tunerkit.load(base_model, path)               # the same hooks as in wrap
    tunerkit.merge(model)                                 # tunerkit_delta per target, or tunerkit_factors (also in each
                                                          # forward of attention); tunerkit_holdings of the base
    tunerkit.load_state(model, path)                      # tunerkit_restore, once it is attached again
    tunerkit.export(model, path, format="peft")           # tunerkit_formats, and tunerkit_factors per target
    tunerkit.unwrap(model)                                # tunerkit_unwrapped, tunerkit_adapted
    model, processor = tunerkit.from_folder("a run")      # tunerkit_open_run
    model = tunerkit.load(base_model, "a peft folder")    # tunerkit_formats, then the hooks of wrap, or
                                                          # tunerkit_from_factors

A plain ``@hookspec`` calls every plugin; ``firstresult=True`` marks hooks that call only the plugin that owns the
method, so no plugin ever receives another plugin's layers.

An answer must have the declared type. If the method's plugin returns a wrong one, that is a `PluginError`. An exception
in a hook keeps its class, with a note on the plugin, the hook and the target or adapter; SystemExit and the like become
a `PluginError`. Hooks that collect records from every plugin never stop the user's call: after a wrong answer or an
exception, there is one warning, the plugin's records are not used, and ``tunerkit.methods()`` lists the plugin with its
error. These hooks are called once, and again when a plugin is added or removed. In all other hooks, and in functions of
the records, exceptions reach the user, with a note on how to run without the plugin. A record with an invalid field
raises a `PluginError` at the line that builds it. docs/authors has examples of all hooks.
"""

# A hook spec has a docstring and no body: pluggy only reads its signature.
# mypy: disable-error-code="empty-body"

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pluggy
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.config import AdapterConfig
from tunerkit.hooks.engines import Engine, TunerView
from tunerkit.layers import Adapter, BaseLayer
from tunerkit.records import (
    DefaultTargets,
    Delta,
    Factors,
    Format,
    Holding,
    Method,
    ModelLibrary,
    ParamGroup,
    RankChange,
    Restriction,
    State,
    Statistics,
    Target,
    WeightReader,
)

# --- Discovery -------------------------------------------------------------------------------------------------------

PROJECT = "tunerkit"
hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec
def tunerkit_methods() -> Iterable[Method]:
    """Yield the methods that this plugin provides.

    Fires once, when the plugin is loaded: at the first use of any method, or in ``tunerkit.register``. Other plugins
    may not be loaded yet. A plugin without methods omits this hook.
    """


# --- Layer injection -------------------------------------------------------------------------------------------------


@hookspec
def tunerkit_base_layers() -> Iterable[type[BaseLayer]]:
    """Return additional kinds of base layers, for modules that core cannot adapt.

    Fires when a model is wrapped or an adapter loaded, before anything is changed. Core's own kinds come first, so a
    plugin cannot redefine ``nn.Linear``; the plugins' kinds follow, sorted by the names of their distributions.
    """


@hookspec
def tunerkit_weight_readers() -> Iterable[WeightReader]:
    """Return the classes that use a child's weight directly, bypassing the child's forward().

    Fires when a model is wrapped or an adapter loaded. A forward hook on such a child would never run. Instead, core
    overrides the child's weight with the adapted weight in each forward of the owner; the method must implement
    `tunerkit_delta` or `tunerkit_factors` for that. Core's own records come first and cannot be changed.
    """


@hookspec
def tunerkit_default_targets() -> Iterable[DefaultTargets]:
    """Return the default targets of additional architectures, by ``model.config.model_type``.

    Fires when a model is wrapped or an adapter loaded. The defaults apply if the config names no targets. If a model
    has no module with these names, tunerkit chooses targets by layer type, as for an unknown architecture.
    """


@hookspec
def tunerkit_model_libraries() -> Iterable[ModelLibrary]:
    """Return records about a library's models: output heads, new modules, settings and tied weights.

    Fires when a model is wrapped, merged or made dense, and when an adapter is saved or loaded. An exception in a
    function of the record reaches the user; a wrong answer is a `PluginError`.
    """


@hookspec(firstresult=True)
def tunerkit_shared(targets: Sequence[Target], bases: Sequence[BaseLayer], config: AdapterConfig) -> nn.Module | None:
    """Build a module that all adapters of the method share, such as VeRA's random matrices, or return None.

    Fires once in ``wrap`` and in ``load``, before the first `tunerkit_build_adapter`, with core's seed set. Targets and
    base layers come in the model's order. Core keeps the module beside the first target's adapter, moves it to that
    target's device and the config's dtype, and saves it once. `tunerkit_build_adapter` gets it and must not change it;
    ``forward`` and `tunerkit_delta` find it as ``adapter.shared``. Parameters with ``requires_grad=False`` stay fixed.
    """


@hookspec(firstresult=True)
def tunerkit_build_adapter(
    target: Target, base: BaseLayer, config: AdapterConfig, shared: nn.Module | None, loading: bool
) -> Adapter:
    """Build the adapter of one target. Every plugin with a method must implement this hook.

    Fires once per target in ``wrap`` and in ``load``, with core's seed set, before anything is injected. ``base`` gives
    sizes and weights of the base layer; do not change it. ``shared`` is the module from `tunerkit_shared`. Core then
    moves the adapter to the base layer's device and the config's dtype. If ``loading``, values from a file replace the
    initial values later: do not read the base layer's weight then, since it may be missing.
    """


@hookspec
def tunerkit_prepare(model: nn.Module) -> None:
    """Prepare a model for the search for targets, for example with a child module for a stack of weights.

    Fires in ``wrap`` and ``load``, for each adapter. `tunerkit_adapted` undoes what is not needed, also if they fail.
    """


@hookspec
def tunerkit_wrapped(model: nn.Module) -> None:
    """Prepare a model for use by another library, after the model's first adapter was injected.

    Fires in ``wrap`` and ``load``; `tunerkit_unwrapped` undoes it. If the hook raises or changes weights, nothing is
    injected.
    """


@hookspec
def tunerkit_unwrapped(model: nn.Module) -> None:
    """Undo the changes that `tunerkit_prepare` and `tunerkit_wrapped` made to a model.

    Fires when the last adapter was removed from a model, and for each copy of a module that is trained in full. It
    fires again after ``unwrap`` replaced layers by dense ones, and after an interrupted call.
    """


@hookspec
def tunerkit_adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """React to a change of a model's adapted modules, before the model runs again.

    Fires after adapters were injected into a model or removed. ``modules`` are the modules that have adapters now. If
    there are none, undo your changes to the model, here or in `tunerkit_unwrapped`.
    """


@hookspec
def tunerkit_holdings() -> Iterable[Holding]:
    """Return records with functions that read weights which a library offloads or shards.

    Fires when core finds weights that are empty or on the meta device, and in verbs that copy, merge or write. A
    forward with ordinary weights never calls this hook.
    """


@hookspec
def tunerkit_restrictions() -> Iterable[Restriction]:
    """Return the verbs that fail with a library that manages weights or adds modules, with reasons and alternatives.

    Fires when a model is wrapped, attached, saved or merged. The first restriction that applies raises an error.
    """


# --- Step callbacks --------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def tunerkit_calibrate(
    tuner: TunerView, statistics: Mapping[str, Statistics], bases: Mapping[str, BaseLayer]
) -> Mapping[str, int] | None:
    """Initialize adapters and ranks from statistics of the data; return the rank by target path if ranks changed.

    Fires in ``tunerkit.calibrate``, before training, for a method with ``statistics`` in its record. ``statistics`` and
    ``bases`` have one entry for each target's path; do not change the base layers. Afterwards, the adapters must still
    add nothing to the output. To change a rank, use `tunerkit.plugin.resize_`, and declare the adapter's ``rank_dims``,
    so that files can be loaded.
    """


@hookspec
def tunerkit_reference(model: nn.Module) -> nn.Module | None:
    """Return a module that computes the wrapped model's present output, unaffected by later training.

    Fires in ``tunerkit.reference``, until a plugin returns a module. Return None to leave the model to another plugin.
    """


@hookspec(firstresult=True)
def tunerkit_param_groups(tuner: TunerView) -> Iterable[ParamGroup] | None:
    """Return the parameters that need another learning rate or weight decay; all others keep the optimizer's.

    Fires in ``tunerkit.param_groups``, and when an attached Trainer builds its optimizer.
    """


@hookspec
def tunerkit_attach(
    tuners: Sequence[TunerView], candidate: object, total_steps: int | None, data_parallel: bool | None
) -> bool | None:
    """Attach adapters to a trainer that this plugin supports, and return True.

    Fires in ``tunerkit.attach``, until a plugin returns True. Return None for any other object. The hook does not fire
    for an optimizer of torch, which core attaches itself. If the trainer has no optimizer yet, wait for one.
    """


@hookspec
def tunerkit_engine(
    tuners: Sequence[TunerView], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object] | None:
    """Return the engine that shards or synchronizes the adapters of a training with several processes.

    Fires when adapters are attached to an optimizer, until a plugin returns an engine. Return None to leave the
    training to another plugin; if none returns an engine, the process trains alone. tunerkit-distributed supports every
    training, and is called last (``tunerkit.hookimpl(trylast=True)``). Return the engine, see `tunerkit.plugin.Engine`,
    and the object that gets the step hooks: ``candidate``, or an optimizer of torch in its place.
    """


@hookspec(firstresult=True)
def tunerkit_start(tuner: TunerView, total_steps: int | None, optimizer: Optimizer | None) -> object | None:
    """Check the schedule, and return the method's own training state. Core stores it as ``tuner.state``.

    Fires when the model is attached, before the first step. ``total_steps`` is None if the length of training is
    unknown: a method that needs it must raise here, not during training. A method that grows parameters must raise here
    if `tunerkit.plugin.resize_obstacle` returns a reason. ``optimizer`` is an optimizer of torch; None if it does not
    support hooks.
    """


@hookspec(firstresult=True)
def tunerkit_before_step(tuner: TunerView, step: int, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Add gradients that are not part of the loss; return the parameters that this step must not update, or None.

    Fires once per optimizer step, independent of gradient accumulation, with complete gradients and before any update;
    with ``optimizer.step(closure)``, after each run of the closure. ``step`` counts from 1. The hook does not fire for
    frozen adapters, nor for inactive adapters without gradients. ``grad_scale``, a scalar tensor, is the scale of the
    gradients under a fused optimizer with a GradScaler: multiply the gradients that you add by it. Core withholds the
    gradients of the returned parameters, and restores them, unscaled, before `tunerkit_after_step`.
    """


@hookspec(firstresult=True)
def tunerkit_after_step(tuner: TunerView, step: int) -> Mapping[str, int] | None:
    """Measure importance and allocate ranks; return the rank by target path after an allocation, else None.

    Fires right after the optimizer updated the weights. This step's gradients still exist, unscaled, and clipped if the
    user clips them. The hook does not fire for a step that was skipped because its gradients overflowed. ``step`` is
    the same number as in `tunerkit_before_step`.
    """


@hookspec(firstresult=True)
def tunerkit_finish(tuner: TunerView) -> Mapping[str, int] | None:
    """Make the final allocation now, regardless of the schedule; return the rank by target path.

    Fires in ``tuner.finish()``, when training ends earlier than planned. Gradients may be missing. A method without a
    schedule omits this hook.
    """


@hookspec(firstresult=True)
def tunerkit_budget(tuner: TunerView, step: int | None) -> int | None:
    """Return the budget in force after ``step`` optimizer steps; if ``step`` is None, the current budget.

    Fires in ``tuner.budget(step)``, possibly before the tuner is attached, and must not change anything. Without this
    hook, the budget is the sum of the live ranks.
    """


@hookspec
def tunerkit_ranks_changed(tuner: TunerView, change: RankChange) -> None:
    """Observe the ranks, for loggers and plots.

    Fires after each allocation of any method, with the new masks in force. Only observe: an exception, even SystemExit,
    becomes a warning, and training continues.
    """


# --- Serialization ---------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def tunerkit_delta(adapter: Adapter, base: BaseLayer) -> Delta:
    """Return one adapter's current change to its base layer, as dense tensors.

    Fires once per target in ``merge``, with gradients disabled, before anything is merged. ``weight`` is always (out,
    in), as in ``nn.Linear``, and ``bias`` is (out,). Core converts the weight to the base layer's own layout. The hook
    also fires in every forward of a module that uses a layer's weight directly, as attention does. In such a module the
    adapter's forward is never called, so do not detach the result: its gradients train the adapter.
    """


@hookspec(firstresult=True)
def tunerkit_factors(adapter: Adapter, base: BaseLayer) -> Factors:
    """Return one adapter's current ΔW as a product of two small matrices.

    Fires wherever a product is sufficient, or better than a dense matrix. A method with this hook needs
    `tunerkit_delta` only if it also adds to the bias. Multiply the scale, λ and masks into the two matrices, as
    `tunerkit.plugin.low_rank_factors` does. Leave out triplets that add nothing. Do not detach the matrices.
    """


@hookspec(firstresult=True)
def tunerkit_from_factors(
    targets: Sequence[Target], factors: Mapping[str, Factors]
) -> tuple[AdapterConfig, Mapping[str, Adapter]]:
    """Build a config and adapters from given products, the inverse of `tunerkit_factors`.

    Fires when an adapter of another method or program is converted to this method. ``factors`` has one entry for each
    target's path, on the CPU; ranks differ between targets and may be 0. With the settled config,
    `tunerkit_build_adapter` must build adapters of the same sizes, unless the class declares its ``rank_dims``.
    """


@hookspec
def tunerkit_open_run(path: Path, base: str | None) -> tuple[nn.Module, object] | None:
    """Load the base model, the adapter and the processor of a run that a command or a trainer wrote.

    Fires in ``tunerkit.from_folder``, until a plugin returns a model. Return None for any other folder. ``base`` is the
    path of the base model, if the user passes it.
    """


@hookspec
def tunerkit_formats() -> Iterable[Format]:
    """Return the formats of other programs that this plugin reads and writes.

    Fires in ``export``, and in ``load`` for a path without a tunerkit file. Of formats with the same name, the first
    distribution's in alphabetical order is used. Import slow libraries inside the functions of the record.
    """


@hookspec(firstresult=True)
def tunerkit_state(tuner: TunerView) -> State | None:
    """Return the method's training state, such as averages and masks, without the adapter's weights.

    Fires in ``save_state``, between two steps, for an attached tuner. Core saves weights, config and step count itself.
    ``tensors`` maps names to tensors, ``values`` names to values that JSON can hold.
    """


@hookspec(firstresult=True)
def tunerkit_restore(tuner: TunerView, state: State) -> None:
    """Restore the state from `tunerkit_state`, so that the next step resumes the interrupted run.

    Fires in ``load_state``, after `tunerkit_start` and before the first step. The adapters have the saved run's weights
    already, and ``tuner.steps`` and ``tuner.history`` are set from the file. Core has verified that the state is
    undamaged and that method and targets match. Raise an error if names or shapes in the state do not fit: core then
    rolls back the adapters and ``tuner.state``.
    """
