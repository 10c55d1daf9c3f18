"""The trainings of the tables: a small classifier, with LoRA and with AdaLoRA in its two forms."""

from typing import Any, Final

from tests.support.together import Job

_SCHEDULE: Final = {"targets": ["0", "2"], "t_init": 2, "t_final": 3, "delta_t": 1}
METHODS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "lora": ("lora", {"targets": ["0", "2"], "rank": 4}),
    "adalora 8 to 2, with its SVD": ("adalora", {**_SCHEDULE, "init_rank": 8, "target_rank": 2}),
    "adalora 6 to 4, without": (
        "adalora",
        {**_SCHEDULE, "init_rank": 6, "target_rank": 4, "exact_svd": False, "train_lambda": True},
    ),
}
# The engines under which masked triplets stay in memory.
KEEPS_SHAPES: Final = ("fsdp2 sharded", "zero")


def job(engine: str, method: str, **options: Any) -> Job:
    """One training; ``options`` are those of `Job`."""
    name, config = METHODS[method]
    return Job(engine, name, config, **options)


def alone(engine: str, method: str) -> Job:
    """The training in one process that one under ``engine`` should equal."""
    name, config = METHODS[method]
    shrink = {} if name == "lora" else {"shrink": engine not in KEEPS_SHAPES}
    return Job("alone", name, {**config, **shrink})
