"""What transformers knows of its models, in errors."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

import tunerkit
from tunerkit.errors import BaseMismatchError
from tunerkit_transformers.plugin import may_be_known
from tunerkit_transformers.transformers_private import LOADED

if TYPE_CHECKING:
    from tests.support.toys import Toys


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_of_another_size_names_num_labels(toys: "Toys", tmp_path: Path, trained: bool) -> None:
    """Whether the head is trained in full or frozen: the error says what to pass to from_pretrained."""

    def base(labels: int) -> Any:
        model = toys.net()
        model.config = SimpleNamespace(num_labels=labels, model_type="toy")
        model.head[2] = nn.Linear(6, labels)
        for parameter in model.head[2].parameters():
            parameter.data.fill_(0.5)
        return model

    config = {"targets": ["conv"], "train_modules": ["head.2"] if trained else []}
    path = tunerkit.save(tunerkit.wrap(base(5), "toy-shift", config), tmp_path)
    words = "built for 2 labels, the adapter needs 5: pass num_labels=5 to from_pretrained"
    with pytest.raises(BaseMismatchError, match=words):
        tunerkit.load(base(2), path)
    assert tunerkit.load(base(5), path) is not None


@pytest.mark.parametrize("name", ["config", "get_output_embeddings", "get_classifier", "pretrained_cfg"])
def test_a_model_is_looked_into_if_one_of_its_modules_has_a_librarys_attribute(name: str) -> None:
    """A plain model is not, since all that is known of others is found by these attributes."""
    inner = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(inner))
    assert not may_be_known(model)
    setattr(inner, name, object())
    assert may_be_known(model)


def test_a_parameter_that_from_pretrained_read_is_enough() -> None:
    """A head may be put on a layer that was taken out of a model of transformers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    setattr(model[0].weight, LOADED, True)
    assert may_be_known(model)
