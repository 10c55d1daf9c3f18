"""The rows of a data file: formats, damage, classes and the split."""

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, strategies as st

from tunerkit_cli.rows import (
    DataError,
    Table,
    checked_rows,
    class_names,
    class_numbers,
    look_alikes,
    read_table,
    require_column,
    split,
    split_by_class,
    tidy,
)

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


def column(table: Table, name: str, task: str, option: str | None = None) -> tuple[object, ...]:
    """The values of a column, all of which are there."""
    found = require_column(table, name, task, option)
    return tuple(row[found] for row in checked_rows(table, {found: found}, lambda row: row))


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}
each_format = pytest.mark.parametrize("ending", WRITERS)


@each_format
@given(rows=tables)
def test_what_was_written_is_read_back(
    ending: str, rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any text and label survive each format: line breaks, quotes, NUL, and Unicode separators."""
    path = tmp_path_factory.mktemp("data") / f"data{ending}"
    WRITERS[ending](path, rows)
    found = read_table(path)
    assert (found.columns, len(found)) == (("text", "label"), len(rows))
    assert column(found, "text", "a task") == tuple(text for text, _ in rows)
    assert column(found, "label", "a task") == tuple(label for _, label in rows)


@given(rows=tables)
def test_a_json_file_is_a_list_or_has_lines(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both are written with this ending, with a byte-order mark or without."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "lines.json", rows)
    objects = [json.loads(line) for line in (folder / "lines.json").read_text("utf-8").split("\n") if line]
    for encoding in ("utf-8", "utf-8-sig"):
        (folder / "list.json").write_text(json.dumps(objects, indent=1), encoding=encoding)
        lines = (folder / "lines.json").read_text("utf-8-sig")
        (folder / "lines.json").write_text(lines, encoding=encoding, newline="\n")
        assert read_table(folder / "list.json").rows == read_table(folder / "lines.json").rows == tuple(objects)


@each_format
def test_values_keep_the_types_of_their_format(ending: str, tmp_path: Path) -> None:
    """A csv file has texts; the other formats keep the values' types."""
    path = tmp_path / f"data{ending}"
    WRITERS[ending](path, [("x", 1), ("y", 0)], ("sentence", "stars"))
    assert column(read_table(path), "stars", "a task") == (("1", "0") if ending == ".csv" else (1, 0))


def test_a_mapping_in_a_columnar_file_has_only_the_keys_that_were_written(tmp_path: Path) -> None:
    """Such a file gives each mapping the keys of all others, without a value, which a model would learn."""
    calls: list[list[dict[str, dict[str, object]]]] = [
        [{"arguments": {"city": "Rome"}}],
        [{"arguments": {"a": 1, "all": [{"x": 1}, {"y": None}]}}],
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"calls": call, "more": None} for call in calls]), tmp_path / "d.parquet"
    )
    calls[1][0]["arguments"]["all"] = [{"x": 1}, {}]
    assert read_table(tmp_path / "d.parquet").rows == tuple({"calls": call, "more": None} for call in calls)


@each_format
def test_a_missing_column_is_reported_with_the_closest_name(ending: str, tmp_path: Path) -> None:
    """The error has the existing columns, the likely one, and the option that chooses it."""
    path = tmp_path / f"data{ending}"
    WRITERS[ending](path, [("x", "a")], ("texts", "label"))
    wanted = r"regression needs a column 'text'; there is only 'texts', 'label'; did you mean 'texts'.*--text-column"
    with pytest.raises(DataError, match=wanted):
        column(read_table(path), "text", "regression", "--text-column")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"text,label\nonly text\n", r"row 1, column 'label': has no value; fill it in"),
        ("d.csv", b"text,label\n", r"there are no rows"),
        ("d.csv", b"a,b,a\n1,2,3\n", r"has the column 'a' twice"),
        ("d.csv", b"text,label\nx,a\nx,y,a\n", r"row 2 has more values than the header has columns"),
        ("d.csv", b"text,label\n\xff\xfe,a\n", r"it is not UTF-8 .*Latin-1"),
        ("d.csv", b'text,label\n"never closed,a\n', r"cannot be read as .csv"),
        ("d.jsonl", b'{"text": "x", "label": "a"}\n{"text": \n', r"line 2 is not JSON"),
        ("d.jsonl", b"[1, 2]\n", r"line 1: expected a JSON object .*, got \[1, 2\]"),
        ("d.jsonl", b'{"text": "x", "label": null}\n', r"row 1, column 'label': has no value; fill it in"),
        ("d.json", b'[{"text": "x"}, 3]', r"row 2: expected a JSON object such as .*, got 3"),
        ("d.json", b'[{"text": "x"}', r"the file is not JSON: Expecting"),
        ("d.parquet", b"not parquet", r"cannot be read as .parquet"),
        (
            "d.jsonl",
            b'{"text": "x", "label": ' + b"1" * 5000 + b"}\n",
            r"line 1 has .* more than 4,300 digits",
        ),
        ("d.jsonl", b"[" * 100_000 + b"\n", r"line 1 is not JSON: .*recursion"),
        ("d.csv", "text,label\nGr\xfc\xdfe,a\n".encode("latin-1"), r"not UTF-8 .*save it with the encoding UTF-8"),
        ("d.csv", "text,label\nx,a\n".encode("utf-16"), r"not UTF-8 .*save it with the encoding UTF-8"),
        ("d.jsonl", '{"text": "\xfc", "label": "a"}\n'.encode("latin-1"), r"not UTF-8"),
        ("d.csv", b"text;label\nx;a\n", r"separate columns by semicolons; save it with commas"),
        ("d.tsv", b"text,label\nx,a\n", r"separate columns by commas; save it with tabs"),
        ("d.csv", b"text\tlabel\nx\ta\n", r"separate columns by tabs; save it with commas"),
        ("d.csv", (",".join(f"column{n}" for n in range(50_000)) + "\n" + "x,a\n").encode(), r"and 49990 more"),
        ("d.txt", b"x", r"data files end in .csv, .tsv, .json, .jsonl, .parquet, got '?.txt"),
    ],
)
def test_damaged_data_is_reported_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """Each kind of damage is one `DataError` that names the file and the position in it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        column(read_table(tmp_path / name), "label", "a task")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_labels_of_thousands_of_digits_are_names(tmp_path: Path) -> None:
    """Python converts no such number; the classes are then sorted as text."""
    write_csv(tmp_path / "d.csv", [("x", "9" * 5000), ("y", "10"), ("z", "9")])
    labels = column(read_table(tmp_path / "d.csv"), "label", "a task")
    assert class_names(map(str, labels)) == ("10", "9", "9" * 5000)


def test_unknown_labels_are_few_in_the_error() -> None:
    """Of a hundred thousand wrong labels the error shows ten, and counts the others."""
    labels = [str(number) for number in range(100_000)]
    with pytest.raises(
        DataError, match=r"and 99988 more\] are not in the training data, which has \['a', 'b'\]"
    ) as caught:
        class_numbers([*labels[2:], "a"], ("a", "b"))
    assert len(str(caught.value)) < 300


@given(st.lists(st.integers(), min_size=2, max_size=30), st.integers(0, 9), st.data())
def test_a_split_is_a_partition_that_the_seed_decides(rows: list[int], seed: int, data: st.DataObject) -> None:
    """Every row is on one side, sizes are as requested, and the same seed gives the same split."""
    cut = data.draw(st.integers(1, len(rows) - 1))
    first, second = split(rows, train_rows=cut, seed=seed)
    assert len(first) == cut
    assert sorted([*first, *second]) == sorted(rows)
    assert split(rows, train_rows=cut, seed=seed) == (first, second)


def test_another_seed_cuts_otherwise() -> None:
    """The split is shuffled: it is not in file order, and seeds differ."""
    rows = range(50)
    cuts = {tuple(split(rows, train_rows=25, seed=seed)[0]) for seed in range(3)}
    assert len(cuts) == 3
    assert tuple(rows[:25]) not in cuts


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 9))
def test_each_class_is_split_as_all_rows_are(labels: list[str], every: int, seed: int) -> None:
    """Of n rows of a class n / every are held out, rounded up or down, and none of a class of one row."""
    rows = list(range(len(labels)))
    first, second = split_by_class(rows, labels, every=every, seed=seed)
    assert sorted([*first, *second]) == rows
    assert split_by_class(rows, labels, every=every, seed=seed) == (first, second)
    held = Counter(labels[row] for row in second)
    for name, count in Counter(labels).items():
        allowed = {0} if count == 1 else {count // every, -(-count // every)}
        assert held[name] in allowed
        assert held[name] < count
    several = sum(count for count in Counter(labels).values() if count > 1)
    assert abs(len(second) - several / every) <= 1 / 2


def test_a_split_by_class_is_shuffled() -> None:
    """It is not in the order of file or class, and seeds differ."""
    rows, labels = range(50), ["a"] * 25 + ["b"] * 25
    cuts = {tuple(split_by_class(rows, labels, every=5, seed=seed)[1]) for seed in range(3)}
    assert len(cuts) == 3
    assert all(list(cut) != sorted(cut) for cut in cuts)


@given(label_names)
def test_tidy_names_differ_where_readers_see_it(name: str) -> None:
    """White space around a name and its Unicode form are gone, and what is tidy stays as it is."""
    for form in ("NFC", "NFD"):
        assert tidy(f" {unicodedata.normalize(form, name)}\n") == tidy(name)
    assert tidy(tidy(name)) == tidy(name)


def test_names_that_look_alike_are_grouped() -> None:
    """Case, inner spaces and width; true beside 1, and 01 and 1.0 too; other names are in no group."""
    names = ["good", "Good", "very  good", "Very good", "true", "1", "0", "\uff11", "bad", "false positive"]
    assert look_alikes(names) == [["1", "true", "\uff11"], ["Good", "good"], ["Very good", "very  good"]]
    assert look_alikes(["True", "1", "1.0", "+01", "-1", "0.", "-0", "False"]) == [
        ["+01", "1", "1.0", "True"],
        ["-0", "0.", "False"],
    ]
    assert look_alikes(["00", "0", "-00.0", "007", "7"]) == [["-00.0", "0", "00"], ["007", "7"]]
    assert look_alikes(["0" * 500_000 + "x", "0" * 500_000 + "y"]) == []  # quadratic, this would take hours
    assert look_alikes(["a", "b", "1.1", "1.10", "-1", "1", "10"]) == []


def test_labels_of_an_earlier_version_are_found_by_their_tidy_names() -> None:
    """It kept the white space; of two names that are the same when tidy, the tidy one counts."""
    assert class_numbers(["good", " bad"], (" bad", " good")) == [1, 0]
    assert class_numbers(["good"], (" good", "good")) == [1]


def test_a_tab_separated_file_is_read(tmp_path: Path) -> None:
    """Commas in it are part of the texts, and a spreadsheet's byte-order mark is no part of the first name."""
    (tmp_path / "d.tsv").write_bytes("\ufefftext\tlabel\ngood, but long\tNA\n".encode())
    assert read_table(tmp_path / "d.tsv").rows == ({"text": "good, but long", "label": "NA"},)


@pytest.mark.parametrize("label", ["a", '"never closed'])
def test_a_text_may_be_longer_than_csvs_limit(label: str, tmp_path: Path) -> None:
    """The limit of the csv module is for the whole process, so it is put back, after an error too."""
    before = csv.field_size_limit()
    (tmp_path / "d.csv").write_text(f"text,label\n{'x' * 200_000},{label}\n")
    if label == "a":
        assert read_table(tmp_path / "d.csv").rows == ({"text": "x" * 200_000, "label": "a"},)
    else:
        with pytest.raises(DataError, match=r"is a quote never closed"):
            read_table(tmp_path / "d.csv")
    assert csv.field_size_limit() == before


def test_a_folder_of_images_has_a_row_for_each(tmp_path: Path) -> None:
    """The subfolder's name is the class; files that are no images are left out."""
    for name in ("b/2.png", "b/1.JPG", "a/1.png", "a/notes.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = read_table(tmp_path)
    assert found.columns == ("image", "label")
    assert [(Path(str(row["image"])).name, row["label"]) for row in found.rows] == [
        ("1.png", "a"),
        ("1.JPG", "b"),
        ("2.png", "b"),
    ]


def test_a_hidden_folder_is_no_class_of_images(tmp_path: Path) -> None:
    """Jupyter and macOS write hidden copies; they are left out, and so are images without a class, which is said."""
    for name in ("a/1.png", "a/._1.png", "b/1.png", ".ipynb_checkpoints/1-checkpoint.png", "0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = read_table(tmp_path)
    assert [row["label"] for row in found.rows] == ["a", "b"]
    said = "left out the hidden folders '.ipynb_checkpoints' and 1 images in no subfolder, such as 0.png"
    assert found.note == said
    asked = read_table(tmp_path, predicting=True)
    names = [str(Path(str(row["image"])).relative_to(tmp_path)) for row in asked.rows]
    assert names == ["0.png", "a/1.png", "b/1.png"]
    for name in ("a", "b"):
        (tmp_path / name / "1.png").unlink()
    with pytest.raises(DataError, match="expected a subfolder per class"):
        read_table(tmp_path)
    assert len(read_table(tmp_path, predicting=True)) == 1


def test_classes_are_in_the_order_of_numbers_where_they_are_numbers() -> None:
    """Class 10 comes after class 9; names are in alphabetical order."""
    assert class_names(["10", "9", "9", "-1"]) == ("-1", "9", "10")
    assert class_names(["b", "10", "9"]) == ("10", "9", "b")
    assert class_numbers(["9", "10"], ("-1", "9", "10")) == [1, 2]


def test_labels_that_training_never_saw_are_refused() -> None:
    """A held-out label without a class would be scored as another class."""
    with pytest.raises(DataError, match=r"\['c'\] are not in the training data, which has \['a', 'b'\]"):
        class_numbers(["a", "c"], ("a", "b"))
