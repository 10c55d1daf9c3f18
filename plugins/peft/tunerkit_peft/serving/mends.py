"""Commands that make an adapter fit for an engine."""

import shlex
from collections.abc import Callable

from tunerkit_peft.serving.adapter_folder import Folder
from tunerkit_peft.serving.gguf_header import GgufAdapter

Mend = Callable[[Folder], str | None]


def quoted(text: object) -> str:
    """Quote a word for a shell."""
    return shlex.quote(str(text))


def uniform(folder: Folder) -> str:
    """Write one rank for all modules, with everything multiplied in."""
    out = quoted(f"{folder.path}-uniform")
    return f"tunerkit convert {quoted(folder.path)} --to peft --out {out} --set form=uniform{_base(folder)}"


def gguf(folder: Folder) -> str:
    """Write the file that llama.cpp reads."""
    out = quoted(f"{folder.path}.gguf")
    return f"tunerkit convert {quoted(folder.path)} --to gguf --out {out}{_base(folder)}"


def merged(folder: Folder) -> str:
    """Merge the adapter into the base, which every engine serves."""
    return f"tunerkit merge {quoted(folder.path)} --out {quoted(f'{folder.path}-merged')}{_base(folder)}"


def _base(folder: Folder) -> str:
    return " --base BASE" if folder.base == "BASE" else ""  # else the command finds it in the folder


def merged_by_peft(folder: Folder) -> str:
    """Merge what tunerkit refuses too: only PEFT knows how."""
    code = (
        "from peft import AutoPeftModelForCausalLM as Model; "
        f"Model.from_pretrained({str(folder.path)!r}).merge_and_unload().save_pretrained({f'{folder.path}-merged'!r})"
    )
    return f"python -c {quoted(code)}"


def none(adapter: Folder | GgufAdapter) -> None:
    """Nothing needs to be done, or nothing can be."""
