"""Commands that make an adapter fit for an engine."""

import shlex
from collections.abc import Callable, Mapping
from typing import Final

from tunerkit.plugin import FileError
from tunerkit_serving import signs
from tunerkit_serving.adapter_folder import Folder
from tunerkit_serving.gguf_header import GgufAdapter

Mend = Callable[[Folder], str | None]
_HEADS: Final = ("score", "classifier")
# What follows AutoPeftModelFor in the names of PEFT's classes.
_CLASSES: Final[Mapping[str, str]] = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}


def quoted(text: object) -> str:
    """Quote a word for a shell."""
    return shlex.quote(str(text))


def uniform(folder: Folder) -> str:
    """Write one rank for all modules, with everything multiplied in."""
    if not _is_read(folder):
        return merged_by_peft(folder)
    out = quoted(f"{folder.path}-uniform")
    return f"tunerkit convert {quoted(folder.path)} --to peft --out {out} --set form=uniform{_base(folder)}"


def experts(folder: Folder) -> str:
    """Write matrices for each expert."""
    if not _is_read(folder):
        return merged_by_peft(folder)
    out = quoted(f"{folder.path}-experts")
    return f"tunerkit convert {quoted(folder.path)} --to peft --out {out} --set form=experts{_base(folder)}"


def gguf(folder: Folder) -> str:
    """Write the file that llama.cpp reads, which holds neither biases nor modules that were trained in full."""
    if not _is_read(folder) or signs.bias(folder, None) or signs.saved_modules(folder, None):
        return merged(folder)
    out = quoted(f"{folder.path}.gguf")
    return f"tunerkit convert {quoted(folder.path)} --to gguf --out {out}{_base(folder)}"


def merged(folder: Folder) -> str:
    """Merge the adapter into the base, which every engine serves."""
    if not _is_read(folder):
        return merged_by_peft(folder)
    return f"tunerkit merge {quoted(folder.path)} --out {quoted(f'{folder.path}-merged')}{_base(folder)}"


def _base(folder: Folder) -> str:
    return " --base BASE" if folder.base == "BASE" else ""  # else the command finds it in the folder


def merged_by_peft(folder: Folder) -> str:
    """Merge what tunerkit refuses too: only PEFT knows how."""
    kind = _class_of(folder)
    labels = _labels(folder) if kind.endswith("Classification") else 0
    given = f"{str(folder.path)!r}" + (f", num_labels={labels}" if labels else "")
    code = (
        f"from peft import AutoPeftModelFor{kind} as Model; "
        f"Model.from_pretrained({given}).merge_and_unload().save_pretrained({f'{folder.path}-merged'!r})"
    )
    return f"python -c {quoted(code)}"


def _is_read(folder: Folder) -> bool:
    """Whether tunerkit takes such a folder, so that its commands are of use."""
    from tunerkit.serialization import format_at  # it imports torch, which the command's help must not

    try:
        format = format_at(folder.path)
        return format is not None and format.describe is not None and format.describe(folder.path) is not None
    except FileError:
        return False


def _class_of(folder: Folder) -> str:
    """The class by the task; without a task, by the name of the head that was trained."""
    task = folder.config.get("task_type")
    if isinstance(task, str) and task in _CLASSES:
        return _CLASSES[task]
    names = folder.config.get("modules_to_save") or ()
    return _CLASSES["SEQ_CLS" if any(name.rpartition(".")[2] in _HEADS for name in names) else "CAUSAL_LM"]


def _labels(folder: Folder) -> int:
    """The fewest rows of a matrix that was trained in full: a head's last layer. 0 if there is none."""
    names = tuple(folder.config.get("modules_to_save") or ())
    shapes = [shape for name, shape in folder.others.items() if name.rpartition(".")[0].endswith(names)]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=0)


def none(adapter: Folder | GgufAdapter) -> None:
    """Nothing needs to be done, or nothing can be."""
