"""The schema of recipes, and reading one strictly: every mistake in it is named, all of them in one error."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs

import tunerkit
from tunerkit.errors import ConfigError, closest, half_character, shown
from tunerkit_cli.plugin_commands import Addition, additions
from tunerkit_cli.recipes.recipe import DATA, PATHS, VERSION, Recipe, files_of, sources_in, with_paths
from tunerkit_cli.recipes.schema import Schema, class_schema, objection, or_null, problems
from tunerkit_cli.recipes.trainer_arguments import argument_types, text_alone
from tunerkit_cli.settings import read_settings
from tunerkit_transformers.run_folder import LIST, RECIPE, placed

# Names that other commands have for keys: PEFT's and TRL's scripts, axolotl, LLaMA-Factory, unsloth.
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("model_name_or_path", "model_name", "base_model", "model_id", "pretrained_model_name_or_path"),
    "data": ("dataset", "datasets", "dataset_name", "dataset_path", "train_data", "train_dataset", "train_file"),
    "data={path: org/name, rows: 1000}": ("dataset_streaming", "max_samples", "max_train_samples", "streaming"),
    "eval_data": ("eval_dataset", "test_datasets", "val_data", "validation_file"),
    "out": ("output_dir",),
    "from_adapter": ("adapter_name_or_path", "lora_model_dir", "resume_adapter"),
    "method": ("adapter", "finetuning_type", "peft_method", "peft_type"),
    "max_length": ("block_size", "cutoff_len", "max_seq_len", "max_seq_length", "sequence_len"),
    "dtype": ("torch_dtype",),
    "quantisation=nf4": ("load_in_4bit", "qlora", "use_4bit"),
    "quantisation=int8": ("load_in_8bit", "use_8bit"),
    "attn_implementation": ("attention", "attn_impl", "flash_attention", "flash_attn", "use_flash_attention"),
    "train_on_prompts": ("train_on_inputs", "train_on_prompt", "train_on_source"),
    "metric": ("compute_metrics", "eval_metrics", "metrics"),
    "early_stopping_patience": ("early_stopping", "patience"),
    "config.rank": ("lora_r", "lora_rank", "r", "rank"),
    "config.alpha": ("alpha", "lora_alpha"),
    "config.dropout": ("lora_dropout",),
    "config.targets": ("lora_modules", "lora_target", "lora_target_modules", "target_modules", "targets"),
    "config.train_modules": ("additional_target", "modules_to_save"),
    "training.learning_rate": ("lr",),
    "training.num_train_epochs": ("epochs", "n_epochs", "num_epochs"),
    "training.per_device_train_batch_size": ("batch_size", "micro_batch_size", "train_batch_size"),
    "training.gradient_accumulation_steps": ("grad_accum_steps", "gradient_accumulation"),
    "training.lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "training.warmup_steps": ("warmup", "warmup_ratio"),
}


def keys_of(added: Iterable[Addition]) -> tuple[dict[str, Schema], tuple[str, ...]]:
    """Return the keys that plugins add to recipes, the first of each name, and a sentence on each that is left out."""
    keys: dict[str, Schema] = {}
    problems: list[str] = []
    for each in added:
        for name, fragment in each.recipe_keys.items():
            if (reason := _objection(name, fragment, keys)) is None:
                keys[name] = fragment
            else:
                problems.append(
                    f"{each.owner}: the recipe key {shown(name)} is left out: {reason}; its author must change it"
                )
    return keys, tuple(problems)


def _objection(name: str, fragment: Schema, others: Mapping[str, Schema]) -> str | None:
    """Return why a recipe cannot have this key, or None."""
    if name in others or name in {field.name for field in attrs.fields(Recipe)}:
        return "there is a key of this name already"
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        return "a key has at most 40 letters from a to z, digits and '_', a letter first"
    return objection(fragment) or (None if fragment.get("description") else "it has no description")


def _declared() -> dict[str, Schema]:
    return keys_of(additions())[0]


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of recipes, with which an editor completes and checks them."""
    own = class_schema(Recipe)["properties"]
    for name, default in attrs.asdict(Recipe()).items():
        own[name] |= {} if default is None else {"default": default}
    del own["extra"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of tunerkit",
        "description": "Arguments of the trainer stand in `training`, and the method's settings in `config`. "
        "Plugins may add keys.",
        "type": "object",
        "properties": {name: or_null(each) for name, each in {**own, **_declared()}.items()},
        "additionalProperties": False,
    }


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML or JSON file; a key without a value has its default. Raises `ConfigError`."""
    return structure(read_settings(path, _typed()), str(path))


def _typed() -> Schema:
    """The schema of recipes, in which those arguments of trainers that are texts are told from others."""

    def training() -> Schema:
        return {"properties": {name: text_alone(kind) for name, kind in argument_types().items()}}

    return {"properties": {**schema()["properties"], "training": training}}


def mapping_at(path: Path) -> dict[str, Any]:
    """Read a recipe's mapping, unchecked; in that of a run, paths are relative to its folder. Raises `ConfigError`."""
    found = read_settings(path, _typed())
    if path.name == RECIPE and (path.parent / LIST).is_file():
        given = {name: found[name] for name in PATHS if name in found}
        found |= {name: with_paths(value, lambda each: placed(each, path.parent)) for name, value in given.items()}
    return found


def structure(mapping: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """Convert a mapping to a recipe. ``source`` names it in errors; the rest is as for `read_recipe`."""
    declared = _declared()
    if mapping.get("on_collapse") == "tell":  # as version 0.1 wrote it
        mapping = {**mapping, "on_collapse": "warn"}
    # Another version has other keys, and a mapping of other types cannot be searched for half characters.
    for find in (_version_problems, partial(_key_problems, schema()), _unusable):
        if found := [f"{source}: {problem}" for problem in find(mapping)]:
            raise ConfigError(found)
    given = {name: copy.deepcopy(value) for name, value in mapping.items() if value is not None}
    extra = {name: copy.deepcopy(each["default"]) for name, each in declared.items() if "default" in each}
    extra |= {name: given.pop(name) for name in declared if name in given}
    return Recipe(**given, extra=extra)


def _version_problems(mapping: Mapping[str, Any]) -> Iterator[str]:
    version = mapping.get("version")
    if version is not None and (version != VERSION or type(version) is not int):
        do = f"no recipe has another one yet; write version: {VERSION}, or start anew from `tunerkit init`"
        if isinstance(version, int) and version > VERSION:
            do = "a later tunerkit reads this recipe; upgrade, or start anew from `tunerkit init`"
        yield f"version: got {shown(version)}, and tunerkit {tunerkit.__version__} reads version {VERSION}; {do}"


def _key_problems(schema: Schema, mapping: Mapping[str, Any]) -> Iterator[str]:
    """What the schema does not allow; a key that another command has leads to ours."""
    known = schema["properties"]
    elsewhere = {name: key_for(str(name), known) for name in mapping if name not in known}
    for name, key in elsewhere.items():
        if key is not None:
            yield f"unknown key {shown(name)}; did you mean {key.replace('=', ': ')!r}?"
    yield from problems({name: value for name, value in mapping.items() if elsewhere.get(name) is None}, schema)


def key_for(name: str, known: Iterable[str] = ()) -> str | None:
    """The key that another command calls so, as ``--set`` takes it; None if none is, or a ``known`` name is close."""
    named = next((key for key, others in _KEYS.items() if name in others), None)
    if named is not None or closest(name, known):
        return named
    return f"training.{name}" if name in argument_types() else None


def _unusable(mapping: Mapping[str, Any]) -> Iterator[str]:
    """Texts that no file of the run could state, paths that no system has, and weights for some sources alone."""
    for name, value in mapping.items():
        sources = sources_in(value) if name in DATA else []
        without = [each.path for each in sources if each.weight is None]
        if 0 < len(without) < len(sources):
            yield f"{name}: {without[0]} has no weight, and others have one; give a weight to each, or to none"
        if name in PATHS and any("\0" in path for path in files_of(value)):
            yield f"{name}: a path cannot contain the character NUL, got {shown(value)}"
        if (problem := half_character(json.dumps(value, ensure_ascii=False, default=str))) is not None:
            yield f"{name}: {problem}"
