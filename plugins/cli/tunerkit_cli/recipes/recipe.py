"""A recipe: one training run, described by plain values."""

import os
from collections.abc import Callable
from typing import Any, Final

import attrs

from tunerkit.errors import ConfigError, shown

VERSION: Final = 1
DEFAULT_METHOD: Final = "adalora"
DTYPES: Final = ("float32", "bfloat16", "float16", "auto")
PRECISIONS: Final = ("fp32", "bf16", "fp16")
TASKS: Final = (
    "text-classification",
    "regression",
    "multi-label",
    "token-classification",
    "causal-lm",
    "preference",
    "seq2seq",
    "image-classification",
)
# The recipe's paths; a model or an adapter is one, or a name on the hub.
_PATHS: Final = ("data", "eval_data", "out", "model", "from_adapter")


def _key(kind: str, description: str, **limits: Any) -> dict[str, Any]:
    """Return the JSON schema of a key, which is the metadata of its field."""
    return {"type": kind, "description": description, **limits}


def _files(description: str) -> dict[str, Any]:
    """Return the JSON schema of a path, or a list of paths."""
    one = {"type": "string", "minLength": 1}
    return {**one, "type": ("string", "array"), "description": description, "items": one, "minItems": 1}


def _alone(paths: str | list[str] | None) -> str | list[str] | None:
    """A list of one path as that path, so that both mean the same run."""
    return paths[0] if isinstance(paths, list) and len(paths) == 1 else paths


@attrs.frozen
class Recipe:
    """A training run. Values are plain: text, numbers, booleans, None, lists and mappings with text as keys.

    Attributes:
        version: The form of the recipe; this tunerkit knows 1.
        task: One of `TASKS`, or None: it follows from the model and the data.
        model: A folder or a name on the hub, or None: the command's default.
        data: The path of the training data, or the paths of several files, or None: the command's default.
        eval_data: The same of the held-out data, or None: a part of ``data``.
        from_adapter: The adapter that the training goes on from: a file, a folder, or a name that a format's plugin
            knows; or None: it trains a new one.
        method: The method's name, or None: that of ``from_adapter``, or else `DEFAULT_METHOD`.
        config: The method's settings; `tunerkit.structure` checks them.
        training: Arguments of the trainer, which checks them when it is built.
        columns: For a column's name in tunerkit, such as ``"text"``, its name in the data.
        max_length: The greatest number of tokens of a text, or None: as the model allows.
        train_on_prompts: Whether a language model learns the tokens of prompts too; None: as the command decides.
        dtype: The dtype of the base's weights; ``"auto"`` is the checkpoint's.
        precision: What matrix products are computed in, one of `PRECISIONS`; or None: fp32 on a CPU, bf16 on an
            accelerator that has it.
        quantisation: How the base is quantised as it is loaded, or None: it is not.
        baseline: Whether the head alone is trained too, for comparison.
        on_collapse: What to do when a run is seen to collapse: ``"tell"``, or ``"restart"``.
        out: The path of the output folder.
        extra: The values of the further keys that plugins declare, by key.
    """

    version: int = attrs.field(
        default=VERSION, metadata=_key("integer", "The form of this file; others are refused.", enum=(VERSION,))
    )
    task: str | None = attrs.field(
        default=None,
        metadata=_key("string", "The task. Without it, the task is inferred from model and labels.", enum=TASKS),
    )
    model: str | None = attrs.field(
        default=None, metadata=_key("string", "The base model: a local folder, or a name on the hub.", minLength=1)
    )
    data: str | list[str] | None = attrs.field(
        default=None,
        converter=_alone,
        metadata=_files(
            "The path of the training data, or a list of paths: .csv, .tsv, .jsonl, .parquet, or folders of images."
        ),
    )
    eval_data: str | list[str] | None = attrs.field(
        default=None,
        converter=_alone,
        metadata=_files("The path of the held-out data, or a list of paths. Without it, a part of `data` is held out."),
    )
    from_adapter: str | None = attrs.field(
        default=None,
        metadata=_key(
            "string",
            "An adapter to go on training, of tunerkit's or of another program's, such as a PEFT folder. It keeps its "
            "method and settings.",
            minLength=1,
        ),
    )
    method: str | None = attrs.field(
        default=None,
        metadata=_key(
            "string",
            "The method. `tunerkit methods` lists the installed ones. Without it: that of from_adapter, or else "
            f"{DEFAULT_METHOD}.",
            minLength=1,
        ),
    )
    config: dict[str, Any] = attrs.field(
        factory=dict,
        metadata=_key("object", "The method's settings, which `tunerkit config` prints. A file goes with --config."),
    )
    training: dict[str, Any] = attrs.field(
        factory=dict, metadata=_key("object", "Arguments of the trainer, such as learning_rate and num_train_epochs.")
    )
    columns: dict[str, str] = attrs.field(
        factory=dict,
        metadata=_key(
            "object",
            "Columns with other names in the data, as in `text: sentence`.",
            additionalProperties={"type": "string", "minLength": 1},
        ),
    )
    max_length: int | None = attrs.field(
        default=None, metadata=_key("integer", "Longer texts are cut to this many tokens.", minimum=4)
    )
    train_on_prompts: bool | None = attrs.field(
        default=None,
        metadata=_key(
            "boolean",
            "Whether a language model learns the prompts too, and not only completions or the assistant's turns.",
        ),
    )
    dtype: str = attrs.field(
        default="float32",
        metadata=_key(
            "string",
            "The dtype of the base's weights; auto is the checkpoint's. Adapters have their own, adapter_dtype.",
            enum=DTYPES,
        ),
    )
    precision: str | None = attrs.field(
        default=None,
        metadata=_key(
            "string",
            "What matrix products are computed in. Without it: fp32 on a CPU, bf16 on an accelerator that has it. "
            "Weights keep their own dtype.",
            enum=PRECISIONS,
        ),
    )
    quantisation: str | None = attrs.field(
        default=None,
        metadata=_key(
            "string",
            "How the base is quantised as it is loaded: nf4 takes an eighth of fp32's memory, int8 a quarter. It needs "
            "bitsandbytes and tunerkit-quant.",
            enum=("nf4", "int8"),
        ),
    )
    baseline: bool = attrs.field(
        default=False, metadata=_key("boolean", "Whether to train the head alone too, for comparison.")
    )
    on_collapse: str = attrs.field(
        default="tell",
        metadata=_key(
            "string",
            "What to do when the loss is lost: tell, or restart from the last good checkpoint at half the rate.",
            enum=("tell", "restart"),
        ),
    )
    out: str = attrs.field(default="out", metadata=_key("string", "The path of the output folder.", minLength=1))
    extra: dict[str, Any] = attrs.field(factory=dict)


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as it stands in a file: without keys that are None, and with those of plugins beside core's."""
    values = attrs.asdict(recipe)
    extra = values.pop("extra")
    return {name: value for name, value in {**values, **extra}.items() if value is not None}


def with_precision(recipe: Recipe) -> Recipe:
    """Return the recipe with ``precision`` in place of the trainer's ``bf16`` and ``fp16``, which mean the same.

    Raises:
        ConfigError: Both are given, or both of the trainer's are true.
    """
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


def with_full_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with full paths, so that it means the same in every working folder."""
    paths = {name: getattr(recipe, name) for name in ("data", "eval_data", "out")}
    for name in ("model", "from_adapter"):
        path = getattr(recipe, name)
        if path is not None and _is_there(path):
            paths[name] = path  # the others are names on the hub
    return attrs.evolve(recipe, **_changed(paths, lambda path: os.path.abspath(os.path.expanduser(path))))


def with_home(recipe: Recipe) -> Recipe:
    """Return the recipe with the home folder for ``~``, which a shell leaves in a recipe and after ``=``."""
    paths = {name: getattr(recipe, name) for name in _PATHS}
    return attrs.evolve(recipe, **_changed(paths, os.path.expanduser))


def files_of(data: str | list[str] | None) -> list[str]:
    """The paths in a recipe's ``data`` or ``eval_data``; none without it."""
    return data if isinstance(data, list) else [] if data is None else [data]


def _changed(paths: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Paths, or lists of them, by key, each path changed; without the keys that are None."""
    return {
        name: [change(each) for each in path] if isinstance(path, list) else change(path)
        for name, path in paths.items()
        if path is not None
    }


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except ValueError:  # NUL
        return False
