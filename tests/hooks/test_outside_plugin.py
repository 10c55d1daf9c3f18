"""A third-party plugin: built and installed by pip, used in a separate process, next to bad plugins."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tunerkit

# The whole of a plugin: what a user sets, what is trained, what core asks for.
PLUGIN = '''\
"""Tune a model by a trained vector behind each target."""

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, hookimpl, setting


@attrs.frozen
class ShiftConfig(AdapterConfig):
    """What a user sets, beyond what every method has."""

    scale: float = setting(1.0, gt=0, doc="Factor of the vector.")


class Shift(Adapter):
    """``v`` (out,): adds scale * v to the base layer's output."""

    reads_output = reads_weight = False

    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(features))  # zeros: nothing is added at the start
        self.scale = scale

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + base.shape_bias(self.scale * self.v).to(y.dtype)


@hookimpl
def tunerkit_methods() -> list[Method]:
    return [Method("shift", config=ShiftConfig)]


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: ShiftConfig) -> Shift:
    return Shift(base.out_features, config.scale)


@hookimpl
def tunerkit_delta(adapter: Shift) -> Delta:
    return Delta(bias=adapter.scale * adapter.v)
'''

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "{version}"
dependencies = ["tunerkit"]

[project.entry-points.tunerkit]
{entry} = "{module}"
"""

# It wants to be asked first, about everybody's layers, and spoils all it is asked for.
CARELESS = '''\
"""A careless plugin."""

import attrs
import torch
from tunerkit.plugin import Adapter, AdapterConfig, Delta, Method, hookimpl


@attrs.frozen
class CarelessConfig(AdapterConfig):
    """Nothing to set."""


class Noise(Adapter):
    reads_output = reads_weight = False

    def forward(self, base, x, y):
        return torch.randn_like(y)


@hookimpl
def tunerkit_methods():
    return [Method("careless", config=CarelessConfig)]


@hookimpl(tryfirst=True)
def tunerkit_build_adapter(target, base, config):
    return Noise()


@hookimpl(tryfirst=True)
def tunerkit_before_step(tuner):
    for parameter in tuner.model.parameters():
        parameter.data.fill_(torch.nan)


@hookimpl(tryfirst=True)
def tunerkit_delta(adapter):
    return Delta(bias=torch.full((1000,), torch.nan))


@hookimpl(tryfirst=True)
def tunerkit_base_layers():
    raise RuntimeError("careless")
'''

# What a user does with the plugin; it prints what it found as JSON.
SESSION = """\
import copy, json, sys, warnings
import attrs, safetensors, torch, tunerkit
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
untouched = copy.deepcopy(base)
x, wanted = torch.randn(32, 8), torch.ones(32, 2)
found = {"methods": {name: attrs.asdict(info) for name, info in tunerkit.methods().items()}}

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model = tunerkit.wrap(base, "shift", {"scale": 2.0, "targets": ["0", "2"]})
found["told"] = [str(warning.message) for warning in told]
adapters = tunerkit.tuner(model).adapters()
found["adapters"] = {path: f"{type(a).__module__}.{type(a).__name__}" for path, a in adapters.items()}
found["starts as the base"] = torch.equal(model(x), untouched(x))

optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
tunerkit.attach(model, optimizer)
losses = []
for _ in range(5):
    loss = nn.functional.mse_loss(model(x), wanted)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
found["losses"] = losses
found["all train"] = all(bool(a.v.any()) for a in adapters.values())
trained = model(x).detach()

path = tunerkit.save(model, sys.argv[1])
loaded = tunerkit.load(copy.deepcopy(untouched), path)
with safetensors.safe_open(path, framework="pt") as file:
    found["versions"] = json.loads(file.metadata()["tunerkit"])["versions"]
found["loads equal"] = torch.equal(loaded(x), trained)

tunerkit.merge(model)
found["merge error"] = ((model(x) - trained).abs().max() / trained.abs().max()).item()
tunerkit.unmerge(model)
plain = tunerkit.unwrap(model)
kept = [torch.equal(*pair) for pair in zip(plain.state_dict().values(), untouched.state_dict().values(), strict=True)]
found["base untouched"] = all(kept) and list(plain.state_dict()) == list(untouched.state_dict())
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
    """The results of `SESSION` in a process where the plugin and three bad ones are installed."""
    folder = tmp_path_factory.mktemp("outside")
    projects = [
        write_distribution(folder, "tunerkit-shift", PLUGIN, entry="shift", version="0.7.0"),
        write_distribution(folder, "acme-broken", "import a_module_that_nobody_has\n", entry="broken"),
        write_distribution(folder, "acme-colliding", PLUGIN.replace("Shift", "Usurper"), entry="colliding"),
        write_distribution(folder, "acme-careless", CARELESS, entry="careless"),
    ]
    site = folder / "site"
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    _run([sys.executable, "-m", "pip", "install", "--quiet", *options, *map(str, projects)])
    # tunerkit may be imported from its checkout: that must come along, and nothing of the developer's limits.
    checkout = str(Path(tunerkit.__file__).parent.parent)
    environment = {name: value for name, value in os.environ.items() if name != "TUNERKIT_PLUGINS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), checkout, environment.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
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


def test_its_method_wraps_and_trains(session: dict[str, Any]) -> None:
    """Its adapters are at both targets, don't change the first output, and learn through the attached optimizer."""
    assert session["adapters"] == {"0": "tunerkit_shift.Shift", "2": "tunerkit_shift.Shift"}
    assert session["starts as the base"]
    assert session["all train"]
    assert session["losses"] == sorted(session["losses"], reverse=True)
    assert session["losses"][-1] < 0.5 * session["losses"][0]


def test_its_adapter_saves_loads_merges_and_leaves_the_base_as_it_was(session: dict[str, Any]) -> None:
    """Loaded output is bit-identical, merged output is equal to 1e-5, and the base is restored bit for bit."""
    assert session["loads equal"]
    assert session["merge error"] <= 1e-5
    assert session["base untouched"]


def test_a_broken_plugin_beside_it_is_named_with_its_reason(session: dict[str, Any]) -> None:
    """The list has its entry point, its distribution and the error at import."""
    broken = session["methods"]["broken"]
    assert (broken["distribution"], broken["version"]) == ("acme-broken", "0.1.0")
    assert broken["error"] == "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"


def test_a_colliding_plugin_beside_it_is_named_with_both_distributions(session: dict[str, Any]) -> None:
    """Its name sorts first, yet it doesn't get the method; the list says which distribution owns it."""
    colliding = session["methods"]["shift (acme-colliding)"]
    assert colliding["distribution"] == "acme-colliding"
    assert "tunerkit-shift" in colliding["error"]
    assert "acme-colliding" in colliding["error"]


def test_wrapping_with_a_method_that_two_provide_names_the_loser(session: dict[str, Any]) -> None:
    """With the way to choose the other one."""
    loser = "acme-colliding's is left out. To use it, list the plugins that may load in the environment variable "
    assert [text for text in session["told"] if f"{loser}TUNERKIT_PLUGINS, without 'shift'" in text]


def test_the_file_says_which_distribution_the_method_came_from(session: dict[str, Any]) -> None:
    """With its version, beside those of tunerkit and torch."""
    assert session["versions"].keys() == {"tunerkit", "torch", "tunerkit-shift"}
    assert session["versions"]["tunerkit-shift"] == "0.7.0"


def test_a_careless_plugin_beside_it_keeps_to_its_own_method(session: dict[str, Any]) -> None:
    """It would build, step and merge for every method, but is never asked: otherwise the tests above would fail.

    It stays listed, and when all plugins are asked, a warning names it and its failure.
    """
    assert session["methods"]["careless"]["error"] is None
    assert [text for text in session["told"] if "'careless' (acme-careless) failed" in text]
