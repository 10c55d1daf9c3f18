"""The names that ``--set`` may use without their section: the trainer's arguments and the method's settings."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from tunerkit import hooks
from tunerkit_cli.recipes.recipe import DEFAULT_METHOD
from tunerkit_cli.tasks import TASKS, task_of
from tunerkit_cli.tasks.base import MissingPackageError


def trainer_arguments(mapping: Mapping[str, Any], settings: Iterable[str]) -> set[str]:
    """The names of the arguments of the task's trainer; without a task, those of any task's."""
    task = _given("task", mapping, settings)
    tasks = [task] if task is not None and task in TASKS else [*TASKS]
    return {name for each in tasks for name in _arguments_of(each)}


def _arguments_of(task: str) -> set[str]:
    """The names of the arguments of a task's trainer; none if its package is missing, which is reported later."""
    try:
        return {field.name for field in dataclasses.fields(task_of(task).trainer_classes()[1])}
    except MissingPackageError:
        return set()


def method_settings(mapping: Mapping[str, Any], settings: Iterable[str]) -> set[str]:
    """The names of the method's settings; of any installed method's if an adapter decides it.

    Raises `UnknownMethodError` if the method is not installed.
    """
    method = _given("method", mapping, settings)
    if method is None and _given("from_adapter", mapping, settings) is not None:
        return {name for each, info in hooks.registry.methods().items() if info.error is None for name in _of(each)}
    return _of(method or DEFAULT_METHOD)


def _of(method: str) -> set[str]:
    return {field.name for field in attrs.fields(hooks.registry.get(method).config)}


def _given(key: str, mapping: Mapping[str, Any], settings: Iterable[str]) -> str | None:
    values = [text.partition("=")[2].strip() for text in settings if text.partition("=")[0].strip() == key]
    found = values[-1] if values else mapping.get(key)
    return found if isinstance(found, str) else None
