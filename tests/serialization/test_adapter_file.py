"""Save and load: what was saved is loaded bit for bit, and values that are not finite are not saved."""

from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch

import tunerkit
from tests.support.adapter_files import assert_refused
from tests.support.model_checks import attached, fit, silent
from tests.support.toys import Toys
from tunerkit.errors import AdapterError, FileError, TunerkitWarning
from tunerkit.serialization.adapter_file import header_of, save_tuner
from tunerkit.serialization.training_state import restore_

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
@pytest.mark.parametrize(
    "config",
    [
        {"targets": ["conv", "layers.0"]},
        {"targets": ["layers.1"], "bias": "adapters"},
        {"targets": ["conv"], "train_modules": ["batch_norm", "head.2"], "bias": "all"},
        {"targets": ["conv"], "adapter_dtype": "bfloat16"},
    ],
)
def test_what_was_saved_is_loaded(toys: "Toys", tmp_path: Path, method: str, config: dict[str, Any]) -> None:
    """On a fresh base the output is bit-identical, the adapter is frozen, and saving it gives the same file."""
    model = toys.trained(method, batch_norm=True, **config)
    path = tunerkit.save(model, tmp_path / "one")
    base = toys.net(batch_norm=True)
    plain = toys.snapshot(base)
    assert tunerkit.load(base, path) is base
    assert torch.equal(base(toys.x()), model(toys.x()))
    assert not any(p.requires_grad for p in base.parameters())
    assert tunerkit.tuner(base).config == tunerkit.tuner(model).config
    assert tunerkit.save(base, tmp_path / "two").read_bytes() == path.read_bytes()
    assert toys.same(toys.snapshot(tunerkit.unwrap(base)), plain)


def test_a_loaded_adapter_may_be_trained_on(toys: "Toys", saved: Path) -> None:
    """With trainable=True exactly the parameters trained before require gradients."""
    model, loaded = toys.trained(), tunerkit.load(toys.net(), saved, trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("global_seed", [0, 1])
def test_loading_draws_no_random_numbers(toys: "Toys", saved: Path, global_seed: int) -> None:
    """The global random state does not change, and has no influence."""
    torch.manual_seed(global_seed)
    state = torch.random.get_rng_state()
    loaded = tunerkit.load(toys.net(), saved)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(loaded(toys.x()), toys.trained()(toys.x()))


def test_files_hold_the_settled_config(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of adapters and of training states store the resolved defaults."""
    tuner = tunerkit.tuner(toys.trained())
    assert tuner.config.settled() == tuner.config
    monkeypatch.setattr(type(tuner.config), "settled", lambda config: attrs.evolve(config, rank=5))
    assert [header_of(tuner, content=kind).config["rank"] for kind in ("adapter", "state")] == [5, 5]


def test_each_of_two_adapters_has_its_own_file(toys: "Toys", tmp_path: Path) -> None:
    """Both are saved by name and loaded under any name, in any order; save without a name is ambiguous."""
    model = toys.trained(targets=["conv"])
    tunerkit.wrap(model, "toy-shift", {"targets": ["layers.0"]}, adapter="second")
    toys.fill_(model)
    with pytest.raises(AdapterError, match="several adapters: default, second"):
        tunerkit.save(model, tmp_path)
    one = tunerkit.save(model, tmp_path / "one", adapter="default")
    two = tunerkit.save(model, tmp_path / "two", adapter="second")
    for first, second in ((one, two), (two, one)):
        loaded = tunerkit.load(tunerkit.load(toys.net(), first, adapter="x"), second, adapter="forward")
        assert torch.equal(loaded(toys.x()), model(toys.x()))
    with pytest.raises(AdapterError, match="'x' already"):
        tunerkit.load(loaded, one, adapter="x")


def test_a_merged_or_disabled_model_saves_the_same_file(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """The file describes the adapter and its base, whatever the model's current state."""
    model = tunerkit.merge(toys.trained())
    assert tunerkit.save(model, tmp_path).read_bytes() == saved.read_bytes()
    with tunerkit.disabled(model):
        assert tunerkit.save(model, tmp_path).read_bytes() == saved.read_bytes()


def test_a_method_that_needs_steps_is_not_saved_untrained(toys: "Toys", tmp_path: Path) -> None:
    """Without a step its adapter is useless: an error, and no file. One step, or having been loaded, is enough."""
    model = toys.trained("toy-stepper", targets=["conv"])
    with pytest.raises(AdapterError, match=r"0 steps.*tunerkit\.attach"):
        tunerkit.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    fit(model, attached(model, total_steps=3), toys.x())
    path = tunerkit.save(model, tmp_path)
    tunerkit.save(tunerkit.load(toys.net(), path), tmp_path / "again")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["conv.tunerkit.default.adapter.b", "head.2.tunerkit.default.copy.weight"])
def test_weights_that_are_not_finite_are_not_saved(toys: "Toys", tmp_path: Path, place: str, value: float) -> None:
    """The error names the tensors, an older file stays, and so it is in a checkpoint."""
    model = toys.trained()
    older = tunerkit.save(model, tmp_path).read_bytes()
    model.get_parameter(place).data.view(-1)[-1] = value
    name = place.replace("tunerkit.default.", "")
    for call in (tunerkit.save, lambda m, p: save_tuner(tunerkit.tuner(m), p)):
        with pytest.raises(AdapterError, match=rf"NaN or inf in 1 of \d+ tensors: {name}\. Nothing was written"):
            call(model, tmp_path)
        assert (tmp_path / "adapter.safetensors").read_bytes() == older
        with pytest.raises(AdapterError, match="NaN or inf"):
            call(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_finite_are_saved_on_demand_and_not_loaded(toys: "Toys", tmp_path: Path) -> None:
    """For a post-mortem they are written; `load` refuses the file and says how to read it, and so does a resume."""
    model = toys.trained()
    model.get_parameter("conv.tunerkit.default.adapter.b").data[0, 0] = torch.nan
    path = tunerkit.save(model, tmp_path, allow_nonfinite=True)
    text = assert_refused(toys, path, FileError, r"NaN or inf in 1 of \d+ tensors: conv\.adapter\.b")
    assert "safetensors.torch.load_file" in text
    assert safetensors.torch.load_file(path)["conv.adapter.b"].isnan().sum() == 1
    live = toys.trained()
    before = toys.snapshot(live)
    with pytest.raises(FileError, match="NaN or inf"):
        restore_(tunerkit.tuner(live), path)
    assert toys.same(toys.snapshot(live), before)


def test_a_mask_of_infinities_in_a_trained_module_is_saved_and_loaded(toys: "Toys", tmp_path: Path) -> None:
    """It is the base's own buffer, and no sign of a training that diverged; a value that training spoilt is one."""

    def base() -> Any:
        model = toys.net()
        model.head[2].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        return model

    model = tunerkit.wrap(base(), "toy-shift", {"targets": ["conv"], "train_modules": ["head"]})
    path = tunerkit.save(model, tmp_path)
    assert torch.equal(tunerkit.load(base(), path)(toys.x()), model(toys.x()))
    model.head[2].tunerkit.default.copy.mask[0] = torch.nan
    with pytest.raises(AdapterError, match=r"head\.2\.copy\.mask"):
        tunerkit.save(model, tmp_path)


def _two(toys: "Toys") -> Any:
    model = toys.trained(targets=["layers.0"])
    return toys.fill_(tunerkit.wrap(model, "toy-shift", {"targets": ["conv"]}, adapter="b"))


def test_a_save_over_the_only_file_of_another_adapter_says_so(toys: "Toys", tmp_path: Path) -> None:
    """Two adapters of one model saved to one folder leave one. An adapter that has another file loses nothing."""
    model = _two(toys)
    file = tunerkit.save(model, tmp_path, adapter="default")
    with pytest.warns(TunerkitWarning, match="adapter 'b' has overwritten adapter 'default' in .*save 'default' again"):
        assert tunerkit.save(model, tmp_path, adapter="b") == file
    with silent():
        tunerkit.save(model, tmp_path, adapter="b")  # its own older file
        tunerkit.save(model, tmp_path / "b.safetensors", adapter="b")
        tunerkit.save(model, tmp_path, adapter="default")
    with pytest.warns(TunerkitWarning, match="has overwritten adapter 'default'"):
        tunerkit.save(model, tmp_path, adapter="b")


def test_an_adapter_may_replace_the_file_that_it_was_loaded_from(toys: "Toys", tmp_path: Path) -> None:
    """Under any name, and also if another adapter came from that file or has the name that it was saved by."""
    file = tunerkit.save(toys.trained(targets=["layers.0"]), tmp_path)
    model = toys.trained(targets=["conv"])
    tunerkit.load(model, file, adapter="news")
    tunerkit.load(model, file, adapter="films")
    with silent():
        assert tunerkit.save(model, tmp_path, adapter="news") == file
    tunerkit.rename(model, "news", "sport")
    with pytest.warns(TunerkitWarning, match="has overwritten adapter 'sport'"):
        tunerkit.save(model, tmp_path, adapter="default")


@pytest.mark.parametrize("save", [tunerkit.save, tunerkit.save_state])
def test_a_file_of_another_program_is_not_replaced(toys: "Toys", tmp_path: Path, save: Any) -> None:
    """A base model's weights stay; a damaged or half file, which may be our own, is replaced."""
    file, model = tmp_path / "model.safetensors", toys.trained(targets=["layers.0"])
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.ones(2)}, file, metadata=metadata)
        content = file.read_bytes()
        with pytest.raises(FileError, match=r"tunerkit did not write.*under another name.*delete that file"):
            save(model, file)
        assert file.read_bytes() == content
    file.write_bytes(content[:20])
    save(model, file)
    file.write_bytes(file.read_bytes()[:-4])
    save(model, file)
    assert b"tunerkit.digest" in file.read_bytes()
