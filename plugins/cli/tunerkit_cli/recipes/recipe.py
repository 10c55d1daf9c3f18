"""A recipe: one training run, described by plain values."""

# ruff: noqa: RUF009 (what defines a key returns an attrs field, which is no shared default)

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs

from tunerkit.errors import ConfigError, shown
from tunerkit_cli import tasks
from tunerkit_transformers.run_folder import placed, stated

VERSION: Final = 1
DEFAULT_METHOD: Final = "lora"
ADALORA: Final = "adalora"  # the method of the demo, and of a run whose recipe is from before LoRA was the default
DTYPES: Final = ("float32", "bfloat16", "float16", "auto")
PRECISIONS: Final = ("fp32", "bf16", "fp16")
ATTENTION: Final = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
TASKS: Final = tuple(tasks.TASKS)


def _key(default: Any, doc: str, *, converter: Callable[[Any], Any] | None = None, **limits: Any) -> Any:
    """Define a key of recipes, with limits as in `class_schema`: 1 is the least length of texts and lists."""
    metadata = {"doc": doc, "min_items": 1, **({} if "enum" in limits else {"min_length": 1}), **limits}
    default = attrs.Factory(dict) if default == {} else default
    return attrs.field(default=default, converter=converter, metadata=metadata)


@attrs.frozen
class Source:
    """Where rows are from. With ``name``, ``split`` or ``revision`` it is a data set of the hub, whatever its path."""

    path: str = _key(attrs.NOTHING, "A file, a folder of images, or the name of a data set on the hub (org/name).")
    name: str | None = _key(None, "The config of a data set of the hub that has several.")
    split: str | None = _key(None, "The split of a data set of the hub, such as test or train[:99]. Without it: train.")
    revision: str | None = _key(None, "A branch, a tag or a commit of a data set of the hub. Without it: the newest.")
    rows: int | None = _key(None, "How many of the first rows are read, as a stream.", ge=1, le=2**31 - 1)
    weight: float | None = _key(None, "The share of rows, relative to the other weights.", gt=0, le=2**31 - 1)


_Sources = str | Source | list[str | Source] | None


def _read_sources(given: Any) -> Any:
    """Sources that are written as mappings; a list of one means the same as that one."""
    if isinstance(given, list):
        return _read_sources(given[0]) if len(given) == 1 else [*map(_read_sources, given)]
    return Source(**given) if isinstance(given, dict) else given


# The keys that name files and folders.
DATA: Final = ("data", "eval_data")
PATHS: Final = (*DATA, "out", "model", "from_adapter", "chat_template", "metric", "reward")


@attrs.frozen
class Recipe:
    """A training run. Values are plain: text, numbers, booleans, None, lists and mappings with text as keys."""

    version: int = _key(VERSION, "The form of this file; others are refused.", enum=(VERSION,))
    task: str | None = _key(None, "The task. Without it, the task is inferred from model and labels.", enum=TASKS)
    model: str | None = _key(None, "The base model: a local folder, or a name on the hub.")
    data: _Sources = _key(
        None,
        "The training data: a .csv, .tsv, .json, .jsonl or .parquet file, a folder of images, or a data set of the hub "
        "(org/name); a mapping such as `{path: org/name, split: train}`, with `rows: 1000` for a stream; or a list of "
        "these.",
        converter=_read_sources,
    )
    eval_data: _Sources = _key(
        None, "The held-out data, as in `data`. Without it, a part of `data` is held out.", converter=_read_sources
    )
    from_adapter: str | None = _key(
        None,
        "An adapter to go on training, of tunerkit's or of another program's, such as a PEFT folder. It keeps its "
        "method and settings.",
    )
    method: str | None = _key(
        None,
        "The method. `tunerkit methods` lists the installed ones. Without it: that of from_adapter, or else "
        f"{DEFAULT_METHOD}; without data, {ADALORA}.",
    )
    config: dict[str, Any] = _key(
        {}, "The method's settings, which `tunerkit config` prints. A file goes with --config."
    )
    training: dict[str, Any] = _key({}, "Arguments of the trainer, such as learning_rate and num_train_epochs.")
    columns: dict[str, str] = _key({}, "Columns with other names in the data, as in `text: sentence`.")
    label_map: dict[str, str] = _key(
        {}, "Other names for labels, as in `'1': sport`. Labels that it does not name stay."
    )
    class_weights: str | list[float] | dict[str, float] | None = _key(
        None,
        "How much each class counts in a classifier's loss: balanced; a list, in the order of the classes; or as in "
        "`{spam: 3}`, 1 for the others.",
        ge=0,
    )
    drop_bad_rows: bool = _key(False, "Whether rows that do not fit are left out, and listed in the output folder.")
    chat_template: str | None = _key(
        None, "The path of a file with a chat template (Jinja), in place of the tokenizer's own."
    )
    max_length: int | None = _key(None, "Longer texts are cut to this many tokens.", ge=4, le=2**31 - 1)
    train_on_prompts: bool | None = _key(
        None, "Whether a language model learns the prompts too, and not only completions or the assistant's turns."
    )
    dtype: str = _key(
        "float32",
        "The dtype of the base's weights; auto is the checkpoint's. Adapters have their own, adapter_dtype.",
        enum=DTYPES,
    )
    precision: str | None = _key(
        None,
        "What matrix products are computed in. Without it: fp32 on a CPU, bf16 on an accelerator that has it. "
        "Weights keep their own dtype.",
        enum=PRECISIONS,
    )
    quantisation: str | None = _key(
        None,
        "How the base is quantised as it is loaded: nf4 takes an eighth of fp32's memory, int8 a quarter. It needs "
        "bitsandbytes and tunerkit-quant.",
        enum=("nf4", "int8"),
    )
    attn_implementation: str | None = _key(
        None, "How attention is computed while training. Without it, transformers chooses.", enum=ATTENTION
    )
    samples: int | None = _key(
        None,
        "How many held-out prompts a language model answers after its training, in a few words each. Without it: 2.",
        ge=0,
    )
    loss: str | None = _key(
        None,
        "What a loss computes: learned, logits at the learned positions alone, or for classifiers of texts from the "
        "first token; or trl, all that the trainer does. Without it: learned, for language models on a CPU.",
        enum=("learned", "trl"),
    )
    memory: float | None = _key(
        None,
        "How many GiB a language model's training may take: activations that do not fit are recomputed. "
        "Without it: what is free.",
        ge=0,
    )
    early_stopping_patience: int | None = _key(
        None,
        "Stop after this many evaluations without a better loss, or metric_for_best_model, and keep the best "
        "checkpoint. A run is then evaluated after each epoch, or as `training` says.",
        ge=1,
    )
    metric: str | list[str] | None = _key(
        None,
        "What is measured on held-out rows beside the task's own metrics: of generated texts exact_match, rouge_l or "
        "chrf, or a function, `FILE.py:FUNCTION`, with --allow-code; or a list of these.",
        converter=lambda given: [given] if isinstance(given, str) else given,
    )
    reward: str | list[str] | None = _key(
        None,
        "What scores the answers of the task grpo, with --allow-code: a function, `FILE.py:FUNCTION`, or a list of "
        "these, whose rewards are added.",
        converter=lambda given: [given] if isinstance(given, str) else given,
    )
    engine: str | None = _key(
        None,
        "The address of a running vLLM, or of an SGLang after sglang+, that draws the answers of the task grpo, such "
        "as http://localhost:8000. Without it: the trainer draws them.",
    )
    metric_rows: int | None = _key(
        None, "How many held-out rows `metric` is measured on. Without it: 100 of a language model's, else all.", ge=1
    )
    baseline: bool = _key(False, "Whether to fit the head alone too, for comparison.")
    on_collapse: str = _key(
        "warn",
        "What to do when the training diverges: warn, or restart from the last good checkpoint at half the rate.",
        enum=("warn", "restart"),
    )
    out: str = _key("out", "The path of the output folder.")
    extra: dict[str, Any] = attrs.field(factory=dict)  # by the keys that plugins declare


def default_method(*, has_data: bool) -> str:
    """The method of a recipe that names none: without data it is the demo, which shows what AdaLoRA does with ranks."""
    return DEFAULT_METHOD if has_data else ADALORA


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as it stands in a file: without keys that are None, and with those of plugins beside core's."""
    values = attrs.asdict(recipe, filter=lambda field, value: value is not None)
    extra = values.pop("extra")
    return {name: value for name, value in {**values, **extra}.items() if value is not None}


def with_precision(recipe: Recipe) -> Recipe:
    """Put ``precision`` in place of the trainer's ``bf16`` and ``fp16``. Raises `ConfigError` if two are given."""
    given = {name: recipe.training[name] for name in ("bf16", "fp16") if name in recipe.training}
    if wrong := [name for name, value in given.items() if value not in (True, False)]:
        raise ConfigError([f"training.{wrong[0]}: expected true or false, got {shown(given[wrong[0]])}"])
    if not given:
        return recipe
    named = " and ".join(f"training.{name}" for name in given)
    if recipe.precision is not None:
        raise ConfigError([f"precision: {recipe.precision} was given, and {named} too; leave {named} out"])
    if all(given.get(name) for name in ("bf16", "fp16")):
        raise ConfigError([f"{named}: both are true; write precision: bf16 or precision: fp16 instead"])
    training = {name: value for name, value in recipe.training.items() if name not in given}
    return attrs.evolve(recipe, training=training, precision=next((name for name in given if given[name]), "fp32"))


def as_stated(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with full paths, in the form that the files of its run in ``folder`` have, see `stated`."""
    return _with_paths(recipe, lambda name, path: stated(_full(name, path), folder))


def as_placed(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe that a run in ``folder`` has written, with full paths again."""
    return _with_paths(recipe, lambda _, path: placed(path, folder))


def with_home(recipe: Recipe) -> Recipe:
    """Return the recipe with the home folder for ``~``, which a shell leaves in a recipe and after ``=``."""
    return _with_paths(recipe, lambda _, path: os.path.expanduser(path))


def _full(name: str, path: str) -> str:
    full = os.path.abspath(os.path.expanduser(path))
    is_name = name in ("model", "from_adapter") and not os.path.exists(full)
    return path if is_name or (name == "metric" and ":" not in path) else full


def with_full_paths(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's mapping with full paths of what exists, so that it means the same from another folder."""

    def full(path: Any) -> Any:
        if not isinstance(path, str):
            return path
        file, colon, function = path.partition(":") if path.rpartition(":")[0].endswith(".py") else (path, "", "")
        found = os.path.abspath(os.path.expanduser(file))
        return f"{found}{colon}{function}" if os.path.exists(found) else path

    return {**mapping, **{name: with_paths(mapping[name], full) for name in PATHS if mapping.get(name) is not None}}


def sources_in(data: Any) -> list[Source]:
    """The sources in a recipe's ``data`` or ``eval_data``, or in a mapping's; none without it."""
    several = data if isinstance(data, list) else [] if data is None else [data]
    return [Source(each) if isinstance(each, str) else _read_sources(each) for each in several]


def files_of(data: Any) -> list[str]:
    """The paths in a recipe's ``data`` or ``eval_data``, or in a mapping's; none without it."""
    return [each.path for each in sources_in(data)]


def with_paths(given: Any, change: Callable[[str], str]) -> Any:
    """Return a key's value with each path in it changed; a data set of the hub at a revision stays."""
    match given:
        case list():
            return [with_paths(each, change) for each in given]
        case dict():
            return {**given, "path": with_paths(given.get("path"), change)}
        case Source(revision=None):
            return attrs.evolve(given, path=change(given.path))
        case str():
            return change(given)
    return given


def _with_paths(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """Return the recipe with each path changed, by its key, those in lists too."""
    changed: Any = {name: with_paths(getattr(recipe, name), partial(change, name)) for name in PATHS}
    return attrs.evolve(recipe, **changed)
