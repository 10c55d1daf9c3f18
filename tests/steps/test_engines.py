"""What is refused with other libraries: each in words, and none of them is imported to recognise it."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toys import Toys, answering
from tunerkit import hooks
from tunerkit.errors import TargetError
from tunerkit.plugin import Restriction
from tunerkit_testing.registering import registered

VERBS = ("wrap", "attach", "save", "merge")
TARGETS = {"targets": ["layers.0", "layers.1"]}


WAY_OUT = "to run without it, pass it to tunerkit.unregister"


def refused(call: Callable[[], object], error: type[Exception], *words: str) -> list[str]:
    """``call`` raises ``error``, and its message has all ``words``. Returns its notes."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert all(word in str(raised.value) for word in words), str(raised.value)
    return [*vars(raised.value).get("__notes__", ())]


class Table(nn.Linear):
    """A layer of another library."""


# Refuses every verb with that layer.
RESTRICTION = Restriction(
    "my tables",
    {verb: f"its tables would be lost. Call the library's own {verb} instead" for verb in VERBS},
    (f"{__name__}.Table",),
    error=TargetError,
)


def test_what_a_plugin_refuses_is_refused(toys: "Toys", tmp_path: Path) -> None:
    """Each verb asks all plugins, and raises the error of the first restriction that applies, with the place."""
    model, net = toys.trained(targets=TARGETS["targets"]), toys.net()
    model.layers[1].__class__ = net.layers[1].__class__ = Table
    optimizer = torch.optim.SGD(list(tunerkit.tuner(model).parameters()), lr=0.1)
    calls: dict[str, Callable[[], object]] = {
        "wrap": lambda: tunerkit.wrap(net, "toy-low-rank", TARGETS),
        "attach": lambda: tunerkit.attach(model, optimizer, total_steps=3),
        "save": lambda: tunerkit.save(model, tmp_path / "out"),
        "merge": lambda: tunerkit.merge(model),
    }
    with registered(answering("tunerkit_restrictions", [RESTRICTION])):
        for verb, call in calls.items():
            notes = refused(call, TargetError, f"cannot {verb} with my tables, found at 'layers.1': its tables would")
            assert notes == [f"because of tunerkit_restrictions of plugin 'answering' (in-process); {WAY_OUT}"]
    calls["merge"]()


def test_every_row_refuses_known_verbs_in_words() -> None:
    """A verb that nobody asks about would never be refused, and a row needs a way to be recognised and a way out."""
    for engine in (*hooks.gather_restrictions(), RESTRICTION):
        assert engine.refused
        assert set(engine.refused) <= set(VERBS)
        assert engine.classes or engine.marks
        assert all(40 < len(text) < 250 for text in engine.refused.values())


def test_a_base_quantised_by_torchao_needs_a_plugin(toys: "Toys") -> None:
    """Its layers look like linear ones and train, but their weights support neither samples nor an addition."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if importlib.util.find_spec("tunerkit_quant") is not None:
        pytest.skip("tunerkit-quant adapts it")
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    before = list(net.state_dict())
    refused(
        lambda: tunerkit.wrap(net, "toy-low-rank", {"targets": ["0"]}), TargetError, "torchao", "install tunerkit-quant"
    )
    assert list(net.state_dict()) == before


def test_recognising_engines_imports_none_of_them(toys: "Toys") -> None:
    """Classes are compared by name, so that core depends on no library of an engine."""
    loaded = set(sys.modules)
    tunerkit.merge(toys.trained(targets=TARGETS["targets"]))
    new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
    assert not new & {"peft", "torchao", "deepspeed", "bitsandbytes", "optimum"}
