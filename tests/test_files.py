"""Save and load: one complete file or none; damaged files and other bases are rejected, and nothing is loaded."""

import io
import json
import multiprocessing
import os
import pickletools
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
from tunerkit.serialization.adapter_file import header_of, read, save_tuner
from tunerkit.serialization.header import decode, digest
from tunerkit.serialization.training_state import restore_

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


def test_a_private_file_stays_private(toys: "Toys", tmp_path: Path) -> None:
    """Saving over a file keeps its mode: one that only its owner may read is not opened to others."""
    path = tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    path.chmod(0o600)
    tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _killed_while_saving(model: nn.Module, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: os.kill(os.getpid(), signal.SIGKILL))
        tunerkit.save(model, folder)


def test_a_save_after_one_that_was_killed_leaves_only_the_file(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """The older file is complete in between, and then the killed writer's temporary file is gone."""
    model, path = toys.trained(targets=["conv"]), tmp_path / "adapter.safetensors"
    path.write_bytes(saved.read_bytes())
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_killed_while_saving, args=(model, tmp_path))
        writer.start()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        assert path.read_bytes() == saved.read_bytes()
    tunerkit.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_is_flushed_after_the_move(toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that, a power failure may bring the older file back after `save` has returned."""
    happened: list[str] = []
    replace, fsync = os.replace, os.fsync

    def flush(number: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def move(source: Path, target: Path) -> None:
        happened.append("move")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    assert happened == ["file", "move", "folder"]


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


# Values that are not finite


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


def test_an_adapter_that_was_never_attached_has_no_state_to_save(toys: "Toys", tmp_path: Path) -> None:
    """Its file would lack every part that the method needs, and the loss would be found when training resumes."""
    model = tunerkit.wrap(toys.net(), "toy-stepper", {"targets": ["conv"]})
    with pytest.raises(AdapterError, match=r"was never attached.*call tunerkit\.attach"):
        tunerkit.save_state(model, tmp_path)
    assert not list(tmp_path.iterdir())
    tunerkit.save_state(tunerkit.wrap(toys.net(), "toy-shift", {"targets": ["conv"]}), tmp_path)


def test_a_training_state_that_is_not_finite_is_neither_saved_nor_loaded(
    toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors and its JSON values: an older file stays, and what is in the model stays."""
    model = toys.trained("toy-shift", targets=["conv"])
    path = tunerkit.save_state(model, tmp_path)
    older = path.read_bytes()
    wrong = tunerkit.State(tensors={"seen": torch.tensor([torch.nan])}, values={"steps": 0})
    for state, error, words in (
        (wrong, AdapterError, r"NaN or inf in 1 of 1 tensors: seen"),
        (tunerkit.State(tensors={}, values={"best": float("inf")}), FileError, "cannot hold NaN, inf .*: best"),
    ):
        monkeypatch.setattr(tunerkit.Tuner, "training_state", lambda tuner, state=state: state)
        with pytest.raises(error, match=words):
            tunerkit.save_state(model, tmp_path)
        assert path.read_bytes() == older

    def spoil(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["seen"] = torch.tensor([torch.inf])

    with pytest.raises(FileError, match="NaN or inf in 1 of 1 tensors: seen"):
        tunerkit.load_state(model, rewritten(path, tmp_path / "x.safetensors", spoil))
    assert tunerkit.tuner(model).state is None


# Files that do not say what they hold


@pytest.mark.parametrize("rank", [10**7, 10**12, 2**63 - 1, 2**63, 10**99, 10**400])
def test_a_small_file_cannot_ask_for_much_memory(toys: "Toys", saved: Path, tmp_path: Path, rank: int) -> None:
    """The config is compared with the file's own tensors before a plugin has made any of such a size."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        fields["config"]["rank"] = rank

    words = "needs many times more memory than the" if rank < 10**100 else "settings below"
    assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), FileError, words)


def test_adapters_that_do_not_fit_are_not_kept(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """A config that asks for a little more than the file has is refused by the shapes, and they are all named."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        fields["config"]["rank"] = 3

    text = assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), FileError, "does not fit its own")
    assert all(f"at {path}: " in text for path in ("conv", "layers.0", "layers.1"))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("name", ["conv.adapter.a", "head.2.copy.weight", "layers.0.bias"])
def test_tensors_of_another_kind_are_refused(
    toys: "Toys", saved: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Integers, booleans, complex numbers and 8-bit floats are no weights in float32: they are not cast."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones_like(tensors[name]).to(dtype)

    words = rf"{name} is {str(dtype).removeprefix('torch.')}, expected float32"
    assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), FileError, words)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_in_another_precision_are_loaded(toys: "Toys", tmp_path: Path, dtype: torch.dtype) -> None:
    """A model may be converted before it is saved; the adapter is loaded in the precision that its config names."""
    model = toys.trained()
    for slot in tunerkit.tuner(model).adapters().values():
        slot.to(dtype)
    loaded = tunerkit.load(toys.net(), tunerkit.save(model, tmp_path))
    assert {p.dtype for p in tunerkit.tuner(loaded).parameters()} == {torch.float32}
    assert torch.allclose(loaded(toys.x()), toys.trained()(toys.x()), rtol=0.1, atol=0.1)


def test_values_that_overflow_in_this_model_are_refused(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """A head that was trained in float32 may be too large for a base in float16."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.2.copy.weight"][0, 0] = 1e30

    path = rewritten(saved, tmp_path / "x.safetensors", change)
    assert_refused(toys, path, FileError, r"too large for the precision .*: head\.2\.copy\.weight", toys.net().half())
    assert tunerkit.load(toys.net(), path).head[2].tunerkit.default.copy.weight.max() == 1e30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wrong(steps=-1), "steps: expected an integer from 0"),
        (wrong(steps=True), "steps: expected an integer"),
        (wrong(steps=2**64), "steps: expected an integer"),
        (wrong(total_steps=10**400), "total_steps: expected an integer"),
        (wrong(targets=["conv", "conv"]), "targets: a path is listed twice"),
        (wrong(history=[[1, 2, [3, 4, -5]]]), "history: expected an integer"),
        (wrong(method="x" * 10**6), "method: expected the name of a method"),
        (wrong(base={"w": {"shape": [-1], "dtype": "float32", "sample": []}}), "base: expected an integer"),
        (wrong(base={"w": {"shape": [1], "dtype": "float32", "sample": [10**400]}}), "base: expected a finite number"),
        (wrong(base={"w": {"shape": [1], "dtype": "float32", "sample": [float("nan")]}}), "expected a finite number"),
        (wrong(values={"base_config": [1]}), "base_config"),
    ],
)
def test_numbers_and_names_that_cannot_be_are_refused(
    toys: "Toys", saved: Path, tmp_path: Path, change: Any, words: str
) -> None:
    """Negative or huge counts, a flag for a number, and paths listed twice: one error of ours, of bounded length."""
    text = assert_refused(toys, rewritten(saved, tmp_path / "x.safetensors", change), FileError, words)
    assert len(text) < 2000


LONG = "x" * 100_000
LONG_FILES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], object]] = {
    "targets": wrong(targets=[LONG + str(number) for number in range(20)]),
    "one target": wrong(targets=[LONG]),
    "fields": lambda fields, _: fields.update({LONG + str(number): 1 for number in range(20)}),
    "kind": wrong(kind=LONG),
    "format": wrong(format=LONG),
    "dtype": wrong(base={"w": {"shape": [1], "dtype": LONG, "sample": [LONG]}}),
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
    base.config = SimpleNamespace(model_type="toy", rms_norm_eps=1e-5)
    with pytest.raises(tunerkit.errors.TunerkitError) as caught:
        tunerkit.load(base, path)
    assert len(str(caught.value)) < 25_000


def test_a_state_of_another_run_is_refused_shortly(toys: "Toys", tmp_path: Path) -> None:
    """Settings of any length are cut."""
    path = tunerkit.save_state(toys.trained("toy-shift", targets=["conv"]), tmp_path)
    other = rewritten(path, tmp_path / "x.safetensors", cast(Any, wrong(config={"targets": LONG, LONG: 1})))
    with pytest.raises(FileError, match="another run") as caught:
        tunerkit.load_state(toys.trained("toy-shift", targets=["conv"]), other)
    assert len(str(caught.value)) < 25_000


def test_a_wrong_base_of_many_targets_is_refused_quickly(toys: "Toys", tmp_path: Path) -> None:
    """The error names a few of 560 targets; looking for similar names must not take longer than loading."""

    def base(block: str) -> nn.Module:
        names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.o_proj")
        model = nn.Module()
        for number in range(94):
            for name in names:
                path = f"model.{block}.{number}.{name}".split(".")
                parent = model
                for part in path[:-1]:
                    if part not in dict(parent.named_children()):
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                parent.add_module(path[-1], nn.Linear(2, 2))
        return model

    path = tunerkit.save(tunerkit.wrap(base("layers"), "toy-shift", {"targets": ["re:.*_proj"]}), tmp_path)
    other, begun = base("blocks"), time.process_time()
    with pytest.raises(BaseMismatchError, match="no module named") as caught:
        tunerkit.load(other, path)
    assert time.process_time() - begun < 10
    assert len(str(caught.value)) < 25_000


# Bases that are almost right


def test_a_base_without_the_bias_that_was_trained_is_refused(toys: "Toys", tmp_path: Path) -> None:
    """The module is there and its bias is not: the error names the module."""
    model = toys.trained(targets=["layers.1"], bias="adapters")
    path = tunerkit.save(model, tmp_path)

    def drop(model: Any) -> None:
        model.layers[1].bias = None

    words = r"modules without the bias that the adapter trains: layers\.1"
    assert_refused(toys, path, BaseMismatchError, words, base=changed(toys, drop))


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_of_another_size_names_num_labels(toys: "Toys", tmp_path: Path, trained: bool) -> None:
    """Whether the head is trained in full or frozen: the error says what to pass to from_pretrained."""

    def base(labels: int) -> Any:
        model = toys.net()
        model.config = SimpleNamespace(num_labels=labels, model_type="toy")
        model.head[2] = nn.Linear(6, labels)
        for parameter in model.head[2].parameters():
            parameter.data.fill_(0.5)
        return model

    config = {"targets": ["conv"], "train_modules": ["head.2"] if trained else []}
    path = tunerkit.save(tunerkit.wrap(base(5), "toy-shift", config), tmp_path)
    words = "built for 2 labels, the adapter needs 5: pass num_labels=5 to from_pretrained"
    assert_refused(toys, path, BaseMismatchError, words, base=base(2))
    assert tunerkit.load(base(5), path) is not None
