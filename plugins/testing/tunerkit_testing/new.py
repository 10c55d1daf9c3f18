"""A new method from a template: a distribution that installs, passes the conformance tests and builds a wheel."""

import importlib.util
import itertools
import json
import keyword
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath
from string import Template
from types import MappingProxyType
from typing import Final

import attrs

import tunerkit
from tunerkit import TunerkitError, plugin
from tunerkit.errors import shown

_LONGEST: Final = 40
_PREFIX: Final = "tunerkit-"


class NewMethodError(TunerkitError, ValueError):
    """A new method cannot have this name, or cannot be written to this place."""


@attrs.frozen
class Form:
    """A form that a new method can have; the folder of its name in templates adds to what all forms share.

    Attributes:
        summary: What the method does, for the README.
        settings: Settings for the generated tests and for the README's example.
        reference: What the adapter computes, as a line of the generated test that compares with a reference.
        contents: The files of the package, with what each contains.
        entry: What the entry point names in the package.
        needs: The distributions of tunerkit that it uses, in addition to core.
    """

    summary: str
    settings: Mapping[str, object]
    reference: str
    contents: Mapping[str, str]
    entry: str = "plugin"
    needs: tuple[str, ...] = ()


_HOOKS = Form(
    summary="each target gets a low-rank update ΔW = scale · P Q of a fixed rank",
    settings=MappingProxyType({"rank": 4}),
    reference="return base(x) + adapter.scale * (x @ adapter.q.T @ adapter.p.T)",
    contents={
        "config.py": "the settings",
        "adapter.py": "what the adapter adds to a layer's output",
        "plugin.py": "the hook implementations",
    },
)
FORMS: Final[Mapping[str, Form]] = {
    "function": Form(
        summary="one function says what is added to each weight, ΔW = scale · P Q of a fixed rank",
        settings=MappingProxyType({"rank": 4}),
        reference='return base(x) + adapter.settings["scale"] * (x @ adapter.q.T @ adapter.p.T)',
        contents={"method.py": "the method: its parameters, its settings, and what it adds to a weight"},
        entry="method:$function",
        needs=("tunerkit-verbs",),
    ),
    "hooks": _HOOKS,
    "scheduled": attrs.evolve(
        _HOOKS,
        summary="each target gets a low-rank update ΔW = scale · P Q, whose rank falls during training",
        settings=MappingProxyType({"rank": 2, "init_rank": 4}),
        contents={
            **_HOOKS.contents,
            "schedule.py": "the rank after each step",
            "training.py": "which columns of P and rows of Q stay",
        },
    ),
}


@attrs.frozen
class Names:
    """The names that follow from a method's own, such as ``"my-method"``."""

    method: str

    @property
    def distribution(self) -> str:
        """The name for pip, and of the folder: ``"tunerkit-my-method"``."""
        return _PREFIX + self.method

    @property
    def package(self) -> str:
        """The name to import: ``"tunerkit_my_method"``."""
        return self.distribution.replace("-", "_")

    @property
    def function(self) -> str:
        """The name of a function: ``"my_method"``; with an underscore if the name means something in its file."""
        plain = self.method.replace("-", "_")
        taken = {"nn", "partial", "parameter", "setting", "tunerkit"}
        return f"{plain}_" if keyword.iskeyword(plain) or plain in taken else plain

    @property
    def classes(self) -> str:
        """How the names of the classes begin: ``"MyMethod"``."""
        return "".join(part.capitalize() for part in self.method.split("-"))


def write_distribution(method: str, form: str, into: Path) -> Path:
    """Write a distribution with a new method. It is written completely or not at all.

    Args:
        method: The method's name.
        form: A key of `FORMS`.
        into: The folder to write the distribution's own folder into.

    Returns:
        The distribution's folder.

    Raises:
        NewMethodError: There is no such form, the name is invalid or taken, or the folder exists or cannot be written.
    """
    if form not in FORMS:
        raise NewMethodError(f"--form: choose function, hooks or scheduled, got {shown(form)}")
    names = _checked(method)
    target = into / names.distribution
    if os.path.lexists(target):  # also a link to nowhere
        raise NewMethodError(f"{target} exists already; remove it, or choose another name or --into another folder")
    texts = dict(_rendered(names, form))
    try:
        with tempfile.TemporaryDirectory(dir=into, prefix=".writing-") as scratch:
            project = Path(scratch) / names.distribution
            for path, text in texts.items():
                (project / path).parent.mkdir(parents=True, exist_ok=True)
                (project / path).write_text(text, encoding="utf-8")
            project.rename(target)
    except OSError as problem:
        raise NewMethodError(
            f"{target} cannot be written: {problem.strerror}; choose a folder that exists and is writable with --into"
        ) from problem
    return target


def files_to_edit(method: str, form: str) -> dict[str, str]:
    """Return the files of a new distribution that its author changes, in this order, with what each contains."""
    package = Names(method).package
    return {
        **{f"{package}/{file}": what for file, what in FORMS[form].contents.items()},
        "tests/test_reference.py": "a reference implementation to compare with",
        "tests/test_conformance.py": "the settings that the checks use",
        "README.md": "what the method does, and an example, which a test runs",
        "pyproject.toml": "the description, the authors and the licence",
    }


def _checked(method: str) -> Names:
    """Return the names of a new method. Raises `NewMethodError`, with the closest name that would do."""
    objection = _objection(method)
    if objection is not None:
        raise NewMethodError(f"a method cannot be named {shown(method)}: {objection}; for example {_closest(method)!r}")
    return Names(method)


def _objection(method: str) -> str | None:
    """Return why a method cannot have this name, or None."""
    valid = re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", method)
    if valid is None or len(method) > _LONGEST or method.startswith(_PREFIX):
        return (
            f"use at most {_LONGEST} letters from a to z and digits, a letter first, in parts joined by '-', without "
            f"{_PREFIX!r}, which comes by itself"
        )
    names, methods = Names(method), tunerkit.methods()
    clashing = {f"{names.classes}Config", f"{names.classes}Adapter"} & set(vars(plugin)["__all__"])
    if clashing:
        return f"tunerkit itself has a class {clashing.pop()}; choose another name"
    if method in methods:
        return f"{methods[method].distribution} has a method of this name; choose another one"
    try:
        version = metadata.version(names.distribution)
    except metadata.PackageNotFoundError:
        found = importlib.util.find_spec(names.package)
        return None if found is None else f"there is a package {names.package}; choose another name"
    return f"{names.distribution} {version} is installed; choose another name"


def _closest(method: str) -> str:
    """Return the closest name that is valid and free."""
    plain = unicodedata.normalize("NFKD", method[:1000]).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9]+", "-", plain).lstrip("0123456789-")
    while plain.startswith(_PREFIX):
        plain = plain.removeprefix(_PREFIX).lstrip("0123456789-")
    plain = plain[:_LONGEST].rstrip("-") or "my-method"
    short = plain[: _LONGEST - 4].rstrip("-")  # leaves room for a number
    names = itertools.chain([plain], (f"{short}-{number}" for number in itertools.count(2)))
    return next(name for name in names if _objection(name) is None)


def _rendered(names: Names, form: str) -> Iterator[tuple[PurePath, str]]:
    """Yield the path of each file of the distribution, and its text."""
    chosen = FORMS[form]
    version = ".".join(metadata.version("tunerkit").split(".")[:2])
    values = {
        "method": names.method,
        "distribution": names.distribution,
        "package": names.package,
        "Name": names.classes,
        "needed": "".join(f', "{name}>={version}"' for name in ("tunerkit", *chosen.needs)),
        "summary": chosen.summary,
        "settings": json.dumps(dict(chosen.settings))[1:-1],
        "function": names.function,
        "entry": f"{names.package}.{chosen.entry.replace('$function', names.function)}",
        "reference": chosen.reference,
        "contents": "\n".join(f"- `{names.package}/{file}`: {what}" for file, what in chosen.contents.items()),
    }
    templates = resources.files(__package__) / "templates"
    for folder in ("common", form):
        for path, text in _texts(templates / folder):
            yield _renamed(path, names), Template(text).substitute(values)


def _texts(folder: Traversable) -> Iterator[tuple[PurePath, str]]:
    """Yield the path in a folder, and the text, of each template."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from ((PurePath(entry.name, path), text) for path, text in _texts(entry))
        else:
            yield PurePath(entry.name), entry.read_text(encoding="utf-8")


def _renamed(path: PurePath, names: Names) -> PurePath:
    """Return the path of a template's result: without .txt, which hides templates from tools for Python."""
    parts = [names.package if part == "package" else part for part in path.with_suffix("").parts]
    return PurePath(*parts)
