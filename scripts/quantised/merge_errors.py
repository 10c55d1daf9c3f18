"""The errors of merging, beside that of quantising the dense W + ΔW directly, for docs/evidence/quantised-grids.md.

ΔW are random products of rank 8, at three projections of four blocks. Run it with a folder of SmolLM2 in full
precision, and forms that can be merged into::

    python -m scripts.quantised.merge_errors MODEL [FORM ...] > rows.md
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import tunerkit
from scripts.quantised.forms import FORMS, quantised
from scripts.quantised.training import TARGETS
from tunerkit import hooks
from tunerkit.plugin import BaseLayer

SIZES = (0.02, 0.3)  # of ΔW, relative to W
CONFIG = {"rank": 8, "targets": list(TARGETS), "layers": [0, 10, 20, 29]}
COLUMNS = (
    *("base", "‖ΔW‖ / ‖W‖", "base's own error", "added by merging", "quantising W + ΔW directly"),
    *("added / direct, worst", "total", "total / direct, worst", "√(1 + (own / direct)²)"),
)


def errors(plain: Any, folder: str, form: str, size: float) -> Iterator[tuple[float, float, float, float]]:
    """For each weight: the base's own error, what merging adds, that of quantising W + ΔW directly, the total."""
    weights = {path: module.weight.detach() for path, module in plain.named_modules() if hasattr(module, "weight")}
    model = tunerkit.wrap(quantised(folder, form), "lora", CONFIG, seed=0)
    packed = _bases(model)
    deltas = _set_deltas(model, packed, weights, size)
    stored = {path: base.dense().float() for path, base in packed.items()}
    direct = _quantised_directly(plain, folder, form, deltas)
    tunerkit.merge(model)
    for path, delta in deltas.items():
        wanted, merged = weights[path] + delta, packed[path].dense().float()
        yield (
            _relative(stored[path], weights[path]),
            _relative(merged, stored[path] + delta),
            _relative(direct[path], wanted),
            _relative(merged, wanted),
        )


@torch.no_grad()
def _set_deltas(
    model: Any, packed: Mapping[str, BaseLayer], weights: Mapping[str, Tensor], size: float
) -> dict[str, Tensor]:
    deltas = {}
    for number, (path, adapter) in enumerate(tunerkit.tuner(model).adapters().items()):
        b: Any = adapter.get_parameter("b")
        b.normal_(generator=torch.Generator().manual_seed(number))
        found = hooks.delta(path, "lora", adapter, packed[path]).weight
        assert found is not None
        b.mul_(size * weights[path].norm() / found.norm())
        found = hooks.delta(path, "lora", adapter, packed[path]).weight
        assert found is not None
        deltas[path] = found.clone()
    return deltas


@torch.no_grad()
def _quantised_directly(plain: Any, folder: str, form: str, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense W + ΔW as the library quantises a model with these weights: no code of tunerkit's writes them."""
    model = copy.deepcopy(plain)
    for path, delta in deltas.items():
        model.get_submodule(path).weight.add_(delta)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        wrapped = tunerkit.wrap(quantised(saved, form), "lora", CONFIG)
    return {path: base.dense().float() for path, base in _bases(wrapped).items()}


def _bases(model: Any) -> dict[str, BaseLayer]:
    # Any: `nn.Module` declares no attribute of this name.
    targets: Any = tunerkit.tuner(model).targets
    return {target.path: target.module.tunerkit.base for target in targets}


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def main(folder: str, forms: Sequence[str]) -> None:
    """Print one row for each form and size."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for form in forms:
        for size in SIZES:
            every = torch.tensor(list(errors(plain, folder, form, size)), dtype=torch.float64)
            own, added, direct, total = every.mean(0).tolist()
            worst_added, worst_total = (float((every[:, column] / every[:, 2]).max()) for column in (1, 3))
            # The base's own error, relative to the longer W + ΔW.
            expected = (1 + (own / (1 + size**2) ** 0.5 / direct) ** 2) ** 0.5
            cells = (f"{size:.0%}", f"{own:.2%}", f"{added:.2%}", f"{direct:.2%}", f"{worst_added:.3f}")
            print(f"| {form} | {' | '.join(cells)} | {total:.2%} | {worst_total:.3f} | {expected:.3f} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2:] or FORMS[:-1])
