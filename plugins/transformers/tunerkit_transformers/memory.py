"""The memory of a training step: what its activations take, estimated, and how much is free."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tunerkit_transformers.learned_positions import takes_positions

GIB: Final = 2**30
_FEW: Final = (16, 48)  # tokens on which activations are measured
# What may be planned with: the estimate is rough, and an allocator cannot use all that is free.
_SHARE: Final = 0.8
_LOGITS: Final = 2**30  # of which no loss keeps more at once: larger batches are computed in parts
# The limits of a container, of version 2 and version 1 of Linux's control groups.
_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def activation_bytes(model: Any, tokens: int, precision: torch.dtype | None = None) -> int:
    """Estimate what a forward keeps of a batch for its backward, without checkpointing and without its logits.

    It is measured on few tokens. Attention that keeps its weights takes more in longer rows.

    Args:
        model: A model of transformers, with adapters.
        tokens: The tokens of a batch, padding included.
        precision: What matrix products are computed in under autocast; None without.
    """
    few, more = (_kept_bytes(model, count, precision) for count in _FEW)
    # What does not depend on the batch counts once, such as weights that autocast has cast.
    each = (more - few) / (_FEW[1] - _FEW[0])
    return int(few + each * (tokens - _FEW[0]))


def _kept_bytes(model: Any, tokens: int, precision: torch.dtype | None) -> int:
    """What a forward of one row keeps for its backward, beside parameters. Each storage counts once."""
    device = next(model.parameters()).device
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor

    ids = torch.ones((1, tokens), dtype=torch.int64, device=device)
    is_pair, was_training = model.config.is_encoder_decoder, model.training
    more = {"decoder_input_ids": ids} if is_pair else {"logits_to_keep": 1} if takes_positions(type(model)) else {}
    autocast = nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), hooks, autocast:
        output = model.train()(input_ids=ids, **more)  # as long as it lives, no storage is given to another tensor
    model.train(was_training)
    del output
    return sum(kept.values())


def free_bytes(device: torch.device, limit: float | None = None) -> int | None:
    """Return how much memory a training may still take on a device; None if that is not known.

    Args:
        device: The device.
        limit: The bytes that the training may take in all, with what it has taken already; None for what there is.
    """
    free: int | None
    if device.type == "cpu":
        import psutil  # type: ignore[import-untyped]  # comes with accelerate

        free, taken = psutil.virtual_memory().available, psutil.Process().memory_info().rss
        free = min([free, *(most - taken for most in map(_number_in, _LIMITS) if most is not None)])
    elif device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken
    else:
        return None
    return free if limit is None else min(free, int(limit) - taken)


def _number_in(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None


def step_bytes(trainer: Any, longest: int) -> int:
    """Estimate what a step takes beside the model: activations, gradients, optimizer state, and logits.

    Args:
        trainer: A transformers Trainer of a language model.
        longest: The tokens of the longest row.
    """
    model, arguments = trainer.model, trainer.args
    tokens = longest * arguments.per_device_train_batch_size * (2 if "DPO" in type(trainer).__name__ else 1)
    precision = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    logits = 2 * 4 * tokens * model.config.get_text_config().vocab_size  # and their gradient, in fp32
    trained = [each for each in model.parameters() if each.requires_grad]
    state = sum(3 * each.numel() * each.element_size() for each in trained)  # a gradient, and Adam's two averages
    needed: int = activation_bytes(model, tokens, precision) + state + min(logits, _LOGITS)
    return needed


def fits(needed: int, free: int | None) -> bool:
    """Whether a step that needs so many bytes fits into what is free; True if that is not known."""
    return free is None or needed <= _SHARE * free
