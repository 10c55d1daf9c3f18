"""Load an adapter of another program, together with the base named in its files."""

import os
from typing import Any

from torch import nn

import tunerkit
from tunerkit.errors import BaseMismatchError, warn
from tunerkit_transformers.base_choice import choose_base, with_base
from tunerkit_transformers.bases import Base, whole
from tunerkit_transformers.pretrained import LOADING, OWN_CODE, ModelError, reason_of

_TOKENIZER = "tokenizer_config.json"


def load_foreign(
    path: str, base: str | None, *, task: str | None = None, in_python: bool = True
) -> tuple[nn.Module, object]:
    """Load the base named in an adapter's files, the adapter, and the processor: the adapter's tokenizer or the base's.

    Args:
        path: A folder or a file in an installed format, or a name on the hub.
        base: The base's folder or name on the hub, if it has moved.
        task: The task of the adapter, if its files do not say it.
        in_python: Whether errors name the Python call beside the command's option, and a missing processor is told.

    Returns:
        The model in eval mode and in the dtype of its files, and the tokenizer or image processor, or None.

    Raises:
        ModelError: The files name no base, or the base cannot be loaded.
        BaseMismatchError: The base has other modules or shapes.
        FileError: The adapter's files are missing or damaged.
    """
    try:
        chosen = choose_base(path, base=base, task=task)
        model = whole(chosen, dtype="auto")
    except ModelError as problem:
        raise ModelError(_in_python(problem, path) if in_python else str(problem)) from problem
    processor = _processor(path, chosen, model, in_python=in_python)
    try:
        tunerkit.load(model, path)
    except BaseMismatchError as problem:
        explained = with_base(problem, chosen, model, path)
        raise BaseMismatchError(_in_python(explained, path) if in_python else str(explained)) from problem
    return model.eval(), processor


def _in_python(problem: Exception, path: str) -> str:
    """Return a command's error text, extended by the Python call that is equivalent to ``--base``."""
    return f"{problem}; in Python, that is tunerkit.from_folder({path!r}, base=...)"


def _processor(path: str, base: Base, model: Any, *, in_python: bool) -> object:
    """Return the tokenizer in the adapter's folder, and enlarge the embeddings to fit; else the base's processor.

    Raises:
        ModelError: The adapter's tokenizer cannot be loaded. The base's is no substitute, since it may differ.
    """
    import transformers

    if (place := _tokenizer_beside(path)) is None:
        revised = {} if base.revision is None else {"revision": base.revision}
        try:
            return transformers.AutoProcessor.from_pretrained(base.source, **OWN_CODE, **revised)
        except LOADING as problem:
            if in_python:
                warn(
                    f"{base.source} has no tokenizer or image processor that transformers can load, so None is in its "
                    f"place: {reason_of(problem)}"
                )
            return None
    try:
        found = transformers.AutoTokenizer.from_pretrained(place, **OWN_CODE)
    except LOADING as problem:
        raise ModelError(
            f"cannot load the tokenizer beside the adapter, from {_TOKENIZER} in {place}: {reason_of(problem)}; fix "
            "it, or delete its files if the base has the same tokenizer"
        ) from problem
    if len(found) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(found))
    return found


def _tokenizer_beside(path: str) -> str | None:
    """Return the adapter's folder or name on the hub if it contains a tokenizer, else None."""
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
