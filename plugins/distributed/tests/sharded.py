"""Shards a wrapped model in processes of their own, which import this function by name, and tries what is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as checkpoint

import tunerkit
from tests.support import two_processes
from tunerkit_testing import small
from tunerkit_testing.toy_methods import LowRankPlugin


def shard_and_try(rank: int, engines: Sequence[str], folder: str) -> None:
    """Be one of two processes that shard a wrapped `small.net` by each engine and then try what FSDP1 refuses.

    The answers are written to ``{folder}/{rank}.pt``, by engine: for each verb the error's class and message, or None,
    and under ``"gathered"`` the outputs of the trained model here and of an unsharded one with the gathered weights,
    saved and loaded again. What an engine lets the processes save is in ``{folder}/{engine}``.

    Args:
        rank: which of the two processes this is; `two_processes.spawn` gives it.
        engines: some of ``"fsdp1"``, ``"fsdp1 flat"`` (without ``use_orig_params``) and ``"fsdp2"``.
        folder: where the processes meet and write.
    """
    with two_processes.joined(rank, folder):
        tunerkit.register(LowRankPlugin())
        answers = {engine: _tried(engine, Path(folder) / engine, rank) for engine in engines}
        torch.save(answers, f"{folder}/{rank}.pt")


def _tried(engine: str, folder: Path, rank: int) -> dict[str, Any]:
    inner = _wrapped()
    model = _sharded(inner, engine)
    answers: dict[str, Any] = {
        "wrap": _error(lambda: _wrapped(_sharded(small.net(), engine))),
        "attach": _error(lambda: tunerkit.attach(model, torch.optim.SGD(small.trainable(model), lr=0.2))),
        "save": _error(lambda: tunerkit.save(model, folder / "sharded")),
        "save the part inside": _error(lambda: tunerkit.save(inner, folder / "sharded")),
        "merge": _error(lambda: tunerkit.unmerge(tunerkit.merge(model))),
    }
    small.train(model, torch.optim.SGD(small.trainable(model), lr=0.2), 2)
    answers["gathered"] = (model(small.X).detach(), _gathered(model, engine, folder, rank))
    return answers


def _wrapped(model: nn.Module | None = None) -> nn.Module:
    return tunerkit.wrap(small.net() if model is None else model, "toy-low-rank", {"targets": ["0", "4"]}, seed=1)


def _sharded(model: nn.Module, engine: str) -> nn.Module:
    if engine == "fsdp2":
        fsdp.fully_shard(model)  # of the same object
        return model
    options: dict[str, Any] = {"use_orig_params": engine == "fsdp1", "device_id": torch.device("cpu")}
    # Each part needs parameters that all require a gradient, or that all do not, if they are to be flattened.
    options["ignored_states"] = [] if engine == "fsdp1" else [p for p in model.parameters() if not p.requires_grad]
    return fsdp.FullyShardedDataParallel(model, **options)


def _gathered(model: nn.Module, engine: str, folder: Path, rank: int) -> Tensor:
    """The output of an unsharded model that was given the full ``state_dict``, as the messages advise."""
    if engine == "fsdp2":
        options = checkpoint.StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        full = checkpoint.get_model_state_dict(model, options=options)
    else:
        full = model.state_dict()
    alone = _wrapped()
    alone.load_state_dict(full)
    tunerkit.save(alone, folder / f"alone-{rank}")
    output: Tensor = tunerkit.load(small.net(), folder / f"alone-{rank}")(small.X)
    return output.detach()


def _error(call: Callable[[], object]) -> tuple[str, str] | None:
    try:
        call()
    except tunerkit.TunerkitError as error:
        return type(error).__name__, str(error)
    return None
