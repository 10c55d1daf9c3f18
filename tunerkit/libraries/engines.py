"""The engines that shard weights and the kinds of packed weights: how each is recognised, and what is refused with it.

One table of plain records. To support an engine in one verb, remove that entry of its row.
"""

from collections.abc import Iterable, Mapping

import attrs
from torch import nn

from tunerkit.errors import AdapterError, TargetError, TunerkitError
from tunerkit.libraries.forwards import is_named
from tunerkit.libraries.torch_private import FLATTENED, VIEWS_FLAT, own_parameters
from tunerkit.paths import join


@attrs.frozen
class Restriction:
    """An engine or a kind of weight with which tunerkit cannot do everything.

    Attributes:
        name: What messages call it.
        refused: The reason and the way out by verb: ``"wrap"`` (and load), ``"attach"``, ``"save"``, ``"merge"``.
        classes: The qualified names of the classes from which its modules or its parameters derive.
        marks: Attributes that it sets on modules or parameters, with their value; None stands for any value.
        error: The exception that refusing raises.
        shards: Whether a process holds only shards of parameters.
    """

    name: str
    refused: Mapping[str, str]
    classes: tuple[str, ...] = ()
    marks: Mapping[str, object] = attrs.field(factory=dict)
    error: type[TunerkitError] = AdapterError
    shards: bool = False


_GATHER = "Gather the full state_dict, load it into an unsharded model that was wrapped in the same way, and {0} there"
_PACKED = "Call tunerkit.merge on the unquantised base instead: load the adapter onto it"

_UNLOAD = "Call unload() on the PeftModel first, and do not pass peft_config to a trainer of a wrapped model"

ENGINES = (
    Restriction(
        "peft",
        classes=(
            "peft.peft_model.PeftModel",
            "peft.tuners.tuners_utils.BaseTunerLayer",
            "peft.utils.other.AuxiliaryTrainingWrapper",
        ),
        refused={
            "wrap": "this is a PeftModel, or holds layers of one, so an adapter would be put on top of peft's. Call "
            "merge_and_unload() on it to keep what peft trained, or unload() to drop that, and wrap what it returns",
            "attach": f"peft has put layers of its own into the wrapped model. {_UNLOAD}",
            "save": f"peft has put layers of its own into the wrapped model, and the file would fit no base. {_UNLOAD}",
        },
    ),
    Restriction(
        "torchao",
        classes=("torchao.utils.TorchAOBaseTensor",),
        refused={
            "merge": f"torchao stores its weights packed, so nothing can be added to them. {_PACKED}",
        },
        error=TargetError,
    ),
    Restriction(
        "FSDP1 (FullyShardedDataParallel)",
        classes=("torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",),
        marks={FLATTENED: True, VIEWS_FLAT: False},
        refused={
            "wrap": "it has flattened the weights already. Wrap the model that it was given, before FSDP",
            "attach": "it flattens the adapters into one tensor for each process, so no step sees a whole adapter. "
            "Train in one process or with DDP",
            "save": f"each process holds a flat shard of the weights. {_GATHER.format('save')}",
            "merge": f"each process holds a flat shard of the weights. {_GATHER.format('merge')}",
        },
    ),
    Restriction(
        "FSDP2 (fully_shard)",
        shards=True,
        # After a forward, FSDP2 may leave parameters whole for a while, but the module's class shows it.
        classes=("torch.distributed.tensor.DTensor", "torch.distributed.fsdp.FSDPModule"),
        refused={
            "wrap": "it has sharded the weights already, and adapters would not be synchronised. Wrap the model first, "
            "then call fully_shard",
        },
    ),
    Restriction(
        "DeepSpeed ZeRO-3",
        shards=True,
        marks={"ds_id": None},
        refused={
            "merge": "it holds the weights in partitions, and the parameters are empty. Save the adapter in every "
            "process, load it onto an unsharded model, and merge there",
        },
    ),
    Restriction(
        "DeepSpeed",
        classes=("deepspeed.runtime.engine.DeepSpeedEngine",),
        marks={"_original_parameters": None},  # which ZeRO-3 sets on each module that is inside an engine
        refused={
            "wrap": "deepspeed.initialize was called already, and its optimizer would not train the adapter. Wrap the "
            "model first, and then pass it to deepspeed.initialize",
        },
    ),
    Restriction(
        "bitsandbytes int8",
        classes=("bitsandbytes.nn.modules.Int8Params",),
        refused={"merge": f"int8 weights are stored packed, and adding to them changes nothing. {_PACKED}"},
    ),
    Restriction(
        "optimum-quanto",
        classes=("optimum.quanto.tensor.qtensor.QTensor",),
        refused={"merge": f"quanto's weights are stored packed, and adding to them changes nothing. {_PACKED}"},
    ),
)

_SHARDING = [engine for engine in ENGINES if engine.shards]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this process holds only a shard of a parameter, as under FSDP2 and ZeRO-3."""
    return any(_is_of(type(parameter), engine) or _is_marked(parameter, engine.marks) for engine in _SHARDING)


def refuse_engine(modules: Iterable[tuple[str, nn.Module]], verb: str) -> None:
    """Raise the error of the first engine that refuses ``verb`` and that is found in ``modules``.

    Args:
        modules: Pairs of a path and a module. The modules inside it are not searched.
        verb: A key of `Restriction.refused`.
    """
    # Nearly always nothing is found, so the search is for all engines at once.
    engines = [engine for engine in ENGINES if verb in engine.refused]
    marks = {name for engine in engines for name in engine.marks}
    known: dict[type, bool] = {}
    for path, module in modules:
        own: list[tuple[str, nn.Module | nn.Parameter]] = [("", module)]
        own += [(name, p) for name, p in own_parameters(module).items() if p is not None]
        for name, thing in own:
            if type(thing) not in known:
                known[type(thing)] = any(_is_of(type(thing), engine) for engine in engines)
            if known[type(thing)] or not marks.isdisjoint(vars(thing)):
                _refuse_thing(thing, join(path, name) if name else path, engines, verb)


def _refuse_thing(thing: nn.Module | nn.Parameter, path: str, engines: Iterable[Restriction], verb: str) -> None:
    for engine in engines:
        if _is_of(type(thing), engine) or _is_marked(thing, engine.marks):
            place = f"at {path!r}" if path else "in the model itself"
            raise engine.error(f"cannot {verb} with {engine.name}, found {place}: {engine.refused[verb]}")


def _is_of(kind: type, engine: Restriction) -> bool:
    return any(is_named(kind, name) for name in engine.classes)


def _is_marked(thing: nn.Module | nn.Parameter, marks: Mapping[str, object]) -> bool:
    held = vars(thing)
    return any(name in held and value in (None, held[name]) for name, value in marks.items())
