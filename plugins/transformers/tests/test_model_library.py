"""What transformers knows of its models, in errors."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

import tunerkit
from tunerkit.errors import BaseMismatchError

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
