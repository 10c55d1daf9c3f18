"""Write recipes: a commented one to start from, and one as it was run."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Final

from tunerkit import TunerkitError
from tunerkit.errors import ConfigError, closest, shown
from tunerkit_cli.recipes.recipe import TASKS, Recipe, to_mapping
from tunerkit_cli.settings import write_settings
from tunerkit_cli.tasks import task_of


class RecipeFileError(TunerkitError):
    """A recipe cannot be written to its file."""


_ENCODER: Final = "distilbert/distilbert-base-uncased"
_CHAT: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"


_A_TEXT: Final = "text: a text, such as: Great film!"
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
    "preference": (
        _CHAT,
        "prompt: a text, such as: Name a colour.",
        "chosen: the better answer, such as: Blue.",
        "rejected: the worse answer, such as: No.",
    ),
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
}
_TEXT: Final = Template("""\
# A recipe for: tunerkit train
# Every key may be left out; `tunerkit schema` prints what each one may be.
version: 1
task: $task

# A local folder, or a name on the hub.
model: $model

# A .csv, .tsv, .json, .jsonl or .parquet file with the columns:
$columns
data: train.$ending
# Without eval_data, a part of the data is held out.
# eval_data: eval.$ending
# If your columns have other names:
# columns: {$first: the_name_in_your_data}
$length
# The dtype of the base's weights: bfloat16 takes half of the memory.
# dtype: bfloat16
# What matrix products are computed in. Default: fp32 on a CPU, bf16 on an accelerator.
# precision: bf16
# Quantising the base saves more; this needs bitsandbytes and tunerkit-quant.
# quantisation: nf4

# The method, and its settings. `tunerkit config lora` prints all of them.
method: lora
config: {}
# config: {rank: 16}
# Instead of both, an adapter to go on training, such as a PEFT folder:
# from_adapter: path/to/adapter

# Arguments of the trainer.
training:
  num_train_epochs: $epochs
  learning_rate: $learning_rate
  per_device_train_batch_size: $batch_size
  seed: 0
  # warmup_steps: 0.1  # below 1, a share of all steps
  # gradient_accumulation_steps: 4

# Whether to train the head alone too, for comparison.
baseline: false

# If the training diverges: warn, or restart from the last good checkpoint at half the rate.
on_collapse: warn

# The folder for the adapter, the metrics and the report.
out: out
""")


def starter(task: str) -> str:
    """Return a commented recipe in YAML to start from. Raises `ConfigError` for an unknown task."""
    if task not in _STARTS:
        raise ConfigError([f"no task {shown(task)}{closest(task, TASKS) or '; the tasks are ' + ', '.join(TASKS)}"])
    model, *columns = _STARTS[task]
    kind = task_of(task)
    length = f"\n# Longer texts are cut to this many tokens.\nmax_length: {kind.max_length}\n"
    return _TEXT.substitute(
        task=task,
        model=model,
        columns="\n".join(f"#   {column}" for column in columns),
        first=columns[0].partition(":")[0],
        ending="jsonl" if any("[" in column for column in columns) else "csv",
        length="" if columns[0].startswith("image") else length,
        epochs=kind.defaults["num_train_epochs"],
        learning_rate=f"{kind.defaults['learning_rate']:g}",
        batch_size=kind.defaults["per_device_train_batch_size"],
    )


def write_starter(task: str, path: Path) -> None:
    """Write the recipe to start from into a new file.

    Raises `ConfigError` if there is no such task, and `RecipeFileError` if the file exists, cannot be written, or has
    an ending that no commented recipe has.
    """
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


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML, which `read_recipe` reads back to an equal one."""
    return write_settings(to_mapping(recipe))
