"""Adapters on experts under DeepSpeed's ZeRO-3 in two processes."""

import importlib.util
from pathlib import Path

import pytest
import torch

import tunerkit
from plugins.experts.tests import parallel_runs
from plugins.experts.tests.tiny_mixtral import gap, logits, mixtral
from tests.support import two_processes

for _name in ("deepspeed", "tunerkit_adalora", "tunerkit_lora"):
    if importlib.util.find_spec(_name) is None:
        pytest.skip(f"{_name} is not installed", allow_module_level=True)


def test_two_processes_train_under_zero_3_as_one(tmp_path: Path) -> None:
    """The same weights up to rounding, though stacks and adapters are empty between uses; the file loads in one.

    Where nothing before the first stack is trained, the error says how to get a gradient there, and that works.
    """
    two_processes.spawn(parallel_runs.train_under_zero_3, (str(tmp_path),))
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for method, targets in parallel_runs.ZERO:
        expected = parallel_runs.train("alone", method, tmp_path, targets=targets)
        for own in both:
            found = own[method, targets]
            assert ("enable_input_require_grads" in found["refused"]) == (targets == ("experts",))
            assert found["empty"]
            assert found["ranks"] == expected["ranks"]
            assert method == "adalora" or all("rank=3" in each for each in found["shown"])
            assert found["weights"].keys() == expected["weights"].keys()
            assert all(gap(found["weights"][name], weight) <= 1e-5 for name, weight in expected["weights"].items())
            assert gap(found["trained"], expected["trained"]) <= 1e-5
            assert gap(logits(tunerkit.load(mixtral(), found["file"])), expected["trained"]) <= 1e-5
