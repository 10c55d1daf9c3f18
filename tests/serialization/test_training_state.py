"""The file of a training state, and states of another run."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import tunerkit
from tests.support.adapter_files import LONG, assert_refused, rewritten, wrong
from tests.support.model_checks import attached, fit, silent
from tests.support.toys import Toys
from tunerkit import injection
from tunerkit.errors import AdapterError, FileError, TunerkitWarning
from tunerkit.plugin import State

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")


def test_training_state_goes_into_a_separate_file(toys: "Toys", tmp_path: Path) -> None:
    """save_state and load_state restore the method's tensors and values, and the step count."""
    model = toys.trained("toy-shift", targets=["conv"])
    fit(model, attached(model, total_steps=9), toys.x(), 3)
    path = tunerkit.save_state(model, tmp_path)
    assert path == tmp_path / "state.safetensors"
    other = toys.trained("toy-shift", targets=["conv"])
    attached(other, total_steps=9)
    tunerkit.load_state(other, tmp_path)
    seen, steps = cast(tuple[torch.Tensor, int], tunerkit.tuner(other).state)
    assert (int(seen), steps, tunerkit.tuner(other).steps) == (3, 3, 3)


def test_a_missing_state_file_is_named(toys: "Toys", saved: Path) -> None:
    """A saved adapter may have no state file: the error says what writes one."""
    with pytest.raises(FileError, match=r"state\.safetensors; tunerkit\.save_state writes state\.safetensors into"):
        tunerkit.load_state(toys.trained(), saved.parent)


@pytest.mark.parametrize("setting", ["exclude", "bias", "targets"])
def test_a_setting_that_the_file_s_version_did_not_have_had_its_default(
    toys: "Toys", tmp_path: Path, setting: str
) -> None:
    """A list too, which a config holds as a tuple. Another value than the default is of another run."""
    model = toys.trained("toy-shift", targets=["conv"])
    path = tunerkit.save_state(model, tmp_path)
    older = rewritten(path, tmp_path / "older.safetensors", lambda fields, _: fields["config"].pop(setting))
    with pytest.raises(FileError, match="targets None -> ") if setting == "targets" else nullcontext():
        tunerkit.load_state(model, older)


def test_the_state_of_another_run_is_refused(toys: "Toys", tmp_path: Path, saved: Path) -> None:
    """Another method, other targets, another length if the method's schedule depends on it, or an adapter file."""
    path = tunerkit.save_state(toys.trained("toy-shift", targets=["conv"]), tmp_path)
    for other in (toys.trained("toy-shift", targets=["layers.0"]), toys.trained("toy-low-rank", targets=["conv"])):
        with pytest.raises(FileError, match="another run"):
            tunerkit.load_state(other, path)
    planned = toys.trained("toy-stepper", targets=["conv"])
    attached(planned, total_steps=9)
    longer = toys.trained("toy-stepper", targets=["conv"])
    attached(longer, total_steps=12)
    with pytest.raises(FileError, match="total_steps 9 -> 12"):
        tunerkit.load_state(longer, tunerkit.save_state(planned, tmp_path / "planned"))
    with pytest.raises(FileError, match="is a file of kind 'adapter': pass the file of kind 'state'"):
        tunerkit.load_state(toys.trained(), saved)
    assert_refused(toys, path, FileError, "is a file of kind 'state': pass the file of kind 'adapter'")


def test_an_adapter_that_was_never_attached_has_no_state_to_save(toys: "Toys", tmp_path: Path) -> None:
    """Its file would lack every part that the method needs, and the loss would be found when training resumes."""
    model = tunerkit.wrap(toys.net(), "toy-stepper", {"targets": ["conv"]})
    with pytest.raises(AdapterError, match=r"was never attached.*call tunerkit\.attach"):
        tunerkit.save_state(model, tmp_path)
    assert not list(tmp_path.iterdir())
    tunerkit.save_state(tunerkit.wrap(toys.net(), "toy-shift", {"targets": ["conv"]}), tmp_path)


def test_a_training_state_that_is_not_finite_is_neither_saved_nor_loaded(
    toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors and its JSON values: an older file stays, and what is in the model stays."""
    model = toys.trained("toy-shift", targets=["conv"])
    path = tunerkit.save_state(model, tmp_path)
    older = path.read_bytes()
    wrong = State(tensors={"seen": torch.tensor([torch.nan])}, values={"steps": 0})
    for state, error, words in (
        (wrong, AdapterError, r"NaN or inf in 1 of 1 tensors: seen"),
        (State(tensors={}, values={"best": float("inf")}), FileError, "cannot hold NaN, inf"),
    ):
        monkeypatch.setattr(injection, "training_state", lambda tuner, state=state: state)
        with pytest.raises(error, match=words):
            tunerkit.save_state(model, tmp_path)
        assert path.read_bytes() == older

    def spoil(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["seen"] = torch.tensor([torch.inf])

    with pytest.raises(FileError, match="NaN or inf in 1 of 1 tensors: seen"):
        tunerkit.load_state(model, rewritten(path, tmp_path / "x.safetensors", spoil))
    assert tunerkit.tuner(model).state is None


def test_a_state_of_another_run_is_refused_shortly(toys: "Toys", tmp_path: Path) -> None:
    """Settings of any length are cut."""
    path = tunerkit.save_state(toys.trained("toy-shift", targets=["conv"]), tmp_path)
    other = rewritten(path, tmp_path / "x.safetensors", cast(Any, wrong(config={"targets": LONG, LONG: 1})))
    with pytest.raises(FileError, match="another run") as caught:
        tunerkit.load_state(toys.trained("toy-shift", targets=["conv"]), other)
    assert len(str(caught.value)) < 25_000


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_a_state_without_its_weights_is_told(toys: "Toys", method: str, tmp_path: Path) -> None:
    """The adapter is new, and the schedule would go on as if it were trained."""
    config = {"targets": ["layers.0"]}
    model = tunerkit.wrap(toys.net(), method, config)
    fit(model, attached(model), toys.x(), 2)
    tunerkit.save(model, tmp_path)
    tunerkit.save_state(model, tmp_path)
    forgotten = tunerkit.wrap(toys.net(), method, config)
    attached(forgotten)
    with pytest.warns(TunerkitWarning, match="at step 2, but the matrices of adapter 'default' are untrained") as told:
        tunerkit.load_state(forgotten, tmp_path)
    assert told[0].filename == __file__
    loaded = tunerkit.load(toys.net(), tmp_path, trainable=True)
    attached(loaded)
    with silent(Warning):
        tunerkit.load_state(loaded, tmp_path)


def test_saving_over_the_only_state_of_another_adapter_is_told(toys: "Toys", tmp_path: Path) -> None:
    """The first adapter's state would be gone; one that was saved elsewhere too is not."""
    model = tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["layers.1"]})
    tunerkit.wrap(model, "toy-shift", {"targets": ["layers.0"]}, adapter="b")
    attached(model)
    tunerkit.save(model, tmp_path, adapter="default")  # another file, which does not count
    tunerkit.save_state(model, tmp_path, adapter="default")
    with pytest.warns(TunerkitWarning, match="overwritten the training state .*'default'.*save 'default' ag") as told:
        tunerkit.save_state(model, tmp_path, adapter="b")
    assert told[0].filename == __file__
    tunerkit.save_state(model, tmp_path / "default", adapter="default")
    tunerkit.save_state(model, tmp_path / "b", adapter="b")
    with silent(Warning):
        tunerkit.save_state(model, tmp_path / "b", adapter="b")
