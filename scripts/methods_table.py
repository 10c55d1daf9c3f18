"""What each method of tunerkit-methods was measured to do: the table of docs/evidence/methods.md.

``python -m scripts.methods_table [METHOD ...]`` prints it as it goes; it takes some minutes of one core.
"""

import ast
import copy
import importlib.util
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from scripts.structure import Source, code_lines
from tunerkit.errors import TunerkitError
from tunerkit.hooks import registry
from tunerkit_testing import check_method
from tunerkit_testing.cases import Case
from tunerkit_testing.known_cases import named

_TESTS = Path(__file__).parents[1] / "plugins/methods/tests"
CASES = ("bert", "llama", "resnet")
# On a CPU, PEFT computes BOFT with one factor, and loads no folder with more.
_EXCHANGED: dict[str, dict[str, object]] = {"boft": {"factors": 1}}
HEAD = (
    "| method | lines | forward | gradients | 20 steps | kit: "
    + ", ".join(CASES)
    + " | PEFT's folder | merging | on top of LoRA |"
)


def _imported(name: str) -> ModuleType:
    """A test file, whose tables the figures come from."""
    spec = importlib.util.spec_from_file_location(name, _TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(method: str) -> int:
    """The lines of code of a method's file."""
    file = Path(__file__).parents[1] / "plugins/methods/tunerkit_methods" / f"{method.replace('-', '_')}.py"
    text = file.read_text(encoding="utf-8")
    return code_lines(Source(method, ast.parse(text), text=text))


def parity(method: str, tests: ModuleType) -> tuple[str, str, str]:
    """The largest differences to PEFT over all rows of the parity test: forward, gradients, weights after 20 steps."""
    import pytest

    rows = [row for row in tests.ROWS if row.method == method]
    if not rows:
        return ("none", "none", "none")
    found = [0.0, 0.0, 0.0]
    for row in rows:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in row.instead.items():
                patch.setattr(name, value)
            for at, each in enumerate(_differences(row, tests)):
                found[at] = max(found[at], each)
    return (f"{found[0]:.0e}", f"{found[1]:.0e}", f"{found[2]:.0e}")


def _differences(row: Any, tests: ModuleType) -> Iterator[float]:
    ours, theirs = tests.both(row)
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outs = [model(x) for model in (ours, theirs)]
    yield _relative(*outs)
    for out in outs:
        out.square().sum().backward()
    pairs = [(a.grad, b.grad) for a, b in tests.every_pair(row, ours, theirs) if a.grad is not None and b.is_leaf]
    # One may be 0 in truth, so the largest of all is the measure.
    largest = max(float(b.abs().max()) for _, b in pairs)
    yield max(float((a.reshape(b.shape) - b).abs().max()) for a, b in pairs) / largest
    yield max(float((a - b.reshape(a.shape)).abs().max()) for a, b in tests.every_pair(row, *tests.trained(row)))


def _relative(mine: Tensor, other: Tensor) -> float:
    return float((mine - other).detach().abs().max() / other.detach().abs().max().clamp_min(1e-300))


def kit(method: str, tests: ModuleType, case: Case) -> str:
    """How many checks passed, were skipped and failed as expected; the names of others that failed."""
    try:
        results = check_method(method, tests.METHODS[method], [case])
    except TunerkitError as error:
        return f"refused: {str(error).splitlines()[0][:60]}"
    count = Counter(each.status for each in results)
    bad = [each.check for each in results if each.status in ("failed", "error")]
    told = f"{count['passed']}, {count['skipped']}, {count['expected failure']}"
    return told + (f" **{', '.join(bad)}**" if bad else "")


def moved(method: str, settings: dict[str, object], adapter: str = "default", model: nn.Module | None = None) -> Any:
    """A small BERT whose adapters were moved at random."""
    (case,) = named(["bert"])
    chosen = {**case.settings, "train_modules": (), **settings}
    model = tunerkit.wrap(model or case.build(), method, chosen, adapter=adapter, seed=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for each in tunerkit.tuner(model, adapter).adapters().values():
            for parameter in (*each.parameters(), *(each.shared.parameters() if each.has_shared else ())):
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def merging(model: nn.Module) -> float:
    """The largest difference that merging makes to the output of a small BERT, relative to the output."""
    (case,) = named(["bert"])
    with torch.no_grad():
        before = case.output(model)
        return _relative(case.output(tunerkit.merge(model)), before)


def folder(method: str, settings: dict[str, object]) -> str:
    """The largest differences after writing PEFT's folder: read by PEFT, and read by tunerkit."""
    import peft

    if "peft" not in registry.get(method).foreign:
        return "none"
    (case,) = named(["bert"])
    model = moved(method, {**settings, **_EXCHANGED.get(method, {})})
    with tempfile.TemporaryDirectory() as path, torch.no_grad():
        expected = case.output(model)
        tunerkit.export(model, path, format="peft")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(tunerkit.unwrap(model)), path).eval()
        ours = tunerkit.load(case.build(), path).eval()
        return f"{_relative(case.output(theirs), expected):.0e}, {_relative(case.output(ours), expected):.0e}"


def rows(methods: Iterable[str]) -> Iterator[str]:
    """Yield the table's rows, one as soon as it is measured."""
    parities, conformance = _imported("test_peft_parity"), _imported("test_conformance")
    for method in methods:
        settings = conformance.METHODS[method]
        cells = [str(lines(method)), *parity(method, parities)]
        cells.append("; ".join(kit(method, conformance, case) for case in named(CASES)))
        cells += [folder(method, settings), f"{merging(moved(method, settings)):.0e}"]
        stacked = moved(method, settings, "second", moved("lora", {"rank": 2}))
        cells.append(f"{merging(stacked):.0e}")
        yield f"| `{method}` | {' | '.join(cells)} |"


def main() -> None:
    """Print the table for the methods that the command line names, or for all."""
    warnings.simplefilter("ignore")
    every = [name for name, info in tunerkit.methods().items() if info.distribution == "tunerkit-methods"]
    print(HEAD, "|---|---:|---|---|---|---|---|---|---|", sep="\n")
    for row in rows(sys.argv[1:] or every):
        print(row, flush=True)


if __name__ == "__main__":
    main()
