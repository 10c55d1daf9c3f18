"""Which checkpoint a Trainer with adapters resumes from: a whole one, or none."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import tunerkit
from plugins.transformers.tests.two_trainers import resume_together
from tests.support import two_processes
from tests.support.trainer_toys import Regression, RegressionRows, arguments, attached_trainer

pytestmark = pytest.mark.usefixtures("toys")
# What a checkpoint of two adapters consists of. Nothing reads the arguments back.
FILES = (
    "a/adapter.safetensors", "a/state.safetensors", "b/adapter.safetensors", "b/state.safetensors", "optimizer.pt",
    "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
)  # fmt: skip


def weights(trainer: Trainer) -> list[Tensor]:
    assert isinstance(trainer.model, nn.Module)
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(one: Trainer, other: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toys: Any) -> tuple[Trainer, Path]:
    """A training of six steps, stopped after four: its end, and its folder with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = attached_trainer(folder)
    trainer.train()
    shutil.rmtree(folder / "checkpoint-6")
    return trainer, folder


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "run"))


def harm(path: Path, how: str) -> None:
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def is_needless(name: str, how: str) -> bool:
    """Whether training resumes exactly although this file was harmed: nothing reads it, or its adapter needs none."""
    return name == "training_args.bin" or (name == "b/state.safetensors" and how == "removed")


@pytest.mark.parametrize("how", ["removed", "cut"])
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_the_newest_checkpoint_is_lost_in_silence(
    name: str, how: str, whole: tuple[Trainer, Path], tmp_path: Path
) -> None:
    """Training goes on exactly: from this checkpoint, or from the one before with a warning that names the file."""
    end, kept = whole
    folder = copied(kept, tmp_path)
    harm(folder / "checkpoint-4" / name, how)
    trainer = attached_trainer(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=True)
    told = [str(w.message) for w in caught if issubclass(w.category, tunerkit.TunerkitWarning)]
    assert equal(trainer, end)
    if is_needless(name, how):
        assert told == []
    else:
        assert len(told) == 1
        assert "checkpoint-2, the newest complete checkpoint" in told[0]
        assert Path(name).name in told[0]


@pytest.mark.parametrize("how", ["removed", "cut"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_was_named_is_refused_if_it_is_not_whole(
    name: str, how: str, whole: tuple[Trainer, Path], tmp_path: Path
) -> None:
    """The error names the file, and nothing of the checkpoint is in the model."""
    end, kept = whole
    folder = copied(kept, tmp_path)
    harm(folder / "checkpoint-4" / name, how)
    trainer = attached_trainer(folder)
    before = weights(trainer)
    if is_needless(name, how):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert equal(trainer, end)
        return
    with pytest.raises(tunerkit.errors.FileError, match=rf"{Path(name).name}.*earlier checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))


STATES: dict[str, dict[str, Any]] = {
    "no fields": {},
    "no number of steps": {"global_step": None},
    "a step below 0": {"global_step": -1},
    "a text for a step": {"global_step": "4"},
    "a text for the epoch": {"epoch": "x"},
    "no log": {"log_history": {"loss": 1}},
    "a log of numbers": {"log_history": [1]},
    "a text for a loss": {"log_history": [{"step": 1, "loss": "x"}]},
    "an unknown field": {"golbal_step": 4},
    "a text for a batch": {"train_batch_size": "x"},
    "a text for an interval": {"save_steps": "x"},
    "nothing for an interval": {"logging_steps": None},
    "callbacks in a list": {"stateful_callbacks": 3},
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_no_trainer_wrote_is_damaged(what: str, whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    """It may be JSON: values of other types would end the training in an error that says nothing of the file."""
    folder = copied(whole[1], tmp_path)
    for number in (2, 4):
        file = folder / f"checkpoint-{number}" / "trainer_state.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps({**found, **STATES[what]} if STATES[what] else {}))
    trainer = attached_trainer(folder)
    for asked in (True, str(folder / "checkpoint-4")):
        with pytest.raises(tunerkit.errors.FileError, match=r"damaged trainer_state\.json"):
            trainer.train(resume_from_checkpoint=asked)


def test_a_checkpoint_of_more_processes_is_resumed_with_a_warning(whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    """Each process has written its own random state. The weights, the optimizer and its schedule are whole."""
    checkpoint = copied(whole[1], tmp_path) / "checkpoint-4"
    for process in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{process}.pth")
    (checkpoint / "rng_state.pth").unlink()
    trainer = attached_trainer(checkpoint.parent)
    with pytest.warns(tunerkit.TunerkitWarning, match="written by another number of processes"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("how", ["whole", "cut"])
def test_files_in_the_older_format_of_torch_are_read(how: str, whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    """It is no zip archive, so whether it is whole shows when it is read."""
    end, kept = whole
    checkpoint = copied(kept, tmp_path) / "checkpoint-4"
    file = checkpoint / "optimizer.pt"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    trainer = attached_trainer(checkpoint.parent)
    if how == "cut":
        harm(file, how)
        with pytest.raises(tunerkit.errors.FileError, match=r"damaged optimizer\.pt.*continue with the weights alone"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert equal(trainer, end)


def test_without_a_whole_checkpoint_the_error_names_what_is_wrong_with_each(
    whole: tuple[Trainer, Path], tmp_path: Path
) -> None:
    """Training from the start must be somebody's decision."""
    folder = copied(whole[1], tmp_path)
    harm(folder / "checkpoint-4" / "optimizer.pt", "cut")
    harm(folder / "checkpoint-2" / "a" / "adapter.safetensors", "removed")
    with pytest.raises(tunerkit.errors.FileError, match=r"none of the 2 checkpoints") as caught:
        attached_trainer(folder).train(resume_from_checkpoint=True)
    assert "has a damaged optimizer.pt" in str(caught.value)
    assert "has no adapter.safetensors for adapter 'a'" in str(caught.value)


def test_a_checkpoint_that_cannot_be_read_is_refused_by_name(
    whole: tuple[Trainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk is a problem of that checkpoint; a bare error of one process would leave the others waiting."""
    folder = copied(whole[1], tmp_path)
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == folder / "checkpoint-4" / "trainer_state.json":
            raise OSError(5, "input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.warns(tunerkit.TunerkitWarning, match=r"checkpoint-4 cannot be read: .*input/output error"):
        attached_trainer(folder).train(resume_from_checkpoint=True)
    with pytest.raises(tunerkit.errors.FileError, match=r"cannot be read: .*resume from an earlier"):
        attached_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_a_checkpoint_of_the_weights_alone_is_resumed_with_a_warning(tmp_path: Path) -> None:
    """With `save_only_model` no optimizer was kept on purpose; the end is another one, which is said."""

    def plain(folder: Path) -> Trainer:
        model = tunerkit.wrap(Regression(), "toy-shift", {"targets": ["first"]})
        trainer = Trainer(
            model, arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True),
            train_dataset=RegressionRows(),
        )  # fmt: skip
        tunerkit.attach(model, trainer)
        return trainer

    plain(tmp_path).train()
    with pytest.warns(tunerkit.TunerkitWarning, match="has the weights alone .save_only_model."):
        plain(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_processes_that_see_other_files_resume_from_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one process sees counts for both: they choose alike or raise the same error, and one of them warns.

    Each process reads the random state of its own. Training then ends exactly as without the interruption.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two_processes.spawn(resume_together, (str(tmp_path),))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    # The folders differ here, and so do their names in the errors.
    parts = [each["answers"].pop("optimizer of one process")[0] for each in (first, second)]
    assert all("has the weights alone" in each and "(seen by process 1 of 2)" in each for each in parts)
    for case, (answer, warned) in first["answers"].items():
        assert second["answers"][case] == (answer, []), case  # the same answer, and no second warning
        assert len(warned) == (1 if case in ("own state damaged", "folder of one process") else 0), case
    answers = {case: answer for case, (answer, _) in first["answers"].items()}
    assert answers["whole"] == answers["named"] == "checkpoint-4"
    assert answers["own state damaged"] == answers["folder of one process"] == "checkpoint-2"
    damage = r"has a damaged rng_state_1\.pth \(seen by process 1 of 2\)"
    assert re.search(damage, first["answers"]["own state damaged"][1][0])
    assert re.search(rf"^FileError: .*checkpoint-4 {damage}; resume from an earlier", answers["damaged and named"])
    assert "checkpoint-4 is not a folder (seen by process 1 of 2)" in first["answers"]["folder of one process"][1][0]
    assert "checkpoint-4 (seen by process 0 of 2); nothing (seen by process 1 of 2)" in answers["asked for by one"]
    assert answers["none"] is None
    assert all(torch.equal(a, b) for a, b in zip(first["end"], first["resumed"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second["end"], second["resumed"], strict=True))
