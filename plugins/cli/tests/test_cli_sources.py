"""Data sets of the hub by name, from a stub of the hub, and several sources with weights."""

import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import yaml
from huggingface_hub import constants
from hypothesis import given, strategies as st

from tests.support.train_command import arguments_of, assert_same_end, command, signalled, succeeded
from tunerkit import TunerkitError
from tunerkit_cli.preparing import sources
from tunerkit_cli.preparing.data import read_rows
from tunerkit_cli.preparing.sources import pinned, read_source
from tunerkit_cli.recipes.recipe import Recipe, Source
from tunerkit_cli.rows import drawn
from tunerkit_cli.tasks import task_of
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

CARD = b"""---
configs:
- {config_name: default, data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]}
dataset_info:
  features: [{name: text, dtype: string}, {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}]
---
"""


class Hub(BaseHTTPRequestHandler):
    """A hub with one data set, acme/films: its files by commit, the newest one last."""

    commits: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """Answer as the hub does, as far as ``datasets`` asks."""
        self.asked.append(self.path)
        commit = next((each for each in self.commits if each in self.path), [*self.commits][-1])
        files, name = self.commits[commit], self.path.rpartition("/")[2]
        answer = (200, "", files.get(name, json.dumps({"id": "acme/films", "sha": commit}).encode()))
        if "/acme/films" not in self.path:
            answer = (401, "RepoNotFound", b"")
        elif "/tree/" in self.path:
            listed = [{"type": "file", "path": each, "size": len(text), "oid": each} for each, text in files.items()]
            answer = (200, "", json.dumps(listed).encode())
        elif "/resolve/" in self.path and name not in files:
            answer = (404, "EntryNotFound", b"")
        status, error, body = answer
        self.send_response(status)
        headers = {"X-Error-Code": error, "X-Repo-Commit": commit, "Content-Length": str(len(body))}
        for key, value in {**headers, "ETag": f'"{name}-{commit[:9]}"'}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def push(commit: str, count: int) -> None:
    """Add a commit with so many rows to train on, and four to test; the label is the first word."""
    rows = [{"text": ["bad", "good"][n % 2] + n % 7 * " film", "label": n % 2} for n in range(count)]
    lines = [f"{json.dumps(row)}\n".encode() for row in rows]
    files = {"README.md": CARD, "train.jsonl": b"".join(lines), "test.jsonl": b"".join(lines[:4])}
    Hub.commits[commit * 40] = files
    sources._commit.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The hub is a stub at the commit a, with 24 rows to train on, and its caches are empty."""
    monkeypatch.chdir(tmp_path)
    Hub.commits.clear()
    Hub.asked.clear()
    push("a", 24)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    set_offline(monkeypatch, on=False)
    yield monkeypatch
    server.shutdown()
    server.server_close()


def set_offline(patch: pytest.MonkeyPatch, *, on: bool) -> None:
    """As HF_HUB_OFFLINE does in a new process."""
    sources._commit.cache_clear()
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", on)
    patch.setattr(constants, "HF_HUB_OFFLINE", on)


def pinned_of(data: Any, begun: Recipe | None = None) -> Source:
    """The one source of a recipe's data, at a commit."""
    found = pinned(Recipe(data=data), begun).data
    assert isinstance(found, Source)
    return found


def test_a_data_set_is_read_at_the_commit_that_the_recipe_keeps(hub: pytest.MonkeyPatch) -> None:
    """Law: its classes have names, its split is train if none is named, and a later commit changes no begun run."""
    begun = Recipe(data=pinned_of("acme/films"))
    assert begun.data == Source("acme/films", split="train", revision="a" * 40)
    test = read_source(pinned_of({"path": "acme/films", "split": "test[:3]"}))
    assert (test.source, test.columns) == ("acme/films (test[:3], aaaaaaa)", ("text", "label"))
    assert [row["label"] for row in test.rows] == ["bad", "good", "bad"]
    push("b", 30)
    assert (len(read_source(pinned_of("acme/films"))), len(read_source(pinned_of(begun.data)))) == (30, 24)
    assert pinned_of("acme/films", begun) == begun.data
    for named in ("main", "b" * 40):  # which a resumed run refuses
        assert pinned_of({"path": "acme/films", "revision": named}, begun).revision == "b" * 40


def test_no_label_is_none_and_images_are_refused_by_name(hub: pytest.MonkeyPatch) -> None:
    """Also in lists of tags, where -1 is the number of no class."""
    assert sources._named([1, -1, 0], datasets.ClassLabel(names=["O", "B"])) == ["B", None, "O"]
    push("c", 8)
    for kind in (b"dtype: image", b"list: audio"):
        Hub.commits["c" * 40]["README.md"] = CARD.replace(b"dtype: string", kind)
        with pytest.raises(TunerkitError, match=r"acme/films \(train, ccccccc\): column 'text' has images or sound"):
            read_source(pinned_of({"path": "acme/films", "rows": 3}))


def test_the_first_rows_are_a_stream_and_no_file_beyond_them_is_read(hub: pytest.MonkeyPatch) -> None:
    """Law: they are those of the whole split, and it is said how many there are. Of a local file too."""
    whole = read_source(pinned_of("acme/films"))
    Hub.asked.clear()
    for rows, note in ((24, "the first 24 rows are read"), (99, "has 28 of the 99 rows asked for")):
        assert not any("test.jsonl" in path for path in Hub.asked)
        found = read_source(pinned_of({"path": "acme/films", "split": "train+test", "rows": rows}))
        assert (found.rows[:24], found.columns, found.note) == (whole.rows, whole.columns, note)
    Path("rows.jsonl").write_text('{"text": "x"}\n' * 3 + "no JSON")
    datasets.Dataset.from_dict({"text": ["x"] * 9}).to_parquet("rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        table = read_source(Source(name, rows=3))
        assert (len(table), table.note) == (3, "the first 3 rows are read")
        assert len(read_source(Source(name, rows=3), most=2)) == 2


def test_a_weight_that_draws_no_row_is_refused(tmp_path: Path) -> None:
    """It would leave a file out in silence."""
    for name, count in (("many", 400), ("few", 2)):
        lines = (json.dumps({"text": f"{name} {row}", "label": "ab"[row % 2]}) + "\n" for row in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    tables = [read_source(Source(str(tmp_path / f"{n}.jsonl"), weight=w)) for n, w in (("many", 1000), ("few", 1))]
    with pytest.raises(TunerkitError, match=r"few\.jsonl: its weight draws none of its 2 rows"):
        read_rows(task_of("text-classification"), tables, {})


def test_offline_the_cache_is_read_and_no_other_commit(hub: pytest.MonkeyPatch) -> None:
    """Law: what the cache has is read without a request, and one commit is never taken for another."""
    assert len(read_source(pinned_of("acme/films"))) == 24
    set_offline(hub, on=True)
    Hub.asked.clear()
    assert len(read_source(pinned_of("acme/films"))) == 24
    with pytest.raises(TunerkitError, match=r"the cache has the commit a+, and b+ is asked for"):
        read_source(Source("acme/films", revision="b" * 40))
    with pytest.raises(TunerkitError, match=r"acme/plays: .* no such data set in the cache; HF_HUB_OFFLINE or"):
        pinned_of("acme/plays")
    assert Hub.asked == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source("acme/plays"), "there is no such file or folder here, and no data set of this name on the hub"),
        (Source("acme/films", split="trian"), "Unknown split \"trian\". Should be one of ['train', 'test']"),
        (Source("acme/films", name="big"), "BuilderConfig 'big' not found. Available: ['default']"),
        (Source("acme/films"), "has the splits train, test; say which one it is, as in {path: acme/films, split"),
        (
            Source("row.csv", split="test"),
            "name, split and revision are for data sets of the hub (org/name), and this is no such",
        ),
        (Source("acme/films", split="train[:3]", rows=2), "exclude each other; write split: train, rows: 2"),
        (Source("acme/films", rows=2), "has the splits train, test; say which one it is, as in {path: acme/films, spl"),
        (Source("here", rows=2), "here: rows: 2 would read the first class of a folder alone; leave rows out"),
        (Source("here/films", split="test"), "(org/name), and this is a path that exists here"),
        (Source("here/flims"), "here/flims: no such file or folder; did you mean 'here/films'?; for a data set of the"),
        (Source("hre/films"), "hre/films: no such file or folder; did you mean 'here/films'"),
        (Source("here/row.csv"), "here/row.csv: no such file; did you mean 'here/rows.csv'"),
        (Source("films"), "films: no such file or folder; for a data set of the hub, write its name, as in `data: {p"),
    ],
    ids=str,
)
def test_a_mistyped_name_or_path_is_one_error(source: Source, words: str, hub: pytest.MonkeyPatch) -> None:
    """Law: what may be a path is never looked for on the hub, and each message says what there is."""
    Path("here/films").mkdir(parents=True)
    Path("here/rows.csv").touch()
    with pytest.raises(TunerkitError) as caught:
        read_source(source)
    assert words in str(caught.value)
    assert bool(Hub.asked) == (source.path.startswith("acme") and "[" not in (source.split or ""))


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0.01, 100)), min_size=1, max_size=4), st.integers(0, 3))
def test_the_rows_drawn_are_as_the_weights_to_a_row(parts: list[tuple[int, float]], seed: int) -> None:
    """Law: none is drawn twice, one part is drawn whole, and each share is exact but for rounding."""
    rows, weights = [[*range(count)] for count, _ in parts], [weight for _, weight in parts]
    found = drawn(rows, weights, seed=seed)
    scale = min(count / weight for count, weight in parts)
    assert [len(part) for part in found] == [len({*part}) for part in found] == [round(scale * w) for w in weights]
    assert all({*part} <= {*whole} for part, whole in zip(found, rows, strict=True))
    assert any(len(part) == count for part, (count, _) in zip(found, parts, strict=True))


def test_a_run_on_weighted_sources_is_resumed_bit_for_bit(hub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: a resumed run has the rows that it began with, though the hub has others now; its folder is used as any."""
    train, *options = arguments_of(tmp_path, "toy-low-rank", "{rank: 2}")
    place = options.index("--data")
    del options[place : place + 2]
    push("a", 30)
    weighted = [{"path": "acme/films", "rows": 24, "weight": 3}, {"path": "data.csv", "weight": 1}]
    recipe: dict[str, Any] = {"data": weighted, "eval_data": {"path": "acme/films", "split": "test"}}
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    Path("other.yaml").write_text(yaml.safe_dump({**recipe, "eval_data": {**recipe["eval_data"], "revision": "main"}}))
    with registered(LowRankPlugin()):
        told = succeeded(train, "r.yaml", *options, "--dry-run").output
        assert "note: acme/films (train, aaaaaaa): the first 24 rows are read" in told
        assert "drawn by weight: 24 of 24 rows of acme/films (train, aaaaaaa), 8 of 40 rows of data.csv" in told
        assert "32 training rows of acme/films (train, aaaaaaa) and data.csv, 4 held out" in told
        succeeded(train, "r.yaml", *options, "--out", "whole")
        with signalled(5, signal.SIGINT):
            assert command(train, "r.yaml", *options, "--out", "parts").exit_code == 130
        push("b", 30)
        refused = command(train, "other.yaml", *options, "--out", "parts", "--resume")
        assert refused.exit_code == 2
        assert f"eval_data.revision was '{'a' * 40}' and is '{'b' * 40}' now" in refused.stderr
        succeeded(train, "r.yaml", *options, "--out", "parts", "--resume")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")
        kept = yaml.safe_load(Path("parts/recipe.yaml").read_text())["data"]
        assert kept[0] == {"path": "acme/films", "split": "train", "revision": "a" * 40, "rows": 24, "weight": 3}
        assert (Path(kept[1]["path"]), kept[1]["weight"]) == (tmp_path / "data.csv", 1)
        assert len(succeeded("predict", "parts", "--data", "data.csv").output.splitlines()) == 40
        assert json.loads(succeeded("eval", "parts", "--data", "data.csv").stdout)["rows"] == 40
