"""Engines that shard a base under adapters: what each verb answers in two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from plugins.distributed.tests.sharded import shard_and_try
from tests.support import two_processes

SHARDING = ("fsdp1", "fsdp1 flat", "fsdp2")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where two processes wrote, and what each of them was answered, by engine."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("sharded")
    two_processes.spawn(shard_and_try, (SHARDING, str(folder)))
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("engine", SHARDING)
def test_nothing_silent_happens_to_sharded_weights(tried: tuple[Path, list[dict[str, Any]]], engine: str) -> None:
    """With two processes, wrapping is refused, and with FSDP1 also the rest; what is advised works.

    Without the refusals, saving writes shards and merging changes nothing. An attached adapter under FSDP2 is gathered.
    """
    folder, found = tried
    name = "FSDP2 (fully_shard)" if engine == "fsdp2" else "FSDP1 (FullyShardedDataParallel)"
    for answers in (dict(each[engine]) for each in found):
        here, alone = answers.pop("gathered")
        assert torch.allclose(here, alone, rtol=1e-5, atol=1e-6)
        if engine == "fsdp2":
            assert all(answers.pop(verb) is None for verb in [*answers] if verb != "wrap")
        for verb, answer in answers.items():
            assert answer is not None, verb
            assert answer[0] == "AdapterError"
            assert answer[1].startswith(f"cannot {verb.split()[0]} with {name}"), answer
        assert engine == "fsdp2" or "Gather the full state_dict" in answers["save"][1]
        assert (folder / engine / "sharded").exists() == (engine == "fsdp2")
