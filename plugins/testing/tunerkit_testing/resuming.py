"""Stop or kill a Trainer and resume it in a new process: the result must be bit-identical to an uninterrupted run.

::

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_resumes(tmp_path, accumulation):
        run = resuming.Run("my-method", {"rank": 2}, tmp_path, accumulation=accumulation)
        resuming.check_stopped_after_every_step(run)
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import tunerkit
from tunerkit import injection
from tunerkit_testing.registering import registered

VOCABULARY = 61
_END = "end.pt"


class TokenRows(Dataset[dict[str, Tensor]]):
    """Six random tokens of `VOCABULARY` a row, with one of two random labels; the same at each construction.

    Args:
        count: the number of rows.
    """

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, VOCABULARY, (count, 6), generator=generator)
        self.labels = torch.randint(0, 2, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


@attrs.frozen
class Run:
    """A training run of a small BERT with dropout.

    Attributes:
        method: The method's name.
        config: The method's config as a mapping.
        folder: The folder for checkpoints and for the final state.
        steps: The total number of optimizer steps.
        accumulation: Micro-batches per optimizer step.
        save_steps: Optimizer steps between two checkpoints.
        stop_after: Stop after this step; None trains to the end.
        kill_at: Kill the process (SIGKILL) at the end of this step; None does not.
        resume: Resume from the last checkpoint in ``folder``.
        best: Evaluate at each checkpoint with a score that is highest at this step, and reload the best checkpoint at
            the end. None does not evaluate.
        plugins: Builds the plugins to register in each process, for methods that no installed one provides.
        calibrate: Whether to calibrate the adapter on the data before training begins.
    """

    method: str
    config: Mapping[str, object]
    folder: Path
    steps: int = 30
    accumulation: int = 1
    save_steps: int = 1
    stop_after: int | None = None
    kill_at: int | None = None
    resume: bool = False
    best: int | None = None
    plugins: tuple[Callable[[], object], ...] = ()
    calibrate: bool = False


def check_stopped_after_every_step(run: Run) -> None:
    """Train each step in a new process that resumes the previous one; the final state equals an uninterrupted run's.

    Args:
        run: The run. Its files go into two folders under ``run.folder``.

    Raises:
        AssertionError: A process failed, or the final states differ.
    """
    whole = attrs.evolve(run, folder=run.folder / "whole")
    assert in_fresh_process(whole) == 0
    for step in range(1, run.steps + 1):
        part = attrs.evolve(run, folder=run.folder / "parts", stop_after=step, resume=step > 1)
        assert in_fresh_process(part) == 0
    assert_same(end_of(whole.folder), end_of(run.folder / "parts"))


def check_killed(run: Run, at: tuple[int, ...]) -> None:
    """Kill the run several times and resume it; the final state equals an uninterrupted run's.

    Args:
        run: The run. Its files go into two folders under ``run.folder``.
        at: The steps at whose end the process is killed, in this order.

    Raises:
        AssertionError: A process ended unexpectedly, or the final states differ.
    """
    whole = attrs.evolve(run, folder=run.folder / "whole", save_steps=run.steps)
    assert in_fresh_process(whole) == 0
    parts = run.folder / "parts"
    for number, step in enumerate(at):
        assert in_fresh_process(attrs.evolve(run, folder=parts, kill_at=step, resume=number > 0)) == -signal.SIGKILL
        assert not (parts / _END).exists()
    assert in_fresh_process(attrs.evolve(run, folder=parts, resume=True)) == 0
    assert_same(end_of(whole.folder), end_of(parts))


def in_fresh_process(run: Run) -> int:
    """Train in a fork of a server process that has only imported the modules, and loaded the plugins.

    Args:
        run: The run.

    Returns:
        The exit code, negative if a signal ended the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tunerkit_testing.loaded"])
    process = context.Process(target=train, args=(run,))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def train(run: Run) -> None:
    """Start or resume training, then write the final state into ``run.folder``.

    Args:
        run: The run.
    """
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage, which would take longer than the training among all that is imported
    with registered(*(build() for build in run.plugins)):
        _train(run)


def _train(run: Run) -> None:
    model = tunerkit.wrap(_model(), run.method, run.config, seed=0)
    if run.calibrate and not run.resume:
        tunerkit.calibrate(model, _batches())
    interrupt = _Interrupt(run)
    trainer = Trainer(
        model,
        _arguments(run),
        train_dataset=TokenRows(24),
        eval_dataset=TokenRows(4),
        callbacks=[interrupt],
        compute_metrics=interrupt.score,
    )
    tunerkit.attach(model, trainer)
    trainer.train(resume_from_checkpoint=True if run.resume else None)
    tuner = tunerkit.tuner(model)
    state = injection.training_state(tuner)
    assert trainer.optimizer is not None
    end = {
        "model": model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "averages and masks": dict(state.tensors),
        "values": dict(state.values),
        "history": [(change.step, change.budget, dict(change.ranks)) for change in tuner.history],
        "steps": (tuner.steps, trainer.state.global_step),
        "storage": [p.untyped_storage().nbytes() for p in tuner.parameters()],
        "random state": torch.get_rng_state(),
    }
    torch.save(end, run.folder / _END)


def end_of(folder: Path) -> dict[str, Any]:
    """Read the final state that `train` wrote.

    Args:
        folder: The run's folder.
    """
    found: dict[str, Any] = torch.load(folder / _END)
    return found


def assert_same(one: object, other: object, where: str = "end") -> None:
    """Assert that two final states are equal, bit for bit and key for key.

    Args:
        one: A state, or a part of one.
        other: The state to compare with.
        where: The path of this part, for the message.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        assert one.keys() == other.keys(), f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, f"{where}: {one} and {other}"


class _Interrupt(TrainerCallback):
    """Stops or kills the training at the step that the run names, and scores each step for evaluation."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = 0

    def score(self, _: object) -> dict[str, float]:
        """Score the current step: 0 at the best step, lower the farther away."""
        return {"score": -abs(self.step - (self.run.best or 0))}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        if state.global_step == self.run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.run.stop_after:
            control.should_training_stop = True


def _batches() -> list[dict[str, Tensor]]:
    rows = TokenRows(8)
    return [{name: value[None] for name, value in rows[number].items()} for number in range(len(rows))]


def _model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
        )
    )


def _arguments(run: Run) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run.folder),
        max_steps=run.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=run.save_steps,
        save_total_limit=2,
        eval_strategy="no" if run.best is None else "steps",
        eval_steps=run.save_steps,
        load_best_model_at_end=run.best is not None,
        metric_for_best_model="score",
        greater_is_better=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
