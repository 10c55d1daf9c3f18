"""The report of one run: sections, numbers on hover, escaping and size."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from plugins.cli.tests import pages, run_records
from tunerkit_cli.report.html import compare, render
from tunerkit_cli.report.record import RecordError

TEMPLATES = Path(__file__).parents[3] / "plugins/cli/tunerkit_cli/report/html/templates"
HOSTILE = "</script></style></svg><script>alert('1')</script>\"'&amp;{{ 7 * 7 }}<!--"
minimal, without = run_records.minimal, run_records.without


def sections(**parts: Any) -> list[str]:
    return pages.checked(render(minimal(**parts))).sections


def renamed(value: Any, name: str) -> Any:
    """The record with every text in it replaced, as far as that leaves it a record: all names of ours stay."""
    if isinstance(value, dict):
        return {key: renamed(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, name) for inner in value]
    return name if isinstance(value, str) else value


@pytest.mark.parametrize(
    "record",
    [
        run_records.classifier(),
        run_records.language_model(),
        run_records.regression(),
        minimal(),
        run_records.large(500),
    ],
)
def test_a_page_is_well_formed_and_loads_nothing(record: dict[str, Any]) -> None:
    """Tags are balanced, drawings are XML with text alternatives, and there is no script and no link."""
    page = pages.checked(render(record))
    assert "loading" in page.sections


def test_a_full_record_has_every_section_of_its_kind() -> None:
    """In a fixed order: the results first."""
    found = pages.checked(render(run_records.classifier())).sections
    shown = ["results", "training", "ranks", "parameters", "spectrum", "mistakes", "loading", "details"]
    assert found == shown
    assert pages.checked(render(run_records.language_model())).sections == [
        *("results", "training", "parameters", "spectrum", "samples", "loading", "details")
    ]


def test_a_minimal_record_has_only_what_can_be_said() -> None:
    """The verdict, and how to load the result."""
    page = pages.checked(render(minimal()))
    assert page.sections == ["loading"]
    assert "AdaLoRA trained an adapter without held-out rows." in page.text
    assert 'tunerkit.from_folder("OUT")' in page.text


def test_what_is_wrong_with_a_run_is_the_first_line() -> None:
    """Before the heading, in a box; a run without problems has none."""
    lost = {"kind": "collapse", "text": "the loss is back", "step": 3, "learning_rate": None, "advice": "--lr 5e-4"}
    page = render({**run_records.classifier(), "problems": [lost]})
    assert "This run did not learn: the loss is back; try --lr 5e-4." in pages.checked(page).text
    assert "This run did not learn" in page.partition("<h1>")[0].partition("<main>")[2]
    assert page.count('class="failure"') == 1
    assert 'class="failure"' not in render({**run_records.classifier(), "problems": []})


@pytest.mark.parametrize(
    ("parts", "section"),
    [
        ({"metrics": {"accuracy": 0.5}}, "results"),
        ({"logs": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}, "training"),
        ({"ranks": {"a.0.q": 1, "a.1.q": 2}}, "ranks"),
        ({"sizes": {"a.0.q": 10, "a.1.q": 20}}, "parameters"),
        ({"spectrum": {"a": [2.0, 1.0]}}, "spectrum"),
        ({"confusion": [[2, 1], [0, 3]]}, "mistakes"),
        ({"samples": [{"prompt": "p", "after": "a"}]}, "samples"),
        ({"config": {"rank": 8}}, "details"),
    ],
)
def test_a_section_is_there_if_it_says_something(parts: dict[str, Any], section: str) -> None:
    """And only then: no other part of the record brings it in."""
    assert section in sections(**parts)
    assert section not in sections()


@pytest.mark.parametrize(
    ("parts", "section"),
    [
        ({"metrics": {}}, "results"),
        ({"logs": [{"step": 1, "loss": 1.0}, {"loss": 2.0}]}, "training"),
        ({"ranks": {"a.0.q": 8, "a.1.q": 8}, "history": [{"step": 0, "budget": 16, "ranks": [8, 8]}]}, "ranks"),
        ({"sizes": {"a.0.q": 10, "a.1.q": 10}}, "parameters"),
        ({"spectrum": {"a": [2.0], "b": []}}, "spectrum"),
        ({"confusion": [[5]]}, "mistakes"),
    ],
)
def test_a_section_without_news_is_left_out(parts: dict[str, Any], section: str) -> None:
    """Constant ranks, equal sizes, single points, one label."""
    assert section not in sections(**parts)


def test_every_rank_shows_its_place_and_cap_on_hover() -> None:
    """A cell per target, and a mark on those at their cap."""
    record = minimal(
        ranks={"m.0.q": 3, "m.0.v": 0, "m.1.q": 5}, caps={"m.0.q": 6, "m.0.v": 6, "m.1.q": 5}, budget={"unit": "rank"}
    )
    text = render(record)
    cells = [title for title in pages.titles(text) if "rank" in title]
    assert sorted(cells) == [
        "layer 0, q: rank 3 of at most 6",
        "layer 0, v: rank 0 of at most 6",
        "layer 1, q: rank 5 of at most 5, at its cap",
    ]
    assert text.count('class="cap"') == 1
    assert "8 live ranks in 3 matrices: 2.7 on average, from 0 to 5; 1 at their cap; 1 without any." in text
    assert 'class="cap"' not in render(without(record, "caps"))
    assert "at its cap" not in pages.checked(render(without(record, "caps"))).text
    constant = render({**record, "caps": record["ranks"]})  # as without a budget: a mark on each would say nothing
    assert "at its cap" not in constant


@pytest.mark.parametrize(
    ("budget", "figures"),
    [
        ({"start": 12, "end": 8, "live": 8, "unit": "rank"}, "Budget (rank) 8 12 at the start"),
        ({"start": 12, "end": 8, "live": 7, "unit": "parameters"}, "Budget (parameters) 8 12 at the start, 7 live"),
        ({"start": 8, "end": 8, "live": 8}, "Rank 4 in 2 matrices"),
        (None, "Rank 4 in 2 matrices"),
    ],
)
def test_a_budget_that_shrank_is_a_key_figure(budget: dict[str, Any] | None, figures: str) -> None:
    """A constant one says no more than the rank does."""
    page = pages.checked(render(minimal(budget=budget, ranks={"a.0.q": 4, "a.1.q": 4})))
    assert figures in page.text


def test_curves_show_their_values_on_hover() -> None:
    """Each strip names its step and the value of each curve there, with where it stands if that is elsewhere."""
    logs = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.25}, {"step": 4, "loss": 1.0, "eval_loss": 0.75}]
    found = [title.splitlines() for title in pages.titles(render(minimal(logs=logs)))]
    assert found == [
        ["optimizer step 1", "training: 1.5", "held-out: 0.75 (at 4)"],
        ["optimizer step 2", "training: 1.25", "held-out: 0.75 (at 4)"],
        ["optimizer step 4", "training: 1", "held-out: 0.75"],
    ]


def test_the_confusion_matrix_has_counts_and_percentages_of_rows() -> None:
    """Also for a label without rows; beside it are recall, precision and F1."""
    record = minimal(labels=["no", "yes"], confusion=[[3, 1], [0, 0]])
    text = render(record)
    assert set(pages.titles(text)) >= {
        "no predicted as no: 3 of 4 rows, 75.0\xa0%",
        "no predicted as yes: 1 of 4 rows, 25.0\xa0%",
        "yes predicted as no: 0 of 0 rows, 0\xa0%",
    }
    assert "no 4 0.750 1.000 0.857" in pages.checked(text).text


def test_many_labels_are_shown_by_their_errors() -> None:
    """A matrix of 77 labels could not be read: the worst labels and the most confused pairs can."""
    count = 77
    confusion = [[90 if n == k else n % 7 if k == (n + 1) % count else 0 for k in range(count)] for n in range(count)]
    page = pages.checked(render(minimal(labels=[f"label {n}" for n in range(count)], confusion=confusion)))
    assert "Confusion matrix" not in page.text
    assert "label 6 label 7 6 6.2 %" in page.text
    assert "47 labels with fewer errors are left out." in page.text


def test_the_baseline_stands_beside_the_result() -> None:
    """With the difference of each metric, and what both cost."""
    text = pages.checked(render(run_records.classifier())).text.replace("\xa0", " ")
    assert "accuracy 0.8517 0.6990 +15.3 points, better" in text
    assert "loss 0.3933 0.5794 −0.186, better" in text
    assert "training time 4 min 12 s 9.1 s 27.6 times" in text
    assert "Baseline: head alone, base frozen." in text
    alone = pages.checked(render(without(run_records.classifier(), "baseline"))).text
    assert "better" not in alone


def test_samples_stand_before_and_after() -> None:
    """An answer that is missing has no box; line breaks stay."""
    text = render(minimal("causal-lm", samples=[{"prompt": "p\nq", "before": None, "after": "one\n  two"}]))
    assert "After training" in text
    assert "Before training" not in text
    assert "one\n  two" in text


@pytest.mark.parametrize(
    ("task", "out", "lines"),
    [
        (
            "text-classification",
            "out",
            ['from_folder("out")', "outputs = model(**processor(", "tunerkit predict out --text"],
        ),
        ("causal-lm", "my out", ['from_folder("my out")', "model.generate(", "tunerkit predict 'my out' --text"]),
        ("image-classification", "out", ["processor(image", "tunerkit predict out --data rows.csv"]),
        ("embedding", "my out", ["SentenceTransformer(", "tunerkit merge 'my out' --out", "predict 'my out' --text"]),
    ],
)
def test_three_lines_load_the_result(task: str, out: str, lines: list[str]) -> None:
    """They name the run's folder, quoted where it has to be, and fit the task."""
    page = pages.checked(render(minimal(task, recipe={"out": out})))
    assert all(line in page.text for line in lines)


def test_nested_settings_have_dotted_names() -> None:
    """And long values are cut."""
    page = pages.checked(
        render(minimal(config={"a": {"b": [1, 2], "c": None}, "d": "x" * 9999}, recipe={"config": {}}))
    )
    assert "a.b [1, 2]" in page.text
    assert "a.c –" in page.text
    assert "x" * 501 not in page.text


@pytest.mark.parametrize("record", [run_records.classifier(2), run_records.language_model(), run_records.regression()])
def test_every_text_of_a_record_is_escaped(record: dict[str, Any]) -> None:
    """Whatever a label, a path or a sample says, it is text: in HTML, in attributes and in drawings."""
    text = render({**renamed(record, HOSTILE), "labels": [HOSTILE, f"{HOSTILE}2"] if record.get("labels") else []})
    page = pages.checked(text)
    assert "<script" not in text
    assert "<!--" not in text
    assert "{{ 7 * 7 }}" in page.text
    assert HOSTILE in page.text


def test_names_of_targets_and_settings_are_escaped() -> None:
    """They are keys of the record."""
    paths = [f"m.{layer}.{HOSTILE}" for layer in range(2)]
    record = minimal(
        metrics={HOSTILE: 0.5},
        main_metric=HOSTILE,
        ranks=dict(zip(paths, (1, 2), strict=True)),
        sizes=dict(zip(paths, (1, 2), strict=True)),
        spectrum={key: [2.0, 1.0] for key in paths},
        logs=[{"step": 1, f"eval_{HOSTILE}": 1.0}, {"step": 2, f"eval_{HOSTILE}": 2.0}],
        baseline={"what": HOSTILE, "metrics": {HOSTILE: 0.25}},
        config={HOSTILE: {HOSTILE: HOSTILE}},
    )
    text = render(record, title=HOSTILE)
    pages.checked(text)
    assert "<script" not in text


@settings(max_examples=25)  # a page takes some milliseconds
@given(st.text(st.characters(), max_size=30))
def test_any_characters_are_written_as_utf_8_and_as_xml(label: str) -> None:
    """Control characters and lone surrogates, which neither has, are replaced."""
    text = render(minimal(labels=[label, "b"], confusion=[[1, 2], [3, 4]], samples=[{"prompt": label}]))
    pages.checked(text)
    text.encode("utf-8")


def test_secrets_of_a_trainer_are_hidden() -> None:
    """A report is passed on; the special tokens of a tokenizer are no secrets."""
    training = {"hub_token": "hf_abc", "hub_strategy": "end", "pad_token": "<pad>", "token": None}
    text = pages.checked(render(minimal(recipe={"training": training}))).text
    assert "hf_abc" not in text
    assert "training.hub_token (hidden)" in text
    assert "training.pad_token <pad>" in text


numbers = st.floats() | st.floats(0, 2) | st.integers(-(10**120), 10**120) | st.none() | st.text(max_size=3)
rows = st.dictionaries(st.sampled_from(("step", "loss", "eval_loss", "eval_f1", "epoch", "learning_rate")), numbers)
usual = st.floats(-1e100, 1e100)


@settings(max_examples=60)  # it takes some hundredths of a second
@given(
    st.lists(rows, max_size=6),
    st.dictionaries(st.sampled_from(("f1", "loss", "")), usual, max_size=3),
    st.dictionaries(st.sampled_from(("f1", "loss")), usual, max_size=2),
    st.dictionaries(st.text(".a01", max_size=5), st.lists(usual, max_size=4), max_size=4),
)
def test_any_numbers_make_a_page(
    logs: list[dict[str, Any]], metrics: dict[str, float], other: dict[str, float], spectrum: dict[str, list[float]]
) -> None:
    """Huge, tiny, equal, negative and missing ones; those in logs may even be text or infinite."""
    ranks = {path: len(values) for path, values in spectrum.items()}
    parts: dict[str, Any] = {"ranks": ranks, "sizes": ranks, "spectrum": spectrum, "metrics": metrics, "logs": logs}
    record = minimal(**parts, baseline={"metrics": other})
    pages.checked(render(record))
    pages.checked(compare({"a": record, "b": minimal(metrics=other)}))


def test_a_large_record_becomes_a_small_page() -> None:
    """224 targets of rank 64 and 10,000 rows of logs stay below 1 MB, and no curve has more than 400 points."""
    text = render(run_records.large())
    assert len(text.encode()) < 1_000_000
    paths = re.findall(r'd="(M[^"]*)" class="(?:line|faint|steps)', text)
    assert 100 < max(path.count("L") + path.count("H") + 1 for path in paths) <= 400
    pages.checked(text)


def test_a_page_is_a_function_of_its_record() -> None:
    """The same record gives the same bytes, whatever was drawn before."""
    first = render(run_records.classifier())
    render(run_records.large(50))
    assert render(run_records.classifier()) == first


def test_the_heading_can_be_chosen() -> None:
    """By default it names the method and the model, without the folders above it."""
    assert "<h1>AdaLoRA on minilm</h1>" in render(minimal(model={"path": "models/deep/minilm/"}))
    assert "<h1>Mine</h1>" in render(minimal(), title="Mine")
    assert "<h1>AdaLoRA</h1>" in render(minimal())


def test_a_damaged_record_is_refused() -> None:
    """Before anything is drawn."""
    with pytest.raises(RecordError, match=r"run\.steps"):
        render(minimal(steps="many"))


def test_scripts_and_network_are_forbidden_by_the_page_itself() -> None:
    """Even if something got past the escaping, a browser would not run or fetch it."""
    assert """content="default-src 'none'; style-src 'unsafe-inline'\"""" in render(minimal())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_their_background(scheme: str) -> None:
    """By the contrast ratios of WCAG 2: 4.5 for text, 3 for lines and marks."""
    light, dark = (TEMPLATES / "style.html.j2").read_text(encoding="utf-8").split("@media (prefers-color-scheme: dark)")
    source = light if scheme == "light" else dark
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", source))
    for name in ("text", "muted", "accent", "good", "bad"):
        assert min(contrast(colours[name], colours[below]) for below in ("page", "card")) >= 4.5
    for number in range(8):
        assert contrast(colours[f"c{number}"], colours["card"]) >= 3
    for below, text in (("amount-low", "on-low"), ("amount-high", "on-high"), ("wrong-low", "on-low")):
        assert contrast(colours[below], colours[text]) >= 4.5


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_templates_are_in_the_wheel() -> None:
    """A page needs them wherever tunerkit is installed."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="builds with hatchling")
    found = {Path(file.path) for file in wheel.WheelBuilder(str(TEMPLATES.parents[3])).recurse_included_files()}
    assert {file for file in TEMPLATES.iterdir()} <= found
