"""The arguments of the tasks' trainers, read from the text of transformers and TRL: importing those takes seconds."""

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from tunerkit.errors import closest
from tunerkit_cli.recipes.recipe import TASKS

# The class of the arguments, and the files with its fields and those of the classes that it inherits from.
_USUAL: Final = ("TrainingArguments", "transformers/training_args.py")
_TRL: Final = ("trl/trainer/base_config.py", _USUAL[1])
_CLASSES: Final[Mapping[str, tuple[str, ...]]] = {
    "causal-lm": ("SFTConfig", "trl/trainer/sft_config.py", *_TRL),
    "preference": ("DPOConfig", "trl/trainer/dpo_config.py", *_TRL),
    "orpo": ("ORPOConfig", "trl/experimental/orpo/orpo_config.py", *_TRL),
    "kto": ("KTOConfig", "trl/trainer/kto_config.py", *_TRL),
    "reward": ("RewardConfig", "trl/trainer/reward_config.py", *_TRL),
    "grpo": ("GRPOConfig", "trl/trainer/grpo_config.py", *_TRL),
    "seq2seq": ("Seq2SeqTrainingArguments", "transformers/training_args_seq2seq.py", _USUAL[1]),
}

# What the command decides: where checkpoints go, and what the trainer must not do with them.
_OURS: Final[Mapping[str, str]] = {
    "output_dir": "set the recipe's `out` instead",
    "resume_from_checkpoint": "pass --resume instead",
    "overwrite_output_dir": "pass --overwrite instead",
    "disable_tqdm": "progress is shown by tunerkit instead",
    "do_train": "`tunerkit train` trains instead",
    "do_eval": "set eval_strategy instead",
    "do_predict": "call `tunerkit predict` instead",
    "debug": "leave it out: a loss that is not finite is reported anyway, and transformers' own search for it fails on "
    "masks",
    # A token in a recipe would stand in every file that is shared.
    "hub_token": "log in with `hf auth login`, which private models need too; upload the folder afterwards: "
    "hf upload NAME OUT",
}
_UPLOAD: Final = "upload the folder afterwards: hf upload NAME OUT"


def name_problem(name: str, task: str) -> str | None:
    """What is wrong with the name of an argument of a task's trainer, as a line of an error; None if nothing is."""
    if name in _OURS or name.startswith(("hub_", "push_to_hub")):
        return f"training.{name}: {_OURS.get(name, _UPLOAD)}"
    names, kind = argument_types(task), _CLASSES.get(task, _USUAL)[0]
    if name in names or not names:
        return None
    return f"training.{name}: {kind} has no argument of this name{closest(name, names)}"


def argument_types(task: str | None = None) -> dict[str, str]:
    """The arguments of a task's trainer, or of all, with their annotations; none of one whose package is missing."""
    return {name: kind for each in ([task] if task in TASKS else TASKS) for name, kind in _fields(str(each)).items()}


def text_alone(annotation: object) -> dict[str, Any]:
    """The JSON schema of a value with this annotation, as far as it says that texts are its only plain values."""
    words = {*re.findall(r"\w+", str(annotation))}
    return {"type": "string"} if words & {"str", "Literal", "Path"} and not words & {"bool", "int", "float"} else {}


@cache
def _fields(task: str) -> Mapping[str, str]:
    """The fields of the class, from the class itself if a release has moved one of the files."""
    found: dict[str, str] = {}
    for file in _CLASSES.get(task, _USUAL)[1:]:
        package, _, path = file.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None:
            return {}
        source = Path(str(spec.origin)).parent / path
        if not source.is_file():
            from tunerkit_cli.tasks import task_of

            return {each.name: str(each.type) for each in dataclasses.fields(task_of(task).trainer_classes()[1])}
        classes = [each for each in ast.parse(source.read_text("utf-8")).body if isinstance(each, ast.ClassDef)]
        fields = [field for each in classes if each.decorator_list for field in each.body]
        found |= {ast.unparse(f.target): ast.unparse(f.annotation) for f in fields if isinstance(f, ast.AnnAssign)}
    return found
