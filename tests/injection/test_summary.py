"""The number of trained parameters, compared with the model's own shapes."""

from torch import nn

import tunerkit
from tests.support.toys import Toys
from tunerkit.plugin import Summary


def test_what_is_trained_is_counted(toys: "Toys") -> None:
    """Trained parameters by adapter, the model's total, and the share as text."""
    base = sum(p.numel() for p in toys.net().parameters())
    model = tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["layers.1"], "rank": 3}, adapter="one")
    tunerkit.wrap(
        model, "toy-shift", {"targets": ["layers.0"], "bias": "adapters", "train_modules": ["head.2"]}, adapter="two"
    )
    one, two = 3 * (8 + 8), 8 + 8 + (6 * 3 + 3)
    found = tunerkit.trainable_parameters(model)
    assert found == Summary(trainable=one + two, total=base + one + two, adapters={"one": one, "two": two})
    share = 100 * (one + two) / (base + one + two)
    assert str(found) == f"{one + two} of {base + one + two} parameters are trained ({share:.2f} %)"


def test_a_loaded_adapter_is_not_trained(toys: "Toys", tmp_path: object) -> None:
    """Frozen parameters count only for the total."""
    model = tunerkit.load(toys.net(), tunerkit.save(toys.trained(), str(tmp_path)))
    found = tunerkit.trainable_parameters(model)
    assert (found.trainable, found.adapters) == (0, {"default": 0})
    assert found.total == sum(p.numel() for p in model.parameters())


def test_plain_and_empty_models_are_counted_too(toys: "Toys") -> None:
    """A model without adapters is trained as a whole; a model without parameters does not divide by zero."""
    total = sum(p.numel() for p in toys.net().parameters())
    assert tunerkit.trainable_parameters(toys.net()) == Summary(trainable=total, total=total, adapters={})
    assert str(tunerkit.trainable_parameters(nn.Identity())) == "0 of 0 parameters are trained (0.00 %)"
    assert str(Summary(trainable=1_234, total=1_234_000, adapters={})).startswith("1,234 of 1,234,000 ")
