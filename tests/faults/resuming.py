"""The row about resuming a Trainer: stops, kills in mid-checkpoint, and checkpoints with damaged or missing files."""

import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

import tunerkit
from tests.faults.harness import Fault, cases, named
from tests.faults.isolation import fork, in_fork
from tests.faults.subjects import Subject, Tunerkit

STEPS = 8
_END = "end.pt"


def resume(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Interrupt a training or damage its newest checkpoint, and resume: the end is the same, or there is an error."""
    runs = {kind: Run(subject, kind, folder / kind, start) for start, kind in enumerate(_kinds(subject))}
    for run in runs.values():
        run.prepare()
    kinds = tuple(runs)
    for number, _, chance in cases("resume", subject, count):
        kind = kinds[number % len(kinds)]
        label, attack = runs[kind].attack(number // len(kinds), chance)
        place = folder / f"case-{number}"
        yield Fault(f"{number}: {kind}, {label}", attack(place))
        shutil.rmtree(place, ignore_errors=True)


def _kinds(subject: Subject) -> tuple[str, ...]:
    if not isinstance(subject, Tunerkit):
        return subject.kinds
    return ("toy-stepper", *(kind for kind in subject.kinds if not kind.startswith("toy")))


class Run:
    """A training of a few steps with dropout that writes a checkpoint after every second step."""

    def __init__(self, subject: Subject, kind: str, folder: Path, start: int) -> None:
        self.subject, self.kind, self.folder, self.start = subject, kind, folder, start

    def prepare(self) -> None:
        """Train without an interruption, keep the checkpoints up to step 6, and count the calls of a checkpoint."""
        # In this process: what is imported at the first training would cost each fork seconds.
        self._train(self.folder / "whole", resume=False)
        self.end: Any = torch.load(self.folder / "whole" / _END)
        self._ended(in_fork(lambda: self._train(self.folder / "until-6", resume=False, stop=6)))
        newest = self.folder / "until-6" / "checkpoint-6"
        self.files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
        child = fork(lambda pipe: self._train(self.folder / "count", resume=False, stop=6, watch=_Counter(pipe)))
        self.calls = int(next(child.outcomes()))
        child.wait()

    def _ended(self, outcome: str) -> None:
        if outcome:
            raise AssertionError(f"a training that nothing interrupts failed: {outcome}")

    def attack(self, number: int, chance: random.Random) -> tuple[str, Callable[[Path], str]]:
        """Return what is done in case ``number``, and the function that does it in a folder and judges the end."""
        ways = [(name, way) for way in ("removed", "cut", "empty") for name in self.files]
        if number % 3 == 1:
            step = chance.randrange(1, STEPS)
            return f"stopped after step {step}", lambda place: self._stopped(place, step)
        if number % 3 == 2:
            at = chance.randrange(1, self.calls + 1)
            return f"killed at call {at} of {self.calls} of a checkpoint", lambda place: self._killed(place, at)
        # Each kind starts at another file, so that few cases touch most of them.
        name, way = ways[(number // 3 + 3 * self.start) % len(ways)]
        return f"{name} {way}", lambda place: self._damaged(place, name, way)

    def _stopped(self, place: Path, step: int) -> str:
        self._ended(in_fork(lambda: self._train(place, resume=False, stop=step)))
        return self._resumed(place)

    def _killed(self, place: Path, at: int) -> str:
        fork(lambda _: self._train(place, resume=False, stop=6, watch=_Killer(at))).wait()
        return self._resumed(place)

    def _damaged(self, place: Path, name: str, way: str) -> str:
        shutil.copytree(self.folder / "until-6", place)
        path = place / "checkpoint-6" / name
        data = path.read_bytes()
        path.unlink() if way == "removed" else path.write_bytes(data[: len(data) // 2] if way == "cut" else b"")
        return self._resumed(place)

    def _resumed(self, place: Path) -> str:
        """Resume, and compare with the end of the training that nothing interrupted."""
        (place / _END).unlink(missing_ok=True)
        again = any(place.glob("checkpoint-*")) if place.is_dir() else False
        outcome = in_fork(lambda: self._resume_and_judge(place, again))
        if outcome or not (place / _END).exists():
            return outcome
        return _difference(torch.load(place / _END), self.end)

    def _resume_and_judge(self, place: Path, again: bool) -> str:
        try:
            return self._train(place, resume=again)
        except Exception as error:
            wrong = self.subject.wrong_error(error)
            return f"{wrong} ({named(error)})" if wrong else ""

    def _train(self, place: Path, *, resume: bool, stop: int | None = None, watch: Any = None) -> str:
        trainer, model = self._trainer(place, stop)
        if watch is not None:
            trainer._save_checkpoint = watch.around(trainer._save_checkpoint)
        trainer.train(resume_from_checkpoint=True if resume else None)
        assert trainer.optimizer is not None
        state = trainer.optimizer.state_dict()["state"]
        found = {
            "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "optimizer": [state[key] for key in sorted(state)],
            "step": trainer.state.global_step,
        }
        torch.save(found, place / _END)
        return ""

    def _trainer(self, place: Path, stop: int | None) -> tuple[Any, nn.Module]:
        from transformers import PrinterCallback, Trainer, TrainerCallback

        from tunerkit_testing.trainer_toys import Regression, RegressionRows, arguments

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = control.should_training_stop or state.global_step == stop

        class Noisy(Regression):
            """Dropout: its random numbers are part of what a checkpoint has to restore."""

            def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
                found: dict[str, Tensor] = super().forward(nn.functional.dropout(x, 0.3, self.training), labels)
                return found

        model = self._wrapped(Noisy())
        chosen = arguments(
            place, max_steps=STEPS, learning_rate=0.05, save_strategy="steps", save_steps=2, remove_unused_columns=False
        )
        trainer = Trainer(model, chosen, train_dataset=RegressionRows(), callbacks=[Stop()])
        trainer.remove_callback(PrinterCallback)
        if isinstance(self.subject, Tunerkit):
            tunerkit.attach(model, trainer)
        return trainer, model

    def _wrapped(self, base: nn.Module) -> nn.Module:
        if isinstance(self.subject, Tunerkit):
            config = {**self.subject.config(self.kind), "targets": ["first", "second"]}
            if self.kind == "adalora":
                config |= {"target_rank": 1, "init_rank": 2, "t_init": 2, "t_final": 2, "delta_t": 2}
            return tunerkit.wrap(base, self.kind, config, seed=0)
        import peft

        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["first", "second"]))


class _Watch:
    """Watches the calls, of Python's and of C's functions, while the third checkpoint is written."""

    def __init__(self) -> None:
        self.checkpoints, self.calls = 0, 0

    def around(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.checkpoints += 1
            if self.checkpoints != 3:
                return save(*arguments, **options)
            sys.setprofile(self.note)
            try:
                return save(*arguments, **options)
            finally:
                sys.setprofile(None)
                self.done()

        return watched

    def note(self, *_: object) -> None:
        self.calls += 1

    def done(self) -> None:
        """Called when the checkpoint is complete."""


class _Counter(_Watch):
    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__()
        self.pipe = pipe

    def done(self) -> None:
        pickle.dump(str(self.calls), self.pipe)
        self.pipe.flush()


class _Killer(_Watch):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def note(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _difference(found: Any, expected: Any) -> str:
    """Return what differs between two ends of training, or an empty text."""
    if found["step"] != expected["step"]:
        return f"training ended at step {found['step']}, not at {expected['step']}, without an error"
    for what in ("model", "optimizer"):
        if not _same(found[what], expected[what]):
            return f"training ended with another {what}, without an error"
    return ""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
