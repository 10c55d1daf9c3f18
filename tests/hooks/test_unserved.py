"""What nothing installed knows, a trainer, a folder or a model: the message names the extra that does."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import tunerkit
from tests.support.model_checks import silent
from tests.support.toys import registering
from tunerkit.hooks.loading import Catalog
from tunerkit.hooks.registry import Registry
from tunerkit_testing.registering import registered
from tunerkit_testing.small import net
from tunerkit_testing.toy_methods import LowRankPlugin

TARGETS = {"targets": ["0", "2"]}


_toy = registering(LowRankPlugin())


def test_a_trainer_that_no_plugin_knows_is_refused_with_the_extra_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library of its class, if the plugin for it is not there; otherwise the error says what to pass."""
    model = tunerkit.wrap(net(), "toy-low-rank", TARGETS)
    trainer = type("SFTTrainer", (), {"__module__": "trl.trainer.sft_trainer"})()
    monkeypatch.setattr(Catalog, "absence", lambda self, name: f"{name} is not installed")
    with pytest.raises(tunerkit.errors.StepError, match=r'transformers is not installed.*"tunerkit\[transformers\]"'):
        tunerkit.attach(model, trainer)
    with pytest.raises(tunerkit.errors.StepError, match="got object; pass the optimizer that steps the adapter"):
        tunerkit.attach(model, object())
    monkeypatch.setattr(Catalog, "absence", lambda self, name: None)
    with pytest.raises(tunerkit.errors.StepError, match="got SFTTrainer; pass the optimizer that steps the adapter"):
        tunerkit.attach(model, trainer)


def test_a_folder_that_no_plugin_opens_is_refused_with_the_extra_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an in-process plugin opens is its own, whatever else is installed; a wrong answer names it."""

    class Opening:
        answer: object = None

        @tunerkit.hookimpl
        def tunerkit_open_run(self, path: object, base: str | None) -> object:
            return self.answer or (net(), f"{base} of {path}")

    plugin = Opening()
    with registered(plugin):
        assert tunerkit.from_folder(tmp_path, "mine")[1] == f"mine of {tmp_path}"
        assert tunerkit.from_folder(tmp_path, "~")[1] == f"{Path.home()} of {tmp_path}"
        plugin.answer = "a model"
        words = r"plugin 'Opening' .*returned 'a model'; it must return tuple\[torch\.nn\.Module, object\] \| None"
        with pytest.raises(tunerkit.errors.PluginError, match=words):
            tunerkit.from_folder(tmp_path)
    monkeypatch.setattr(Registry, "ask", lambda *_, **__: iter(()))
    for absent, words in ("it is not installed", r"tunerkit\[transformers\]"), (None, "supports this folder. To load"):
        monkeypatch.setattr(Catalog, "absence", lambda self, name, absent=absent: absent)
        with pytest.raises(tunerkit.errors.FileError, match=f"no installed plugin.*{words}"):
            tunerkit.from_folder(tmp_path)


def test_a_model_of_a_library_without_its_plugin_says_how_its_targets_were_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what else is missing, where targets are named too, and only as long as the plugin is not there."""

    def model() -> nn.Module:
        built: Any = net()
        built.__class__ = type("BertModel", (nn.Sequential,), {"__module__": "transformers.models.bert"})
        return built  # type: ignore[no-any-return]

    monkeypatch.setattr(Catalog, "absence", lambda self, name: f"{name} is not installed")
    lost = r"new modules of this BertModel.*stay frozen.*do not record its settings.*transformers is not installed"
    said = f"default targets of this BertModel are chosen by layer type; {lost}"
    with pytest.warns(tunerkit.TunerkitWarning, match=said) as caught:
        tunerkit.wrap(model(), "toy-low-rank")
    assert caught[0].filename == __file__
    with pytest.warns(tunerkit.TunerkitWarning, match=f"^{lost}"):
        tunerkit.wrap(model(), "toy-low-rank", TARGETS)
    with silent(Warning):
        monkeypatch.setattr(Catalog, "absence", lambda self, name: None)
        tunerkit.wrap(model(), "toy-low-rank")
