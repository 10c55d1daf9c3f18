"""Files that are damaged, forged, absurd or hostile are refused, and change nothing; no code of a file runs."""

import copy
import json
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st

import tunerkit
from tests.faults.adapters import FILE, config_of, kinds, net, output, trained, warm_up, wrong_error
from tests.faults.forks import Case, failures, limited
from tests.support.adapter_files import assert_refused, in_place, rewritten
from tests.support.toys import Toys
from tunerkit.serialization.header import digest

Fields = dict[str, Any]
Tensors = dict[str, torch.Tensor]

# --- Damaged bytes ----------------------------------------------------------------------------------------------------


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that were changed, cut, added, removed or moved."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    at = draw(st.one_of(st.integers(0, 7), st.integers(8, header_end - 1), st.integers(header_end, len(data) - 1)))
    to = min(len(data), at + draw(st.sampled_from((1, 2, 8, 64, 512))))
    junk = draw(st.sampled_from((bytes(to - at), b"\xff" * (to - at), data[: to - at][::-1])))
    flipped = bytes([data[at] ^ 1 << draw(st.integers(0, 7))])
    return draw(
        st.sampled_from(
            (
                *(data[:at] + flipped + data[at + 1 :], data[:at] + junk + data[to:], data[:at]),
                *(data[:at] + data[to:], data[:at] + junk + data[at:], data + junk, data[:to] + data[at:]),
            )
        )
    )


@given(data=st.data())
@in_place
def test_damage_is_refused_or_changes_nothing(toys: "Toys", saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever happens to the bytes, loading gives our error and the base is unchanged, or the content is the same."""
    whole = saved.read_bytes()
    path = tmp_path / FILE
    path.write_bytes(data.draw(damages(whole)))
    base = toys.net()
    before = toys.snapshot(base)
    try:
        loaded = tunerkit.load(base, path)
    except tunerkit.errors.FileError:
        assert toys.same(toys.snapshot(base), before)
        return
    assert tunerkit.save(loaded, tmp_path / "again").read_bytes() == whole


# --- Forgeries --------------------------------------------------------------------------------------------------------


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Fields, Tensors], object]:
    return lambda fields, tensors: tensors.update({"conv.adapter.a": change(tensors["conv.adapter.a"])})


def sample(**entry: Any) -> Callable[[Fields, Tensors], object]:
    return lambda fields, tensors: next(iter(fields["base"].values())).update(entry)


def named(*names: str) -> Callable[[Fields, Tensors], object]:
    return lambda fields, tensors: tensors.update({name: torch.full((8, 4), 7.0) for name in names})


FORGERIES: dict[str, Callable[[Fields, Tensors], object]] = {
    "a tensor renamed": lambda f, t: t.update({"conv.adapter.c": t.pop("conv.adapter.a")}),
    "a tensor with a row more": first(lambda tensor: torch.cat([tensor, tensor[:1]])),
    "a tensor with a dimension more": first(lambda tensor: tensor[None]),
    "a tensor made flat": first(lambda tensor: tensor.reshape(-1)),
    "an empty tensor": first(lambda tensor: tensor.flatten()[:0]),
    # A file cannot replace weights of the base.
    **{
        f"a tensor named {name}": named(name)
        for name in (
            *("layers.0.weight", "base_model.model.layers.0.weight", "module.layers.0.weight", "model.layers.0.weight"),
            *("_orig_mod.layers.0.weight", ".layers.0.weight", "layers.0.weight.", "layers.0.copy.weight"),
            *("layers.0.tunerkit.default.weight", "layers.0.adapter.weight", "stray"),
            "layers.0.parametrizations.weight.original",
        )
    },
    "a target less": lambda f, t: f["targets"].pop(),
    "a target more": lambda f, t: f["targets"].append("head.0"),
    "a target that is no layer": lambda f, t: f["targets"].append("head.1"),
    "a copy without tensors": lambda f, t: f["copies"].append("norm"),
    "a bias without a tensor": lambda f, t: f["biases"].append("nowhere"),
    "negative total steps": lambda f, t: f.update(total_steps=-5),
    "an empty fingerprint": lambda f, t: f.update(base={}),
    "a parameter less in the fingerprint": lambda f, t: f["base"].popitem(),
    "another shape in the fingerprint": sample(shape=[1]),
    "a huge shape in the fingerprint": sample(shape=[10**400]),
    "a sample that is too short": sample(sample=[1.0]),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_file_that_contradicts_itself_is_refused(toys: "Toys", saved: Path, tmp_path: Path, forgery: str) -> None:
    """Although its digest is right; base and random state are unchanged, and the message is short."""

    def change(fields: Fields, tensors: Tensors) -> None:
        FORGERIES[forgery](fields, tensors)

    path = rewritten(saved, tmp_path / FILE, change)
    assert len(assert_refused(toys, path, tunerkit.TunerkitError, r"\w")) <= 10_000


# --- Absurd headers and configs ---------------------------------------------------------------------------------------

# Values that no writer means, of every type that JSON has.
JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "a", "0", "null", "\0", "\ud800", "é" * 1000, "x" * 100_000, "../..", "re:(a+)+$", "re:(", "re:(?R)"),
    *("[", "*", "?" * 200, "[!a", "torch", "os.system", "__class__", "float32", "float8_e4m3fn"),
    *([], {}, [[]], [{}], [None], ["x"] * 1000, [1, "a", None], {"": 0}, {"a": {"b": {"c": []}}}, {"__class__": "os"}),
)
_DEEP = {f"\x1a{depth}\x1a": "[" * depth + "]" * depth for depth in (10, 900, 100_000)}  # json.dumps cannot write it


def mutated(value: Any, chance: random.Random) -> Any:
    """Return a copy of a JSON value with one to three changes somewhere in it."""
    changed = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = chance.choice(list(_containers(changed)))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        way = chance.choice(("replace", "replace", "replace", "delete", "add", "swap", "nest")) if keys else "add"
        junk = copy.deepcopy(chance.choice([*_DEEP] if way == "nest" else JUNK))
        if way == "delete":
            del place[chance.choice(keys)]
        elif way == "swap":
            one, other = chance.choice(keys), chance.choice(keys)
            place[one], place[other] = place[other], place[one]
        elif way in ("replace", "nest"):
            place[chance.choice(keys)] = junk
        elif isinstance(place, dict):
            place[chance.choice(("", "x", "rank", "__init__", "targets", "x" * 10_000, "\ud800"))] = junk
        else:
            place.insert(chance.randrange(len(place) + 1), junk)
    return changed


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)


def text_of(value: Any, chance: random.Random) -> str:
    """Return JSON text, sometimes with a piece removed, doubled or replaced."""
    text = json.dumps(value)
    for mark, deep in _DEEP.items():
        text = text.replace(json.dumps(mark), deep)
    if chance.random() < 0.2:
        at, length = chance.randrange(len(text) + 1), chance.choice((1, 3, 20))
        junk = chance.choice(("", "\0", "{", "}", "[", "]", '"', ",", ":", "\\u", "1e999", "NaN", "é", "\n"))
        text = text[:at] + junk + text[at + (0 if chance.random() < 0.3 else length) :]
    return text


def write_signed(path: Path, text: str, tensors: Tensors) -> None:
    """Write a file with any header text and the digest that fits."""
    metadata = {"tunerkit": text, "tunerkit.digest": digest(text, tensors)}
    safetensors.torch.save_file(tensors, path, metadata)


def originals(folder: Path) -> dict[str, tuple[Fields, Tensors]]:
    """The header and the tensors of an adapter of each kind."""
    found = {}
    for kind in kinds():
        path = tunerkit.save(trained(kind, seed=1), folder / kind)
        with safetensors.safe_open(path, framework="pt") as file:
            found[kind] = (json.loads(file.metadata()["tunerkit"]), safetensors.torch.load_file(path))
    return found


def mutated_headers(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Change the header of a file as JSON or as text, sign it, and load it."""
    saved = originals(folder)

    def case(number: int) -> Case:
        kind, chance = kinds()[number % len(kinds())], random.Random(f"headers/{number}")

        def call() -> str:
            fields, tensors = saved[kind]
            write_signed(folder / FILE, text_of(mutated(fields, chance), chance), tensors)
            try:
                loaded = tunerkit.load(net(), folder / FILE)
            except Exception as error:
                return wrong_error(error)
            return "" if output(loaded).isfinite().all() else "it was loaded, and gives no finite output"

        return f"{number}: {kind}", call

    yield from limited(map(case, range(count)))


def mutated_configs(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Change a mapping of settings, and build a config from it."""

    def case(number: int) -> Case:
        kind, chance = kinds()[number % len(kinds())], random.Random(f"configs/{number}")
        found = json.loads(json.dumps(tunerkit.unstructure(tunerkit.structure(kind, config_of(kind)))))
        return f"{number}: {kind}", partial(_structured, kind, mutated(found, chance))

    yield from limited(map(case, range(count)))


def _structured(kind: str, settings: Any) -> str:
    try:
        config = tunerkit.structure(kind, settings)
        numbers = [value for name, value in settings.items() if "rank" in str(name) and isinstance(value, int)]
        small = all(number < 10**4 for number in numbers)  # a larger one would need gigabytes, which users may ask for
        model = tunerkit.wrap(net(), kind, config) if small else net()
    except Exception as error:
        return wrong_error(error)
    if tunerkit.structure(kind, tunerkit.unstructure(config)) != config:
        return "the config does not survive its own conversion"
    return "" if output(model).isfinite().all() else "the model gives no finite output"


@pytest.mark.skipif(sys.platform != "linux", reason="limits are set in forks, from the memory that /proc shows")
@pytest.mark.parametrize("attack", [mutated_headers, mutated_configs])
def test_whatever_is_written_there_is_one_clean_error_or_works(attack: Any) -> None:
    """Within 2 CPU seconds and 300 MB; the message is short."""
    assert failures(attack, 200, warm_up) == []


# --- Code in files ----------------------------------------------------------------------------------------------------


class Evil:
    """An object whose unpickling creates a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (self.trace,)


def _zipped(path: Path, evil: object) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(evil))
        archive.writestr("archive/version", "3\n")


PICKLES: dict[str, Callable[[Path, object], object]] = {
    "a pickle": lambda path, evil: path.write_bytes(pickle.dumps(evil)),
    "torch's form": lambda path, evil: torch.save(evil, path),
    "torch's old form": lambda path, evil: torch.save(evil, path, _use_new_zipfile_serialization=False),
    "a zip": _zipped,
    "a .bin beside it": lambda path, evil: torch.save(evil, path.with_suffix(".bin")),
}


@pytest.mark.parametrize("form", PICKLES)
def test_a_pickle_is_not_run(toys: "Toys", tmp_path: Path, form: str) -> None:
    """In the place of an adapter's file, or beside it."""
    PICKLES[form](tmp_path / FILE, {"0.weight": Evil(tmp_path / "trace")})
    assert_refused(toys, tmp_path, tunerkit.errors.FileError, r"\w")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["faults_canary", "faults_canary.run", "faults_canary:Net", "../faults_canary"])
@pytest.mark.parametrize("field", ["method", "kind", "adapter_dtype", "import", "targets", "copies", "versions"])
def test_nothing_that_a_file_names_is_imported(
    toys: "Toys", saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, name: str
) -> None:
    """Names of modules and functions in any field of the header are text, whether the file is loaded or refused."""
    (tmp_path / "faults_canary.py").write_text("class Net: ...\ndef run(*a, **k): ...\n")
    monkeypatch.syspath_prepend(tmp_path)

    def change(fields: Fields, tensors: Tensors) -> None:
        place = fields["config"] if field in ("adapter_dtype", "import") else fields
        place[field] = {name: "1"} if field == "versions" else [name] if field in ("targets", "copies") else name

    path = rewritten(saved, tmp_path / FILE, change)
    if field == "versions":
        tunerkit.load(toys.net(), path)
    else:
        assert_refused(toys, path, tunerkit.TunerkitError, r"\w")
    assert "faults_canary" not in sys.modules


# --- Links and odd places ---------------------------------------------------------------------------------------------

# What is made in a folder, and whether an adapter can then be saved there, and be loaded again.
PLACES: dict[str, tuple[Callable[[Path], Path], bool]] = {
    "a link to a folder": (lambda at: _link(at / "link", at / "real"), True),
    "a link to nothing": (lambda at: _link(at / FILE, at / "nothing" / "there").parent, True),
    "a file that links to itself": (lambda at: _link(at / FILE, at / FILE).parent, True),
    "a folder that links to itself": (lambda at: _link(at / "loop", at / "loop"), False),
    "a path with a line break": (lambda at: at / "a\nb", True),
    "a path with a lone surrogate": (lambda at: at / "a\udc80b", True),
    "a path with ..": (lambda at: at / "a/../b", True),
    "a device": (lambda at: Path("/dev/null"), False),
}


def _link(path: Path, to: Path) -> Path:
    if to.name == "real":
        to.mkdir()
    path.symlink_to(to)
    return path


@pytest.mark.parametrize("place", PLACES)
def test_an_odd_place_is_written_or_refused(toys: "Toys", tmp_path: Path, place: str) -> None:
    """Nothing can be loaded from there before; saving works and can be loaded, or is refused; nothing lies outside."""
    (tmp_path / "inside").mkdir()
    make, works = PLACES[place]
    path = make(tmp_path / "inside")
    assert_refused(toys, path, tunerkit.errors.FileError, r"\w")
    model = toys.trained()
    if works:
        tunerkit.save(model, path)
        assert torch.equal(tunerkit.load(toys.net(), path)(toys.x()), model(toys.x()))
    else:
        with pytest.raises(tunerkit.errors.FileError):
            tunerkit.save(model, path)
    assert [found.name for found in tmp_path.iterdir()] == ["inside"]


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(toys: "Toys", tmp_path: Path) -> None:
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / FILE)
    assert_refused(toys, tmp_path, tunerkit.errors.FileError, r"\w")


def test_saving_through_a_link_to_another_adapter_leaves_a_whole_one(toys: "Toys", tmp_path: Path) -> None:
    """What is behind the link is the older adapter or the newer one."""
    other, model = toys.trained(), toys.trained(targets=["conv"])
    elsewhere = tunerkit.save(other, tmp_path / "elsewhere")
    (tmp_path / FILE).symlink_to(elsewhere)
    tunerkit.save(model, tmp_path)
    assert torch.equal(tunerkit.load(toys.net(), tmp_path)(toys.x()), model(toys.x()))
    behind = tunerkit.load(toys.net(), elsewhere)(toys.x())
    assert any(torch.equal(behind, each(toys.x())) for each in (other, model))
