"""LoRA in compiled models."""

import pytest

pytest.importorskip("transformers", reason="most of the models are transformers'")
from tests.support import compiling

STEPS = 4


@compiling.each_model
def test_a_wrapped_model_trains_in_one_graph_compiled_once(name: str, backend: str) -> None:
    """No graph break in forward or backward; one compilation each for training and eval mode; outputs equal eager's."""
    training = compiling.check_trains_in_one_graph(name, "lora", {"rank": 3}, backend=backend, steps=STEPS)
    assert training.compilations == [1] * STEPS + [2]


@pytest.mark.parametrize(("name", "backend"), [("bert", "eager"), ("tiny", "inductor")])
def test_adapters_take_part_in_a_model_compiled_before(name: str, backend: str) -> None:
    """Code compiled before wrapping is not reused after it, even if the base was frozen already."""
    compiling.check_adapts_what_was_compiled(name, "lora", {"rank": 3}, backend=backend, steps=STEPS)
