"""Which checkpoint a Trainer with adapters resumes from: a whole one, or none."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit

pytest.importorskip("transformers", reason="the Trainer is transformers'")
pytest.importorskip("accelerate", reason="the Trainer needs it")
from transformers import Trainer

from tunerkit.testing.trainer_toys import Regression, RegressionRows, arguments

pytestmark = pytest.mark.usefixtures("toys")
# What a checkpoint of two adapters consists of. Nothing reads the arguments back.
FILES = (
    "a/adapter.safetensors", "a/state.safetensors", "b/adapter.safetensors", "b/state.safetensors", "optimizer.pt",
    "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
)  # fmt: skip


def trainer_of(folder: Path, **options: Any) -> Trainer:
    """A trainer of a model with two adapters, of which one needs steps."""
    model: nn.Module = Regression()
    for name, method in (("a", "toy-stepper"), ("b", "toy-shift")):
        model = tunerkit.wrap(model, method, {"targets": ["first", "second"]}, adapter=name)
    defaults: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}
    trainer = Trainer(model, arguments(folder, **(defaults | options)), train_dataset=RegressionRows())
    tunerkit.attach(model, trainer)
    return trainer


def weights(trainer: Trainer) -> list[Tensor]:
    assert isinstance(trainer.model, nn.Module)
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(one: Trainer, other: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toys: Any) -> tuple[Trainer, Path]:
    """A training of six steps, stopped after four: its end, and its folder with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder)
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
    trainer = trainer_of(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=True)
    told = [str(w.message) for w in caught if issubclass(w.category, tunerkit.TunerkitWarning)]
    assert equal(trainer, end)
    if is_needless(name, how):
        assert told == []
    else:
        assert len(told) == 1
        assert "checkpoint-2, the newest whole checkpoint" in told[0]
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
    trainer = trainer_of(folder)
    before = weights(trainer)
    if is_needless(name, how):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert equal(trainer, end)
        return
    with pytest.raises(tunerkit.FileError, match=rf"{Path(name).name}.*earlier checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))


def test_a_checkpoint_of_more_processes_is_resumed_with_a_warning(whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    """Each process has written its own random state. The weights, the optimizer and its schedule are whole."""
    checkpoint = copied(whole[1], tmp_path) / "checkpoint-4"
    for process in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{process}.pth")
    (checkpoint / "rng_state.pth").unlink()
    trainer = trainer_of(checkpoint.parent)
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
    trainer = trainer_of(checkpoint.parent)
    if how == "cut":
        harm(file, how)
        with pytest.raises(tunerkit.FileError, match=r"damaged optimizer\.pt.*go on with the weights alone"):
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
    with pytest.raises(tunerkit.FileError, match=r"none of the 2 checkpoints") as caught:
        trainer_of(folder).train(resume_from_checkpoint=True)
    assert "has a damaged optimizer.pt" in str(caught.value)
    assert "has no adapter.safetensors for adapter 'a'" in str(caught.value)


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
