"""The generated reference is complete: every public name, hook, option, setting and key stands on the built site."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

pytest.importorskip("material", reason="the site is built with mkdocs-material, which is not installed")
pytest.importorskip("mkdocstrings", reason="the API is read by mkdocstrings, which is not installed")
pytest.importorskip("tunerkit_adalora", reason="the site describes all plugins, which are not installed")

import pluggy
import typer

import tunerkit
from scripts.docs import reference
from scripts.docs.reference import allowed
from tests.support.config_checks import Kinds
from tests.support.site import Read, built
from tunerkit import plugin
from tunerkit.hooks import specs
from tunerkit.plugin import engines, trainers
from tunerkit_cli.app import build
from tunerkit_cli.recipes.reading import schema


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory)


def overview(page: Read) -> dict[str, list[str]]:
    """The rows of a page's tables by their first cell."""
    return {row[0]: row[1:] for row in page.rows if row}


MANAGER = pluggy.PluginManager(specs.PROJECT)
MANAGER.add_hookspecs(specs)
# The page for each kind of reader, and what stands on it.
PAGES: dict[str, tuple[str, Iterable[str]]] = {
    "users": ("api", getattr(tunerkit, "__all__")),  # noqa: B009 - the stub has none
    "authors": ("plugin-api", vars(plugin)["__all__"]),
    "engines": ("plugin-api", vars(engines)["__all__"]),
    "trainers": ("plugin-api", vars(trainers)["__all__"]),
    "hooks": ("hooks", vars(MANAGER.hook)),
}


@pytest.mark.parametrize("who", PAGES)
def test_every_name_is_described(site: Path, who: str) -> None:
    """It has a heading, for an author's name maybe the users', and a sentence in the overview that leads there."""
    name, wanted = PAGES[who]
    page, users = Read(site / "reference" / f"{name}.html"), Read(site / "reference" / "api.html")
    assert wanted
    assert set(wanted) <= {each.text for each in (*page.headings, *(users.headings if who == "authors" else ()))}
    assert all(overview(page)[each][0] for each in wanted)
    assert [link for link in page.links if link.startswith("#") and link[1:] not in page.anchors] == []
    assert {link.removeprefix("api.html#") for link in page.links if link.startswith("api.html#")} <= users.anchors


def subcommands() -> Mapping[str, Any]:
    found: Any = typer.main.get_command(build())
    return {name: each for name, each in found.commands.items() if not each.hidden}


def test_every_subcommand_and_option_is_described(site: Path) -> None:
    """Each subcommand has a heading; each option and argument an item below it, with what its help says."""
    page = Read(site / "reference" / "command-line.html")
    assert {f"tunerkit {name}" for name in subcommands()} <= {heading.text for heading in page.headings}
    for name, each in subcommands().items():
        for parameter in each.params:
            is_option = parameter.param_type_name == "option"
            shown = parameter.opts[0] if is_option else parameter.metavar or parameter.name
            described = [item for item in page.items if item.startswith(shown)]
            words = " ".join((parameter.help or "").replace("`", "").split())
            assert any(words in item.replace("`", "") for item in described), f"{name} {shown}"


def settings() -> Iterator["attrs.Attribute[Any]"]:
    for name, info in tunerkit.methods().items():
        assert info.error is None
        yield from attrs.fields(type(tunerkit.structure(name, {})))


def default_of(field: "attrs.Attribute[Any]") -> object:
    factory = getattr(field.default, "factory", None)
    return field.default if factory is None else factory()


def test_every_setting_is_described_with_its_range_and_default(site: Path) -> None:
    """Each field of each installed method's config has a row with its limits, its default and its meaning."""
    rows = [row for row in Read(site / "reference" / "methods.html").rows if row]
    for field in settings():
        default = default_of(field)
        mine = [row for row in rows if row[0] == field.name and row[2] == repr(default)]
        assert mine, field.name
        limits = [str(field.metadata[key]) for key in ("ge", "gt", "le", "lt") if field.metadata[key] is not None]
        assert any(all(limit in row[1] for limit in limits) and row[3] for row in mine), field.name


def test_every_kind_of_field_is_described() -> None:
    """Choices, collections and classes inside, with the ranges of their fields and the key that names a class."""
    cells = {field.name: allowed(field) for field in attrs.fields(Kinds)}
    linear = "`steps` (`int`; ≥ 1), `unit` (`'steps'` or `'share'`)"
    cosine = f"`start` (`float`), `warm_up` (mapping with {linear} or `None`), `share` (`float`)"
    assert cells["folder"] == "`Path` or `None`"
    assert cells["size"] == "`1` or `9` or `None`"
    assert cells["several"] == "list of `float`; ≥ 0"
    assert cells["names"] == "list of different `str`"
    assert cells["shape"] == f"mapping with `type: Linear`, {linear} or mapping with `type: Cosine`, {cosine}"
    assert cells["stages"] == f"mapping to mapping with {linear}"


def test_every_recipe_key_is_described(site: Path) -> None:
    """Each key of the schema has a row with its default and its description; nothing else has one."""
    rows = overview(Read(site / "reference" / "recipe-keys.html"))
    properties = schema()["properties"]
    assert set(rows) == set(properties)
    for name, fragment in properties.items():
        assert rows[name][2] == " ".join(fragment["description"].replace("`", "").split())


def test_the_home_page_says_where_to_clone_until_there_is_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is one setting, empty while there is none; once distributions are published, no clone is needed."""
    monkeypatch.setattr(reference, "PUBLISHED", False)
    for place, line in (("", "In your clone of the repository:\n"), ("https://e.org/t", "`git clone https://e.org/t`")):
        monkeypatch.setattr(reference, "address", lambda place=place: place)
        assert line in reference.where_to_get_it()
    monkeypatch.setattr(reference, "PUBLISHED", True)
    assert reference.where_to_get_it() == ""
