"""A Trainer's checkpoints with adapters, with toy methods: what is written where, and what is loaded."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import tunerkit
from tests.support.trainer_toys import Regression, RegressionRows, TokenRows, arguments
from tunerkit_testing.transformers_cases import bert

if TYPE_CHECKING:
    from tests.support.toys import Toys


class Tokenizer:
    """An object that is saved with a model."""

    def save_pretrained(self, folder: str | Path) -> None:
        (Path(folder) / "tokenizer.txt").write_text("words")


def wrapped(*names: str, method: str = "toy-shift") -> nn.Module:
    model: nn.Module = Regression()
    for name in names or ("default",):
        model = tunerkit.wrap(model, method, {"targets": ["first", "second"]}, adapter=name)
    return model


def trainer_of(model: nn.Module, folder: Path, *, attach: bool = True, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}
    chosen = arguments(folder, **(defaults | options))
    trainer = Trainer(model, chosen, train_dataset=RegressionRows())
    if attach:
        tunerkit.attach(model, trainer)
    return trainer


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.usefixtures("toys")
def test_a_checkpoint_has_the_adapter_s_files_and_what_belongs_to_a_model(tmp_path: Path) -> None:
    """The processor and the arguments are written as usual, but the model itself is not."""
    trainer = trainer_of(wrapped(), tmp_path)
    trainer.processing_class = Tokenizer()  # type: ignore[assignment]  # the Trainer only calls save_pretrained
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"adapter.safetensors", "state.safetensors", "tokenizer.txt", "training_args.bin"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)


@pytest.mark.usefixtures("toys")
def test_several_adapters_lie_in_folders_by_their_names(tmp_path: Path) -> None:
    """Names that a file system can't store, or can't distinguish, get a digest; all adapters are restored."""
    names = ("a", "A", "x" * 64, "naïve name: *?")
    model = wrapped(*names)
    trainer_of(model, tmp_path).train()
    folders = sorted(path for path in (tmp_path / "checkpoint-6").iterdir() if path.is_dir())
    assert len(folders) == len(names)
    assert tmp_path / "checkpoint-6" / "a" in folders
    assert all({p.name for p in folder.iterdir()} == {"adapter.safetensors", "state.safetensors"} for folder in folders)
    again = wrapped(*names)
    trainer_of(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(model), strict=True))
    assert tunerkit.tuner(again, "A").steps == 6


@pytest.mark.usefixtures("toys")
def test_a_checkpoint_holds_active_adapters_that_are_not_attached(tmp_path: Path) -> None:
    """Without a frozen one, what is loaded would be another model; an inactive one is not needed."""
    model = wrapped("trained", "frozen", "idle")
    tunerkit.activate(model, ["trained", "frozen"])
    tunerkit.freeze(model, "frozen")
    trainer = trainer_of(model, tmp_path, attach=False, max_steps=2, save_steps=1)
    tunerkit.attach(model, trainer, adapter="trained")
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert sorted(path.parent.name for path in checkpoint.glob("*/adapter.safetensors")) == ["frozen", "trained"]
    assert not (checkpoint / "adapter.safetensors").exists()
    ended = weights(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(map(torch.equal, weights(model), ended))


def test_adapters_attached_one_after_the_other_share_the_trainer(tmp_path: Path) -> None:
    """The second attach adds to the first; an adapter that was not named is not driven."""
    model = wrapped("a", "b", "c")
    trainer = trainer_of(model, tmp_path, attach=False)
    tunerkit.attach(model, trainer, adapter="a")
    tunerkit.attach(model, trainer, adapter="b", total_steps=6)
    with pytest.raises(tunerkit.errors.StepError, match="attached to this trainer already"):
        tunerkit.attach(model, trainer, adapter="a")
    with pytest.raises(tunerkit.errors.StepError, match="total_steps=6, now with 7"):
        tunerkit.attach(model, trainer, adapter="c", total_steps=7)
    trainer.train()
    assert [tunerkit.tuner(model, name).steps for name in "abc"] == [6, 6, 0]


@pytest.mark.usefixtures("toys")
def test_a_whole_model_s_checkpoint_is_still_loaded_by_the_trainer(tmp_path: Path) -> None:
    """If it was written before the trainer was attached, the trainer's own loading is used, and training continues."""
    model = wrapped()
    trainer_of(model, tmp_path, attach=False).train()
    again = wrapped()
    trainer_of(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(model), strict=True))


@pytest.mark.usefixtures("toys")
def test_a_method_without_steps_resumes_without_a_state_and_for_longer(tmp_path: Path) -> None:
    """It has no state to lose; a method that needs steps raises an error that names the missing file."""
    trainer_of(wrapped(), tmp_path / "plain", save_only_model=True).train()
    checkpoint = tmp_path / "plain" / "checkpoint-4"
    longer = wrapped()
    trainer_of(longer, tmp_path / "plain", max_steps=9).train(resume_from_checkpoint=str(checkpoint))
    assert tunerkit.tuner(longer).steps == 9
    trainer_of(wrapped(method="toy-stepper"), tmp_path / "stepper", save_only_model=True).train()
    with pytest.raises(tunerkit.errors.FileError, match=r"no state\.safetensors.*save_only_model"):
        trainer_of(wrapped(method="toy-stepper"), tmp_path / "stepper").train(
            resume_from_checkpoint=str(tmp_path / "stepper" / "checkpoint-4")
        )


@pytest.mark.usefixtures("toys")
def test_a_damaged_adapter_changes_nothing_when_resumed(tmp_path: Path) -> None:
    """Everything is read and checked before anything is changed."""
    trainer_of(wrapped(), tmp_path).train()
    checkpoint = tmp_path / "checkpoint-4"
    data = bytearray((checkpoint / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "adapter.safetensors").write_bytes(data)
    model = wrapped()
    before = weights(model)
    with pytest.raises(tunerkit.errors.FileError, match="damaged"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.usefixtures("toys")
def test_a_checkpoint_that_is_overwritten_is_incomplete_until_its_end(tmp_path: Path) -> None:
    """An earlier run's marker file would otherwise make a mixture of two runs look complete."""
    trainer_of(wrapped(), tmp_path).train()
    again = trainer_of(wrapped(), tmp_path)

    def interrupted(output_dir: str) -> None:
        raise KeyboardInterrupt

    again._save_optimizer_and_scheduler = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        again.train()
    with pytest.raises(tunerkit.errors.FileError, match="not complete"):
        trainer_of(wrapped(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.usefixtures("toys")
def test_adapters_may_leave_the_model_at_any_time(tmp_path: Path) -> None:
    """If one is deleted during training, the others continue, with saves and logs. After unwrap, a model is saved."""
    model = wrapped("a", "b")

    class Delete(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                tunerkit.delete(model, "b")

    trainer = trainer_of(model, tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.add_callback(Delete())
    trainer.train()
    assert tunerkit.tuner(model).steps == 6
    assert (tmp_path / "checkpoint-2" / "b" / "adapter.safetensors").is_file()
    loaded = tunerkit.load(Regression(), tmp_path / "checkpoint-6")
    pairs = zip(tunerkit.tuner(loaded).parameters(), tunerkit.tuner(model).parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    tunerkit.unwrap(model, keep_merged=True)
    trainer.save_model(str(tmp_path / "whole"))
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert "model.safetensors" in names
    assert "adapter.safetensors" not in names


@pytest.mark.usefixtures("toys")
def test_bypassed_methods_of_a_subclass_trigger_a_warning(tmp_path: Path) -> None:
    """A trainer with its own way of saving weights would not notice that its method is no longer called."""

    class Own(Trainer):
        def _save(self, *args: Any, **kwargs: Any) -> None:
            super()._save(*args, **kwargs)

    model = wrapped()
    trainer = Own(model, arguments(tmp_path), train_dataset=RegressionRows())
    with pytest.warns(tunerkit.TunerkitWarning, match=r"Own overrides methods that read or write weights \(_save\)"):
        tunerkit.attach(model, trainer)


@pytest.mark.usefixtures("toys")
def test_a_trainer_that_rebuilds_its_model_is_refused(tmp_path: Path) -> None:
    """With `model_init`, the trained model is not the one with the attached adapters."""
    chosen = arguments(tmp_path, max_steps=2)
    trainer = Trainer(args=chosen, train_dataset=RegressionRows(), model_init=lambda: wrapped())  # type: ignore[arg-type, return-value]
    assert isinstance(trainer.model, nn.Module)
    tunerkit.attach(trainer.model, trainer)
    with pytest.raises(tunerkit.errors.StepError, match="model_init"):
        trainer.train()


def test_training_without_step_hooks_triggers_a_warning(toys: "Toys", tmp_path: Path) -> None:
    """If the optimizer's step hooks never fire, the adapter is untrained: the end of training warns about it."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path, save_strategy="no", optim="sgd")
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    trainer.optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    with pytest.warns(tunerkit.TunerkitWarning, match="took part in none"):
        trainer.train()
    assert tunerkit.tuner(model).steps == 0


@pytest.mark.usefixtures("toys")
def test_a_checkpoint_is_a_folder_that_load_reads(tmp_path: Path) -> None:
    """The Trainer's folder is an adapter folder: no conversion is needed."""
    model = wrapped()
    trainer_of(model, tmp_path).train()
    loaded = tunerkit.load(Regression(), tmp_path / "checkpoint-6")
    rows = RegressionRows()[0]
    assert torch.equal(
        loaded(rows["x"][None], rows["labels"])["logits"], model(rows["x"][None], rows["labels"])["logits"]
    )


@pytest.mark.usefixtures("toys")
def test_a_trainer_that_was_not_attached_says_once_that_it_writes_whole_models(tmp_path: Path) -> None:
    """A method without steps trains all the same; the first checkpoint says that attach makes it hold the adapter."""
    model = tunerkit.wrap(bert(), "toy-low-rank", {"targets": ["query"]})
    chosen = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = Trainer(model, chosen, train_dataset=TokenRows(8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        trainer.train()
    told = [str(w.message) for w in caught if issubclass(w.category, tunerkit.TunerkitWarning)]
    assert len(told) == 1
    assert "tunerkit.attach(model, trainer) makes each checkpoint hold the adapters" in told[0]
