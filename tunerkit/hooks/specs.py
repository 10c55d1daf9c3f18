"""The hooks that a plugin implements, and when each one fires.

A plugin is a module (or an object) with functions marked ``@tunerkit.hookimpl`` and named like the hooks below. It may
leave out hooks and arguments that it does not need. *Discovery* declares the plugin's methods. The other three groups
follow the data flow: *Layer injection* builds adapters, *Step callbacks* train them, *Serialization* saves and merges
them. When they fire::

    tunerkit.wrap(model, "method", config)                # tunerkit_methods, once per process
                                                          # tunerkit_base_layers, tunerkit_weight_readers,
                                                          # tunerkit_default_targets, tunerkit_model_libraries:
                                                          # the model is scanned once
                                                          # tunerkit_shared, once; tunerkit_build_adapter per target
                                                          # tunerkit_wrapped, for the first adapter
                                                          # tunerkit_adapted; tunerkit_restrictions, also in the calls
                                                          # below
    tunerkit.calibrate(model, batches)                    # tunerkit_calibrate, if the method wants statistics
    reference = tunerkit.reference(model)                 # tunerkit_reference
    groups = tunerkit.param_groups(model, lr=1e-3)        # tunerkit_param_groups
    tunerkit.attach(model, optimizer, total_steps=1000)   # tunerkit_attach: is it a trainer that a plugin knows?
                                                          # tunerkit_engine: what the processes do together
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
    model = tunerkit.load(base_model, "a peft folder")    # tunerkit_formats, then those of wrap, or
                                                          # tunerkit_from_factors

A plain ``@hookspec`` asks every plugin; ``firstresult=True`` marks hooks that call only the plugin that owns the
method, so no plugin ever receives another plugin's layers.

An answer must be of the declared type. A wrong one of the method's plugin is a `PluginError`. An exception in a hook
keeps its class and gets a note that names the plugin, the hook and the target or adapter; SystemExit and the like
become a `PluginError`. Hooks that ask every plugin for a list of what it knows never stop the user's call: a wrong
answer or an exception is left out, with one warning, and ``tunerkit.methods()`` lists the plugin with its error. They
are asked once, and again when a plugin is added or removed. In the other hooks that ask every plugin, and in functions
of what is listed, a plugin is part of the user's call: what it raises, that raises, naming it and how to run without.

The examples follow ``import torch, tunerkit`` and ``from types import SimpleNamespace``.
"""

# A hook spec has a docstring and no body: pluggy reads its signature, and nobody calls it.
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
    may not be loaded yet. A plugin without methods leaves it out.

    >>> import attrs
    >>> @attrs.frozen
    ... class BiasConfig(tunerkit.plugin.AdapterConfig):
    ...     '''No settings beyond those of every method.'''
    >>> @tunerkit.hookimpl
    ... def tunerkit_methods():
    ...     yield tunerkit.plugin.Method("bias", config=BiasConfig)
    >>> [method.name for method in tunerkit_methods()]
    ['bias']
    """


# --- Layer injection -------------------------------------------------------------------------------------------------


@hookspec
def tunerkit_base_layers() -> Iterable[type[BaseLayer]]:
    """Return additional kinds of base layers, for modules that core cannot adapt.

    Fires when a model is wrapped or an adapter loaded, before anything is changed. Core's own kinds come first, so a
    plugin cannot redefine ``nn.Linear``; the plugins' follow in the order of their distributions' names.

    >>> class QuantisedLinear(tunerkit.plugin.BaseLayer):
    ...     '''Reads and writes a quantised weight.'''
    >>> @tunerkit.hookimpl
    ... def tunerkit_base_layers():
    ...     return [QuantisedLinear]
    >>> [kind.__name__ for kind in tunerkit_base_layers()]
    ['QuantisedLinear']
    """


@hookspec
def tunerkit_weight_readers() -> Iterable[WeightReader]:
    """Return the classes that use a child's weight directly, bypassing the child's forward().

    Fires when a model is wrapped or an adapter loaded. A forward hook on such a child would never run. Instead, core
    overrides the child's weight with the adapted weight in each forward of the owner; the method must implement
    `tunerkit_delta` or `tunerkit_factors` for that. Core's own records come first and cannot be changed.

    >>> @tunerkit.hookimpl
    ... def tunerkit_weight_readers():
    ...     return [tunerkit.plugin.WeightReader(owner="my_library.attention.FusedAttention", children=("qkv", "proj"))]
    >>> [reader.children for reader in tunerkit_weight_readers()]
    [('qkv', 'proj')]
    """


@hookspec
def tunerkit_default_targets() -> Iterable[DefaultTargets]:
    """Return the default targets of additional architectures, by ``model.config.model_type``.

    Fires when a model is wrapped or an adapter loaded. The defaults apply if the config names no targets. If a model
    has no module with these names, tunerkit chooses targets by layer type, as for an unknown architecture.

    >>> @tunerkit.hookimpl
    ... def tunerkit_default_targets():
    ...     return [tunerkit.plugin.DefaultTargets(model_types=("my_decoder",), names=("attention.qkv", "mlp.up"))]
    >>> [defaults.model_types for defaults in tunerkit_default_targets()]
    [('my_decoder',)]
    """


@hookspec
def tunerkit_model_libraries() -> Iterable[ModelLibrary]:
    """Say what a library knows of its models: their output heads, new modules, settings and ties.

    Fires when a model is wrapped, merged or made dense, and when an adapter is saved or loaded. What a function of the
    record raises, the user's call raises; a wrong answer is a `PluginError`.

    >>> def settings(model):
    ...     return {"epsilon": model.eps} if isinstance(model, torch.nn.LayerNorm) else {}  # which no weight shows
    >>> @tunerkit.hookimpl
    ... def tunerkit_model_libraries():
    ...     return [tunerkit.plugin.ModelLibrary(settings=settings)]
    >>> [library.settings(torch.nn.LayerNorm(2)) for library in tunerkit_model_libraries()]
    [{'epsilon': 1e-05}]
    """


@hookspec(firstresult=True)
def tunerkit_shared(targets: Sequence[Target], bases: Sequence[BaseLayer], config: AdapterConfig) -> nn.Module | None:
    """Build what all adapters of the method use, such as VeRA's random matrices; None for nothing.

    Fires once in ``wrap`` and in ``load``, before the first `tunerkit_build_adapter`, with core's seed set. Targets and
    base layers come in the model's order. Core keeps the module beside the first target's adapter, moves it to that
    target's device and the config's dtype, and saves it once. `tunerkit_build_adapter` gets it and must not change it;
    ``forward`` and `tunerkit_delta` find it as ``adapter.shared``. Parameters with ``requires_grad=False`` stay fixed.

    >>> class Bases(torch.nn.Module):
    ...     def __init__(self, rank, features):
    ...         super().__init__()
    ...         self.q = torch.nn.Parameter(torch.randn(rank, features), requires_grad=False)
    >>> @tunerkit.hookimpl
    ... def tunerkit_shared(bases):
    ...     return Bases(2, max(base.in_features for base in bases))
    >>> tunerkit_shared([SimpleNamespace(in_features=4), SimpleNamespace(in_features=8)]).q.shape
    torch.Size([2, 8])
    """


@hookspec(firstresult=True)
def tunerkit_build_adapter(
    target: Target, base: BaseLayer, config: AdapterConfig, shared: nn.Module | None, loading: bool
) -> Adapter:
    """Build the adapter of one target. Every plugin with a method must implement this hook.

    Fires once per target in ``wrap`` and in ``load``, with core's seed set, before anything is injected. ``base`` has
    the number of features and the weights, which must not be changed; ``shared`` is what `tunerkit_shared` built. Core
    then moves the adapter to the base layer's device and the config's dtype. ``loading`` says that a file's values
    replace these, so that a start that is computed from the weight is not needed, and the weight may be absent.

    >>> class Bias(tunerkit.plugin.Adapter):
    ...     reads_output = reads_weight = False
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.bias = torch.nn.Parameter(torch.zeros(features))  # (out,): nothing is added at the start
    ...     def forward(self, base, x, y):
    ...         return y + self.bias.to(y.dtype)
    >>> @tunerkit.hookimpl
    ... def tunerkit_build_adapter(target):
    ...     return Bias(target.module.out_features)
    >>> adapter = tunerkit_build_adapter(tunerkit.plugin.Target("head", torch.nn.Linear(4, 3)))
    >>> adapter(None, torch.ones(2, 4), torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """


@hookspec
def tunerkit_wrapped(model: nn.Module) -> None:
    """Prepare a model whose first adapter has just been put in, for what a library does with the model later.

    Fires in ``wrap`` and ``load``; `tunerkit_unwrapped` undoes it. If it raises or changes weights, nothing is put in.

    >>> @tunerkit.hookimpl
    ... def tunerkit_wrapped(model):
    ...     model.card = "with adapters"
    >>> model = torch.nn.Linear(2, 2)
    >>> tunerkit_wrapped(model)
    >>> model.card
    'with adapters'
    """


@hookspec
def tunerkit_unwrapped(model: nn.Module) -> None:
    """Undo what `tunerkit_wrapped` did.

    Fires when the last adapter has left a model, and for a copy of a part of it, which has none. It fires again where
    ``unwrap`` has then replaced layers by dense ones, and after an interrupted call.

    >>> @tunerkit.hookimpl
    ... def tunerkit_unwrapped(model):
    ...     vars(model).pop("card", None)
    >>> tunerkit_unwrapped(torch.nn.Linear(2, 2))
    """


@hookspec
def tunerkit_adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Look at the modules of a model that have adapters now, before it runs again.

    Fires when adapters have been put into a model or taken out. ``modules`` is empty when none is left. What it does to
    the model is undone here too, or in `tunerkit_unwrapped`.

    >>> @tunerkit.hookimpl
    ... def tunerkit_adapted(model, modules):
    ...     print(f"{len(modules)} modules with adapters")
    >>> tunerkit_adapted(torch.nn.Linear(2, 2), [])
    0 modules with adapters
    """


@hookspec
def tunerkit_holdings() -> Iterable[Holding]:
    """Say how a library holds weights that are not simply in their modules: offloaded, or divided among processes.

    Fires where core meets weights that are empty or on the meta device, and in calls that copy, merge or write. A
    forward of a model whose weights are in its modules never asks.

    >>> def is_cut(tensor):
    ...     return hasattr(tensor, "whole_shape")
    >>> @tunerkit.hookimpl
    ... def tunerkit_holdings():
    ...     return [tunerkit.plugin.Holding(name="my engine", shards=is_cut, shape=lambda tensor: tensor.whole_shape)]
    >>> tunerkit_holdings()[0].shards(torch.zeros(1))
    False
    """


@hookspec
def tunerkit_restrictions() -> Iterable[Restriction]:
    """Say what cannot be done with a library that holds a model's weights or puts modules into it, and what to do.

    Fires when a model is wrapped, attached, saved or merged. The first that applies is raised.

    >>> @tunerkit.hookimpl
    ... def tunerkit_restrictions():
    ...     why = "its tables are packed. Merge before you convert the model"
    ...     return [tunerkit.plugin.Restriction("my tables", {"merge": why}, classes=("my_library.Table",))]
    >>> [restriction.name for restriction in tunerkit_restrictions()]
    ['my tables']
    """


# --- Step callbacks --------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def tunerkit_calibrate(
    tuner: TunerView, statistics: Mapping[str, Statistics], bases: Mapping[str, BaseLayer]
) -> Mapping[str, int] | None:
    """Set the adapters' start and ranks from statistics of the data; return the rank of each target if they changed.

    Fires in ``tunerkit.calibrate``, before training, for a method whose record names ``statistics``: one entry for each
    target's path, and in ``bases`` its base layer, which is only read. The adapters must still add nothing afterwards.
    To change a rank, use `tunerkit.plugin.resize_`, and declare the adapter's ``rank_dims``, so that files can be
    loaded.

    >>> @tunerkit.hookimpl
    ... def tunerkit_calibrate(tuner, statistics):
    ...     for path, adapter in tuner.adapters().items():
    ...         directions = torch.linalg.svd(statistics[path].inputs, full_matrices=False).Vh
    ...         adapter.q.copy_(directions[: len(adapter.q)])  # as EVA does: the inputs' main directions
    >>> adapter = SimpleNamespace(q=torch.zeros(1, 2))
    >>> found = tunerkit.plugin.Statistics(rows=4, inputs=torch.tensor([[0.0, 3.0], [0.1, 0.0]]), gradients=None)
    >>> tunerkit_calibrate(SimpleNamespace(adapters=lambda: {"head": adapter}), {"head": found})
    >>> adapter.q.abs()
    tensor([[0., 1.]])
    """


@hookspec
def tunerkit_reference(model: nn.Module) -> nn.Module | None:
    """Make a module that runs a wrapped model as it stands now, whatever is trained in it later.

    Fires in ``tunerkit.reference``, until one plugin answers. None leaves it to another.

    >>> import copy
    >>> @tunerkit.hookimpl
    ... def tunerkit_reference(model):
    ...     return copy.deepcopy(model).eval().requires_grad_(False)  # simple, in twice the memory
    >>> reference = tunerkit_reference(torch.nn.Linear(2, 2))
    >>> any(parameter.requires_grad for parameter in reference.parameters())
    False
    """


@hookspec(firstresult=True)
def tunerkit_param_groups(tuner: TunerView) -> Iterable[ParamGroup] | None:
    """Return parameters that need their own learning rate or weight decay; all others are trained as usual.

    Fires in ``tunerkit.param_groups``, and when a Trainer that is attached builds its optimizer.

    >>> @tunerkit.hookimpl
    ... def tunerkit_param_groups(tuner):
    ...     up = [parameter for name, parameter in tuner.named_parameters() if name.endswith(".up")]
    ...     return [tunerkit.plugin.ParamGroup(up, lr_scale=16.0)]  # LoRA+
    >>> up = torch.nn.Parameter(torch.zeros(2))
    >>> tunerkit_param_groups(SimpleNamespace(named_parameters=lambda: [("head.adapter.up", up)]))[0].lr_scale
    16.0
    """


@hookspec
def tunerkit_attach(
    tuners: Sequence[TunerView], candidate: object, total_steps: int | None, data_parallel: bool | None
) -> bool | None:
    """Connect adapters to what trains them, if that is something of a library that this plugin knows: a trainer.

    Fires in ``tunerkit.attach``, until one plugin answers True. None means that the object is none of this plugin's.
    Nobody is asked about an optimizer of torch, which core attaches: a plugin waits until the trainer has one.

    >>> @tunerkit.hookimpl
    ... def tunerkit_attach(tuners, candidate, total_steps):
    ...     if not hasattr(candidate, "on_start"):  # where a trainer of this library lists what to call
    ...         return None
    ...     candidate.on_start.append((tuners, total_steps))  # attach its optimizer there
    ...     return True
    >>> tunerkit_attach([], SimpleNamespace(on_start=[]), 10), tunerkit_attach([], "a text", 10)
    (True, None)
    """


@hookspec
def tunerkit_engine(
    tuners: Sequence[TunerView], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object] | None:
    """Say what the processes of a training do together: how they hold adapters, and keep them alike.

    Fires when adapters are attached to an optimizer, until one plugin answers. None means that this plugin has nothing
    to do with the training; if all say so, the process trains alone. tunerkit-distributed answers for every training,
    and is asked last (``tunerkit.hookimpl(trylast=True)``).

    Returns:
        The engine, see `tunerkit.plugin.Engine`; and what takes the step hooks: ``candidate``, or an optimizer of torch
        that stands for it.

    >>> from tunerkit.plugin import Engine
    >>> @tunerkit.hookimpl
    ... def tunerkit_engine(candidate):
    ...     return Engine(), candidate  # that of one process
    >>> tunerkit_engine("an optimizer")[1]
    'an optimizer'
    """


@hookspec(firstresult=True)
def tunerkit_start(tuner: TunerView, total_steps: int | None, optimizer: Optimizer | None) -> object | None:
    """Check the schedule, and return the method's own training state. Core stores it as ``tuner.state``.

    Fires when the model is attached, before the first step. ``total_steps`` is None if the length of training is
    unknown, and it stays unknown: a method that needs it must raise here, not during training. So must a method that
    grows, if `tunerkit.plugin.resize_obstacle` names a reason why it cannot. ``optimizer`` is torch's; None if it takes
    no hooks.

    >>> @tunerkit.hookimpl
    ... def tunerkit_start(tuner, total_steps):
    ...     if total_steps is None:
    ...         raise tunerkit.errors.StepError("total steps are unknown; pass attach(..., total_steps=...)")
    ...     return {"warmup": total_steps // 10}
    >>> tunerkit_start(tuner=None, total_steps=1000)
    {'warmup': 100}
    """


@hookspec(firstresult=True)
def tunerkit_before_step(tuner: TunerView, step: int, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Add gradients that are not part of the loss, such as a regulariser's; return the parameters not to update.

    Fires once per optimizer step, independent of gradient accumulation, with complete gradients and before any update;
    with ``optimizer.step(closure)`` after each run of the closure. ``step`` is this step's number, from 1. Step hooks
    do not fire for an adapter that is frozen, nor for one that is inactive and has no gradients.

    ``grad_scale`` is the factor by which the gradients are still scaled, a scalar tensor, with a fused optimizer and a
    GradScaler. Multiply by it what you add. It is None if the gradients are unscaled.

    Core removes the gradients of the returned parameters for the step, and restores them before `tunerkit_after_step`
    fires, unscaled like all others; after a skipped step unchanged; after a step that raised when the next one begins,
    unless the adapter's gradients were cleared since then. None lets the optimizer update everything.

    >>> @tunerkit.hookimpl
    ... def tunerkit_before_step(tuner, grad_scale):
    ...     weight, gate = tuner.parameters()
    ...     decay = 0.1 * weight.detach()
    ...     weight.grad += decay if grad_scale is None else decay * grad_scale
    ...     return [gate]  # the method updates it, not the optimizer
    >>> weight, gate = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.zeros(2)
    >>> tuner = SimpleNamespace(parameters=lambda: [weight, gate])
    >>> tunerkit_before_step(tuner, grad_scale=torch.tensor(1024.0)) == [gate]
    True
    >>> weight.grad
    tensor([102.4000, 102.4000])
    """


@hookspec(firstresult=True)
def tunerkit_after_step(tuner: TunerView, step: int) -> Mapping[str, int] | None:
    """Measure importance and allocate ranks; return the rank of each target by its path after an allocation, else None.

    Fires right after the optimizer updated the weights. This step's gradients still exist, unscaled, and clipped if the
    user clips them. It does not fire for a step that was skipped because its gradients overflowed. ``step`` is the
    number that `tunerkit_before_step` was given.

    >>> @tunerkit.hookimpl
    ... def tunerkit_after_step(tuner, step):
    ...     return {"head": 3} if step == 100 else None
    >>> tunerkit_after_step(tuner=None, step=99)
    >>> tunerkit_after_step(tuner=None, step=100)
    {'head': 3}
    """


@hookspec(firstresult=True)
def tunerkit_finish(tuner: TunerView) -> Mapping[str, int] | None:
    """Make the final allocation now, regardless of the schedule; return the rank of each target by its path.

    Fires in ``tuner.finish()``, when training ends earlier than planned. Gradients may be missing. A method without a
    schedule leaves it out.

    >>> @tunerkit.hookimpl
    ... def tunerkit_finish(tuner):
    ...     tuner.state["final"] = True
    ...     return {"head": 2}
    >>> tunerkit_finish(SimpleNamespace(state={"final": False}))
    {'head': 2}
    """


@hookspec(firstresult=True)
def tunerkit_budget(tuner: TunerView, step: int | None) -> int:
    """Return the budget in force after ``step`` optimizer steps; None means now.

    Fires in ``tuner.budget(step)``, possibly before the tuner is attached, and must not change anything. Without it,
    the budget is the sum of the live ranks.

    >>> @tunerkit.hookimpl
    ... def tunerkit_budget(step):
    ...     return max(8, 12 - (step or 0))
    >>> [tunerkit_budget(step=step) for step in (0, 2, 100)]
    [12, 10, 8]
    """


@hookspec
def tunerkit_ranks_changed(tuner: TunerView, change: RankChange) -> None:
    """Observe the ranks, for loggers and plots.

    Fires after each allocation of any method, with the new masks in force. Only observe: whatever is raised here, also
    SystemExit, becomes a warning, and training continues.

    >>> @tunerkit.hookimpl
    ... def tunerkit_ranks_changed(change):
    ...     print(f"step {change.step}: budget {change.budget}, {change.ranks}")
    >>> tunerkit_ranks_changed(tunerkit.plugin.RankChange(step=100, budget=5, ranks={"query": 3, "value": 2}))
    step 100: budget 5, {'query': 3, 'value': 2}
    """


# --- Serialization ---------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def tunerkit_delta(adapter: Adapter, base: BaseLayer) -> Delta:
    """Return what one adapter currently adds to its base layer, as dense tensors.

    Fires once per target in ``merge``, with gradients disabled, before anything is merged. ``weight`` is always (out,
    in), as in ``nn.Linear``, and ``bias`` is (out,). Core converts the weight to the base layer's own layout.

    It also fires in every forward of a module that uses a layer's weight directly, bypassing the layer's forward(), as
    attention does. The adapter's own forward is never called there, so do not detach: the gradients train the adapter.

    >>> @tunerkit.hookimpl
    ... def tunerkit_delta(adapter):
    ...     return tunerkit.plugin.Delta(weight=adapter.up @ adapter.down)  # (out, r) @ (r, in)
    >>> tunerkit_delta(SimpleNamespace(up=torch.ones(3, 2), down=torch.ones(2, 4))).weight.shape
    torch.Size([3, 4])
    """


@hookspec(firstresult=True)
def tunerkit_factors(adapter: Adapter, base: BaseLayer) -> Factors:
    """Return what one adapter currently adds to its base layer's weight as a product of two small matrices.

    Fires wherever a product is enough or better than a dense matrix: with it a method needs no `tunerkit_delta`, unless
    it also adds to the bias. Multiply everything into the two, as `tunerkit.plugin.low_rank_factors` does. Leave out
    triplets that add nothing. Do not detach them.

    >>> @tunerkit.hookimpl
    ... def tunerkit_factors(adapter):
    ...     return tunerkit.plugin.low_rank_factors(adapter.down, adapter.up, scale=2.0)
    >>> tunerkit_factors(SimpleNamespace(up=torch.ones(3, 2), down=torch.ones(2, 4))).rank
    2
    """


@hookspec(firstresult=True)
def tunerkit_from_factors(
    targets: Sequence[Target], factors: Mapping[str, Factors]
) -> tuple[AdapterConfig, Mapping[str, Adapter]]:
    """Build a config and adapters that add given products, the twin of `tunerkit_factors`.

    Fires when an adapter of another method or program becomes one of this method. ``factors`` has one entry for each
    target's path, on the CPU; ranks differ between targets and may be 0. The config, settled, must give adapters of the
    same sizes in `tunerkit_build_adapter`, unless the class declares its ``rank_dims``.

    >>> from tunerkit_testing.toy_adapters import SCALE, LowRank
    >>> from tunerkit_testing.toy_methods import LowRankConfig
    >>> @tunerkit.hookimpl
    ... def tunerkit_from_factors(targets, factors):
    ...     adapters = {}
    ...     for target in targets:
    ...         given = factors[target.path]
    ...         adapters[target.path] = adapter = LowRank(target.module, given.rank)
    ...         adapter.a.data, adapter.b.data = given.q, given.p / SCALE
    ...     return LowRankConfig(rank=max(given.rank for given in factors.values())), adapters
    >>> factors = {"head": tunerkit.plugin.Factors(q=torch.ones(2, 4), p=torch.ones(3, 2))}
    >>> config, adapters = tunerkit_from_factors([tunerkit.plugin.Target("head", torch.nn.Linear(4, 3))], factors)
    >>> config.rank, adapters["head"].rank
    (2, 2)
    """


@hookspec
def tunerkit_open_run(path: Path, base: str | None) -> tuple[nn.Module, object] | None:
    """Load the base model, the adapter and the processor of a run that a command or a trainer wrote.

    Fires in ``tunerkit.from_folder``, until one plugin answers. None means that the folder is none of this plugin's.
    ``base`` is where the base model is, if the user names it.

    >>> from pathlib import Path
    >>> @tunerkit.hookimpl
    ... def tunerkit_open_run(path):
    ...     if not (path / "acme.json").is_file():
    ...         return None
    >>> print(tunerkit_open_run(Path("out")))
    None
    """


@hookspec
def tunerkit_formats() -> Iterable[Format]:
    """Return the formats of other programs that this plugin reads and writes.

    Fires in ``export``, and in ``load`` for a path that holds no file of tunerkit's. Of formats with one name the first
    counts, in the order of their distributions' names. Import slow libraries inside the functions of the record.

    >>> from tests.support.toy_formats import read, sniff, write
    >>> @tunerkit.hookimpl
    ... def tunerkit_formats():
    ...     return [tunerkit.plugin.Format("toy", sniff=sniff, read=read, write=write)]
    >>> [format.name for format in tunerkit_formats()]
    ['toy']
    """


@hookspec(firstresult=True)
def tunerkit_state(tuner: TunerView) -> State | None:
    """Return what training needs to resume, apart from the adapter's weights, such as averages and masks.

    Fires in ``save_state``, between two steps, for an attached tuner. Core saves weights, config and step count itself.
    ``tensors`` and ``values`` are by name; values must be representable in JSON.

    >>> @tunerkit.hookimpl
    ... def tunerkit_state(tuner):
    ...     return tunerkit.plugin.State(tensors={"head.mask": tuner.state["mask"]}, values={"allocations": 4})
    >>> tunerkit_state(SimpleNamespace(state={"mask": torch.tensor([True, False])})).tensors
    {'head.mask': tensor([ True, False])}
    """


@hookspec(firstresult=True)
def tunerkit_restore(tuner: TunerView, state: State) -> None:
    """Restore what `tunerkit_state` returned, so that the next step resumes the interrupted run.

    Fires in ``load_state``, after `tunerkit_start` and before the first step. The adapters have the saved run's weights
    already, and ``tuner.steps`` and ``tuner.history`` are those of the file. Core has verified that the state is
    undamaged and that method and targets match. Raise an error if names or shapes do not fit: core then undoes what was
    changed, in the adapters and in ``tuner.state``.

    >>> @tunerkit.hookimpl
    ... def tunerkit_restore(tuner, state):
    ...     tuner.state = {"mask": state.tensors["head.mask"]}
    >>> tuner = SimpleNamespace(state=None)
    >>> tunerkit_restore(tuner, tunerkit.plugin.State(tensors={"head.mask": torch.tensor([True, False])}, values={}))
    >>> tuner.state
    {'mask': tensor([ True, False])}
    """
