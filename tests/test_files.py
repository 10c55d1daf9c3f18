"""Save and load: one complete file or none; damaged files and other bases are rejected, and nothing is loaded."""

import io
import json
import os
import pickletools
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError, BaseMismatchError, ConfigError, FileError, TargetError, UnknownMethodError
from tunerkit.serialization.adapter_file import header_of, read
from tunerkit.serialization.header import decode, digest

if TYPE_CHECKING:
    from tests.conftest import Toys

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")
in_place = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def saved(toys: "Toys", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of an adapter with everything in it."""
    return tunerkit.save(toys.trained(), tmp_path_factory.mktemp("saved"))


def assert_refused(
    toys: "Toys", path: Path, error: type[Exception], words: str = "", base: nn.Module | None = None
) -> str:
    """Check that loading ``path`` raises this error with ``words``, and leaves base and random state unchanged."""
    base = toys.net() if base is None else base
    before, state = toys.snapshot(base), torch.random.get_rng_state()
    with pytest.raises(error, match=words) as caught:
        tunerkit.load(base, path)
    assert toys.same(toys.snapshot(base), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    return str(caught.value)


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A file with a valid digest but changed fields or tensors."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["tunerkit"])
    change(fields, tensors)
    text = json.dumps(fields)
    metadata = {"tunerkit": text, "tunerkit.digest": digest(text, tensors)}
    safetensors.torch.save_file(tensors, to, metadata)
    return to


# There and back


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
    with pytest.raises(AdapterError, match=r"no step.*tunerkit\.attach"):
        tunerkit.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=3)
    model(toys.x()).sum().backward()
    optimizer.step()
    path = tunerkit.save(model, tmp_path)
    tunerkit.save(tunerkit.load(toys.net(), path), tmp_path / "again")


# The file


def test_a_folder_gets_the_file_and_a_path_is_the_file(toys: "Toys", tmp_path: Path) -> None:
    """Folders are created; the suffix decides between file and folder; str and Path work."""
    model = toys.trained(targets=["conv"])
    assert tunerkit.save(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "adapter.safetensors"
    assert tunerkit.save(model, str(tmp_path / "a.safetensors")) == tmp_path / "a.safetensors"
    assert tunerkit.save(model, tmp_path / "v1.5") == tmp_path / "v1.5" / "adapter.safetensors"
    for path in (tmp_path / "new" / "folder", str(tmp_path / "a.safetensors"), tmp_path / "v1.5"):
        assert torch.equal(tunerkit.load(toys.net(), path)(toys.x()), model(toys.x()))


def test_equal_adapters_give_equal_bytes(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """Files can be compared by digest: saving again changes no byte."""
    assert {tunerkit.save(toys.trained(), tmp_path).read_bytes() for _ in range(6)} == {saved.read_bytes()}


def test_tensors_lie_at_multiples_of_eight_bytes(saved: Path) -> None:
    """Readers map the file into memory, so data must be aligned."""
    assert int.from_bytes(saved.read_bytes()[:8], "little") % 8 == 0


def test_the_file_holds_no_pickle(saved: Path) -> None:
    """It is safetensors, which other programs can read, and contains no executable code."""
    assert safetensors.torch.load_file(saved)
    with pytest.raises(ValueError):
        pickletools.dis(saved.read_bytes(), out=io.StringIO())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_files_mode_follows_the_umask(toys: "Toys", tmp_path: Path, umask: int) -> None:
    """Others can read it like any other file of the user."""
    before = os.umask(umask)
    try:
        path = tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_write_leaves_what_was_there(
    toys: "Toys", saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, existing: bool
) -> None:
    """On a full disk the old file stays complete, or there is none; no temporary file is left."""

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    path = tmp_path / "adapter.safetensors"
    if existing:
        path.write_bytes(saved.read_bytes())
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(FileError, match="no space"):
        tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == saved.read_bytes()


def test_a_file_is_replaced_in_one_move(toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete file, flushed to disk, is moved within its folder, so the move is atomic."""
    model, moves, synced = toys.trained(targets=["conv"]), [], []
    replace, fsync = os.replace, os.fsync

    def note(number: int) -> None:
        synced.append(number)
        fsync(number)

    def watch(source: Path, target: Path) -> None:
        assert synced
        moves.append((source.parent, source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", watch)
    path = tunerkit.save(model, tmp_path)
    assert moves == [(tmp_path, path.read_bytes())]


# Damage


def test_a_truncated_file_is_refused(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """Truncated at every fiftieth byte, it is rejected, and nothing is loaded."""
    data, path = saved.read_bytes(), tmp_path / "adapter.safetensors"
    for end in (*range(0, len(data), 50), len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(FileError):
            read(path, content="adapter")
    assert_refused(toys, path, FileError, "cannot be read as a safetensors file")


@given(data=st.data())
@in_place
def test_a_changed_byte_is_refused(toys: "Toys", saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whichever byte is changed, the file is rejected with a clear error, or its content is the same."""
    whole = bytearray(saved.read_bytes())
    header_end = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.one_of(st.integers(0, header_end - 1), st.integers(header_end, len(whole) - 1)))
    whole[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(whole)
    try:
        _, tensors, found = read(path, content="adapter")
    except FileError as error:
        assert str(path) in str(error)  # noqa: PT017  # an error is one of the two right ends
        return
    _, right, expected = read(saved, content="adapter")
    assert found == expected
    assert all(torch.equal(tensors[name], tensor) for name, tensor in right.items())


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


@pytest.mark.parametrize("word", ["toy-low-rank", "conv", "sample", '\\"steps\\": 0'])
def test_an_edited_header_is_damage(toys: "Toys", saved: Path, tmp_path: Path, word: str) -> None:
    """The digest covers the header's text: an edit of the same length is detected."""
    data = saved.read_bytes()
    assert word.encode() in data
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(data.replace(word.encode(), word[:-1].encode() + b"1", 1))
    assert_refused(toys, path, FileError, "digest|safetensors")


def test_another_programs_file_is_refused(toys: "Toys", tmp_path: Path) -> None:
    """A safetensors file without our header, another file type, or a missing file: each has its own error."""
    path = tmp_path / "adapter.safetensors"
    assert_refused(toys, tmp_path, FileError, "there is no file .*adapter.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    assert_refused(toys, path, FileError, "no tunerkit header")
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"format": "pt"})
    assert_refused(toys, path, FileError, "no tunerkit header")
    torch.save({"a": torch.ones(1)}, path)
    assert_refused(toys, path, FileError, "cannot be read as a safetensors file")
    path.unlink()
    path.mkdir()
    assert_refused(toys, path, FileError, "there is no file")


def test_every_misfit_of_tensors_is_named_at_once(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """One error lists missing, unexpected and misshapen tensors, and nothing is loaded."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors["conv.adapter.a"], tensors["head.2.copy.bias"]
        tensors["layers.0.adapter.b"] = torch.ones(3, 3)
        tensors["layers.1.bias"] = torch.ones(2)
        tensors["conv.adapter.c"] = torch.ones(1)
        tensors["stray"] = torch.ones(1)

    text = assert_refused(
        toys, rewritten(saved, tmp_path / "x.safetensors", change), FileError, "does not fit its own header"
    )
    for words in (
        "missing: conv.adapter.a", "missing: head.2.copy.bias", "unexpected: conv.adapter.c", "unexpected: stray",
        "at layers.0: ", "at layers.1: ",
    ):  # fmt: skip
        assert words in text


def wrong(**fields: object) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda found, tensors: found.update(fields)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (wrong(format=2), FileError, "format 2, this tunerkit reads 1"),
        (wrong(kind="state"), FileError, "holds 'state', expected 'adapter'"),
        (wrong(more=1), FileError, "header fields"),
        (lambda fields, _: fields.pop("biases"), FileError, "header fields"),
        (wrong(method="gone"), UnknownMethodError, "no method named 'gone'"),
        (wrong(method=["toy"]), FileError, "tunerkit would not write"),
        (wrong(config={"rank": 0}), ConfigError, r"\$.rank"),
        (wrong(config={"rnk": 2}), ConfigError, "rank"),
        (wrong(config=[]), FileError, "tunerkit would not write"),
        (wrong(targets="conv"), FileError, "tunerkit would not write"),
        (wrong(targets=[1]), FileError, "tunerkit would not write"),
        (wrong(copies={"head": 1}), FileError, "tunerkit would not write"),
        (wrong(steps="1"), FileError, "tunerkit would not write"),
        (wrong(base=[]), FileError, "tunerkit would not write"),
        (wrong(base={"conv.weight": [1]}), FileError, "tunerkit would not write"),
        (wrong(base={"conv.weight": {"shape": [1], "sample": ["x"]}}), FileError, "tunerkit would not write"),
        (wrong(base={"conv.weight": {"shape": [1]}}), FileError, "expected a shape, a dtype and a sample"),
        (wrong(targets=["convolution"]), BaseMismatchError, "no module named 'convolution'"),
        (wrong(targets=["norm"]), TargetError, "LayerNorm"),
        (wrong(targets=[""]), BaseMismatchError, "no module named ''"),
    ],
)
def test_a_header_that_says_nonsense_is_refused(
    toys: "Toys", saved: Path, tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    """Even with a valid digest: another format version, wrong fields or types, unknown methods and modules."""
    assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), error, words)


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


# Bases


def changed(toys: "Toys", change: Callable[[Any], object]) -> nn.Module:
    base = toys.net()
    with torch.no_grad():
        change(base)
    return base


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "norm", nn.Identity()), "this base lacks: norm.weight"),
        (lambda m: setattr(m, "more", nn.Linear(1, 1)), "only this base has: more.weight, more.bias"),
        (lambda m: setattr(m.layers, "0", nn.Linear(4, 9)), r"layers.0.weight \[8, 4\] -> \[9, 4\]"),
        (lambda m: m.conv.weight.mul_(1.02), "other values: conv.weight"),
        (lambda m: m.layers.__delitem__(1), r"no module named 'layers\.1'"),
        (lambda m: m.norm.weight[-1].add_(0.1), "other values: norm.weight"),
    ],
)
def test_another_base_is_refused(toys: "Toys", saved: Path, change: Any, words: str) -> None:
    """Other layers, shapes or values: the error names the differences, and nothing is loaded."""
    assert_refused(toys, saved, BaseMismatchError, words, base=changed(toys, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.head[2].weight.add_(1),
        lambda m: m.norm.bias.add_(1),
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
    ],
)
def test_the_same_base_is_accepted(toys: "Toys", saved: Path, change: Any) -> None:
    """The base may have another precision, or fresh values in a head or bias that is trained in full."""
    loaded = tunerkit.load(changed(toys, change), saved).float().eval()
    assert torch.allclose(loaded(toys.x()), toys.trained()(toys.x()), rtol=0.1, atol=0.1)


def test_a_fresh_head_is_replaced_and_shown_when_disabled(toys: "Toys", saved: Path) -> None:
    """The trained head is used; disabled shows this base's own head."""
    base = changed(toys, lambda m: m.head[2].weight.add_(1))
    fresh = base(toys.x())
    loaded = tunerkit.load(base, saved)
    assert torch.equal(loaded(toys.x()), toys.trained()(toys.x()))
    with tunerkit.disabled(loaded):
        assert torch.equal(loaded(toys.x()), fresh)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "other", m.conv), None),
        (lambda m: m.conv.to("meta"), "meta"),
    ],
)
def test_a_target_that_is_unfit_by_now_is_refused(toys: "Toys", saved: Path, change: Any, words: str | None) -> None:
    """A weight on meta is rejected as in wrap; a module that only has two names is not."""
    base = toys.net()
    change(base)
    if words is None:
        assert torch.equal(tunerkit.load(base, saved)(toys.x()), toys.trained()(toys.x()))
    else:
        assert_refused(toys, saved, TargetError, words, base=base)


def test_a_target_or_copy_that_is_tied_by_now_is_refused(toys: "Toys", tmp_path: Path) -> None:
    """With a tied weight, the module that shares it would lack the adapter, as in wrap."""

    def build(*, tie: str | None) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        if tie is not None:
            model.get_submodule(tie).weight = model[1].weight
        return model

    config = {"targets": ["0"], "train_modules": ["2"]}
    path = tunerkit.save(tunerkit.wrap(build(tie=None), "toy-shift", config), tmp_path)
    for tie in ("0", "2"):
        assert_refused(toys, path, TargetError, "tied", base=build(tie=tie))
    assert list(tunerkit.tuner(tunerkit.load(build(tie=None), path)).adapters()) == ["0"]


# Training state


def test_training_state_goes_into_a_separate_file(toys: "Toys", tmp_path: Path) -> None:
    """save_state and load_state restore the method's tensors and values, and the step count."""
    model = toys.trained("toy-shift", targets=["conv"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=9)
    for _ in range(3):
        model(toys.x()).sum().backward()
        optimizer.step()
    path = tunerkit.save_state(model, tmp_path)
    assert path == tmp_path / "state.safetensors"
    other = toys.trained("toy-shift", targets=["conv"])
    tunerkit.attach(other, torch.optim.SGD(tunerkit.tuner(other).parameters(), lr=0.1), total_steps=9)
    tunerkit.load_state(other, tmp_path)
    seen, steps = cast(tuple[torch.Tensor, int], tunerkit.tuner(other).state)
    assert (int(seen), steps, tunerkit.tuner(other).steps) == (3, 3, 3)


def test_a_missing_state_file_is_named(toys: "Toys", saved: Path) -> None:
    """A saved adapter may have no state file: the error says what writes one."""
    with pytest.raises(FileError, match=r"state\.safetensors; tunerkit\.save_state writes state\.safetensors into"):
        tunerkit.load_state(toys.trained(), saved.parent)


def test_the_state_of_another_run_is_refused(toys: "Toys", tmp_path: Path, saved: Path) -> None:
    """Another method, other targets, another length if the method's schedule depends on it, or an adapter file."""
    path = tunerkit.save_state(toys.trained("toy-shift", targets=["conv"]), tmp_path)
    for other in (toys.trained("toy-shift", targets=["layers.0"]), toys.trained("toy-low-rank", targets=["conv"])):
        with pytest.raises(FileError, match="another run"):
            tunerkit.load_state(other, path)
    planned = toys.trained("toy-stepper", targets=["conv"])
    tunerkit.attach(planned, torch.optim.SGD(tunerkit.tuner(planned).parameters(), lr=0.1), total_steps=9)
    longer = toys.trained("toy-stepper", targets=["conv"])
    tunerkit.attach(longer, torch.optim.SGD(tunerkit.tuner(longer).parameters(), lr=0.1), total_steps=12)
    with pytest.raises(FileError, match="total_steps 9 -> 12"):
        tunerkit.load_state(longer, tunerkit.save_state(planned, tmp_path / "planned"))
    with pytest.raises(FileError, match="holds 'adapter', expected 'state'"):
        tunerkit.load_state(toys.trained(), saved)
    assert_refused(toys, path, FileError, "holds 'state', expected 'adapter'")


def test_the_header_says_what_is_inside(toys: "Toys", saved: Path) -> None:
    """Method, config, targets, steps and library versions can be read without loading anything."""
    _, _, found = read(saved, content="adapter")
    said = attrs.asdict(found)
    assert (said["method"], said["steps"], said["format"], said["kind"]) == ("toy-low-rank", 0, 1, "adapter")
    assert tunerkit.structure("toy-low-rank", said["config"]) == tunerkit.tuner(toys.trained()).config
    assert (said["targets"], said["copies"]) == (["conv", "layers.0", "layers.1"], ["head.0", "head.2"])
    assert said["biases"] == ["conv", "group_norm", "layers.0", "layers.1", "norm"]
    assert {"tunerkit", "torch"} <= set(said["versions"])


@pytest.mark.parametrize("path", [None, 3, ["out"]])
def test_what_is_no_path_is_refused(toys: "Toys", path: Any) -> None:
    """This holds in every function that takes a path."""
    for call in (tunerkit.save, tunerkit.save_state, tunerkit.load_state):
        with pytest.raises(FileError, match=rf"expected the path .* got {type(path).__name__}"):
            call(toys.trained(), path)
    with pytest.raises(FileError, match="expected the path"):
        tunerkit.load(toys.net(), path)


def test_a_place_that_cannot_be_written_is_named(toys: "Toys", tmp_path: Path) -> None:
    """A file instead of a folder, or a folder instead of the file: our error names the path."""
    model = toys.trained(targets=["conv"])
    (tmp_path / "plain").write_text("mine")
    with pytest.raises(FileError, match="plain"):
        tunerkit.save(model, tmp_path / "plain")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileError, match="it is a folder"):
        tunerkit.save(model, tmp_path / "folder.safetensors")
    assert (tmp_path / "plain").read_text() == "mine"
