"""Quantised bases in two processes: the training of one, its file, and merging or its refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from plugins.quant.tests import parallel_runs, quantised
from plugins.quant.tests.parallel_runs import ENGINES, METHODS
from tests.support import two_processes

for package in ("bitsandbytes", "tunerkit_adalora", "tunerkit_lora"):
    pytest.importorskip(package)
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*4 bits", "ignore:.*on a base with another quantization", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each of two processes found, by engine and method."""
    folder = tmp_path_factory.mktemp("runs")
    two_processes.spawn(parallel_runs.be_one, (str(folder),))
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_nf4_trains_in_two_processes_as_in_one(runs: list[dict[Any, Any]], engine: str, method: str) -> None:
    """The same ranks and history, weights within 1e-6, and a file that gives one process the same outputs."""
    kept = method == "adalora" and engine == "fsdp2 sharded"
    one = parallel_runs.train("alone", method, **({"shrink": False} if kept else {}))
    for found in (each[engine, method] for each in runs):
        assert found["ranks"] == one["ranks"]
        assert found["history"] == one["history"]
        for name, tensor in one["weights"].items():
            assert torch.allclose(found["weights"][name], tensor, rtol=0, atol=1e-6), name
        with torch.no_grad():
            loaded = tunerkit.load(quantised.nf4(), found["file"])(quantised.X)
        assert torch.allclose(loaded, found["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_merging_into_nf4_is_that_of_one_process_or_refused(
    runs: list[dict[Any, Any]], engine: str, method: str
) -> None:
    """FSDP2 cuts packed weights, which cannot be read or quantised in parts. Nor can they be made dense."""
    for found in (each[engine, method] for each in runs):
        if engine.startswith("fsdp2"):
            assert found["merge"].startswith("cannot merge into '0': its quantized weight is sharded")
            assert found["dense"].startswith("cannot make a dense layer of '0': its quantized weight is sharded")
            continue
        assert torch.allclose(found["dense"], found["output"], rtol=0, atol=1e-5)
        merged, unmerged = found["merge"]
        assert torch.equal(unmerged, found["output"])
        model = tunerkit.load(quantised.nf4(), found["file"])
        with torch.no_grad():
            assert torch.allclose(tunerkit.merge(model)(quantised.X), merged, rtol=0, atol=1e-5)
