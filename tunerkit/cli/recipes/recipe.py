"""A recipe: one training run, described by plain values."""

import os
from typing import Any, Final

import attrs

VERSION: Final = 1
DEFAULT_METHOD: Final = "adalora"
DTYPES: Final = ("float32", "bfloat16", "float16", "auto")
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


@attrs.frozen
class Recipe:
    """A training run. Values are plain: text, numbers, booleans, None, lists and mappings with text as keys.

    Attributes:
        version: The form of the recipe; this tunerkit knows 1.
        task: One of `TASKS`, or None: it follows from the model and the data.
        model: A folder or a name on the hub, or None: the command's default.
        data: The path of the training data, or None: the command's default.
        eval_data: The path of the held-out data, or None: a part of ``data``.
        from_adapter: The adapter that the training goes on from: a file, a folder, or a name that a format's plugin
            knows; or None: it trains a new one.
        method: The method's name, or None: that of ``from_adapter``, or else `DEFAULT_METHOD`.
        config: The method's settings; `tunerkit.structure` checks them.
        training: Arguments of the trainer, which checks them when it is built.
        columns: For a column's name in tunerkit, such as ``"text"``, its name in the data.
        max_length: The greatest number of tokens of a text, or None: as the model allows.
        dtype: The dtype of the base's weights; ``"auto"`` is the checkpoint's.
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
    data: str | None = attrs.field(
        default=None,
        metadata=_key(
            "string", "The path of the training data: .csv, .tsv, .jsonl, .parquet, or a folder of images.", minLength=1
        ),
    )
    eval_data: str | None = attrs.field(
        default=None,
        metadata=_key(
            "string", "The path of the held-out data. Without it, a part of `data` is held out.", minLength=1
        ),
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
    dtype: str = attrs.field(
        default="float32",
        metadata=_key(
            "string",
            "The dtype of the base's weights; auto is the checkpoint's. Adapters have their own, adapter_dtype.",
            enum=DTYPES,
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


def with_full_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with full paths, so that it means the same in every working folder."""
    paths = {name: getattr(recipe, name) for name in ("data", "eval_data", "out")}
    for name in ("model", "from_adapter"):
        path = getattr(recipe, name)
        if path is not None and _is_there(path):
            paths[name] = path  # the others are names on the hub
    full = {name: os.path.abspath(os.path.expanduser(path)) for name, path in paths.items() if path is not None}
    return attrs.evolve(recipe, **full)


def with_home(recipe: Recipe) -> Recipe:
    """Return the recipe with the home folder for ``~``, which a shell leaves in a recipe and after ``=``."""
    paths = {name: getattr(recipe, name) for name in _PATHS}
    return attrs.evolve(recipe, **{name: os.path.expanduser(path) for name, path in paths.items() if path is not None})


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except ValueError:  # NUL
        return False
