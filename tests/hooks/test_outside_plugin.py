"""A third-party plugin: built and installed by pip, used in a separate process, beside one of the same method."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tunerkit
import tunerkit_testing

# The whole of a plugin's module.
PLUGIN = """\
from tunerkit.plugin import Method, hookimpl
from tunerkit_testing import toy_adapters, toy_methods


class Shift(toy_adapters.Shift):
    pass


class Plugin(toy_methods.Shifting):
    @hookimpl
    def tunerkit_methods(self):
        return [Method("shift", config=toy_methods.ShiftConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base):
        return Shift(base)


plugin = Plugin()
"""

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "{version}"
dependencies = ["tunerkit"]

[project.entry-points.tunerkit]
{entry} = "{module}:plugin"
"""

# What a user does with the plugin; it prints what it found as JSON.
SESSION = """\
import copy, json, sys, warnings
import attrs, safetensors, torch, tunerkit
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
untouched, x = copy.deepcopy(base), torch.randn(32, 8)
found = {"methods": {name: attrs.asdict(info) for name, info in tunerkit.methods().items()}}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model = tunerkit.wrap(base, "shift", {"targets": ["0", "2"]})
found["told"] = [str(warning.message) for warning in told]
adapters = tunerkit.tuner(model).adapters()
found["adapters"] = {path: f"{type(a).__module__}.{type(a).__name__}" for path, a in adapters.items()}
found["starts as the base"] = torch.equal(model(x), untouched(x))
optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
tunerkit.attach(model, optimizer)
model(x).sum().backward()
optimizer.step()
found["all train"] = all(bool(a.v.any()) for a in adapters.values())
path = tunerkit.save(model, sys.argv[1])
found["loads equal"] = torch.equal(tunerkit.load(copy.deepcopy(untouched), path)(x), model(x))
with safetensors.safe_open(path, framework="pt") as file:
    found["versions"] = json.loads(file.metadata()["tunerkit"])["versions"]
found["base untouched"] = torch.equal(tunerkit.unwrap(model)(x), untouched(x))
print(json.dumps(found))
"""


def write_distribution(folder: Path, distribution: str, text: str, *, entry: str, version: str = "0.1.0") -> Path:
    """A project of one module, ready for pip."""
    module = distribution.replace("-", "_")
    project = folder / distribution
    (project / module).mkdir(parents=True)
    (project / module / "__init__.py").write_text(text)
    pyproject = PYPROJECT.format(distribution=distribution, version=version, entry=entry, module=module)
    (project / "pyproject.toml").write_text(pyproject)
    return project


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of `SESSION` in a process where the plugin and one of the same method are installed."""
    folder = tmp_path_factory.mktemp("outside")
    projects = [
        write_distribution(folder, "tunerkit-shift", PLUGIN, entry="shift", version="0.7.0"),
        write_distribution(folder, "acme-colliding", PLUGIN, entry="colliding"),
    ]
    site = folder / "site"
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    _run([sys.executable, "-m", "pip", "install", "--quiet", *options, *map(str, projects)])
    # Both may be imported from a checkout: that must come along, and nothing of the developer's limits.
    checkouts = [str(Path(str(module.__file__)).parent.parent) for module in (tunerkit, tunerkit_testing)]
    environment = {name: value for name, value in os.environ.items() if name != "TUNERKIT_PLUGINS"}
    paths = [str(site), *checkouts, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    printed = _run([sys.executable, "-c", SESSION, str(folder / "out")], env=environment)
    found: dict[str, Any] = json.loads(printed)
    return found


def _run(command: list[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_plugin_is_listed_with_its_distribution(session: dict[str, Any]) -> None:
    """After pip install the method is available, with the name and version of its distribution."""
    assert session["methods"]["shift"] == {"distribution": "tunerkit-shift", "version": "0.7.0", "error": None}


def test_its_method_wraps_trains_saves_and_leaves_the_base_as_it_was(session: dict[str, Any]) -> None:
    """Its adapters are at both targets, don't change the first output, learn, and load bit for bit."""
    assert session["adapters"] == {"0": "tunerkit_shift.Shift", "2": "tunerkit_shift.Shift"}
    for what in ("starts as the base", "all train", "loads equal", "base untouched"):
        assert session[what], what


def test_wrapping_with_a_method_that_two_provide_names_the_loser(session: dict[str, Any]) -> None:
    """With the way to choose the other one."""
    loser = "acme-colliding's is left out. To use it, list the plugins that may load in the environment variable "
    assert [text for text in session["told"] if f"{loser}TUNERKIT_PLUGINS, without 'shift'" in text]


def test_the_file_says_which_distribution_the_method_came_from(session: dict[str, Any]) -> None:
    """With its version, beside those of tunerkit and torch."""
    assert session["versions"].keys() == {"tunerkit", "torch", "tunerkit-shift"}
    assert session["versions"]["tunerkit-shift"] == "0.7.0"
