"""Load an adapter of another program together with the base that its files name."""

import os
from typing import Any

from torch import nn

import tunerkit
from tunerkit.errors import BaseMismatchError, warn
from tunerkit_transformers.base_choice import choose_base, with_base
from tunerkit_transformers.bases import Base, whole
from tunerkit_transformers.pretrained import LOADING, OWN_CODE, ModelError, reason_of

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
        tunerkit.load(model, path)
    except BaseMismatchError as problem:
        raise BaseMismatchError(_in_python(with_base(problem, chosen, model, path), path)) from problem
    return model.eval(), processor


def _in_python(problem: Exception, path: str) -> str:
    """The text of an error of the command, extended by the call in Python that replaces ``--base``."""
    return f"{problem}; in Python, that is tunerkit.from_folder({path!r}, base=...)"


def _processor(path: str, base: Base, model: Any) -> object:
    """The tokenizer beside the adapter, to which the model's embeddings are resized; else the base's processor.

    Raises:
        ModelError: There is a tokenizer beside the adapter, and it cannot be loaded: the base's may be another one.
    """
    import transformers

    if (place := _tokenizer_beside(path)) is None:
        revised = {} if base.revision is None else {"revision": base.revision}
        try:
            return transformers.AutoProcessor.from_pretrained(base.source, **OWN_CODE, **revised)
        except LOADING as problem:
            warn(
                f"{base.source} has no tokenizer or image processor that transformers can load, so None is in its "
                f"place: {reason_of(problem)}"
            )
            return None
    try:
        found = transformers.AutoTokenizer.from_pretrained(place, **OWN_CODE)
    except LOADING as problem:
        raise ModelError(
            f"cannot load the tokenizer beside the adapter, from {_TOKENIZER} in {place}: {reason_of(problem)}; mend "
            "it, or delete the tokenizer's files if it is the base's"
        ) from problem
    if len(found) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(found))
    return found


def _tokenizer_beside(path: str) -> str | None:
    """The folder or the name on the hub where a tokenizer lies beside the adapter; None if there is none."""
    from transformers.utils.hub import cached_file

    if os.path.exists(path):
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        return folder if os.path.isfile(os.path.join(folder, _TOKENIZER)) else None
    found = cached_file(
        path,
        _TOKENIZER,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else path
