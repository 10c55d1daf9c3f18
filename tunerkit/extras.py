"""Which extra of tunerkit serves which library, for messages: the only file of core that names other distributions."""

from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

PUBLISHED: Final = False  # whether an index has our distributions; after a change, `make pages` writes them again
FROM, AFTER = ("", "") if PUBLISHED else ("--find-links dist ", ", after `make dist` in a clone")
QUANTISED: Final = "quant"  # knows the layers of libraries that quantise
ENGINES: Final = "distributed"  # trains in several processes
METHODS: Final = "methods"  # has many small methods
# What core cannot do, as messages say it, and the extra that does.
DOES: Final = {
    **dict.fromkeys(("makes references", "reads what `tunerkit train` writes", "compares them"), "transformers"),
    "keeps them alike": ENGINES,
    "notices adapters that DistributedDataParallel does not synchronise": ENGINES,
}
DEFAULT_FORMAT: Final = "peft"  # the one that most programs read
# What the extra "transformers" serves, by the root of the library's modules.
_OF_TRANSFORMERS: Final = ("transformers", "trl", "accelerate", "timm", "torchvision")


class Reader(NamedTuple):
    """An extra that reads adapters of other programs, and how their files are known where it is not installed.

    Attributes:
        extra: The extra.
        formats: The names of its formats, see `tunerkit.export`.
        program: The programs that write them.
        files: The names of the files, or their ends.
        tensors: What the names of tensors in them begin with.
        instead: How to use them without tunerkit.
    """

    extra: str
    formats: tuple[str, ...]
    program: str
    files: tuple[str, ...]
    tensors: tuple[str, ...]
    instead: str


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
    """Return the extra that reads a file or folder, by the names in it; None if none is known.

    Args:
        files: The name of the file, or the names in the folder.
        tensors: The names of the tensors in the file, if they are known.
    """
    names = [name for name in tensors if "lora" in name]  # as in all of these formats
    for reader in READERS:
        if any(file.endswith(reader.files) for file in files) or any(name.startswith(reader.tensors) for name in names):
            return reader
    return None


class Library(NamedTuple):
    """A library that holds weights of a model, or puts modules of its own into one.

    Attributes:
        name: What messages call it.
        extra: The extra that knows what it does.
        verbs: What core would do wrong without that: of ``"wrap"``, ``"attach"``, ``"save"`` and ``"merge"``.
        package: What the names of its classes begin with; with a dot at its end.
        marks: Attributes that it sets on modules and parameters.
    """

    name: str
    extra: str
    verbs: tuple[str, ...]
    package: str = ""
    marks: tuple[str, ...] = ()


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

_LORA: Final = "tunerkit.wrap(model, 'lora', config)"
_TRAINED: Final = "print(tunerkit.trainable_parameters(model))"
# What PEFT and transformers call functions, classes and methods, and what has left core; what to write here.
CALLS_ELSEWHERE: Final = {
    **dict.fromkeys(("get_peft_model", "inject_adapter_in_model", "LoraModel"), _LORA),
    **dict.fromkeys(("LoraConfig", "PeftConfig"), "from tunerkit_lora import LoraConfig"),
    "AdaLoraConfig": "from tunerkit_adalora import AdaLoraConfig",
    "PeftModel": "tunerkit.load(model, folder)",
    **dict.fromkeys(("AutoPeftModel", "AutoPeftModelForCausalLM"), "tunerkit.from_folder(folder)"),
    "prepare_model_for_kbit_training": f"nothing before {_LORA}: it freezes the base, and adapters are fp32",
    **dict.fromkeys(("print_trainable_parameters", "get_nb_trainable_parameters"), _TRAINED),
    "merge_and_unload": "tunerkit.unwrap(model, keep_merged=True)",
    "unload": "tunerkit.unwrap(model)",
    **{f"{verb}_adapter": f"tunerkit.{verb}(model)" for verb in ("merge", "unmerge")},
    "add_adapter": "tunerkit.wrap(model, 'lora', config, adapter='name'), which is active at once, beside the others",
    "load_adapter": "tunerkit.load(model, folder, adapter='name'), which is active at once, beside the others",
    "set_adapter": "tunerkit.activate(model, ['name'])",
    "delete_adapter": "tunerkit.delete(model, 'name')",
    **dict.fromkeys(("active_adapter", "active_adapters"), "tunerkit.active(model)"),
    **dict.fromkeys(("disable_adapter", "disable_adapters"), "with tunerkit.disabled(model):"),
    "enable_adapters": "tunerkit.activate(model, ['name']); the block of tunerkit.disabled(model) ends by itself",
    **dict.fromkeys(("get_adapter_state_dict", "get_peft_model_state_dict"), "tunerkit.save(model, path)"),
    "add_weighted_adapter": "tunerkit.activate(model, ['a', 'b']) for their plain sum; none has a weight",
    "adapter_names": "tunerkit.activate(model, ['name']), and call the model with the rows of that adapter",
    "update_and_allocate": "tunerkit.attach(model, optimizer, total_steps=...) once: steps then allocate by themselves",
    "enable_peft_hotswap": "tunerkit.load(model, folder, adapter='new'); tunerkit.activate(model, ['new'])",
    "PackedLinear": f"from tunerkit_quant import PackedLinear ({install(QUANTISED)})",
}
# Settings of theirs that are none here, or one method's alone; `setting` takes their names for those that there are.
SETTINGS_ELSEWHERE: Final = {
    "task_type": "leave it out: the model's class says the task, and new heads are trained",
    "inference_mode": "leave it out: tunerkit.load(model, path) loads without training",
    "fan_in_fan_out": "leave it out: the kind of each layer is recognised",
    "layers_pattern": "leave it out: the first number in a path is the layer's",
    "use_dora": f"it is method 'dora' ({install(METHODS)})",
    "lora_bias": "B has no bias here; bias='adapters' trains the biases of the adapted layers",
    "loftq_config": "the base is quantised before: quantise it, and wrap it, by LoRA's start 'loftq' if you like",
    "eva_config": "if the method has a start 'eva', tunerkit.calibrate sets it; rho is a setting of method 'lora'",
    "trainable_token_indices": f"it is method 'trainable-tokens', beside this one ({install(METHODS)})",
    "target_parameters": "only modules can be adapted, and no parameters such as stacks of experts: leave it out",
    "ensure_weight_tying": "leave it out: name both sides of the tied weight in train_modules, or untie them",
    "rank_pattern": "it belongs to method 'lora'; min_rank and max_rank bound AdaLoRA's ranks by pattern",
    **dict.fromkeys(("alpha_pattern", "use_rslora"), "it belongs to method 'lora'"),
    **dict.fromkeys(("init_r", "target_r", "tinit", "tfinal", "deltaT"), "it belongs to method 'adalora'"),
    **dict.fromkeys(("orth_reg_weight", "total_step", "beta1", "beta2"), "it belongs to method 'adalora'"),
}
_PROMPTS: Final = (
    "it lengthens the sequence, with its masks, positions and caches, and an adapter sees one layer: take PEFT; "
    "'Prompts and prefixes' in the docs has prototypes"
)
_PROMPT_METHODS: Final = (
    *("prompt-tuning", "multitask-prompt-tuning", "p-tuning", "prefix-tuning"),
    *("adaption-prompt", "cpt", "cartridge"),
)
_OF_METHODS: Final = (
    *("boft", "c3a", "delora", "dora", "fourierft", "growing", "hra", "ia3", "ln-tuning", "loha", "lokr", "lora-fa"),
    *("lora-xs", "miss", "oft", "randlora", "road", "shira", "tinylora", "trainable-tokens", "vblora", "vera"),
)
# Where a method is that is not installed: PEFT's that are none here, with what to do instead, and those of our plugins.
METHODS_ELSEWHERE: Final = {
    **dict.fromkeys(_PROMPT_METHODS, _PROMPTS),
    **dict.fromkeys(_OF_METHODS, f"{distribution(METHODS)} brings it ({install(METHODS)})"),
    **{name: f"{distribution(name)} brings it ({install(name)})" for name in ("lora", "adalora")},
}
ROWS: Final = "adapter_names"  # the argument of a forward that names an adapter for each row of a batch


def elsewhere(name: str) -> str:
    """Say what to write instead of a call of another library; empty if it is none that people try."""
    return f": write {CALLS_ELSEWHERE[name]}" if name in CALLS_ELSEWHERE else ""


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
    """The library that a class is of, in words, if it is one that quantises; None otherwise."""
    libraries = (each for each in LIBRARIES if each.extra == QUANTISED)
    return next((each.name for each in libraries if f"{kind.__module__}.".startswith(each.package)), None)
