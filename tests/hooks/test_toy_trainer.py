"""A trainer of a library that nobody knows: a plugin attaches to it without a line in core."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.hooks.loading import Catalog
from tunerkit.hooks.registry import Registry
from tunerkit.plugin import Tuner, optimizer_of
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, trainable
from tunerkit_testing.toy_methods import LowRankPlugin

TARGETS = {"targets": ["0", "2"]}


class Loop:
    """A trainer: it makes its optimizer in `run`, and tells whoever listens."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.steps = model, steps
        self.listening: list[Callable[[torch.optim.Optimizer], None]] = []

    def run(self) -> None:
        optimizer = torch.optim.SGD(trainable(self.model), lr=0.1)
        for listen in self.listening:
            listen(optimizer)
        for _ in range(self.steps):
            self.model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


class LoopPlugin:
    @tunerkit.hookimpl
    def tunerkit_attach(self, tuners: Sequence[Tuner], candidate: object, total_steps: int | None) -> bool | None:
        if not isinstance(candidate, Loop):
            return None
        if total_steps not in (None, candidate.steps):
            raise tunerkit.errors.StepError(f"the loop takes {candidate.steps} steps, not {total_steps}")
        for tuner in tuners:
            attach = partial(tunerkit.attach, candidate.model, total_steps=candidate.steps, adapter=tuner.name)
            candidate.listening.append(attach)
        return True


PLUGINS = (LowRankPlugin(), LoopPlugin())


class Claiming:
    """Answers for whatever is attached."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    @tunerkit.hookimpl(tryfirst=True)
    def tunerkit_attach(self) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered(*PLUGINS):
        yield


def wrapped() -> Any:
    return tunerkit.wrap(net(), "toy-low-rank", TARGETS, seed=0)


def test_a_trainer_that_a_plugin_knows_drives_the_adapter() -> None:
    """Law: what it trains is counted, and an optimizer is attached as if there were no plugin."""
    model = wrapped()
    loop = Loop(model, 3)
    tunerkit.attach(model, loop)
    assert tunerkit.tuner(model).steps == 0
    loop.run()
    tuner = tunerkit.tuner(model)
    assert (tuner.steps, tuner.total_steps) == (3, 3)
    other = wrapped()
    tunerkit.attach(other, torch.optim.SGD(trainable(other), lr=0.1), total_steps=1)
    assert tunerkit.tuner(other).total_steps == 1


def test_what_the_plugin_raises_reaches_the_user_and_names_it() -> None:
    """It is no reason to go on with somebody else's way of attaching."""
    model = wrapped()
    with pytest.raises(tunerkit.errors.StepError, match="the loop takes 3 steps, not 5") as caught:
        tunerkit.attach(model, Loop(model, 3), total_steps=5)
    assert any("tunerkit_attach of plugin 'LoopPlugin'" in note for note in caught.value.__notes__)


def test_a_trainer_that_no_plugin_knows_is_refused_with_the_extra_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library of its class, if the plugin for it is not there; otherwise it is told what to pass instead."""
    model = wrapped()
    trainer = type("SFTTrainer", (), {"__module__": "trl.trainer.sft_trainer"})()
    monkeypatch.setattr(Catalog, "absence", lambda self, name: f"{name} is not installed")
    with pytest.raises(
        tunerkit.errors.StepError, match=r'tunerkit-transformers is not installed.*"tunerkit\[transformers\]"'
    ):
        tunerkit.attach(model, trainer)
    with pytest.raises(tunerkit.errors.StepError, match="got object; pass the optimizer that steps the adapter"):
        tunerkit.attach(model, object())
    monkeypatch.setattr(Catalog, "absence", lambda self, name: None)
    with pytest.raises(tunerkit.errors.StepError, match="got SFTTrainer; pass the optimizer that steps the adapter"):
        tunerkit.attach(model, trainer)


def test_a_plugin_that_says_false_is_not_the_last_to_be_asked() -> None:
    """It means the same as None: not mine."""

    class Careless:
        @tunerkit.hookimpl
        def tunerkit_attach(self) -> bool:
            return False

    model = wrapped()
    tunerkit.unregister(PLUGINS[1])
    with registered(Careless(), PLUGINS[1]):
        tunerkit.attach(model, loop := Loop(model, 3))
    tunerkit.register(PLUGINS[1])
    assert len(loop.listening) == 1


@pytest.mark.parametrize("answer", [True, "yes", SystemExit(0)])
def test_an_optimizer_of_torch_is_cores_own(answer: Any) -> None:
    """No plugin is asked about it: one that claims everything would train nothing, in silence."""
    with registered(Claiming(answer)):
        model = wrapped()
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        tunerkit.attach(model, optimizer, total_steps=1)
    assert optimizer_of(tunerkit.tuner(model)) is optimizer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("yes", r"returned 'yes'; it must return bool \| None"),
        (1, r"returned 1; it must return bool \| None"),
        (SystemExit(0), "raised SystemExit"),
    ],
)
def test_a_wrong_answer_about_a_trainer_names_the_plugin(answer: Any, words: str) -> None:
    """So does what would end the program; and both say how to run without the plugin."""
    with (
        registered(Claiming(answer)),
        pytest.raises(tunerkit.errors.PluginError, match=f"tunerkit_attach of plugin 'Claiming'.*{words}") as caught,
    ):
        tunerkit.attach(model := wrapped(), Loop(model, 1))
    assert "to run without it, pass it to tunerkit.unregister" in str(caught.value)


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
        plugin.answer = "a model"
        words = r"plugin 'Opening' .*returned 'a model'; it must return tuple\[torch\.nn\.Module, object\] \| None"
        with pytest.raises(tunerkit.errors.PluginError, match=words):
            tunerkit.from_folder(tmp_path)
    monkeypatch.setattr(Registry, "ask", lambda *_, **__: iter(()))
    for absent, words in ("it is not installed", r"tunerkit\[transformers\]"), (None, "knows this folder. An adapter"):
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
    said = f"default targets of this BertModel are chosen by the kinds of its layers; {lost}"
    with pytest.warns(tunerkit.TunerkitWarning, match=said) as caught:
        tunerkit.wrap(model(), "toy-low-rank")
    assert caught[0].filename == __file__
    with pytest.warns(tunerkit.TunerkitWarning, match=f"^{lost}"):
        tunerkit.wrap(model(), "toy-low-rank", TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Catalog, "absence", lambda self, name: None)
        tunerkit.wrap(model(), "toy-low-rank")
