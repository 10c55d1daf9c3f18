"""An adapter of another program with its base, in one call: its files say which base that is."""

from typing import Any

from torch import nn

from tunerkit import serialization
from tunerkit.errors import BaseMismatchError, warn
from tunerkit_transformers.base_choice import choose_base, with_base
from tunerkit_transformers.bases import Base, whole
from tunerkit_transformers.pretrained import LOADING, ModelError

_TOKENIZER = "tokenizer_config.json"


def load_foreign(path: str, base: str | None) -> tuple[nn.Module, object]:
    """Load the base that an adapter's files name, the adapter, and its tokenizer, or the base's or image processor.

    Args:
        path: A folder or a file in an installed format, or a name on the hub.
        base: Where the base is, if it is elsewhere by now.

    Returns:
        The model in eval mode and in the dtype of its files, and the processor; None if there is none.

    Raises:
        ModelError: The files name no base, or it cannot be loaded.
        BaseMismatchError: The base has other modules or shapes.
        FileError: The adapter's files are missing or damaged.
    """
    try:
        chosen = choose_base(path, base=base, task=None)
        model = whole(chosen, dtype="auto")
    except ModelError as problem:
        raise ModelError(_in_python(problem, path)) from problem
    processor = _processor(path, chosen, model)
    try:
        serialization.load(model, path)
    except BaseMismatchError as problem:
        raise BaseMismatchError(_in_python(with_base(problem, chosen, model, path), path)) from problem
    return model.eval(), processor


def _in_python(problem: Exception, path: str) -> str:
    """The error, whose words are those of the command, with the call that does what ``--base`` does there."""
    return f"{problem}; in Python, that is tunerkit.from_folder({path!r}, base=...)"


def _processor(path: str, base: Base, model: Any) -> object:
    """The tokenizer beside the adapter, for which the model gets as many rows as it needs; else what the base has."""
    import transformers
    from transformers.utils.hub import cached_file

    there = cached_file(
        path,
        _TOKENIZER,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    kind, source = ("AutoProcessor", base.source) if there is None else ("AutoTokenizer", path)
    revised = {"revision": base.revision} if there is None and base.revision is not None else {}
    try:
        found = getattr(transformers, kind).from_pretrained(source, **revised)
    except LOADING:
        warn(f"{source} has no tokenizer or image processor that transformers can load: None is in its place")
        return None
    if there is not None and len(found) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(found))
    return found
