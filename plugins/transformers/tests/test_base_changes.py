"""Under a Trainer: the warning that parameters of the base are trained too."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import transformers

import tunerkit
from tests.support.trainer_toys import Regression, RegressionRows, arguments
from tunerkit import TunerkitWarning

if TYPE_CHECKING:
    from tests.support.toys import Toys


@pytest.mark.parametrize("thawed", ["before attach", "before train"])
def test_a_trainer_says_it_once_in_a_run(toys: "Toys", thawed: str, tmp_path: Path) -> None:
    """At attach, or at the start of training if parameters are thawed in between; no checkpoint repeats it."""
    model: Any = tunerkit.wrap(Regression(), "toy-low-rank", {"targets": ["first"]})
    options = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    trainer = transformers.Trainer(model, options, train_dataset=RegressionRows())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if thawed == "before attach":
            model.second.requires_grad_(True)
        tunerkit.attach(model, trainer)
        model.second.requires_grad_(True)
        before = len(caught)
        trainer.train()
    texts = [str(each.message) for each in caught if each.category is TunerkitWarning]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    assert before == (thawed == "before attach")
    assert [text.startswith("parameters of the base require gradients: second.weight") for text in texts] == [True]
