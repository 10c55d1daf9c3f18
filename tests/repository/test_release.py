"""What is published: one version, complete sdists, and commands to install that work today."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import tunerkit
from scripts.release import building, llms
from scripts.release.building import ROOT, for_the_index, projects, urls
from scripts.release.install_lines import mended, pages, problems
from tunerkit import extras

PLUGINS = [each.name for each in projects()[1:]]
WORKFLOWS = [*ROOT.glob(".github/workflows/*.yml"), *ROOT.glob("plugins/testing/**/workflows/*.yml.txt")]


def project_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    return found


def built(folder: Path, target: str, into: Path) -> Path:
    """A wheel or an sdist, built by hatchling from a folder."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(into)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = into.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return file


# --- One version ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_has_the_version_of_the_core(name: str) -> None:
    """Law: `tunerkit.__version__` is the one place; no other file states a version of ours."""
    project = project_of(ROOT / "plugins" / name)
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert (ROOT / "plugins" / name / project["tool"]["hatch"]["version"]["path"]).samefile(tunerkit.__file__)
    assert building.version() == tunerkit.__version__


@pytest.mark.parametrize("folder", projects(), ids=lambda each: each.name)
def test_our_distributions_ask_for_each_other_from_this_minor_version_on(folder: Path) -> None:
    """A plugin is made for the core that it is released with, and for later ones."""
    project = project_of(folder)["project"]
    lists = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    ours = [r for texts in lists for r in map(Requirement, texts) if r.name.startswith("tunerkit-")]
    ours += [r for r in map(Requirement, project["dependencies"]) if r.name == "tunerkit"]
    version = Version(tunerkit.__version__)
    assert {str(r.specifier) for r in ours} == {f">={version.major}.{version.minor}"}
    assert {r.name.removeprefix("tunerkit-") for r in ours} - {"tunerkit"} <= set(PLUGINS)


def test_every_list_of_the_plugins_is_complete() -> None:
    """The Makefile, uv's workspace, the extras, and [all], which brings every one of them."""
    project = project_of(ROOT)
    makefile = re.search(r"^NAMES := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert makefile is not None
    assert sorted(makefile[1].split()) == PLUGINS
    assert sorted(project["tool"]["uv"]["sources"]) == sorted(["tunerkit", *(f"tunerkit-{name}" for name in PLUGINS)])
    optional = project["project"]["optional-dependencies"]
    (everything,) = map(Requirement, optional["all"])
    assert set(PLUGINS) <= everything.extras <= set(optional)
    for name in PLUGINS:
        assert f"tunerkit-{name}" in {Requirement(text).name for text in optional[name]}


def test_an_sdist_of_a_plugin_is_built_where_there_is_no_clone(tmp_path: Path) -> None:
    """It carries the version, which its pyproject.toml looks for in the core."""
    pytest.importorskip("hatchling", reason="hatchling builds the distributions")
    sdist = built(ROOT / "plugins/lora", "sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    wheel = built(tmp_path / sdist.name.removesuffix(".tar.gz"), "wheel", tmp_path)
    assert wheel.name == f"tunerkit_lora-{tunerkit.__version__}-py3-none-any.whl"


# --- What an index shows ----------------------------------------------------------------------------------------------


def test_without_an_address_nothing_is_shown_and_with_one_every_link_has_it() -> None:
    """Law: the address is one variable. Empty, it leaves no table and no link that leads nowhere."""
    page = "[a](docs/a.md), [b](../lora/README.md#x), [c](https://c.org), [d](#d)![e](e.png)"
    assert urls("") == ""
    assert for_the_index(page, "plugins/peft", "") == "a, b, [c](https://c.org), [d](#d)"
    table = tomllib.loads(urls("https://example.org/t"))["project"]["urls"]
    assert all(url.startswith("https://example.org/t") for url in table.values())
    shown = for_the_index(page, "plugins/peft", "https://example.org/t")
    assert "(https://example.org/t/blob/main/plugins/peft/docs/a.md)" in shown
    assert "(https://example.org/t/blob/main/plugins/lora/README.md#x)" in shown
    assert "[c](https://c.org), [d](#d)![e](https://example.org/t/raw/main/plugins/peft/e.png)" in shown


def test_what_is_staged_is_valid_and_has_the_address(tmp_path: Path) -> None:
    """Every pyproject.toml of the copy has the table; the tree itself is not changed."""
    building.stage(tmp_path, "https://example.org/t")
    assert len(projects(tmp_path)) == len(PLUGINS) + 1
    for each in projects(tmp_path):
        assert project_of(each)["project"]["urls"]["Source"] == "https://example.org/t"
        assert "](../" not in (each / "README.md").read_text("utf-8")


def test_every_file_of_a_package_is_staged(tmp_path: Path) -> None:
    """Templates too, whose folders are named like those of tests."""
    building.stage(tmp_path, "")
    for package in (ROOT / "tunerkit", *ROOT.glob("plugins/*/tunerkit_*")):
        files = [each.relative_to(ROOT) for each in package.rglob("*") if each.is_file() and each.suffix != ".pyc"]
        assert [file for file in files if not (tmp_path / file).is_file()] == []


# --- Commands that install --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", list(pages()), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_how_to_install_what_works_today(page: Path) -> None:
    """Law: while `PUBLISHED` is false, a command that installs ours names the folder of wheels; later, none does."""
    assert problems(page.read_text("utf-8")) == []


def commands_in_code(text: str) -> Iterator[str]:
    """The texts in Python code, docstrings apart, that install one of our distributions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            said = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = node.value
        else:
            continue
        if re.search(r"pip install (?!-e)[^`]*tunerkit", said):
            yield said


def test_messages_take_the_command_from_one_function() -> None:
    """`tunerkit.extras.install` alone says how to install, so that one line changes all messages."""
    files = [*ROOT.glob("tunerkit/**/*.py"), *ROOT.glob("plugins/*/tunerkit_*/**/*.py")]
    found = {file.relative_to(ROOT).as_posix(): list(commands_in_code(file.read_text("utf-8"))) for file in files}
    assert {name for name, commands in found.items() if commands} == {"tunerkit/extras.py"}


def test_the_command_names_extras_that_exist() -> None:
    """Each of the extras that messages name, in a form that pip takes."""
    optional = project_of(ROOT)["project"]["optional-dependencies"]
    named = {each.extra for each in (*extras.READERS, *extras.LIBRARIES)}
    named |= {*extras.DOES.values(), *extras.VERBS.values()}
    assert named <= set(optional)
    assert f'"tunerkit[{",".join(sorted(named))}]"' in extras.install(*sorted(named))


def test_what_has_left_core_is_brought_by_the_distribution_that_messages_name() -> None:
    """Law: the entry points of the group `tunerkit.verbs` in this repository are those that core knows, no others."""
    found = {}
    for folder in projects()[1:]:
        points = project_of(folder)["project"].get("entry-points", {}).get("tunerkit.verbs", {})
        found.update(dict.fromkeys(points, folder.name))
    assert found == extras.VERBS


@pytest.mark.parametrize("page", list(pages()), ids=lambda page: str(page.relative_to(ROOT)))
def test_once_published_no_page_speaks_of_the_folder(page: Path) -> None:
    """`make pages` after the change of one line leaves nothing behind."""
    later = mended(page.read_text("utf-8"), "")
    assert problems(later, "") == []
    assert "on no index" not in later


def test_one_line_changes_what_messages_say() -> None:
    """Today a folder of wheels, later an index."""
    assert extras.install("lora", "cli") == (
        'pip install --find-links dist "tunerkit[lora,cli]", after `make dist` in a clone'
    )
    later: dict[str, Any] = {"__name__": "extras"}
    source = (ROOT / "tunerkit/extras.py").read_text("utf-8")
    exec(source.replace("PUBLISHED: Final = False", "PUBLISHED: Final = True"), later)
    assert later["install"]("lora", "cli") == 'pip install "tunerkit[lora,cli]"'


# --- Workflows --------------------------------------------------------------------------------------------------------


def test_every_action_is_pinned_by_a_commit() -> None:
    """A tag can be moved to other code; the release of a pin stands in a comment beside it."""
    for file in WORKFLOWS:
        lines = re.findall(r"uses: *(\S+)(.*)", file.read_text("utf-8"))
        assert lines
        assert [used for used, rest in lines if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", used)] == []
        assert [used for used, rest in lines if not re.fullmatch(r" # v\d+\.\d+\.\d+", rest)] == []


def test_only_the_publishing_job_may_ask_for_a_token() -> None:
    """Trusted publishing: no secret is stored, and what builds and tests cannot publish."""
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text("utf-8"))
    assert release["permissions"] == {"contents": "read"}
    asking = [name for name, job in release["jobs"].items() if "id-token" in job.get("permissions", {})]
    assert asking == ["publish"]
    assert release["jobs"]["publish"]["environment"]["name"] == "pypi"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text("utf-8")


# --- The repository's own pages ---------------------------------------------------------------------------------------


def test_the_map_of_the_documentation_is_that_of_the_site() -> None:
    """llms.txt has every page of the site's navigation, with what the page says of itself; `make pages` writes it."""
    assert (ROOT / "llms.txt").read_text("utf-8") == llms.text(building.address())


def test_paths_and_targets_that_agents_md_names_exist() -> None:
    """And the same of CONTRIBUTING.md."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for page in ("AGENTS.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text("utf-8")
        assert [name for name in re.findall(r"(?m)(?:^|`|=\S+ )make ([a-z-]+)", text) if name not in targets] == []
        named = re.findall(r"`((?:tunerkit|plugins|tests|scripts|docs|benchmarks|examples)/[\w./*-]*)`", text)
        assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


# --- Exact versions ---------------------------------------------------------------------------------------------------


def test_constraints_are_exact_versions_without_addresses() -> None:
    """What CI installs: releases as on an index, and none of ours."""
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[0-9][\w.]*(; .+)?", line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(names)
    assert not any(name.startswith("tunerkit") for name in names)


def exact_versions(name: str) -> dict[str, str]:
    """The versions in a file at the top of the repository."""
    lines = [line for line in (ROOT / name).read_text("utf-8").splitlines() if not line.startswith("#")]
    return dict(line.partition(";")[0].split("==") for line in lines)


@pytest.mark.parametrize("folder", projects(), ids=lambda each: each.name)
def test_core_is_tested_with_the_oldest_versions_that_anybody_asks_for(folder: Path) -> None:
    """Plugins may need newer ones. torch is apart: `make test-core TORCH=2.9.1`."""
    oldest = exact_versions("oldest.txt")
    wanted = [Requirement(text) for text in project_of(folder)["project"]["dependencies"]]
    for own in wanted:
        lowest = next((each.version for each in own.specifier if each.operator == ">="), None)
        if folder == ROOT and own.name != "torch":
            assert f"{oldest[own.name]}.".startswith(f"{lowest}."), own
        elif own.name in oldest and lowest is not None:
            tested = oldest[own.name].split(".")[: lowest.count(".") + 1]
            assert Version(lowest) >= Version(".".join(tested)), own


@pytest.mark.parametrize("folder", projects(), ids=lambda each: each.name)
def test_constraints_are_within_what_we_ask_for(folder: Path) -> None:
    """And every library that a distribution needs has its line."""
    exact = exact_versions("constraints.txt")
    for wanted in map(Requirement, project_of(folder)["project"]["dependencies"]):
        if not wanted.name.startswith("tunerkit"):
            assert wanted.specifier.contains(exact[wanted.name])
