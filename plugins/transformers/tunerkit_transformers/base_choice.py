"""Choose the base model of an adapter, and the class that builds it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
from torch import nn

from tunerkit.errors import BaseMismatchError
from tunerkit_transformers.adapter_files import BaseFacts, base_facts
from tunerkit_transformers.bases import Base, config_of, diffusers_class, refusing, skeleton
from tunerkit_transformers.pretrained import ModelError, classes_of, looks_local
from tunerkit_transformers.task_classes import TASKS

_AUTO = "AutoModel"
_CLASSIFIER = "Classification"  # in the names of all classes with such a head


def choose_base(path: str, *, base: str | None, task: str | None, beside: str | None = None) -> Base:
    """Find the base of the adapter at ``path``.

    The base's class comes from ``task`` or from the adapter's files. If neither names one, these classes are tried, and
    the first whose modules and shapes fit is taken: the config's architecture, the tasks' classes, ``AutoModel``.

    Args:
        path: The adapter.
        base: The folder of the base, or its name on the hub; None to read it from the adapter's files.
        task: One of the tasks of ``tunerkit train``, or None.
        beside: Another adapter of the same base. Its files are read if the first adapter's do not name the base.

    Raises:
        FileError: No adapter is there, or its files are damaged.
        ModelError: There is no such task, or the base cannot be found.
    """
    if task is not None:
        classes_of(task)
    facts, names = base_facts(path), path
    if base is None and beside is not None and not facts.source and (other := base_facts(beside)).source:
        facts, names = attrs.evolve(facts, source=other.source, revision=other.revision, seed=other.seed), beside
    found = Base(
        source=base if base is not None else _named(facts, names),
        kind="",
        revision=facts.revision if base is None else None,
        seed=facts.seed,
    )
    with refusing(found):
        kinds = [*_kinds(found, facts, task)]
    return _first_fit([attrs.evolve(found, kind=kind) for kind in kinds], facts)


def _named(facts: BaseFacts, path: str) -> str:
    """Return the base named in the adapter's files. Raises `ModelError` if there is none, or its folder is gone."""
    if not facts.source:
        raise ModelError(f"{path} does not say what its base model is; pass the folder of the base with --base")
    if looks_local(facts.source) and not Path(facts.source).expanduser().exists():
        raise ModelError(
            f"{path}: the base model was in {facts.source}, which is not here; pass the folder where it is now with "
            "--base"
        )
    return facts.source


def _kinds(base: Base, facts: BaseFacts, task: str | None) -> Iterator[str]:
    """Yield the names of the classes to try, the most likely one first."""
    import transformers

    if name := diffusers_class(base.source):
        yield name
        return
    if task is not None:
        yield TASKS[task].model
        return
    if facts.kind and hasattr(transformers, facts.kind):
        yield facts.kind
        return
    config = config_of(base.source, base.revision)
    own = [name for name in config.architectures or () if hasattr(transformers, name)][:1]
    fitting = [
        classes.model for classes in TASKS.values() if type(config) in getattr(transformers, classes.mapping, ())
    ]
    yield from dict.fromkeys([*own, *fitting, _AUTO])


def _first_fit(bases: Sequence[Base], facts: BaseFacts) -> Base:
    """Return the first base that fits the adapter; if none fits, the first one, so that loading reports why."""
    for base in bases:
        try:
            model = skeleton(base)
        except ModelError:
            if len(bases) == 1:
                raise
            continue
        if len(bases) == 1 or _fits(model, facts):
            return attrs.evolve(base, labels=_labels_of(model, facts))
    return bases[0]


def _fits(model: nn.Module, facts: BaseFacts) -> bool:
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    shapes = _shapes(model)
    return modules.issuperset(facts.paths) and all(
        name in shapes and shapes[name] == tuple(shape) for name, shape in facts.shapes.items()
    )


def _labels_of(model: nn.Module, facts: BaseFacts) -> int:
    """Return the number of classes for the base's head, from the adapter's facts or its copied head; 0 if unknown."""
    if _CLASSIFIER not in type(model).__name__:
        return 0  # a table of tokens that is trained in full is no head with classes
    if facts.labels:
        return facts.labels
    own = getattr(getattr(model, "config", None), "num_labels", 0)
    shapes = _shapes(model)
    for name, shape in facts.copies.items():
        here = shapes.get(name, ())
        if here and len(shape) == len(here) and here[0] == own != shape[0] and tuple(shape[1:]) == here[1:]:
            return int(shape[0])
    return 0


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in own}


def with_base(problem: BaseMismatchError, base: Base, model: nn.Module, path: str) -> BaseMismatchError:
    """Extend the error of an adapter that does not fit by the base's name and the options that choose another base.

    Args:
        problem: The error.
        base: The base.
        model: The model that was built from it.
        path: The adapter. If the model has all of its modules, another class would not help.
    """
    named = base_facts(path).paths
    modules = {each for each, _ in model.named_modules(remove_duplicate=False)}
    has_all = bool(named) and modules.issuperset(named)
    task = "" if has_all else f", or the task of the adapter with --task ({', '.join(TASKS)})"
    return BaseMismatchError(f"{problem}\n- the base was {base.source} as {base.kind}; pass another with --base{task}")
