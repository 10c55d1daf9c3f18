"""The task grpo: a language model learns from the rewards of its own answers, which functions in files give."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Final

from tunerkit import TunerkitError
from tunerkit.errors import ConfigError, shown
from tunerkit.extras import install
from tunerkit.paths import few
from tunerkit_cli.tasks import EQUAL
from tunerkit_cli.tasks.base import Column, MissingPackageError, Row, Task
from tunerkit_cli.tasks.functions import Function, function_of, refuse_code, refuse_namesakes
from tunerkit_cli.tasks.generating import require_tokens
from tunerkit_cli.tasks.language import PROMPT, GenerationTask, prompt_of
from tunerkit_cli.tasks.texts import token_limit
from tunerkit_cli.tasks.turns import refuse_lost
from tunerkit_transformers.pretrained import Pretrained

_PATIENCE: Final = 600.0  # seconds that a training waits for an engine that is restarted


class RewardError(TunerkitError):
    """A reward function of a recipe fails, or returns what is no reward."""


class Grpo(GenerationTask):
    """Rows with ``prompt``, and with whatever else the reward functions read; TRL's `GRPOTrainer`."""

    trainer: ClassVar[tuple[str, str]] = ("trl.trainer.grpo_trainer:GRPOTrainer", "trl.trainer.grpo_config:GRPOConfig")
    columns: ClassVar[tuple[Column, ...]] = (PROMPT,)
    keeps_columns: ClassVar[bool] = True
    judges_loss: ClassVar[bool] = False
    drops_long_prompts: ClassVar[bool] = False
    main_metric: ClassVar[str] = "reward"
    measures: ClassVar[tuple[str, ...]] = ("loss", "reward", EQUAL, "answer_tokens")
    # As TRL has it for whole models, times ten for an adapter.
    defaults: ClassVar[Mapping[str, Any]] = {**GenerationTask.defaults, "learning_rate": 1e-5}

    def __init__(self, name: str, max_length: int | None = None) -> None:
        super().__init__(name, max_length)
        self.functions: Sequence[Function] = ()
        self.engine: str | None = None
        self.prefix = "tunerkit"  # of the names of the versions in the engine

    def room(self, arguments: Any, loaded: Pretrained) -> tuple[int, int]:
        """The same, with room for the longest answer. Raises `ConfigError` if that leaves no token for prompts."""
        limit, room = token_limit(loaded, self.limit), int(arguments.max_completion_length)
        if room >= limit:
            do = f"lower training.max_completion_length, which is {room}"
            raise ConfigError([f"max_length: {limit} tokens have no room for a prompt and its answer; {do}"])
        return limit, room

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """The rows as they are, with all their columns."""
        import datasets

        require_tokens(loaded, chat=isinstance(rows[0]["prompt"], list))
        refuse_lost([prompt_of(row) for row in rows], loaded)
        return datasets.Dataset.from_list([*rows], on_mixed_types="use_json")

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """The reward functions, and what draws the answers."""
        settings: dict[str, Any] = {"reward_funcs": [*self.functions]}
        if self.engine is not None:
            draw = _drawing(self.engine).load()
            settings["rollout_func"] = draw(loaded.model, self.engine, prefix=self.prefix, patience=_PATIENCE)
        return settings

    def metrics_of(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The mean reward of sampled answers, how many prompts' answers all have the same, and the loss."""
        tokens = {"answer_tokens": "completions/mean_length"}
        names = {"reward": "reward", EQUAL: "frac_reward_zero_std", **tokens, "loss": "loss"}
        return {ours: float(found[f"eval_{name}"]) for ours, name in names.items()}


def refuse_rewards(named: Sequence[str], task: Task | None, *, allow_code: bool) -> None:
    """Raise `TunerkitError` if a recipe's reward functions do not exist or may not run, or if the task takes none."""
    if task is not None and task.name != "grpo" and named:
        raise ConfigError([f"reward: is for grpo, and the task is {task.name}; leave the key out"])
    if task is not None and task.name == "grpo" and not named:
        raise ConfigError(["reward: grpo needs a function that scores answers: set reward: FILE.py:FUNCTION"])
    refuse_namesakes("reward", named)
    for each in named:
        refuse_code("reward", each, allowed=allow_code)
        function_of("reward", each)


def refuse_engine(engine: str | None, task: Task) -> None:
    """Raise `TunerkitError` if a recipe's engine is no address, or the task draws no answers."""
    if engine is None:
        return
    if task.name != "grpo":
        raise ConfigError([f"engine: is for grpo, and the task is {task.name}; leave the key out"])
    _drawing(engine)


def _drawing(engine: str) -> EntryPoint:
    """What draws answers by an engine, of the plugin for its address. Raises `TunerkitError` if there is none."""
    scheme, _, host = engine.partition("://")
    points = {point.name: point for point in entry_points(group="tunerkit.rollouts")}
    if not points:
        raise MissingPackageError(f"engine needs tunerkit-serving: {install('serving', 'peft')}")
    if scheme not in points or not host:
        known = ", ".join(sorted(points))
        raise ConfigError(
            [f"engine: expected an address such as http://localhost:8000, by {known}; got {shown(engine)}"]
        )
    return points[scheme]


def settle_engine_(task: Task, engine: str | None, out: str) -> None:
    """Give a task its engine, where versions are named after the run's folder. Raises `TunerkitError`."""
    refuse_engine(engine, task)
    if isinstance(task, Grpo):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(out).absolute().name).strip(".-_")
        task.engine, task.prefix = engine, name[:64] or task.prefix


def settle_rewards_(task: Task, named: Sequence[str], rows: Sequence[Row]) -> None:
    """Read the reward functions of a task, and try them on an answer to the first row. Raises `TunerkitError`."""
    refuse_rewards(named, task, allow_code=True)  # which was asked for before
    if not isinstance(task, Grpo):
        return
    from transformers import TrainerState

    task.functions = _checked([function_of("reward", each) for each in named])
    first = rows[0]
    answer: Any = [{"role": "assistant", "content": ""}] if isinstance(first["prompt"], list) else ""
    columns = {name: [value] for name, value in first.items() if name != "prompt"}
    given = {"completion_ids": [[0]], "trainer_state": TrainerState(), "log_extra": _ignore, "log_metric": _ignore}
    for function in task.functions:
        try:
            function(prompts=[first["prompt"]], completions=[answer], **columns, **given)
        except RewardError as problem:
            also = few([shown(name) for name in columns], shown=10) or "none"
            raise RewardError(
                f"{problem} (tried on an empty answer to the first row). It is called as TRL calls it, with prompts, "
                f"completions and the other columns ({also}), all as lists, and returns a number for each completion"
            ) from problem


def _ignore(*given: object, **named: object) -> None:
    """What a reward function logs while it is tried."""


def _checked(functions: Sequence[tuple[str, Function]]) -> list[Function]:
    """The functions, whose rewards are checked: finite numbers, or None from some of them where others score."""
    without: set[int] = set()  # answers that no function has scored so far

    def checking(number: int, name: str, function: Function) -> Callable[..., list[float | None]]:
        @wraps(function)
        def scored(**given: Any) -> list[float | None]:
            count = len(given["completions"])
            try:
                rewards = [None if each is None else float(each) for each in function(**given)]
            except (Exception, SystemExit) as problem:  # of code that is not ours
                raise RewardError(f"reward {name} failed: {type(problem).__name__}: {problem}") from problem
            if len(rewards) != count:
                raise RewardError(f"reward {name} returned {len(rewards)} rewards for {count} answers")
            for reward, answer in zip(rewards, given["completions"], strict=True):
                if reward is not None and not math.isfinite(reward):
                    raise RewardError(f"reward {name} returned {reward} for the answer {shown(answer)}")
            missing = {place for place, reward in enumerate(rewards) if reward is None}
            if number == 0:  # other answers
                without.clear()
                without.update(missing)
            without.intersection_update(missing)
            if number == len(functions) - 1 and without:
                answer = given["completions"][min(without)]
                raise RewardError(f"reward {name} returned None for the answer {shown(answer)}, and no other scores it")
            return rewards

        return scored

    return [checking(number, name, function) for number, (name, function) in enumerate(functions)]
