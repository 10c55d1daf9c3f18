"""Numbers that no layer can have in the settings of every installed method: refused, or cheap."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tunerkit
from tests.support.adapter_files import rewritten
from tunerkit.errors import ConfigError, FileError, TunerkitError
from tunerkit.hooks import registry

pytestmark = pytest.mark.filterwarnings("ignore::tunerkit.errors.TunerkitWarning")

ABSURD = (2**70, 2**63, 10**9, -1, 1e308)
WHERE: dict[str, dict[str, object]] = {
    "ln-tuning": {"targets": "re:norm"},
    "trainable-tokens": {"targets": "re:embed", "tokens": [3, 7]},
}
LARGEST, MOST = 2**21, 4000  # elements of a tensor, and calls: far above what a layer of 16 x 32 needs


class Cheap(TorchDispatchMode):
    """Fails where a tensor is large, or after many operations."""

    left = MOST

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, self.left = func(*args, **(kwargs or {})), self.left - 1
        assert self.left > 0, "too many operations"
        assert not isinstance(result, torch.Tensor) or result.numel() <= LARGEST, f"{func} makes {result.numel():,}"
        return result


def base() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {
        "embed": nn.Embedding(32, 16),
        "up": nn.Linear(16, 32),
        "norm": nn.LayerNorm(32),
        "down": nn.Linear(32, 16),
    }
    return nn.ModuleDict(layers)


def run(model: nn.ModuleDict) -> torch.Tensor:
    x: torch.Tensor = torch.arange(4)
    for layer in model.values():
        x = layer(x)
    return x


def settings_of(method: str) -> dict[str, object]:
    return WHERE.get(method, {"targets": "re:up|down"})


def saved(method: str, to: Path) -> Path:
    model = tunerkit.wrap(base(), method, settings_of(method), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tunerkit.attach(model, optimizer, total_steps=8)  # some methods need steps
    for _ in range(8):
        run(model).square().mean().backward()
        optimizer.step()
    return tunerkit.save(model, to)


def accepted(method: str) -> Iterator[dict[str, object]]:
    """Every setting with every number, alone, in a list and in a mapping, as far as `structure` accepts it."""
    fields = attrs.fields(registry.get(method).config)
    for field in (each for each in fields if re.search("int|float", str(each.type))):
        for value in (form for number in ABSURD for form in (number, [number], {"re:.*": number})):
            with suppress(ConfigError):
                tunerkit.structure(method, {**settings_of(method), field.name: value})
                yield {field.name: value}


@pytest.mark.parametrize("method", sorted(tunerkit.methods()))
def test_an_absurd_number_is_refused_or_cheap(method: str, tmp_path: Path) -> None:
    """By `structure`, or else by `wrap` and by `load`, in words and before anything large is made."""
    file, to = saved(method, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    tried = list(accepted(method))
    assert tried
    for own in tried:
        rewritten(file, to, lambda fields, _, own=own: fields["config"].update(own))  # type: ignore[misc]  # bound now
        with suppress(TunerkitError), Cheap():
            run(tunerkit.wrap(base(), method, {**settings_of(method), **own}))
        with suppress(TunerkitError), Cheap():
            run(tunerkit.load(base(), to))


SEEDS = {
    "fourierft": "random_loc_seed",
    "oft": "num_cayley_neumann_terms",
    "randlora": "projection_prng_key",
    "shira": "random_seed",
    "vera": "projection_prng_key",
}


@pytest.mark.parametrize("method", SEEDS)
def test_an_absurd_number_in_a_folder_of_peft_is_refused(method: str, tmp_path: Path) -> None:
    """The error names the folder and the setting, and the model stays as it was."""
    tunerkit.export(tunerkit.wrap(base(), method, settings_of(method), seed=0), tmp_path, format="peft")
    place, model = tmp_path / "adapter_config.json", base()
    place.write_text(json.dumps({**json.loads(place.read_text()), SEEDS[method]: 2**70}))
    with pytest.raises(FileError, match=rf"(?s){tmp_path}.*expected an int of 64 bits, got int {2**70} @ \$"):
        tunerkit.load(model, tmp_path)
    assert model.state_dict().keys() == base().state_dict().keys()
