"""Tables of the extras that support other libraries, for messages. No other file of core names distributions."""

import functools
import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

PUBLISHED: Final = False  # whether our distributions are on an index; after a change, run `make pages`
FROM, AFTER = ("", "") if PUBLISHED else ("--find-links dist ", ", after `make dist` in a clone")
QUANTISED: Final = "quant"  # the extra for layers of quantization libraries
ENGINES: Final = "distributed"  # the extra for training in several processes
# Names that moved from core to another distribution, as entry points, and the extra that installs it.
VERBS: Final = dict.fromkeys(("calibrate", "method", "plugin.parameter", "plugin.Gain"), "verbs")
# Features that core lacks, as phrases for messages, and the extra that has them.
DOES: Final = {
    **dict.fromkeys(("makes references", "reads what `tunerkit train` writes", "compares them"), "transformers"),
    "synchronizes them": ENGINES,
    "detects adapters that DistributedDataParallel does not synchronize": ENGINES,
}
DEFAULT_FORMAT: Final = "peft"  # the one that most programs read
# The root modules of the libraries that the extra "transformers" serves.
_OF_TRANSFORMERS: Final = ("transformers", "trl", "accelerate", "timm", "torchvision")


class Reader(NamedTuple):
    """An extra that reads other programs' adapters, and the file and tensor names that identify these adapters."""

    extra: str
    formats: tuple[str, ...]  # the names of the formats, see `tunerkit.export`
    program: str  # the programs that write the files
    files: tuple[str, ...]  # suffixes of file names
    tensors: tuple[str, ...]  # prefixes of tensor names
    instead: str  # how to use the files without tunerkit


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
    """Return the reader for an adapter with these file names or, if known, tensor names; None if no reader matches."""
    names = [name for name in tensors if "lora" in name]  # as in all of these formats
    for reader in READERS:
        if any(file.endswith(reader.files) for file in files) or any(name.startswith(reader.tensors) for name in names):
            return reader
    return None


class Library(NamedTuple):
    """A library that manages a model's weights or replaces its modules."""

    name: str
    extra: str  # the extra that supports the library
    verbs: tuple[str, ...]  # verbs of core that go wrong without the extra
    package: str = ""  # the prefix of its classes' qualified names, with a dot at its end
    marks: tuple[str, ...] = ()  # attributes that the library sets on modules and parameters


_ALL: Final = ("wrap", "attach", "save", "merge")
LIBRARIES: Final = (
    Library("FSDP", ENGINES, _ALL, "torch.distributed.fsdp.", ("_fsdp_flattened",)),
    Library("DTensor", ENGINES, _ALL, "torch.distributed.tensor."),
    Library("DeepSpeed", ENGINES, _ALL, "deepspeed.", ("ds_id", "_original_parameters")),
    Library("accelerate", ENGINES, ("wrap", "merge"), "", ("_hf_hook",)),
    Library("peft", "peft", ("wrap", "attach", "save"), "peft."),
    Library("torchao", QUANTISED, ("merge",), "torchao."),
    Library("bitsandbytes", QUANTISED, ("merge",), "bitsandbytes.nn.modules."),
    Library("optimum-quanto", QUANTISED, ("merge",), "optimum.quanto."),
    Library("HQQ", QUANTISED, (), "hqq."),
    Library("GPTQModel", QUANTISED, (), "gptqmodel."),
    Library("auto-gptq", QUANTISED, (), "auto_gptq."),
    Library("AutoAWQ", QUANTISED, (), "awq."),
)


def distribution(extra: str) -> str:
    """Return the name of the distribution that an extra installs."""
    return f"tunerkit-{extra}"


def install(*extras: str) -> str:
    """Return the command that installs extras, for all messages and pages."""
    return f'pip install {FROM}"tunerkit[{",".join(extras)}]"{AFTER}'


# --- Names in other libraries -----------------------------------------------------------------------------------------

ROWS: Final = "adapter_names"  # the argument of a forward that names an adapter for each row of a batch


@functools.cache
def hints(kind: str) -> Mapping[str, str]:
    """Return {name in another library: hint for messages}; ``kind`` is "calls", "settings" or "methods"."""
    import tomllib  # only errors need it

    lines = tomllib.loads((pkgutil.get_data("tunerkit", "elsewhere.toml") or b"").decode())[kind]
    whole = {re.sub(r"\{(\w+)\}", lambda extra: install(extra[1]), line): names for line, names in lines.items()}
    return {name: line for line, names in whole.items() for name in names}


def elsewhere(name: str) -> str:
    """Return the end of a message with tunerkit's replacement for another library's call; "" if there is none."""
    found = hints("calls").get(name)
    return f": write {found}" if found else ""


def serving(thing: object, *, described: bool = False) -> str | None:
    """Return the extra for the library that defines an object's class or a base class; None if there is none.

    With ``described``, consider only extras that also find a model's settings and newly initialized modules.
    """
    roots = {kind.__module__.partition(".")[0] for kind in type(thing).__mro__}
    if described:
        return "transformers" if "transformers" in roots else None
    if "peft" in roots:  # its configs derive from a class of transformers'
        return "peft"
    if not roots.isdisjoint(_OF_TRANSFORMERS):
        return "transformers"
    return QUANTISED if any(map(quantiser, type(thing).__mro__)) else None


def quantiser(kind: type) -> str | None:
    """Return the name of the quantization library that defines a class; None if there is none."""
    module = f"{kind.__module__}."
    return next((e.name for e in LIBRARIES if e.extra == QUANTISED and module.startswith(e.package)), None)
