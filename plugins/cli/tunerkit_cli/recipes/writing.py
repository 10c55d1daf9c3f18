"""The commented recipes to start from, as texts and in new files."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Template
from textwrap import wrap
from typing import Final

from tunerkit import TunerkitError
from tunerkit.errors import ConfigError, closest, shown
from tunerkit_cli.recipes.recipe import DEFAULT_METHOD, TASKS, VERSION, Recipe
from tunerkit_cli.recipes.schema import class_schema
from tunerkit_cli.tasks import GENERATED, LANGUAGE, task_of


class RecipeFileError(TunerkitError):
    """A recipe cannot be written to its file."""


_ENCODER: Final = "distilbert/distilbert-base-uncased"
_CHAT: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"


_TEXTS: Final = {"text": ("a text", "Great film!")}
_PROMPT: Final = {"prompt": ("a text", "Name a colour.")}
_PAIRED: Final = {**_PROMPT, "chosen": ("the better answer", "Blue."), "rejected": ("the worse answer", "No.")}
_CHAT_ROW: Final = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
# For each task, the base model to start from, and the forms of its rows: each column in words, and an example.
_STARTS: Final[Mapping[str, tuple[str, *tuple[Mapping[str, tuple[str, object]], ...]]]] = {
    "text-classification": (_ENCODER, {**_TEXTS, "label": ("the name of its class", "positive")}),
    "regression": (_ENCODER, {**_TEXTS, "label": ("a number", 4.5)}),
    "multi-label": (_ENCODER, {**_TEXTS, "labels": ("the list of its labels, which may be empty", ["funny", "short"])}),
    "token-classification": (
        _ENCODER,
        {
            "tokens": ("the list of the words", ["Ada", "lives", "in", "London"]),
            "tags": ("the list of their tags, one for each word", ["B-PER", "O", "O", "B-LOC"]),
        },
    ),
    "causal-lm": (
        _CHAT,
        {"text": ("a text to learn", "The days are getting longer.")},
        {**_PROMPT, "completion": ("a text, which alone is learned", "Blue.")},
        {"messages": ("a chat, of which the assistant's turns are learned", _CHAT_ROW)},
    ),
    "preference": (_CHAT, _PAIRED),
    "orpo": (_CHAT, _PAIRED),
    "kto": (_CHAT, {**_PROMPT, "completion": ("an answer", "Blue."), "label": ("whether it is a good one", True)}),
    "reward": (_CHAT, _PAIRED),
    "grpo": (
        _CHAT,
        {"prompt": ("a text", "What is 3 + 4?"), "solution": ("for the reward, as any other column", "7")},
    ),
    "seq2seq": (
        "google-t5/t5-small",
        {"source": ("the text to read", "Guten Tag"), "target": ("the text to write", "Good day")},
    ),
    "image-classification": (
        "google/vit-base-patch16-224-in21k",
        {"image": ("the path of an image file", "images/1.png"), "label": ("the name of its class", "cat")},
    ),
    "embedding": (
        "sentence-transformers/all-MiniLM-L6-v2",
        {
            "anchor": ("a text", "How do I reset my password?"),
            "positive": ("a text that belongs to it", "Open the settings, and choose a new password."),
            "negative": ("a text that does not", "Passwords have eight characters or more."),
        },
    ),
}
# For each key that a first run may leave out, a value other than its default.
_EXAMPLES: Final[Mapping[str, str]] = {
    **{"eval_data": "eval.$ending", "from_adapter": "path/to/adapter", "columns": "{$first: the_name_in_your_data}"},
    **{"label_map": "{'1': sport}", "drop_bad_rows": "true", "chat_template": "template.jinja"},
    **{"train_on_prompts": "true", "dtype": "bfloat16", "precision": "bf16", "quantisation": "nf4", "samples": "4"},
    **{"attn_implementation": "sdpa", "early_stopping_patience": "3", "class_weights": "balanced"},
    **{"loss": "trl", "memory": "8", "baseline": "true", "on_collapse": "restart"},
    **{"reward": "rewards.py:score", "metric": "[chrf, rouge_l]", "metric_rows": "500"},
    **{"engine": "http://localhost:8000"},
}
_OF_LANGUAGE: Final = {"chat_template", "train_on_prompts", "samples", "loss", "memory"}  # language models' keys
_TRAINING: Final = """ # among others:
  num_train_epochs: {num_train_epochs}
  learning_rate: {learning_rate:g}
  per_device_train_batch_size: {per_device_train_batch_size}
  seed: 0
  # warmup_steps: 0.1  # below 1, a share of all steps
  # gradient_accumulation_steps: 4"""


def starter(task: str) -> str:
    """Return a commented recipe in YAML to start from. Raises `ConfigError` for an unknown task."""
    if task not in _STARTS:
        raise ConfigError([f"no task {shown(task)}{closest(task, TASKS) or '; the tasks are ' + ', '.join(TASKS)}"])
    model, *forms = _STARTS[task]
    kind, first = task_of(task), next(iter(forms[0]))
    ending = "jsonl" if any(isinstance(value, list) for form in forms for _, value in form.values()) else "csv"
    given = {"version": VERSION, "task": task, "model": model, "data": f"train.{ending}", "method": DEFAULT_METHOD}
    given |= {"config": "{}", "training": _TRAINING.format(**kind.defaults), "out": "out"}
    given |= {"reward": _EXAMPLES["reward"]} if task == "grpo" else {}
    given |= {} if first == "image" else {"max_length": kind.max_length}
    left_out = set() if kind.label_column else {"label_map", "class_weights"}
    left_out |= set() if task in LANGUAGE else _OF_LANGUAGE
    left_out |= set() if task == "grpo" else {"reward", "engine"}
    left_out |= set() if task in GENERATED else {"metric", "metric_rows"}
    lines = ["# A recipe for: tunerkit train", "# Every key may be left out."]
    for name, schema in class_schema(Recipe)["properties"].items():
        if name in left_out or not (name in given or name in _EXAMPLES):
            continue
        lines += ["", *wrap(schema["description"], 98, initial_indent="# ", subsequent_indent="# ")]
        if name == "data":
            lines += ["# Its columns:", *_columns(forms)]
        example = Template(_EXAMPLES.get(name, "")).substitute(ending=ending, first=first)
        lines.append(f"{name}: {given[name]}" if name in given else f"# {name}: {example}")
    return "\n".join([*lines, ""])


def _columns(forms: Iterable[Mapping[str, tuple[str, object]]]) -> Iterator[str]:
    for number, form in enumerate(forms):
        yield from ["# or:"] * bool(number)
        for name, (what, value) in form.items():
            said = f"{name}: {what}, such as: {value if isinstance(value, str) else json.dumps(value)}"
            yield from wrap(said, 98, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False)


def example_rows(task: str) -> list[dict[str, object]]:
    """Return a row of each form that a task's data may have, as a JSON file has it."""
    return [{name: value for name, (_, value) in form.items()} for form in _STARTS[task][1:]]


def write_starter(task: str, path: Path) -> None:
    """Write the recipe to start from into a new YAML file. Raises `ConfigError` or `RecipeFileError`."""
    text = starter(task)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise RecipeFileError(f"--out {path}: a commented recipe is YAML; choose a name that ends in .yaml")
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeFileError(f"--out {path}: the file exists already; remove it, or choose another name") from None
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise RecipeFileError(f"--out {path}: cannot be written: {reason}; choose another folder") from problem
