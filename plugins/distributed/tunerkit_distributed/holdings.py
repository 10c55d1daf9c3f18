"""How accelerate, DeepSpeed and FSDP2 offload or shard weights, and which operations do not work with them."""

from torch import Tensor, nn

from tunerkit.plugin import Holding, Restriction
from tunerkit_distributed import dtensors, offloading, zero_init
from tunerkit_distributed.deepspeed_names import DEEPSPEED_ENGINE
from tunerkit_distributed.torch_private import FLATTENED, VIEWS_FLAT, is_managed_by_fsdp2


def is_sharded(parameter: Tensor) -> bool:
    """Whether this rank holds only a shard of a parameter, as under FSDP2 and ZeRO-3."""
    return dtensors.is_split(parameter) or zero_init.is_zero_shard(parameter)


def _kept_whole(module: nn.Module) -> str | None:
    """Return why a merge into a module would be lost, if FSDP2 has gathered its weights now; None if it would last."""
    if not is_managed_by_fsdp2(module) or any(map(dtensors.is_split, module.parameters())):
        return None
    return (
        "FSDP2 keeps its weight gathered after a forward, and shards it in a module around this model; call it on the "
        "module that was passed to fully_shard"
    )


HOLDINGS = (
    Holding(
        name="accelerate",
        package="accelerate",
        way_out="call accelerate.hooks.remove_hook_from_submodules(model)",
        offloads=offloading.is_offloaded,
        load=offloading.load,
        device=offloading.execution_device,
        forward=offloading.forward_on_instance,
        identity=offloading.identity,
        duplicate=offloading.duplicate,
    ),
    Holding(
        name="DeepSpeed's zero.Init",
        package="deepspeed",
        way_out="use ZeRO-2",
        one_dtype="DeepSpeed trains one dtype beside a base in zero.Init",
        shards=zero_init.is_zero_shard,
        shape=zero_init.whole_shape,
        gathered=zero_init.gathered,
        outside=zero_init.outside_zero_init,
    ),
    Holding(
        name="FSDP2",
        shards=dtensors.is_split,
        part=dtensors.local_part,
        gathered=dtensors.gathered,
        reshard_=dtensors.reshard_,
        lent=_kept_whole,
    ),
)

_GATHER = "Gather the full state_dict, load it into an unsharded model that was wrapped in the same way, and {0} there"
RESTRICTIONS = (
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
        # After a forward, FSDP2 may leave parameters whole for a while, but the module's class shows it.
        classes=("torch.distributed.tensor.DTensor", "torch.distributed.fsdp.FSDPModule"),
        refused={
            "wrap": "it has sharded the weights already, and adapters would not be synchronized. Wrap the model first, "
            "then call fully_shard",
        },
    ),
    Restriction(
        "DeepSpeed ZeRO-3",
        marks={"ds_id": None},
        refused={
            "merge": "it holds the weights in partitions, and the parameters are empty. Save the adapter in every "
            "process, load it onto an unsharded model, and merge there",
        },
    ),
    Restriction(
        "DeepSpeed",
        classes=(DEEPSPEED_ENGINE,),
        marks={"_original_parameters": None},  # which ZeRO-3 sets on each module that is inside an engine
        refused={
            "wrap": "deepspeed.initialize was called already, and its optimizer would not train the adapter. Wrap the "
            "model first, and then pass it to deepspeed.initialize",
        },
    ),
)
