"""The commented recipes to start from, as texts and in new files."""

from collections.abc import Mapping
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


_A_TEXT: Final = "text: a text, such as: Great film!"
_PAIRED: Final = (
    _CHAT,
    "prompt: a text, such as: Name a colour.",
    "chosen: the better answer, such as: Blue.",
    "rejected: the worse answer, such as: No.",
)
# For each task, the base model to start from, and the columns of the data with an example of each.
_STARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "text-classification": (_ENCODER, _A_TEXT, "label: the name of its class, such as: positive"),
    "regression": (_ENCODER, _A_TEXT, "label: a number, such as: 4.5"),
    "multi-label": (
        _ENCODER,
        _A_TEXT,
        "labels: the list of its labels, which may be empty, such as: [funny, short]",
    ),
    "token-classification": (
        _ENCODER,
        "tokens: the list of the words, such as: [Ada, lives, in, London]",
        "tags: the list of their tags, one for each word, such as: [B-PER, O, O, B-LOC]",
    ),
    "causal-lm": (
        _CHAT,
        "text: a text to learn; or",
        "prompt and completion: two texts, of which the completion is learned; or",
        "messages: a chat, such as: [{role: user, content: Hi}, {role: assistant, content: Hello!}]",
    ),
    "preference": _PAIRED,
    "orpo": _PAIRED,
    "kto": (
        _CHAT,
        "prompt: a text, such as: Name a colour.",
        "completion: an answer, such as: Blue.",
        "label: whether it is a good one, such as: true",
    ),
    "reward": _PAIRED,
    "seq2seq": (
        "google-t5/t5-small",
        "source: the text to read, such as: Guten Tag",
        "target: the text to write, such as: Good day",
    ),
    "image-classification": (
        "google/vit-base-patch16-224-in21k",
        "image: the path of an image file, such as: images/1.png",
        "label: the name of its class, such as: cat",
    ),
    "embedding": (
        "sentence-transformers/all-MiniLM-L6-v2",
        "anchor: a text, such as: How do I reset my password?",
        "positive: a text that belongs to it, such as: Open the settings, and choose a new password.",
        "negative: a text that does not, such as: Passwords have eight characters or more.",
    ),
}
# For each key that a first run may leave out, a value other than its default.
_EXAMPLES: Final[Mapping[str, str]] = {
    **{"eval_data": "eval.$ending", "from_adapter": "path/to/adapter", "columns": "{$first: the_name_in_your_data}"},
    **{"label_map": "{'1': sport}", "drop_bad_rows": "true", "chat_template": "template.jinja"},
    **{"train_on_prompts": "true", "dtype": "bfloat16", "precision": "bf16", "quantisation": "nf4", "samples": "4"},
    **{"attn_implementation": "sdpa", "early_stopping_patience": "3", "class_weights": "balanced"},
    **{"loss": "trl", "memory": "8", "baseline": "true", "on_collapse": "restart"},
    **{"metric": "[chrf, rouge_l]", "metric_rows": "500"},
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
    model, *columns = _STARTS[task]
    kind, first = task_of(task), columns[0].partition(":")[0]
    ending = "jsonl" if any("[" in column for column in columns) else "csv"
    given = {"version": VERSION, "task": task, "model": model, "data": f"train.{ending}", "method": DEFAULT_METHOD}
    given |= {"config": "{}", "training": _TRAINING.format(**kind.defaults), "out": "out"}
    given |= {} if first == "image" else {"max_length": kind.max_length}
    left_out = set() if kind.label_column else {"label_map", "class_weights"}
    left_out |= set() if task in LANGUAGE else _OF_LANGUAGE
    left_out |= set() if task in GENERATED else {"metric", "metric_rows"}
    lines = ["# A recipe for: tunerkit train", "# Every key may be left out."]
    for name, schema in class_schema(Recipe)["properties"].items():
        if name in left_out or not (name in given or name in _EXAMPLES):
            continue
        lines += ["", *wrap(schema["description"], 98, initial_indent="# ", subsequent_indent="# ")]
        if name == "data":
            lines += ["# Its columns:", *(f"#   {column}" for column in columns)]
        example = Template(_EXAMPLES.get(name, "")).substitute(ending=ending, first=first)
        lines.append(f"{name}: {given[name]}" if name in given else f"# {name}: {example}")
    return "\n".join([*lines, ""])


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
