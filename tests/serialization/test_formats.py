"""Formats of other programs: exporting through a plugin, and adopting what a plugin reads."""

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support import toy_formats
from tests.support.model_checks import attached, fit, silent
from tests.support.toys import OneMethod, Toys, registering
from tunerkit import hooks, serialization
from tunerkit.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FileError,
    PluginError,
    TargetError,
    TunerkitWarning,
    UnknownFormatError,
    UnknownMethodError,
)
from tunerkit.plugin import (
    BaseLayer,
    Delta,
    Factors,
    Foreign,
    Format,
    Method,
    Target,
    Tuner,
    biases_of,
    copies_of,
    factors_of,
    low_rank_delta,
    low_rank_factors,
    setting,
)
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import SCALE, LowRank
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin


class Product(LowRank):
    """A low-rank adapter whose rank may differ between targets."""

    rank_dims: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1}

    @property
    def rank(self) -> int:
        """The rows of a."""
        return int(self.a.shape[0])


class ProductPlugin(OneMethod, LowRankPlugin):
    """``toy-product``: it can leave and come in, by products or by its own tensors."""

    method = Method("toy-product", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Product:
        return Product(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_factors(self, adapter: Product) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=SCALE)

    @tunerkit.hookimpl
    def tunerkit_from_factors(
        self, targets: Sequence[Target], factors: Mapping[str, Factors]
    ) -> tuple[LowRankConfig, dict[str, Product]]:
        adapters = {}
        for path, each in factors.items():

            class Features:
                in_features, out_features = each.q.shape[1], each.p.shape[0]

            adapters[path] = adapter = Product(Features(), each.rank)  # type: ignore[arg-type]
            adapter.a.data, adapter.b.data = each.q.clone(), each.p / SCALE
        return LowRankConfig(rank=max(1, *(each.rank for each in factors.values()))), adapters


class BiasedPlugin(ProductPlugin):
    """``toy-biased``: its factors are not all that it adds."""

    method = Method("toy-biased", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: LowRank, base: BaseLayer) -> Delta:
        weight = low_rank_delta(base, q=adapter.a, p=adapter.b, scale=SCALE)
        return Delta(weight=weight, bias=torch.ones(base.out_features))


class FormatPlugin:
    """Yields one format; a test may replace its functions."""

    def __init__(self, **changed: Any) -> None:
        functions = {"sniff": toy_formats.sniff, "read": toy_formats.read, "write": toy_formats.write}
        self.format = Format(**{"name": "toy", **functions, **changed})

    @tunerkit.hookimpl
    def tunerkit_formats(self) -> list[Format]:
        return [self.format]


_products = registering(ProductPlugin(), BiasedPlugin())


@pytest.fixture
def exported(toys: "Toys", tmp_path: Path) -> Path:
    """A folder of the toy format, with the adapter of `trained`."""
    return export(toys, tmp_path / "exported")


def trained(toys: "Toys", method: str = "toy-product", **config: Any) -> nn.Module:
    """A model with an adapter at a convolution and a linear layer."""
    model: nn.Module = toys.trained(method, **{"targets": ["conv", "layers.1"], **config})
    return model


def reader(**fields: Any) -> FormatPlugin:
    """A format whose adapters are of ``toy-product``, with these fields."""

    def read(path: Path, model: nn.Module) -> Foreign:
        return attrs.evolve(toy_formats.read(path, model), **{"method": "toy-product", **fields})

    return FormatPlugin(read=read)


def export(toys: "Toys", place: Any, plugin: FormatPlugin | None = None, model: nn.Module | None = None) -> Path:
    """Export through one format, by default the adapter of `trained`."""
    with registered(plugin or FormatPlugin()):
        return tunerkit.export(model or trained(toys), place, format="toy")


def load(toys: "Toys", path: Path, plugin: FormatPlugin | None = None, **options: Any) -> nn.Module:
    """Load through one format."""
    with registered(plugin or reader()):
        model: nn.Module = tunerkit.load(toys.net(), path, **options)
    return model


def test_an_exported_adapter_comes_back_and_computes_the_same(toys: "Toys", exported: Path) -> None:
    """By products alone; the output is that of the exported model, bit for bit."""
    loaded = load(toys, exported)
    tuner = tunerkit.tuner(loaded)
    assert torch.equal(loaded(toys.x()), trained(toys)(toys.x()))
    assert (tuner.method, tuner.ranks()) == ("toy-product", {"conv": 2, "layers.1": 2})
    assert not any(parameter.requires_grad for parameter in tuner.parameters())


def test_a_loaded_adapter_is_saved_as_ours_and_trains_on(toys: "Toys", exported: Path, tmp_path: Path) -> None:
    """Our file of it needs no plugin of the format; steps move it."""
    model = load(toys, exported, trainable=True)
    before = model(toys.x()).detach()
    again = tunerkit.load(toys.net(), tunerkit.save(model, tmp_path / "ours"))
    assert torch.equal(again(toys.x()), before)
    fit(model, attached(model), toys.x())
    assert not torch.equal(model(toys.x()), before)


def test_the_tensors_of_a_method_are_taken_as_they_are(toys: "Toys", exported: Path) -> None:
    """With them, the method's settings come from the file too, and ranks differ between targets."""
    shapes = {"conv": ((3, 27), (4, 3)), "layers.1": ((1, 8), (8, 1))}
    tensors = {path: {"a": torch.ones(a), "b": torch.ones(b)} for path, (a, b) in shapes.items()}
    factors = {path: Factors(q=own["a"], p=own["b"] * SCALE) for path, own in tensors.items()}
    model = load(toys, exported, reader(tensors=tensors, factors=factors, config={"rank": 3}))
    tuner = tunerkit.tuner(model)
    assert tuner.ranks() == {"conv": 3, "layers.1": 1}
    assert tuner.config == LowRankConfig(rank=3, targets=("re:conv", r"re:layers\.1"))
    assert torch.equal(factors_of(tuner)["conv"].p, torch.full((4, 3), SCALE))


def test_copies_and_biases_come_too(toys: "Toys", exported: Path) -> None:
    """A container is trained as the modules in it; a bias at a target and one elsewhere."""
    head = {name: torch.full_like(value, 0.5) for name, value in toys.net().head.state_dict().items()}
    biases = {"layers.1": torch.full((8,), 0.25), "norm": torch.full((8,), 0.75)}
    model = load(toys, exported, reader(copies={"head": head}, biases=biases))
    tuner = tunerkit.tuner(model)
    assert [copied.path for copied in tuner.copies] == ["head.0", "head.2"]
    assert all(bool((value == 0.5).all()) for own in copies_of(tuner).values() for value in own.values())
    found = {path: float(bias.mean()) for path, bias in biases_of(tuner).items()}
    assert found == {"layers.1": 0.25, "norm": 0.75}
    assert tuner.config.bias == "all"


def test_a_method_that_is_not_installed_becomes_the_common_one(
    toys: "Toys", exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning says so, beside what the format has to say; without either method, an error names both."""
    monkeypatch.setattr("tunerkit.serialization.adopting._COMMON", "toy-product")
    with pytest.warns(TunerkitWarning, match=r"(?s)exported:\n- the alpha.*\n- method 'absent' is not installed"):
        model = load(toys, exported, reader(method="absent", remarks=("the alpha was lost",)))
    assert torch.equal(model(toys.x()), trained(toys)(toys.x()))
    monkeypatch.setattr("tunerkit.serialization.adopting._COMMON", "absent-too")
    with pytest.raises(UnknownMethodError, match=r"It needs absent or absent-too: pip install .*\[absent-too\]"):
        load(toys, exported, reader(method="absent"))


def test_opening_needs_no_weights_of_the_base(toys: "Toys", exported: Path, tmp_path: Path) -> None:
    """Over a model on the meta device, an adapter of either kind lies on the CPU and is exported as it was."""
    biases = {"layers.1": torch.ones(8)}
    head = toys.net().head.state_dict()
    ours = tunerkit.save(load(toys, exported, reader(copies={"head": head}, biases=biases)), tmp_path / "ours")
    with registered(reader()):
        for number, source in enumerate((exported, ours)):
            skeleton = serialization.open_unloaded(toys.net().to("meta"), source)
            assert all(not tensor.is_meta for tensor in tunerkit.tuner(skeleton).parameters())
            written = tunerkit.export(skeleton, tmp_path / f"again-{number}", format="toy")
            for path, product in toy_formats.read(exported, skeleton).factors.items():
                again = toy_formats.read(written, skeleton).factors[path]
                assert torch.equal(again.p @ again.q, product.p @ product.q)
    assert torch.equal(copies_of(tunerkit.tuner(skeleton))["head.0"]["weight"], head["0.weight"])


def at(q: Tensor, p: Tensor, path: str = "conv", **more: object) -> dict[str, Any]:
    return {"factors": {path: Factors(q=q, p=p)}, **more}


Q, P = torch.ones(1, 27), torch.ones(4, 1)  # what the convolution takes
FITS = at(Q, P)["factors"]
OWN = at(Q, P, tensors={"conv": {"a": Q, "b": P}}, config={"rank": 1})
MORE = {**OWN, "tensors": {"conv": {"a": Q, "b": P, "c": P}}}
BIAS = torch.ones(3)


def copied(**tensors: Tensor) -> dict[str, Any]:
    return {"copies": {"head.2": {"weight": torch.ones(3, 6), **tensors}}}


WIDE, STRAY = copied(weight=torch.ones(4, 6), bias=P[:, 0]), {"biases": {"batch_norm": P[:, 0]}}
# The fields of what is read, the error, and its words.
LOST = r"another base model, 'acme/one': no module named 'convs'; did you mean 'conv'"
REJECTED = r"settings that method 'toy-product' rejects:\nexpected int, got str 'one' @ \$\.rank"
MISFITS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no target": ({"factors": {}}, FileError, "holds no adapter"),
    "another path": (at(Q, P, "convs", base="acme/one"), BaseMismatchError, LOST),
    "a norm": (at(Q, P, "norm"), TargetError, "is a LayerNorm"),
    "the model itself": (at(Q, P, ""), BaseMismatchError, "''"),
    "another shape": (at(Q[:, 1:], P), BaseMismatchError, r"conv has q of shape \(1, 26\).*needs q \(r, 27\)"),
    "halves of two ranks": (at(torch.ones(2, 27), P), BaseMismatchError, r"with one r"),
    "nan": (at(Q * torch.nan, P), FileError, r"NaN or inf in 1 of 2"),
    "a wide copy": (WIDE, BaseMismatchError, r"head\.2\.copy\.weight \[4, 6\] -> \[3, 6\]"),
    "a copy without its bias": (copied(), FileError, r"or this model:\n- missing: head\.2\.copy\.bias"),
    "a copy with more": (copied(bias=BIAS, gain=BIAS), FileError, r"unexpected: head\.2\.copy\.gain"),
    "a copy with nan": (copied(bias=BIAS * torch.inf), FileError, r"NaN or inf"),
    "a stray bias": (STRAY, BaseMismatchError, r"biases of batch_norm, which have no bias here"),
    "a wide bias": ({"biases": {"norm": torch.ones(9)}}, BaseMismatchError, r"norm\.bias \[9\] -> \[8\]"),
    "settings that the method rejects": ({**OWN, "config": {"rank": "one"}}, FileError, REJECTED),
    "a tensor that the method does not know": (MORE, FileError, r"unexpected: conv\.adapter\.c"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_and_the_model_unchanged(toys: "Toys", exported: Path, case: str) -> None:
    """One error of our class names the files, the place and what the model needs."""
    fields, error, message = MISFITS[case]
    model = toys.net()
    before = toys.snapshot(model)
    with registered(reader(**fields)), pytest.raises(error, match=message) as raised:
        tunerkit.load(model, exported)
    assert str(exported) in str(raised.value)
    assert toys.same(toys.snapshot(model), before)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned None; it must return tunerkit.plugin.Foreign"),
        (Foreign(MappingProxyType({"conv": 3}), method="toy-product"), "returned 3 for 'conv'; expected Factors"),  # type: ignore[dict-item]
        (Foreign({"conv": Factors(torch.ones(2), torch.ones(2))}, method="toy-product"), "expected Factors"),
        (Foreign(FITS, tensors={"x": {}}), "same paths as factors"),
    ],
)
def test_a_wrong_answer_of_a_reader_is_the_plugin_s_fault(
    toys: "Toys", exported: Path, answer: Any, message: str
) -> None:
    """The error names the format."""
    with pytest.raises(PluginError, match=rf"format 'toy'.*{re.escape(message)}"):
        load(toys, exported, FormatPlugin(read=lambda path, model: answer))


def test_a_reader_that_makes_a_wrong_record_is_named(toys: "Toys", exported: Path) -> None:
    """The error says the format, the field, its value and what is allowed."""
    wrong: Any = 3
    words = r"read of format 'toy' failed: copies of a Foreign is {'head': 3} with 3 at \['head'\]; expected Mapping"
    with pytest.raises(PluginError, match=words):
        load(toys, exported, FormatPlugin(read=lambda path, model: Foreign({}, copies={"head": wrong})))


def test_an_error_of_a_reader_keeps_its_class_and_names_the_format(toys: "Toys", exported: Path) -> None:
    """Of a plugin's own mistake, a user sees where it came from."""

    def read(path: Path, model: nn.Module) -> Foreign:
        raise ZeroDivisionError("one by zero")

    with pytest.raises(ZeroDivisionError) as raised:
        load(toys, exported, FormatPlugin(read=read))
    assert raised.value.__notes__[0] == "raised by read of format 'toy'"
    assert "tunerkit_formats of plugin 'FormatPlugin' (in-process)" in raised.value.__notes__[1]


def test_our_file_comes_first(toys: "Toys", exported: Path) -> None:
    """In a folder with both, and no format is asked."""
    tunerkit.save(trained(toys), exported)
    model = load(toys, exported, FormatPlugin(read=lambda path, model: 1 / 0))
    assert torch.equal(model(toys.x()), trained(toys)(toys.x()))


@pytest.mark.parametrize("name", ["toi", "TOY", 3, None, "peft-2"])
def test_an_unknown_format_is_named_with_those_that_are_there(toys: "Toys", tmp_path: Path, name: Any) -> None:
    """With the closest name, and nothing is written."""
    hint = "; did you mean 'toy'" if name in ("toi", "TOY") else ""
    with registered(FormatPlugin()), pytest.raises(UnknownFormatError, match=rf"no format named .*{hint}.*installed"):
        tunerkit.export(trained(toys), tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()


def test_a_format_of_a_distribution_that_is_missing_names_it(
    toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as the default."""
    monkeypatch.setattr(hooks, "gather_formats", dict)
    with pytest.raises(UnknownFormatError, match="format 'peft' needs tunerkit-peft, which is not installed: pip"):
        tunerkit.export(trained(toys), tmp_path / "out")


@attrs.frozen
class Options:
    """Three options, of which one is bounded and one has a check of its own."""

    form: str = setting("plain", doc="What it looks like.")
    rank: int | None = setting(None, ge=1, doc="How wide it is.")
    even: int = attrs.field(default=2)

    @even.validator
    def _check(self, attribute: Any, value: int) -> None:
        if value % 2:
            raise ValueError(f"{value} is odd")


def test_options_are_checked_as_settings_are(toys: "Toys", tmp_path: Path) -> None:
    """Names, types and ranges, all problems at once; a valid one reaches the writer."""
    seen: list[object] = []

    def write(tuner: Tuner, path: Path, options: object) -> list[Path]:
        seen.append(options)
        return toy_formats.write(tuner, path, options)

    with registered(FormatPlugin(write=write, options=Options)):
        with pytest.raises(ConfigError) as raised:
            tunerkit.export(trained(toys), tmp_path / "out", format="toy", forms="x", rank=0, form=3)
        assert raised.value.problems == (
            "unknown key 'forms'; did you mean 'form'? @ $.forms",
            "expected str, got int 3 @ $.form",
            "expected >= 1, got 0 @ $.rank",
        )
        with pytest.raises(ConfigError, match="3 is odd"):
            tunerkit.export(trained(toys), tmp_path / "out", format="toy", even=3)
        assert not seen
        tunerkit.export(trained(toys), tmp_path / "out", format="toy", rank=4)
    assert seen == [Options(rank=4)]


@pytest.mark.parametrize(
    ("method", "message"),
    [("toy-low-rank", "is not a product of two small matrices"), ("toy-biased", "also adds to the bias of 'conv'")],
)
def test_a_method_with_more_than_products_cannot_leave(toys: "Toys", tmp_path: Path, method: str, message: str) -> None:
    """Nothing would tell the reader of the file what is missing; the way out is a merged model."""
    with registered(FormatPlugin()), pytest.raises(AdapterError, match=rf"{message}.*keep_merged=True"):
        tunerkit.export(trained(toys, method), tmp_path / "out", format="toy")
    assert not any(tmp_path.iterdir())


def test_a_diverged_or_untrained_adapter_is_not_written(toys: "Toys", tmp_path: Path) -> None:
    """NaN is an error as in `save`, and an adapter that adds nothing a warning."""
    with registered(FormatPlugin()):
        model = trained(toys)
        next(tunerkit.tuner(model).parameters()).data[0] = torch.nan
        with pytest.raises(AdapterError, match="NaN or inf in 1 of 4 tensors"):
            tunerkit.export(model, tmp_path / "out", format="toy")
        fresh = tunerkit.wrap(toys.net(), "toy-product", {"targets": ["conv"]})
        with pytest.warns(TunerkitWarning, match="saved untrained"):
            tunerkit.export(fresh, tmp_path / "fresh", format="toy")
    assert [each.name for each in tmp_path.iterdir()] == ["fresh"]


def test_a_single_file_may_be_named(toys: "Toys", exported: Path, tmp_path: Path) -> None:
    """A path that ends as the file does is the file; the folder is created."""
    path = export(toys, tmp_path / "a" / "b" / "mine.json")
    assert path == tmp_path / "a" / "b" / "mine.json"
    assert path.read_bytes() == (exported / "toy.json").read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["mine.json"]


def test_an_older_adapter_is_replaced_and_other_files_stay(
    toys: "Toys", exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exporting twice into a folder leaves the second adapter, and what else was there. A reader finds one of them."""
    (exported / "notes.txt").write_text("mine")
    model = toys.fill_(trained(toys), seed=9)
    move, moved = os.replace, []

    def watched(source: Any, target: Any) -> None:
        moved.append(Path(target))
        assert (exported / "toy.json").is_file()
        move(source, target)

    monkeypatch.setattr(os, "replace", watched)
    export(toys, exported, model=model)
    assert moved == [exported / "toy.json"]
    assert torch.equal(load(toys, exported)(toys.x()), model(toys.x()))
    assert sorted(each.name for each in exported.iterdir()) == ["notes.txt", "toy.json"]


def cards(text: str) -> Callable[[Tuner, Path, object], list[Path]]:
    """A writer that also writes a card."""

    def write(tuner: Tuner, path: Path, options: object) -> list[Path]:
        (path / "README.md").write_text(text)
        return [*toy_formats.write(tuner, path, options), path / "README.md"]

    return write


def test_a_card_of_the_user_is_kept_and_ours_replaced(toys: "Toys", tmp_path: Path) -> None:
    """Ours carries a mark."""
    out, mark = tmp_path / "out", "<!-- written by tunerkit -->"
    for text, expected in ((f"{mark} one", f"{mark} one"), (f"{mark} two", f"{mark} two")):
        export(toys, out, FormatPlugin(write=cards(text)))
        assert (out / "README.md").read_text() == expected
    (out / "README.md").write_text("my words")
    export(toys, out, FormatPlugin(write=cards(f"{mark} three")))
    assert (out / "README.md").read_text() == "my words"


@pytest.mark.parametrize(
    "case", ["a file", "several files into a file", "other files", "a file as folder", "NUL", "int"]
)
def test_what_is_there_already_is_never_lost(toys: "Toys", tmp_path: Path, case: str) -> None:
    """An error says what is in the way; nothing is changed and no scratch folder stays."""
    place: Any = tmp_path / "taken"
    if case in ("a file", "several files into a file"):
        place = tmp_path / "taken.json"
        place.write_text("{}")
    elif case == "other files":
        place.mkdir()
        (place / "toy.json").write_text("{}")
    elif case == "a file as folder":
        place.write_text("text")
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    place = {"NUL": str(place) + "\0", "int": 3}.get(case, place)
    write = cards("x") if case == "several files into a file" else toy_formats.write
    plugin = FormatPlugin(write=write, sniff=lambda path: False)
    with registered(plugin), pytest.raises(FileError, match=r"cannot write|expected the path|NUL"):
        tunerkit.export(trained(toys), place, format="toy")
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_a_failure_between_two_files_brings_the_older_ones_back(
    toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever move it comes, in a folder with an older adapter, and in an empty one."""
    model, mark = trained(toys), "<!-- written by tunerkit -->"
    older = export(toys, tmp_path / "older", FormatPlugin(write=cards(f"{mark} one")), model)
    (tmp_path / "empty").mkdir()
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    move, moves = os.replace, 0

    def counted(source: Any, target: Any) -> None:
        nonlocal moves
        moves += 1
        if moves == number:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr("tunerkit.serialization.formats.os.replace", counted)
    for place in (older, tmp_path / "empty"):
        for number in range(1, 10):  # noqa: B007  # `counted` uses it
            moves = 0
            with registered(FormatPlugin(write=cards(f"{mark} two"))):
                try:
                    tunerkit.export(toys.fill_(trained(toys)), place, format="toy")
                except KeyboardInterrupt:
                    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before
                else:
                    break
        assert number == (5 if place == older else 3)
        before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("case", ["empty", "link", "dot", "slash", "with a mode"])
def test_folders_that_are_there_are_written_into(
    toys: "Toys", exported: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder, a link to one, the working folder, a path with a slash. A replaced file keeps its mode."""
    folder = tmp_path / "folder"
    folder.mkdir()
    place: Any = folder
    if case == "link":
        place = tmp_path / "link"
        place.symlink_to(folder)
    elif case == "dot":
        monkeypatch.chdir(folder)
        place = "."
    elif case == "slash":
        place = f"{folder}/"
    elif case == "with a mode":
        (folder / "toy.json").write_bytes((exported / "toy.json").read_bytes())
        (folder / "toy.json").chmod(0o640)
    export(toys, place)
    assert [each.name for each in folder.iterdir()] == ["toy.json"]
    assert (folder / "toy.json").read_bytes() == (exported / "toy.json").read_bytes()
    if case == "with a mode":
        assert stat.S_IMODE((folder / "toy.json").stat().st_mode) == 0o640


def test_a_format_that_cannot_sniff_stops_no_other(toys: "Toys", exported: Path) -> None:
    """One warning names it, and the others are asked."""

    def sniff(path: Path) -> bool:
        raise RuntimeError("no sniffing")

    with (
        registered(FormatPlugin(name="broken", sniff=sniff)),
        pytest.warns(TunerkitWarning, match="'broken' failed to check"),
    ):
        model = load(toys, exported)
    assert torch.equal(model(toys.x()), trained(toys)(toys.x()))


def test_a_damaged_file_of_ours_is_not_passed_over(toys: "Toys", exported: Path) -> None:
    """Another adapter in the same folder would be loaded in its place, without a word."""
    (exported / "adapter.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileError, match=r"adapter\.safetensors cannot be read"):
        load(toys, exported)


def test_two_formats_in_one_folder_are_named(toys: "Toys", exported: Path) -> None:
    """Nothing says which one is meant."""
    with registered(FormatPlugin(name="other")), pytest.raises(FileError, match="in the formats other and toy"):
        load(toys, exported)


def test_loading_keeps_the_random_state(toys: "Toys", exported: Path) -> None:
    """As loading our own file does."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load(toys, exported)
    assert torch.equal(torch.rand(1), expected)


def test_with_warnings_as_errors_nothing_is_loaded(toys: "Toys", exported: Path) -> None:
    """The remark comes before the adapter."""
    model = toys.net()
    before = toys.snapshot(model)
    with registered(reader(remarks=("lost",))), silent(Warning), pytest.raises(TunerkitWarning, match="lost"):
        tunerkit.load(model, exported)
    assert toys.same(toys.snapshot(model), before)


def test_a_target_at_several_paths_is_refused(exported: Path) -> None:
    """Other programs adapt the path that they name; here an adapter acts at all of them, so that is refused."""
    shared = nn.Linear(3, 3)
    product = Factors(q=torch.ones(1, 3), p=torch.ones(3, 1))
    for path, other in (("0", "1"), ("1", "0")):
        model = nn.Sequential(shared, shared, nn.Linear(3, 3))
        with (
            registered(reader(factors={path: product})),
            pytest.raises(TargetError, match=rf"'{path}', which is the same module as '{other}'.*deepcopy"),
        ):
            tunerkit.load(model, exported)
    with (
        registered(reader(factors={"2": product}, biases={"1": torch.ones(3)})),
        pytest.raises(TargetError, match=r"biases .* 1 \(the same module as 0\)"),
    ):
        tunerkit.load(model, exported)


def test_a_bias_that_core_cannot_add_is_refused(exported: Path) -> None:
    """A norm of another library may add its bias along any axis, and the shapes need not tell."""

    class Channels(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(nn.Linear(3, 3), Channels(3))
    product = Factors(q=torch.ones(1, 3), p=torch.ones(3, 1))
    with (
        registered(reader(factors={"0": product}, biases={"1": torch.ones(3)})),
        pytest.raises(TargetError, match=r"1 \(a Channels\).*Merge the adapter"),
    ):
        tunerkit.load(model, exported)


def liar(tuner: Tuner, path: Path, options: object) -> list[Path]:
    """Return a file that it did not write."""
    toy_formats.write(tuner, path, options)
    return [path / "other.json"]


def failing(tuner: Tuner, path: Path, options: object) -> list[Path]:
    """Fail after one file."""
    toy_formats.write(tuner, path, options)
    raise KeyboardInterrupt


def mute(tuner: Tuner, path: Path, options: object) -> None:
    """Write, and return nothing."""
    toy_formats.write(tuner, path, options)


@pytest.mark.parametrize(("write", "error"), [(liar, PluginError), (mute, PluginError), (failing, KeyboardInterrupt)])
def test_a_writer_that_fails_leaves_nothing(
    toys: "Toys", tmp_path: Path, write: Any, error: type[BaseException]
) -> None:
    """Neither half an adapter nor a scratch folder nor new folders above it, and an older adapter is unchanged."""
    older = export(toys, tmp_path / "older")
    before = (older / "toy.json").read_bytes()
    for place in (older, tmp_path / "new" / "er"):
        with registered(FormatPlugin(write=write)), pytest.raises(error):
            tunerkit.export(toys.fill_(trained(toys)), place, format="toy")
    assert (older / "toy.json").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["older"]


def test_of_two_formats_with_one_name_the_first_counts(toys: "Toys", tmp_path: Path) -> None:
    """As with base-layer kinds, a plugin cannot replace what another one brings."""
    words = "'FormatPlugin'.* is not used for 'toy': plugin 'FormatPlugin' .*comes first"
    second = FormatPlugin(write=lambda tuner, path, options: 1 / 0)
    with registered(FormatPlugin(), second), pytest.warns(TunerkitWarning, match=words):
        path = tunerkit.export(trained(toys), tmp_path / "out", format="toy")
    assert [each.name for each in path.iterdir()] == ["toy.json"]
