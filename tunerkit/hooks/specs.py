"""The hooks through which a plugin speaks: what it brings, and what happens when.

A plugin is a module (or an object) with functions marked ``@tunerkit.hookimpl`` and named like the hooks below; it may
leave out hooks and arguments that it doesn't need. *Discovery* says which methods it brings. Three groups follow the
way of the data: *Layer injection* puts adapters beside base layers, *Step callbacks* train them, *Serialization* takes
them out of the model. When they fire::

    tunerkit.wrap(model, "method", config)                  # tunerkit_methods, once per process
                                                            # tunerkit_base_layers, tunerkit_weight_readers,
                                                            # tunerkit_default_targets: the model is scanned once
                                                            # tunerkit_build_adapter per target
    tunerkit.attach(model, optimizer, total_steps=1000)     # tunerkit_start: nothing is trained yet
    for batch in batches:
        for part in batch.micro_batches():                  # no hook fires per micro-batch
            loss(model, part).backward()
        clip_gradients(model)
        optimizer.step()                                    # tunerkit_before_step: gradients complete, nothing updated
                                                            # (the optimizer updates the weights)
                                                            # tunerkit_after_step: weights updated, gradients alive
                                                            # tunerkit_ranks_changed, if that was an allocation
        scheduler.step()
        optimizer.zero_grad()                               # no hook fires: the gradients are gone
        model(validation_batch)                             # no hook fires
    tunerkit.tuner(model).finish()                          # tunerkit_finish, tunerkit_ranks_changed
    tunerkit.save(model, path)                              # no hook fires: core writes the adapters' tensors
    tunerkit.save_state(model, path)                        # tunerkit_state
    model = tunerkit.load(base_model, path)                 # the same hooks as in wrap
    tunerkit.merge(model)                                   # tunerkit_delta per target
                                                            # (in attention it fires in each forward, too)
    tunerkit.attach(model, optimizer, total_steps=1000)     # tunerkit_start
    tunerkit.load_state(model, path)                        # tunerkit_restore

Four hooks ask every plugin: `tunerkit_base_layers`, `tunerkit_weight_readers`, `tunerkit_default_targets` and
`tunerkit_ranks_changed`. `tunerkit_methods` is asked of each plugin alone. All others call only the plugin that owns
the method, so no plugin is ever handed another's layers.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from tunerkit.config import AdapterConfig
from tunerkit.hooks.markers import hookspec
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.layers import Adapter, BaseLayer
from tunerkit.records import DefaultTargets, Delta, Method, RankChange, State, Target, WeightReader

# --- Discovery -------------------------------------------------------------------------------------------------------


@hookspec
def tunerkit_methods() -> Iterable[Method]:
    """Yield the methods this plugin brings.

    Fires once, when the plugin is loaded: at the first use of any method, or in ``tunerkit.register``. No model exists
    yet, and other plugins may not be loaded. A plugin that brings only base layers or watches ranks leaves it out.

    >>> import attrs, tunerkit
    >>> @attrs.frozen
    ... class BiasConfig(tunerkit.AdapterConfig):
    ...     '''Nothing to set beyond what every method has.'''
    >>> @tunerkit.hookimpl
    ... def tunerkit_methods():
    ...     yield tunerkit.Method("bias", config=BiasConfig)
    >>> [method.name for method in tunerkit_methods()]
    ['bias']
    """
    raise NotImplementedError


# --- Layer injection -------------------------------------------------------------------------------------------------


@hookspec
def tunerkit_base_layers() -> Iterable[type[BaseLayer]]:
    """Yield further kinds of base layers: how to read features and dense weights of a module core doesn't know.

    Fires when a model is wrapped; every plugin is asked. Core's own kinds come first, so a plugin cannot change what
    a plain ``nn.Linear`` means; then follow the plugins' in the order of their distributions' names. The model is
    still as the user passed it.

    >>> import tunerkit
    >>> class QuantisedLinear(tunerkit.BaseLayer):
    ...     '''Says how to read and write a quantised weight.'''
    >>> @tunerkit.hookimpl
    ... def tunerkit_base_layers():
    ...     return [QuantisedLinear]
    >>> [kind.__name__ for kind in tunerkit_base_layers()]
    ['QuantisedLinear']
    """
    raise NotImplementedError


@hookspec
def tunerkit_weight_readers() -> Iterable[WeightReader]:
    """Yield the classes that use a child's weight directly, bypassing the child's forward.

    Fires when a model is wrapped and when an adapter is loaded; every plugin is asked. An adapter beside such a child
    would never run. Instead, core overrides the child's weight in each forward of the owner with what the adapter
    makes of it. For that the method must implement `tunerkit_delta`. Core's own records come first and cannot be
    changed.

    >>> import tunerkit
    >>> @tunerkit.hookimpl
    ... def tunerkit_weight_readers():
    ...     return [tunerkit.WeightReader(owner="my_library.attention.FusedAttention", children=("qkv", "proj"))]
    >>> [reader.children for reader in tunerkit_weight_readers()]
    [('qkv', 'proj')]
    """
    raise NotImplementedError


@hookspec
def tunerkit_default_targets() -> Iterable[DefaultTargets]:
    """Yield the default targets of further architectures, by ``model.config.model_type``.

    Fires when a model is wrapped and when an adapter is loaded; every plugin is asked. They are the targets if the
    config names none. Core's own records come first and cannot be changed. If a model has no module of these names, its
    layers decide, as in an unknown architecture.

    >>> import tunerkit
    >>> @tunerkit.hookimpl
    ... def tunerkit_default_targets():
    ...     return [tunerkit.DefaultTargets(model_types=("my_decoder",), names=("attention.qkv", "mlp.up", "mlp.down"))]
    >>> [defaults.model_types for defaults in tunerkit_default_targets()]
    [('my_decoder',)]
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: AdapterConfig) -> Adapter:
    """Build the adapter of one target. Only the plugin that owns the method is called; it must implement this hook.

    Fires once per target in ``wrap`` and in ``load``, under core's seed. The base's weights are in place and must not
    be changed; ``base`` says its features in and out; nothing is injected yet. Core moves the adapter to the base
    layer's device and to the config's dtype afterwards.

    >>> import tunerkit, torch
    >>> class Bias(tunerkit.Adapter):
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.bias = torch.nn.Parameter(torch.zeros(features))  # (out,): nothing is added at the start
    ...     def forward(self, base, x, y):
    ...         return y + self.bias
    >>> @tunerkit.hookimpl
    ... def tunerkit_build_adapter(target):
    ...     return Bias(target.module.out_features)
    >>> adapter = tunerkit_build_adapter(tunerkit.Target("head", torch.nn.Linear(4, 3)))
    >>> adapter(None, torch.ones(2, 4), torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    raise NotImplementedError


# --- Step callbacks --------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def tunerkit_start(tuner: TunerView, total_steps: int | None) -> object | None:
    """Check the schedule, and return the method's own training state; core keeps it at ``tuner.state``.

    Fires when the model is attached to what trains it, before the first step. ``total_steps`` is known now if it ever
    will be; None means that nobody said. A method that cannot do without refuses here, not in the middle of training.

    >>> import tunerkit
    >>> @tunerkit.hookimpl
    ... def tunerkit_start(tuner, total_steps):
    ...     if total_steps is None:
    ...         raise tunerkit.StepError("total steps are unknown; pass attach(..., total_steps=...)")
    ...     return {"warmup": total_steps // 10}
    >>> tunerkit_start(tuner=None, total_steps=1000)
    {'warmup': 100}
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def tunerkit_before_step(tuner: TunerView, step: int, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Add to the gradients what is not part of the loss, such as a regulariser's gradient; return what must not move.

    Fires once per optimizer step, whatever the accumulation; with ``optimizer.step(closure)`` after each run of the
    closure. Gradients are complete, no weight is updated. ``step`` is this step's number, the first being 1. An
    adapter that is frozen, or neither active nor given a gradient, has no part in the step: neither hook fires for it.
    ``grad_scale`` is the factor the gradients still carry (a scalar tensor, under a fused optimizer with a
    GradScaler), or None if they carry none: multiply by it what you add.

    The step leaves the returned parameters alone. Core takes their gradients away, so that no optimizer touches these
    parameters, and puts them back before `tunerkit_after_step` fires: then they carry no scale, like all others. After
    a step that was skipped or raised, the gradients go back unchanged. Return None to withhold nothing.

    >>> import tunerkit, torch
    >>> from types import SimpleNamespace
    >>> @tunerkit.hookimpl
    ... def tunerkit_before_step(tuner, grad_scale):
    ...     weight, gate = tuner.parameters()
    ...     decay = 0.1 * weight.detach()
    ...     weight.grad += decay if grad_scale is None else decay * grad_scale
    ...     return [gate]  # the method sets it, the optimizer does not
    >>> weight, gate = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.zeros(2)
    >>> tuner = SimpleNamespace(parameters=lambda: [weight, gate])
    >>> tunerkit_before_step(tuner, grad_scale=torch.tensor(1024.0)) == [gate]
    True
    >>> weight.grad
    tensor([102.4000, 102.4000])
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def tunerkit_after_step(tuner: TunerView, step: int) -> Mapping[str, int] | None:
    """Measure and allocate; return the ranks by target path if an allocation changed masks, else None.

    Fires right after the optimizer updated the weights. The gradients of this step are still there, without any
    scale; clipping, if the user clips, is in them. It doesn't fire for a step that was skipped because its gradients
    overflowed. ``step`` is this step's number, the same as in `tunerkit_before_step`.

    >>> import tunerkit
    >>> @tunerkit.hookimpl
    ... def tunerkit_after_step(tuner, step):
    ...     return {"head": 3} if step == 100 else None
    >>> tunerkit_after_step(tuner=None, step=99)
    >>> tunerkit_after_step(tuner=None, step=100)
    {'head': 3}
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def tunerkit_finish(tuner: TunerView) -> Mapping[str, int] | None:
    """Make the final allocation now, whatever the schedule says; return the ranks by target path.

    Fires in ``tuner.finish()``: training ended earlier than planned. No gradients need exist. A method without a
    schedule leaves it out.

    >>> import tunerkit
    >>> @tunerkit.hookimpl
    ... def tunerkit_finish(tuner):
    ...     tuner.state["final"] = True
    ...     return {"head": 2}
    >>> from types import SimpleNamespace
    >>> tunerkit_finish(SimpleNamespace(state={"final": False}))
    {'head': 2}
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def tunerkit_budget(tuner: TunerView, step: int | None) -> int:
    """Return the budget in force after ``step`` optimizer steps; None means now.

    Fires whenever somebody asks ``tuner.budget(step)``, before attaching too, and changes nothing. A method of
    constant rank leaves it out: core then counts the live ranks.

    >>> import tunerkit
    >>> @tunerkit.hookimpl
    ... def tunerkit_budget(step):
    ...     return max(8, 12 - (step or 0))
    >>> [tunerkit_budget(step=step) for step in (0, 2, 100)]
    [12, 10, 8]
    """
    raise NotImplementedError


@hookspec
def tunerkit_ranks_changed(tuner: TunerView, change: RankChange) -> None:
    """Watch the ranks: for loggers and plots.

    Fires after each allocation of any method; every plugin is told. The masks are already in force. Watch only: an
    exception here is told as a warning, and training goes on.

    >>> import tunerkit
    >>> @tunerkit.hookimpl
    ... def tunerkit_ranks_changed(change):
    ...     print(f"step {change.step}: budget {change.budget}, {change.ranks}")
    >>> tunerkit_ranks_changed(tunerkit.RankChange(step=100, budget=5, ranks={"query": 3, "value": 2}))
    step 100: budget 5, {'query': 3, 'value': 2}
    """
    raise NotImplementedError


# --- Serialization ---------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def tunerkit_delta(adapter: Adapter, base: BaseLayer) -> Delta:
    """Return what one adapter adds to its base layer, densely: the weights as they stand now.

    Fires once per target in ``merge``, without gradients. Nothing is merged yet; core does the adding, in the base
    layer's own layout, so ``weight`` is always (out, in) as ``nn.Linear`` has it and ``bias`` (out,).

    Fires also in every forward of a module that reads its weights past a layer's forward (attention), for each target
    there: the adapter's own forward is never called then. Compute the delta from the parameters, not detached, for
    that is how they are trained.

    >>> import tunerkit, torch
    >>> from types import SimpleNamespace
    >>> @tunerkit.hookimpl
    ... def tunerkit_delta(adapter):
    ...     return tunerkit.Delta(weight=adapter.up @ adapter.down)  # (out, r) @ (r, in)
    >>> tunerkit_delta(SimpleNamespace(up=torch.ones(3, 2), down=torch.ones(2, 4))).weight.shape
    torch.Size([3, 4])
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def tunerkit_state(tuner: TunerView) -> State:
    """Return what training needs to go on, apart from the adapter's weights: averages, masks.

    Fires in ``save_state``, between two steps, on an attached tuner. Core saves the weights, the config and the step
    count itself. Tensors go by name; values must be what JSON can say.

    >>> import tunerkit, torch
    >>> from types import SimpleNamespace
    >>> @tunerkit.hookimpl
    ... def tunerkit_state(tuner):
    ...     return tunerkit.State(tensors={"head.mask": tuner.state["mask"]}, values={"allocations": 4})
    >>> tunerkit_state(SimpleNamespace(state={"mask": torch.tensor([True, False])})).tensors
    {'head.mask': tensor([ True, False])}
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def tunerkit_restore(tuner: TunerView, state: State) -> None:
    """Take back what `tunerkit_state` returned: the next step continues the interrupted run.

    Fires in ``load_state``, after `tunerkit_start` and before the first step; the adapters' weights are those of the
    saved run. The state is undamaged and of the same method and targets, and still came from a file: refuse names and
    shapes that don't fit.

    >>> import tunerkit, torch
    >>> from types import SimpleNamespace
    >>> @tunerkit.hookimpl
    ... def tunerkit_restore(tuner, state):
    ...     tuner.state = {"mask": state.tensors["head.mask"]}
    >>> tuner = SimpleNamespace(state=None)
    >>> tunerkit_restore(tuner, tunerkit.State(tensors={"head.mask": torch.tensor([True, False])}, values={}))
    >>> tuner.state
    {'mask': tensor([ True, False])}
    """
    raise NotImplementedError
