"""The generated parts of the reference, as Markdown. A page says ``<!-- generated: NAME -->`` where one belongs."""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum, EnumMeta
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs
import pluggy
import typer
from typer.cli import get_docs_for_click

import tunerkit
from scripts.docs.gallery import measured
from scripts.release.building import address
from tunerkit import plugin
from tunerkit.config import TAG
from tunerkit.extras import PUBLISHED
from tunerkit.hooks import specs
from tunerkit.plugin import AdapterConfig, engines, trainers
from tunerkit_cli.app import build
from tunerkit_cli.recipes.reading import schema

_SIGNS: Final = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_GROUP: Final = re.compile(r"^# --- (?P<title>.+?) -+$")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table. A cell may contain no line break; a vertical bar is escaped."""
    heads = [*header]
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def first_sentence(text: str | None) -> str:
    """Return the first paragraph of a docstring, as Markdown in one line."""
    return " ".join((text or "").strip().partition("\n\n")[0].split()).replace("``", "`")


# --- The public names ------------------------------------------------------------------------------------------------


def users_names() -> list[str]:
    """Return the names of `tunerkit`."""
    return list(getattr(tunerkit, "__all__"))  # noqa: B009 - the stub has none


def api() -> str:
    """Describe the names of `tunerkit`."""
    return _public_names(tunerkit, users_names(), {})


def plugin_api() -> str:
    """Describe the names of `tunerkit.plugin`. Those that users have too are described on the users' page alone."""
    return _public_names(plugin, vars(plugin)["__all__"], dict.fromkeys(users_names(), "api.md"))


def engine_api() -> str:
    """Describe the names of `tunerkit.plugin.engines`."""
    return _names(engines, ())


def trainer_api() -> str:
    """Describe the names of `tunerkit.plugin.trainers`, except those that are described as names for engines."""
    return _names(trainers, vars(engines)["__all__"])


def _names(module: Any, described: Iterable[str]) -> str:
    """Describe the names of a small module: an overview in its own order, and what mkdocstrings finds in the code."""
    values = {name: getattr(module, name) for name in vars(module)["__all__"]}
    rows = ((f"[`{name}`](#{place_of(name, value)})", first_sentence(_words(value))) for name, value in values.items())
    entries = [_entry(name, value, members=False) for name, value in values.items() if name not in described]
    return "\n".join([table(["name", "what it is"], rows), *entries])


def _public_names(module: Any, names: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """Describe names in groups: an overview, then what mkdocstrings finds in the code."""
    groups: dict[str, dict[str, Any]] = {"Functions": {}, "Classes": {}, "Errors and warnings": {}, "Others": {}}
    for name in names:
        value = getattr(module, name)
        groups[_group_of(value)][name] = value
    parts: list[str] = []
    for title, values in groups.items():
        rows = (
            (f"[`{name}`]({elsewhere.get(name, '')}#{place_of(name, value)})", first_sentence(_words(value)))
            for name, value in values.items()
        )
        parts += [f"## {title}\n", table(["name", "what it is"], rows)] if values else []
        parts += [_entry(name, value) for name, value in values.items() if name not in elsewhere]
    return "\n".join(parts)


def _group_of(value: object) -> str:
    if inspect.isclass(value):
        return "Errors and warnings" if issubclass(value, BaseException) else "Classes"
    return "Functions" if inspect.isroutine(value) else "Others"


def place_of(name: str, value: Any) -> str:
    """Return where a public object is defined, as a dotted path: its anchor on the page."""
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"tunerkit.{name}"


def _entry(name: str, value: Any, *, members: bool = True) -> str:
    if inspect.isclass(value) or inspect.isroutine(value):
        return _directive(place_of(name, value), name) + ("" if members else "      members: false\n")
    return f"### `{name}` {{ #tunerkit.{name} }}\n\n{_words(value)}\n"


def _words(value: Any) -> str:
    """Return a docstring, or what a type alias stands for: the docstring of an alias would be that of its origin."""
    return inspect.cleandoc(value.__doc__ or "") if get_origin(value) is None else f"A short name for `{value}`."


def _directive(place: str, heading: str) -> str:
    return f"::: {place}\n    options:\n      heading: {heading}\n      toc_label: {heading}\n"


# --- Hooks -----------------------------------------------------------------------------------------------------------


def hook_names() -> list[str]:
    """Return the names of all hooks."""
    manager = pluggy.PluginManager(specs.PROJECT)
    manager.add_hookspecs(specs)
    return [*vars(manager.hook)]


def grouped_hooks() -> Mapping[str, list[str]]:
    """Return the hooks by the headings of their file, in its order."""
    groups: dict[str, list[str]] = {}
    known = set(hook_names())
    source = inspect.getsource(specs)
    starts = {each.lineno: each.name for each in ast.parse(source).body if isinstance(each, ast.FunctionDef)}
    title = ""
    for number, line in enumerate(source.splitlines(), start=1):
        if (found := _GROUP.match(line)) is not None:
            title = found["title"]
        if starts.get(number) in known:
            groups.setdefault(title, []).append(starts[number])
    return groups


def hooks() -> str:
    """Describe when hooks fire, all of them at a glance, and each one."""
    moments = inspect.cleandoc((specs.__doc__ or "").partition("When they fire::")[2].partition("\n\nA plain")[0])
    rules = inspect.cleandoc(specs.__doc__ or "").partition("\n\nAn answer")[2]
    parts = ["## When hooks fire\n", f"```python\n{_narrow(moments)}\n```\n", "## What an answer must be\n"]
    parts += [f"An answer{rules}\n", "## All hooks\n"]
    rows = (
        (f"[`{name}`](#{name})", _moment(name), _asked(name)) for names in grouped_hooks().values() for name in names
    )
    parts.append(table(["hook", "fires", "who is asked"], rows))
    for title, names in grouped_hooks().items():
        parts += [f"## {title}\n", *map(_hook, names)]
    return "\n".join(parts)


def _narrow(code: str) -> str:
    """Move the comments beside calls below them: a page is narrower than a terminal."""
    lines: list[str] = []
    indent = 0
    for line in code.splitlines():
        call, _, comment = line.partition("#")
        if call.strip():
            lines.append(call.rstrip())
            indent = len(call) - len(call.lstrip()) + 4
        lines += [f"{' ' * indent}# {comment.strip()}"] if comment else []
    return "\n".join(lines)


def _hook(name: str) -> str:
    """Describe one hook: its signature and its docstring."""
    text = inspect.cleandoc(getattr(specs, name).__doc__ or "")
    signature = ast.unparse(_definition(name)).partition("\n")[2].partition(":\n")[0]
    return f"### `{name}` {{ #{name} }}\n\n```python\n{signature}\n```\n\n{text.replace('``', '`')}\n"


def _definition(name: str) -> ast.FunctionDef:
    (found,) = [each for each in ast.parse(inspect.getsource(specs)).body if getattr(each, "name", "") == name]
    assert isinstance(found, ast.FunctionDef)
    return found


def _moment(name: str) -> str:
    found = re.search(r"^Fires (.+?)[.:](\s|$)", inspect.getdoc(getattr(specs, name)) or "", re.MULTILINE | re.DOTALL)
    return "" if found is None else " ".join(found[1].split()).replace("``", "`")


def _asked(name: str) -> str:
    manager = pluggy.PluginManager(specs.PROJECT)
    manager.add_hookspecs(specs)
    spec = getattr(manager.hook, name).spec
    return "the method's own plugin" if spec is not None and spec.opts["firstresult"] else "every plugin"


# --- The command -----------------------------------------------------------------------------------------------------


def command() -> str:
    """Describe the command with all subcommands, arguments and options, as ``typer utils docs`` writes it."""
    built = typer.main.get_command(build())
    text = get_docs_for_click(obj=built, ctx=typer.Context(built, info_name="tunerkit"), name="tunerkit", indent=1)
    return re.sub(r"^### `", "## `", text.partition("\n")[2], flags=re.MULTILINE)


# --- Recipes ---------------------------------------------------------------------------------------------------------


def recipe_keys() -> str:
    """Describe the keys of recipes, those of the installed plugins too, from their JSON schema."""
    rows = (
        (f"`{name}`", _kind(fragment), _json(fragment.get("default")), fragment["description"])
        for name, fragment in schema()["properties"].items()
    )
    return table(["key", "value", "default", "what it is"], rows)


def _kind(fragment: Mapping[str, Any]) -> str:
    if "enum" in fragment:
        return ", ".join(_json(each) for each in fragment["enum"] if each is not None)
    words = {"string": "text", "object": "mapping", "array": "list", "boolean": "true or false", "integer": "integer"}
    given = fragment.get("type", "anything")
    kinds = [given] if isinstance(given, str) else [each for each in given if each != "null"]
    least = f" ≥ {fragment['minimum']}" if "minimum" in fragment else ""
    most = f" ≤ {fragment['maximum']}" if "maximum" in fragment else ""
    return " or ".join(words.get(kind, kind) for kind in kinds) + least + most


def _json(value: object) -> str:
    return "none" if value is None else f"`{json.dumps(value)}`"


# --- Settings of methods ---------------------------------------------------------------------------------------------


def settings(config: type, own: bool) -> str:
    """Describe the fields of a config: ``own`` leaves out those that it inherits."""
    fields = [each for each in attrs.fields(config) if not (own and each.inherited)]
    rows = (
        (f"`{each.name}`", allowed(each), f"`{_default(each)}`", _sentence(each.metadata["doc"])) for each in fields
    )
    return table(["setting", "allowed", "default", "what it does"], rows)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].removesuffix(".") if text[:1].isascii() and text[1:2].islower() else text


def _default(field: "attrs.Attribute[Any]") -> str:
    factory = getattr(field.default, "factory", None)
    default = field.default if factory is None else factory()
    return repr(default.value if isinstance(default, Enum) else str(default) if isinstance(default, Path) else default)


def allowed(field: "attrs.Attribute[Any]") -> str:
    """Say which values a setting takes: its type, and the range of its numbers."""
    kinds = dict.fromkeys(_kinds(field.type))
    limits = [f"{sign} {field.metadata[key]}" for key, sign in _SIGNS.items() if field.metadata.get(key) is not None]
    return " or ".join(kinds) + (f"; {' and '.join(limits)}" if limits else "")


def _kinds(annotation: Any, tagged: bool = False) -> Iterator[str]:
    """Yield what an annotation allows. A class is a mapping: a tagged one has a key with its name."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        several = sum(map(attrs.has, members)) > 1
        for member in members:
            yield from _kinds(member, several)
    elif origin is Literal or isinstance(annotation, EnumMeta):
        choices = members if origin is Literal else annotation
        yield from (f"`{each.value if isinstance(each, Enum) else each!r}`" for each in choices)
    elif origin in (tuple, list, set, frozenset):
        inner = dict.fromkeys(kind for member in members if member is not Ellipsis for kind in _kinds(member))
        yield f"list of {'different ' if origin in (set, frozenset) else ''}{' or '.join(inner)}"
    elif origin is not None:
        yield f"mapping to {' or '.join(_kinds(members[1]))}"
    elif attrs.has(annotation):
        fields = [field for field in attrs.fields(attrs.resolve_types(annotation)) if field.init]
        keys = [f"`{TAG}: {annotation.__name__}`"] if tagged else []
        yield f"mapping with {', '.join([*keys, *(f'`{each.name}` ({allowed(each)})' for each in fields)])}"
    else:
        yield "`None`" if annotation in (None, type(None)) else f"`{annotation.__name__}`"


def methods() -> dict[str, type]:
    """Return the config class of each installed method, by the method's name."""
    return {name: type(tunerkit.structure(name, {})) for name, info in tunerkit.methods().items() if not info.error}


def other_methods() -> str:
    """Describe the settings of every installed method that has no section of its own on the page."""
    parts = [
        f"## {name} (`{config.__qualname__}`)\n\n{first_sentence(config.__doc__)}\n\n{settings(config, own=True)}"
        for name, config in methods().items()
        if name not in ("lora", "adalora")
    ]
    return "\n".join(parts)


def where_to_get_it() -> str:
    """Return the line above the command that installs from a clone; empty once there is an index to install from."""
    if PUBLISHED:
        return ""
    return f"In a clone, from `git clone {address()}`:\n" if address() else "In your clone of the repository:\n"


FRAGMENTS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "api": api,
        "plugin api": plugin_api,
        "engine api": engine_api,
        "trainer api": trainer_api,
        "hooks": hooks,
        "command": command,
        "recipe keys": recipe_keys,
        "settings of every method": lambda: settings(AdapterConfig, own=False),
        "settings of lora": lambda: settings(methods()["lora"], own=True),
        "settings of adalora": lambda: settings(methods()["adalora"], own=True),
        "settings of other methods": other_methods,
        "what methods cost": measured,
        "where to get it": where_to_get_it,
    }
)
