"""How often the verdict of `tunerkit sweep` is right: ``python -m benchmarks.verdicts [SWEEP]``, in two minutes.

Draws scores of two contenders (seeds, rows) with the spread between seeds that LoRA and AdaLoRA had in
benchmarks/quality, with and without a gap of three points, and counts how often the interval tells them apart. With the
folder of a sweep it also draws 5 of its seeds and 1,000 of its rows, twenty times, and counts how often the value that
is best over all of them is named.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median, stdev

import numpy as np

from benchmarks.quality import store
from tunerkit_cli.sweeping.statistics import Scores, difference, rows_to_tell, seeds_to_tell

GAP, DISAGREE, FIXED = 0.03, 0.1, 0.3  # two runs differ on a tenth of the rows, and on a third of these in all seeds
DRAWS, REPETITIONS = 2000, 20


def spreads() -> list[float]:
    """The standard deviations over seeds of AdaLoRA's test accuracy minus LoRA's, by task and rank."""
    found: dict[tuple[str, int], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in store.read(Path(__file__).parent / "quality" / "rows" / "contest.jsonl"):
        accuracy = (row.get("test") or {}).get("accuracy")
        if accuracy is not None and not row["settings"]:
            found[row["task"], row["rank"]][row["seed"]][row["method"]] = accuracy
    both = ([each for each in seeds.values() if {"adalora", "lora"} <= each.keys()] for seeds in found.values())
    return [stdev(each["adalora"] - each["lora"] for each in pairs) for pairs in both if len(pairs) > 1]


def drawn(generator: np.random.Generator, shape: tuple[int, int], gap: float, spread: float) -> Scores:
    """Differences of two contenders' right answers: -1, 0 or 1 for each seed and row."""
    shift = gap + spread * generator.normal(size=(shape[0], 1))
    fixed = generator.random((1, shape[1])) < DISAGREE * FIXED
    loose = generator.random(shape) < DISAGREE * (1 - FIXED)
    signs = np.where(fixed, generator.choice([-1, 1], size=(1, shape[1])), generator.choice([-1, 1], size=shape))
    found = np.where(fixed | loose, signs, 0)
    moved = (found == 0) & (generator.random(shape) < np.abs(shift) / (1 - DISAGREE))
    return np.where(moved, np.sign(shift), found).astype(float)


def scores(file: Path) -> list[float]:
    """The scores of all held-out rows of a run."""
    found = json.loads(file.read_text("utf-8"))
    return [*found["choosing"], *found["judging"]]


def named(generator: np.random.Generator, sweep: Path) -> tuple[str, int]:
    """The best value of a sweep, and in how many of the repetitions it is the one that is chosen."""
    runs = {folder.name: sorted(folder.glob("seed-*/scores.json")) for folder in sorted(sweep.glob("[0-9]*-*"))}
    seeds = min(map(len, runs.values()))
    kept = {name: np.array([scores(file) for file in files[:seeds]]) for name, files in runs.items()}
    best, rows = max(kept, key=lambda name: float(kept[name].mean())), next(iter(kept.values())).shape[1]
    hits = 0
    for _ in range(REPETITIONS):
        some = generator.choice(seeds, 5, replace=False)[:, None], generator.choice(rows, 1000, replace=False)
        hits += max(kept, key=lambda name: float(kept[name][some].mean())) == best
    return best, hits


def main() -> None:
    """Print a line for each spread and size, and one for the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", type=Path, help="the folder of a sweep with at least five seeds")
    arguments = parser.parse_args()
    generator = np.random.default_rng(61)
    middle = median(spreads())
    for shape in ((5, 1000), (3, 200)):
        for spread in (middle / 2, middle, 2 * middle):
            nothing = np.zeros(shape)
            null = sum(difference(drawn(generator, shape, 0, spread), nothing).is_told for _ in range(DRAWS))
            found = [difference(drawn(generator, shape, GAP, spread), nothing) for _ in range(DRAWS)]
            missed = [each for each in found if not each.is_told]
            more = sum(seeds_to_tell(each) is not None or rows_to_tell(each) is not None for each in missed)
            print(
                f"{shape[0]} seeds, {shape[1]} rows, {100 * spread:.2f} points between seeds: no gap told in "
                f"{null / DRAWS:.1%}, {100 * GAP:g} points found in {sum(each.low > 0 for each in found) / DRAWS:.1%}; "
                f"of {len(missed)} that were not told, {more} say how much more would tell",
                flush=True,
            )
    if arguments.sweep is not None:
        best, hits = named(generator, arguments.sweep)
        print(f"{best} is the best value, and is chosen in {hits} of {REPETITIONS} draws")


if __name__ == "__main__":
    main()
