"""The modules that PEFT's settings name as targets, and the settings with which PEFT takes exactly those."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import FileError, file_matchers

ALL_LINEAR: Final = "all-linear"
_NAME: Final = re.compile(r"\w+")


@attrs.frozen
class Selection:
    """What the settings say of where the adapter is. A value of a wrong type says nothing: the tensors say it too.

    Attributes:
        targets: ``target_modules``: ends of paths, or a regular expression for whole paths; None if nothing is said.
        excluded: ``exclude_modules``, in the same form.
        layers: ``layers_to_transform``; None for all.
        blocks: ``layers_pattern``: the names before a layer's number; empty for any.
        task: ``task_type``; may be empty.
        model_class: The class that was wrapped, where there is no task; may be empty.
    """

    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None
    blocks: tuple[str, ...]
    task: str
    model_class: str

    def matcher(self) -> Callable[[str], bool]:
        """Return a function that checks whether PEFT would adapt the module at a path.

        Raises:
            TargetError: A regular expression is malformed or takes too many steps, here or when the function is called.
        """
        targets, left_out = _matcher(self.targets or ()), _matcher(self.excluded)
        return lambda path: targets(path) and not left_out(path) and self._is_layer(path)

    def kinds(self, path: str) -> set[str]:
        """Return the names in ``targets`` by which a path is one; for an expression, its last part."""
        if isinstance(self.targets, tuple):
            return set(ends(path)) & set(self.targets)
        return {path.rpartition(".")[2]}

    def _is_layer(self, path: str) -> bool:
        """Whether a path is in one of the chosen layers. PEFT's versions read another number if there are several."""
        if self.layers is None or (isinstance(self.targets, tuple) and path in self.targets):
            return True
        parts = path.split(".")
        named = [name for name in self.blocks if _NAME.fullmatch(name)]
        numbers = [
            int(part)
            for place, part in enumerate(parts[:-1])
            if part.isdecimal() and (parts[place - 1] in named if named and place else place > 1)
        ]
        return bool(numbers) and {numbers[0], numbers[-1]} <= self.layers


def selection_of(found: Mapping[str, Any]) -> Selection:
    """Read it from the settings."""
    mapping = found.get("auto_mapping")
    layers = found.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    chosen = frozenset(each for each in numbers if isinstance(each, int) and not isinstance(each, bool))
    return Selection(
        targets=_names(found.get("target_modules")) or None,
        excluded=_names(found.get("exclude_modules")),
        layers=chosen or None,
        blocks=(blocks,) if isinstance(blocks := _names(found.get("layers_pattern")), str) else blocks,
        task=_text(found.get("task_type")),
        model_class=_text(mapping.get("base_model_class")) if isinstance(mapping, dict) else "",
    )


def ends(path: str) -> Iterator[str]:
    """Yield a path and all its ends, cut at dots."""
    while path:
        yield path
        path = path.partition(".")[2]


def _matcher(names: tuple[str, ...] | str) -> Callable[[str], bool]:
    if isinstance(names, str):
        return file_matchers([names])[names] if names else lambda path: False
    known = set(names)
    return lambda path: any(end in known for end in ends(path))


def _names(value: object) -> tuple[str, ...] | str:
    if isinstance(value, list):
        return tuple(each for each in value if isinstance(each, str) and each)
    return _text(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


# What PEFT puts below an adapted module. It looks there too for modules to train in full.
BELOW: Final = (
    "base_layer",
    "lora_A",
    "lora_A.default",
    "lora_B",
    "lora_B.default",
    "lora_dropout",
    "lora_dropout.default",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


def target_modules(chosen: Collection[str], present: Iterable[str]) -> list[str] | str:
    """Return ``target_modules`` for some modules of a model.

    A name selects every module with that name, and a path also those whose path ends with it. So this is the shortest
    form that selects no other module: names, which servers understand best; or paths; or an expression.

    Args:
        chosen: The paths of the modules.
        present: The paths of all modules of the model.

    Returns:
        A list of names or paths, or a regular expression for whole paths.
    """
    wanted, there = set(chosen), list(present)
    for names in ({path.rpartition(".")[2] for path in wanted}, wanted):
        if {path for path in there if any(end in names for end in ends(path))} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(wanted))


def target_parameters(chosen: Collection[str], model: nn.Module) -> list[str]:
    """Return ``target_parameters`` for some parameters of a model: the ends of their paths, or these as they are.

    Args:
        chosen: The paths of the parameters.
        model: The model.
    """
    short = {".".join(path.split(".")[-3:]) for path in chosen}
    others = (path for path, _ in model.named_parameters() if path not in chosen)
    return sorted(chosen if any(is_named(path, short) for path in others) else short)


def pattern_for(path: str, others: Collection[str]) -> str:
    """Return a key of ``rank_pattern`` that matches one of several modules, and no other.

    Args:
        path: The module's path.
        others: The paths of all adapted modules.

    Returns:
        The path, escaped; anchored if it is the end of another one.
    """
    ambiguous = any(other.endswith("." + path) for other in others)
    return ("^" if ambiguous else "") + re.escape(path)


def modules_to_save(
    copies: Collection[str], targets: Collection[str], present: Iterable[str], below: Iterable[str] = BELOW
) -> list[str]:
    """Return ``modules_to_save`` for the modules that are trained in full: their paths.

    PEFT takes each module whose path ends with a name, also in the middle of a word, and takes no target below a path
    that has the name in it. So this fails if the paths select anything but these modules.

    Args:
        copies: The paths of the modules.
        targets: The paths of the targets.
        present: The paths of all modules of the model.
        below: What PEFT puts below a target.

    Raises:
        FileError: PEFT would also train other modules, or leave targets out.
    """
    inside = tuple(below)
    lower = [f"{target}.{name}" for target in targets for name in inside]
    names = tuple(sorted(copies))
    others = sorted({path for path in (*present, *lower) if path.endswith(names)} - set(names))
    others += [path for path in targets if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in names)]
    if others:
        raise FileError(
            f"PEFT selects the modules that it trains in full by the ends of their names: with {few(names)} it would "
            f"also take {few(others)}. Train these in full too (train_modules), or call tunerkit.unwrap(model, "
            "keep_merged=True) and save the whole model instead"
        )
    return list(names)


def is_named(parameter: str, names: Collection[str]) -> bool:
    """Whether PEFT's ``target_parameters`` name the parameter at a path."""
    return any(f".{parameter}".endswith(f".{name}") for name in names)


def few(paths: Sequence[str]) -> str:
    """Return the first paths, for a message."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(shown, paths[:3])) + more


# The class that loads a base for the task, and how the classes of its models end.
TASKS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "SEQ_CLS": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
    "TOKEN_CLS": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "FEATURE_EXTRACTION": ("AutoModel", ("Model",)),
}
# The heads that models of transformers have on top of their bodies.
HEADS: Final = ("classifier", "score", "qa_outputs", "lm_head", "embed_out", "cls")


def auto_class(task: str, model_class: str) -> str:
    """Return the class that loads the base: by the task, or the one that was wrapped without a task; may be empty."""
    return TASKS[task][0] if task in TASKS else model_class


def is_task_class(model: nn.Module | None, task: str, model_class: str) -> bool:
    """Whether a model is of the class that the adapter was trained on, as far as its settings say."""
    name = type(model).__name__
    return (bool(model_class) and name == model_class) or (task in TASKS and name.endswith(TASKS[task][1]))
