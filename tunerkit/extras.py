"""Which extra of tunerkit serves which library, for messages: the only file of core that names other distributions."""

import functools
import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

PUBLISHED: Final = False  # whether an index has our distributions; after a change, `make pages` writes them again
FROM, AFTER = ("", "") if PUBLISHED else ("--find-links dist ", ", after `make dist` in a clone")
QUANTISED: Final = "quant"  # knows the layers of libraries that quantize
ENGINES: Final = "distributed"  # trains in several processes
# Names that left core, as the entry points that bring them, and the extra with them.
VERBS: Final = dict.fromkeys(("calibrate", "method", "plugin.parameter", "plugin.Gain"), "verbs")
# Things that core cannot do, in the words of messages, and the extra that does them.
DOES: Final = {
    **dict.fromkeys(("makes references", "reads what `tunerkit train` writes", "compares them"), "transformers"),
    "synchronizes them": ENGINES,
    "detects adapters that DistributedDataParallel does not synchronize": ENGINES,
}
DEFAULT_FORMAT: Final = "peft"  # the one that most programs read
# The libraries that the extra "transformers" serves, by the root of their modules.
_OF_TRANSFORMERS: Final = ("transformers", "trl", "accelerate", "timm", "torchvision")


class Reader(NamedTuple):
    """An extra that reads adapters of other programs, and how their files are known where it is not installed."""

    extra: str
    formats: tuple[str, ...]  # their names, see `tunerkit.export`
    program: str  # the programs that write them
    files: tuple[str, ...]  # their names, or the ends of these
    tensors: tuple[str, ...]  # beginnings of the names of tensors in them
    instead: str  # how to use them without tunerkit


READERS: Final = (
    Reader(
        "peft",
        formats=("peft",),
        program="PEFT",
        files=("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        tensors=("base_model.model.",),
        instead="PEFT: peft.PeftModel.from_pretrained(model, folder)",
    ),
    Reader(
        "diffusers",
        formats=("diffusers", "kohya"),
        program="diffusers or of Kohya's scripts",
        files=("pytorch_lora_weights.safetensors",),
        tensors=("unet.", "transformer.", "text_encoder.", "lora_unet_", "lora_te", "lora_transformer_"),
        instead="diffusers: pipeline.load_lora_weights(folder)",
    ),
    Reader("gguf", formats=("gguf",), program="llama.cpp", files=(".gguf",), tensors=(), instead="llama.cpp"),
)


def reader_of(files: Collection[str], tensors: Iterable[str] = ()) -> Reader | None:
    """The extra that reads a file or folder, by the names of its files and, if they are known, of its tensors."""
    names = [name for name in tensors if "lora" in name]  # as in all of these formats
    for reader in READERS:
        if any(file.endswith(reader.files) for file in files) or any(name.startswith(reader.tensors) for name in names):
            return reader
    return None


class Library(NamedTuple):
    """A library that holds weights of a model, or puts modules of its own into one."""

    name: str
    extra: str  # that knows it
    verbs: tuple[str, ...]  # what core would do wrong without that
    package: str = ""  # the beginning of the names of its classes, with a dot at its end
    marks: tuple[str, ...] = ()  # attributes that it sets on modules and parameters


_ALL: Final = ("wrap", "attach", "save", "merge")
LIBRARIES: Final = (
    Library("FSDP", ENGINES, _ALL, "torch.distributed.fsdp.", ("_fsdp_flattened",)),
    Library("DTensor", ENGINES, _ALL, "torch.distributed.tensor."),
    Library("DeepSpeed", ENGINES, _ALL, "deepspeed.", ("ds_id", "_original_parameters")),
    Library("accelerate", ENGINES, ("wrap", "merge"), "", ("_hf_hook",)),
    Library("peft", "peft", ("wrap", "attach", "save"), "peft."),
    Library("torchao", QUANTISED, ("merge",), "torchao."),
    Library("bitsandbytes", QUANTISED, ("merge",), "bitsandbytes."),
    Library("optimum-quanto", QUANTISED, ("merge",), "optimum.quanto."),
    Library("HQQ", QUANTISED, (), "hqq."),
    Library("GPTQModel", QUANTISED, (), "gptqmodel."),
    Library("auto-gptq", QUANTISED, (), "auto_gptq."),
    Library("AutoAWQ", QUANTISED, (), "awq."),
)


def distribution(extra: str) -> str:
    """The distribution that an extra installs."""
    return f"tunerkit-{extra}"


def install(*extras: str) -> str:
    """The command that installs extras, which works today; every message and page that tells to install has it."""
    return f'pip install {FROM}"tunerkit[{",".join(extras)}]"{AFTER}'


# --- What other libraries call it -------------------------------------------------------------------------------------

ROWS: Final = "adapter_names"  # the argument of a forward that names an adapter for each row of a batch


@functools.cache
def hints(kind: str) -> Mapping[str, str]:
    """What to write here, by another library's name for it. The kinds are "calls", "settings" and "methods"."""
    import tomllib  # only errors need it

    lines = tomllib.loads((pkgutil.get_data("tunerkit", "elsewhere.toml") or b"").decode())[kind]
    whole = {re.sub(r"\{(\w+)\}", lambda extra: install(extra[1]), line): names for line, names in lines.items()}
    return {name: line for line, names in whole.items() for name in names}


def elsewhere(name: str) -> str:
    """The replacement for a call of another library, as the end of an error's text; empty if there is none."""
    found = hints("calls").get(name)
    return f": write {found}" if found else ""


def serving(thing: object, *, described: bool = False) -> str | None:
    """The extra for a library's object, by the classes that it derives from; None if no extra serves it.

    With ``described``, one that knows more of a model than the kinds of its layers.
    """
    roots = {kind.__module__.partition(".")[0] for kind in type(thing).__mro__}
    if described:  # these models have settings, and marks of what was loaded
        return "transformers" if "transformers" in roots else None
    if "peft" in roots:  # its configs derive from a class of transformers'
        return "peft"
    if not roots.isdisjoint(_OF_TRANSFORMERS):
        return "transformers"
    return QUANTISED if any(map(quantiser, type(thing).__mro__)) else None


def quantiser(kind: type) -> str | None:
    """The library that a class is of, in words, if it is one that quantizes; None otherwise."""
    module = f"{kind.__module__}."
    return next((e.name for e in LIBRARIES if e.extra == QUANTISED and module.startswith(e.package)), None)
