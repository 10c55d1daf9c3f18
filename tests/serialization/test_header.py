"""The header of a file: what it says, and one short error for whatever it should not say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import torch
from hypothesis import example, given, strategies as st

import tunerkit
from tests.support.adapter_files import LONG, assert_refused, in_place, rewritten, wrong
from tests.support.model_checks import told
from tests.support.toys import Toys, answering
from tunerkit.errors import BaseMismatchError, ConfigError, FileError, TargetError, UnknownMethodError
from tunerkit.hooks.registry import Registry
from tunerkit.plugin import ModelLibrary
from tunerkit.records import MethodInfo
from tunerkit.serialization.header import decode, digest, read
from tunerkit_testing.registering import registered

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")


def test_the_digest_covers_name_dtype_and_shape_of_equal_bytes() -> None:
    """The same bytes under another name, dtype or shape are another file."""
    zeros = torch.zeros(2, 3, dtype=torch.float16)
    variants: tuple[dict[str, torch.Tensor], ...] = (
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.bfloat16()},
        {"a": zeros.reshape(3, 2)},
        {},
    )
    assert len({digest("text", tensors) for tensors in variants}) == len(variants)
    assert digest("text", {"a": zeros, "b": zeros + 1}) == digest("text", {"b": zeros + 1, "a": zeros})


def noted(**entry: object) -> Any:
    """A fingerprint of one parameter."""
    return wrong(base={"w": {"shape": [1], "dtype": "float32", "sample": [], **entry}})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (wrong(format=2), FileError, "format 2, this tunerkit reads 1"),
        (wrong(kind="state"), FileError, "is a file of kind 'state': pass the file of kind 'adapter'"),
        (wrong(more=1), FileError, "this release would not write: .*'more'.* install that one"),
        (lambda fields, _: fields.pop("biases"), FileError, r"this release would not write: missing.* @ \$\.biases"),
        (lambda fields, _: fields.pop("history"), FileError, r"this release would not write: missing.* @ \$\.history"),
        (wrong(method="gone"), UnknownMethodError, "no method named 'gone'"),
        (wrong(method=["toy"]), FileError, "this release would not write"),
        (wrong(config={"rank": 0}), ConfigError, r"\$.rank"),
        (wrong(config={"rnk": 2}), ConfigError, "rank"),
        (wrong(config=[]), FileError, "this release would not write"),
        (wrong(targets="conv"), FileError, "this release would not write"),
        (wrong(targets=[1]), FileError, "this release would not write"),
        (wrong(copies={"head": 1}), FileError, "this release would not write"),
        (wrong(steps="1"), FileError, "this release would not write"),
        (wrong(base=[]), FileError, "this release would not write"),
        (wrong(base={"conv.weight": [1]}), FileError, "this release would not write"),
        (wrong(base={"conv.weight": {"shape": [1], "sample": ["x"]}}), FileError, "this release would not write"),
        (wrong(base={"conv.weight": {"shape": [1]}}), FileError, "expected a shape of integers, a dtype and a sample"),
        (wrong(targets=["convolution"]), BaseMismatchError, "no module named 'convolution'"),
        (wrong(targets=["norm"]), TargetError, "LayerNorm"),
        (wrong(targets=[""]), BaseMismatchError, "no module named ''"),
        (wrong(steps=-1), FileError, r"expected >= 0, got -1 @ \$\.steps"),
        (wrong(steps=True), FileError, r"expected int, got bool True @ \$\.steps"),
        (wrong(steps=2**64), FileError, r"expected an int of 64 bits, got int .* @ \$\.steps"),
        (wrong(steps=2**63), FileError, r"expected < 9223372036854775808, got .* @ \$\.steps"),
        (wrong(total_steps=10**400), FileError, r"expected .* @ \$\.total_steps"),
        (wrong(targets=["conv", "conv"]), FileError, "targets: expected distinct paths"),
        (wrong(history=[[1, 2, [3, 4, -5]]]), FileError, "history: expected a step, a .* each an integer from 0"),
        (wrong(method="x" * 10**6), FileError, "method: expected the name of a method"),
        (noted(shape=[-1]), FileError, "base: expected a shape of int"),
        (noted(sample=[10**400]), FileError, "a sample of finite numbers"),
        (noted(sample=[float("nan")]), FileError, "a sample of finite numbers"),
        (wrong(values={"base_config": [1]}), FileError, "base_config"),
    ],
)
def test_a_header_that_says_nonsense_is_refused(
    toys: "Toys", saved: Path, tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    """With a valid digest too: wrong versions, fields, types, counts, methods and modules; the message is short."""
    assert len(assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), error, words)) < 2000


@given(text=st.one_of(st.text(), st.just("[" * 100_000)))
@example(text="{}")
@example(text="[]")
@example(text="null")
@in_place
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    """Only a JSON object with our fields is accepted."""
    metadata = {"tunerkit": text, "tunerkit.digest": digest(text, {})}
    with pytest.raises(FileError):
        decode(metadata, {}, source="x", content="adapter")


def test_the_header_says_what_is_inside(toys: "Toys", saved: Path) -> None:
    """Method, config, targets, steps and library versions can be read without loading anything."""
    _, _, found = read(saved, content="adapter")
    said = attrs.asdict(found)
    assert (said["method"], said["steps"], said["format"], said["kind"]) == ("toy-low-rank", 0, 1, "adapter")
    assert tunerkit.structure("toy-low-rank", said["config"]) == tunerkit.tuner(toys.trained()).config
    assert (said["targets"], said["copies"]) == (("conv", "layers.0", "layers.1"), ("head.0", "head.2"))
    assert said["biases"] == ("conv", "group_norm", "layers.0", "layers.1", "norm")
    assert {"tunerkit", "torch"} <= set(said["versions"])


@pytest.mark.parametrize(("saved_by", "is_told"), [("acme-two", True), ("acme-one", False), ("in-process", False)])
def test_a_method_of_another_distribution_than_the_file_names_is_told(
    toys: "Toys", saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_by: str, is_told: bool
) -> None:
    """Two may call different methods by one name. What was tried in a notebook may be installed since."""
    path = rewritten(saved, tmp_path / "x.safetensors", wrong(versions={"tunerkit": "0", "torch": "0", saved_by: "1"}))
    monkeypatch.setattr(Registry, "owner_of", lambda self, method: MethodInfo("acme-one", "2"))
    texts = told(lambda: tunerkit.load(toys.net(), path))
    words = "saved with method 'toy-low-rank' from acme-two; the method here is from acme-one and may compute something"
    assert [words in text for text in texts if "was saved with method" in text] == [True] * is_told


LONG_FILES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], object]] = {
    "targets": wrong(targets=[LONG + str(number) for number in range(20)]),
    "one target": wrong(targets=[LONG]),
    "fields": lambda fields, _: fields.update({LONG + str(number): 1 for number in range(20)}),
    "kind": wrong(kind=LONG),
    "format": wrong(format=LONG),
    "dtype": noted(dtype=LONG, sample=[LONG]),
    "parameters": wrong(base={LONG + str(n): {"shape": [1], "dtype": "float32", "sample": []} for n in range(20)}),
    "shape": wrong(base={"conv.weight": {"shape": [1] * 100_000, "dtype": "float32", "sample": []}}),
    "settings": wrong(config={LONG + str(number): 1 for number in range(20)}),
    "setting": wrong(config={"rank": LONG, "targets": [LONG]}),
    "tensors": lambda _, tensors: tensors.update({LONG[:1000] + str(n): torch.ones(1) for n in range(1000)}),
    "base": wrong(values={"base_config": {"rms_norm_eps": LONG}}),
}


@pytest.mark.parametrize("name", LONG_FILES)
def test_errors_about_a_file_are_short(toys: "Toys", saved: Path, tmp_path: Path, name: str) -> None:
    """Whatever a file contains, an error names a few parts of it, cut to a readable length, and counts the rest."""
    path = rewritten(saved, tmp_path / "x.safetensors", cast(Any, LONG_FILES[name]))
    base = toys.net()
    library = ModelLibrary(settings=lambda model: {"rms_norm_eps": 1e-5} if model is base else {})
    plugin = answering("tunerkit_model_libraries", [library])
    with registered(plugin), pytest.raises(tunerkit.errors.TunerkitError) as caught:
        tunerkit.load(base, path)
    assert len(str(caught.value)) < 25_000
