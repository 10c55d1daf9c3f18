"""Checks under `torch.compile`."""

from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from tunerkit.errors import shown
from tunerkit.layers import torch_private
from tunerkit_testing.cases import Trial, tolerance_of
from tunerkit_testing.checks.probing import (
    Call,
    adapter_dtypes,
    calls_of,
    fill_,
    filled,
    first_of,
    seeded,
)

_CALLS = 4
_GRAPHS = 2  # a recompilation for other sizes is normal; one per call is not


def check_compiles(trial: Trial) -> str:
    """An adapted layer of each kind compiles into one graph, which is used again while its weights change."""
    _require_compiler()
    model = filled(trial)
    trial.start_training(model)
    kinds: dict[type, Call] = {}
    for call in calls_of(model, trial):
        if call.base.lends:  # a temporary weight override is a graph break
            continue
        kinds.setdefault(type(call.module), call)
    if not kinds:
        raise SkipTest("at every target only the weight is used, by the model or by its module's own forward")
    most = max(_graphs(call, model) for call in kinds.values())
    assert most <= _GRAPHS, (
        f"a layer was compiled {most} times in {_CALLS} calls; change no attribute in forward, and read no number "
        "there that changes from step to step: keep it in a buffer"
    )
    return f"{most} graph{'s' if most > 1 else ''}"


def _graphs(call: Call, model: nn.Module) -> int:
    """Compile one layer, compare it with itself, and return how often it was compiled while its weights changed."""
    torch.compiler.reset()
    try:
        counter = torch_private.compile_counter("eager")
        compiled = torch.compile(call.module, backend=counter, fullgraph=True)
        for number in range(_CALLS):
            fill_(model, 0.01)
            expected = call.seeded(number)
            found = seeded(lambda _: _called(call, compiled), model, number)
            worst = float((found - expected).detach().abs().max())
            share = tolerance_of(found.dtype, *adapter_dtypes(model))
            assert worst <= share * float(expected.detach().abs().max()), (
                f"{call.path}: compiled, the output differs by {worst:.3g}; forward must depend on its arguments, "
                "parameters and buffers alone"
            )
        return int(counter.frame_count)
    finally:
        torch.compiler.reset()


def _called(call: Call, compiled: Any) -> Tensor:
    try:
        found = compiled(*call.args, **call.kwargs)
    except Exception as error:
        raise AssertionError(
            f"{call.path}: the layer does not compile into one graph: {shown(str(error))}; compute with tensors alone "
            "in forward: build no records there, such as Factors, and read no numbers from tensors"
        ) from error
    return first_of(found)


def _require_compiler() -> None:
    """Skip where `torch.compile` does not run: its frontend needs a Python version that it knows."""
    try:
        torch.compile(nn.Identity(), backend="eager")(torch.zeros(1))
    except Exception as error:
        raise SkipTest(f"torch.compile does not run here: {error}") from error
