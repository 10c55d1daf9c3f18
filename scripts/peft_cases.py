"""What becomes of PEFT's own test cases: each is made by PEFT, and taken through tunerkit and back.

``python scripts/peft_cases.py FOLDER [TYPE ...]``, with the ``tests`` folder of a clone of PEFT, prints a table by
type, and each message with its cases. It takes a minute; for some types, such as ``OFT``, less.
"""

import copy
import importlib
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import peft
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import TunerkitError

NEAR = 1e-5  # of the largest number of an output
RESULTS = ("held", "refused", "differs", "crashes")
X = torch.arange(90).view(9, 10)


@attrs.frozen
class Row:
    """What became of one case."""

    kind: str
    name: str
    result: str
    message: str
    warned: bool


class Differs(Exception):
    """A model computes something else than it should."""


def cases_of(folder: Path) -> ModuleType:
    """Import PEFT's test module by its file, without the tests that it derives from: these need further libraries."""
    sys.modules["peft_tests"] = package = ModuleType("peft_tests")
    package.__path__ = [str(folder)]
    common: Any = ModuleType("peft_tests.testing_common")
    common.PeftCommonTester = object
    common._skip_if_deleting_adapter_not_supported = common._skip_if_merging_not_supported = lambda *_: None
    sys.modules[common.__name__] = common
    return importlib.import_module("peft_tests.test_custom_models")


def computed(model: nn.Module) -> Tensor:
    """The output of a model in evaluation."""
    with torch.no_grad():
        output: Tensor = model.eval()(X)
    return output


def compare(what: str, got: Tensor, wanted: Tensor) -> None:
    """Raise `Differs` if two outputs are not equal in fp32."""
    error, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    if not error <= NEAR * max(largest, 1e-6):
        raise Differs(f"{what}: {error / largest:.0e} of the largest output")


def drawn(model: nn.Module) -> None:
    """Move what PEFT starts without effect, whatever the case says."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))


def whole_way(tests: ModuleType, model_id: str, config_class: Any, given: dict[str, Any], folder: Path) -> None:
    """PEFT's folder is loaded, disabled, merged, trained, saved, loaded again, exported, and read by PEFT."""
    build = partial(tests.MockTransformerWrapper.from_pretrained, model_id)
    made = peft.get_peft_model(build(), config_class(**tests.set_init_weights_false(config_class, given)))
    drawn(made)
    made.save_pretrained(str(folder / "peft"))
    wanted, bare = computed(made), computed(build())
    model = tunerkit.load(build(), folder / "peft", trainable=True)
    compare("loaded", computed(model), wanted)
    with tunerkit.disabled(model):
        compare("disabled", computed(model), bare)
    tunerkit.merge(model)
    compare("merged", computed(model), wanted)
    tunerkit.unmerge(model)
    compare("unmerged", computed(model), wanted)
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=1e-6)
    tunerkit.attach(model, optimizer, total_steps=10)
    model.train()(X).square().mean().backward()
    optimizer.step()
    trained = computed(model)
    tunerkit.save(model, folder / "own")
    compare("saved and loaded", computed(tunerkit.load(build(), folder / "own")), trained)
    tunerkit.export(model, folder / "back")
    compare("exported", computed(peft.PeftModel.from_pretrained(build(), str(folder / "back"))), trained)


def both(tests: ModuleType, method: str, config_class: Any, given: Sequence[dict[str, Any]], folder: Path) -> None:
    """Two folders are loaded beside each other, and both are active."""
    names, helper = ["one", "two"], tests.TestMultipleActiveAdapters()
    torch.manual_seed(0)
    base = helper.resolve_model_cls(method)
    made = peft.get_peft_model(copy.deepcopy(base), config_class(**given[0]), adapter_name=names[0])
    made.add_adapter(names[1], config_class(**given[1]))
    for name in names:
        made.set_adapter(name)
        drawn(made)
    made.save_pretrained(str(folder))
    helper.set_multiple_active_adapters(made, names)
    wanted = computed(made)
    for name in names:
        tunerkit.load(base, folder / name, adapter=name)
    tunerkit.activate(base, names)
    compare("both active", computed(base), wanted)


def rows(tests: ModuleType, types: Sequence[str]) -> Iterator[Row]:
    """Take each case through."""
    singles: list[Any] = [(case[0], case[2], case[3], whole_way, (case[1], *case[2:])) for case in tests.TEST_CASES]
    doubles: list[Any] = [
        (case[0], case[2], case[3], both, (case[1], case[2], case[3:5]))
        for case in tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
    ]
    for name, config_class, given, run, arguments in (*singles, *doubles):
        kind = "DORA" if given.get("use_dora") else str(config_class(**given).peft_type.value)
        if types and kind not in types:
            continue
        kind = f"{kind} x 2" if run is both else kind
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, message = "held", ""
            try:
                run(tests, *arguments, Path(folder))
            except Exception as error:  # a case that PEFT itself fails is a row as well
                refused = "refused" if isinstance(error, TunerkitError) else "crashes"
                result = "differs" if isinstance(error, Differs) else refused
                message = f"{type(error).__name__}: {error}".replace(folder, "…")
        warned = any(issubclass(each.category, tunerkit.TunerkitWarning) for each in caught)
        yield Row(kind, name, result, message, warned)


def main(folder: str, *types: str) -> None:
    """Print the table and the messages."""
    found = list(rows(cases_of(Path(folder)), types))
    counted = Counter((row.kind, row.result) for row in found)
    print("| type | cases |", " | ".join(RESULTS), "|\n|---|" + "---|" * 5)
    for kind in dict.fromkeys(row.kind for row in found):
        numbers = [counted[kind, result] for result in RESULTS]
        print(f"| {kind} | {sum(numbers)} |", " | ".join(map(str, numbers)), "|")
    alike: dict[str, list[Row]] = {}
    for row in (each for each in found if each.message):
        text = re.sub(r"'[A-Z0-9_]+'|[0-9]+", "#", row.message)  # but for types of PEFT and numbers
        alike.setdefault(f"{row.result}: {text}", []).append(row)
    for same in alike.values():
        names = [f"{row.name}{' (warned)' if row.warned else ''}" for row in same]
        print(f"\n{len(same)} {same[0].result}: {same[0].message}\n    {'; '.join(names)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
