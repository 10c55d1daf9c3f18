"""Versions of an AdaLoRA for a running vLLM, while it prunes and others ask: ``python -m benchmarks.publishing``.

Each step trains on a few sentences and publishes. Two threads ask the server all the time, under the latest version's
name. Each answer is scored afterwards with the files of its version, which are compared with the model at its step.
"""

import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

import tunerkit
from tunerkit_serving import Answer, Publisher, Sampling, VllmServer, publisher, read_folder
from tunerkit_serving.local_scores import LocalModel, factors

PROMPT = 12  # tokens
TEXTS = (
    "the film is a quiet story of two sisters who run a small hotel by the sea",
    "nothing in this comedy is new and hardly anything in it is funny at all",
    "a thriller that knows its streets and keeps its best turn for the last minute",
    "the songs are better than the plot and the dancing is better than the songs",
)


class Asker(threading.Thread):
    """Asks for answers by the latest version until it is told to stop."""

    def __init__(self, versions: Publisher, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self.versions, self.prompt = versions, prompt
        self.over, self.most = threading.Event(), 0
        self.found: list[tuple[str, Answer]] = []
        self.problem: BaseException | None = None

    def run(self) -> None:
        """Ask, and count what is loaded."""
        server = self.versions.server
        try:
            while not self.over.is_set():
                with self.versions.using() as name:
                    drawing = Sampling(max_tokens=16, seed=len(self.found))
                    ((answer,),) = server.sample(name, [(self.prompt, drawing)])
                    self.found.append((name, answer))
                    self.most = max(self.most, len(server.listed().adapters))
        except BaseException as problem:  # reported by the main thread
            self.problem = problem


def resident(port: int) -> int:
    """The bytes in memory of the process that listens on a port, and of its children."""
    pid = next(
        each.pid
        for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    )
    server = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (server, *server.children(recursive=True)))


def worst(model: Any, folder: Path, prompt: list[int], answers: list[Answer]) -> float:
    """The largest difference of the engine's log-probabilities from those with the files of a version."""
    local = LocalModel(model, [[*prompt, *each.tokens] for each in answers], len(prompt))
    engine = torch.tensor([score for each in answers for score in each.logprobs])
    return float((local.scores_with(factors(read_folder(folder))) - engine).abs().max())


def main(
    url: Annotated[str, typer.Argument(help="The address of a running vLLM with the model.")],
    folder: Annotated[Path, typer.Argument(help="The model's folder.")],
    steps: Annotated[int, typer.Option(min=10)] = 100,
    keep: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Train, publish and ask; print what was found."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = torch.tensor([ids[:PROMPT] for ids in tokenizer(list(TEXTS))["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    schedule = {"init_rank": 12, "target_rank": 4, "t_init": 5, "t_final": 5, "delta_t": 1, "total_steps": steps}
    tunerkit.wrap(model, "adalora", schedule)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-3)
    tunerkit.attach(model, optimizer)
    tuner = tunerkit.tuner(model)

    place = Path(tempfile.mkdtemp(prefix="tunerkit-publishing-"))
    versions = publisher(model, VllmServer.at(url), keep=keep, folder=place / "served")
    port = int(url.rpartition(":")[2])
    askers: list[Asker] = []
    seconds, sizes, memory, ranks = [], [], [], []
    for step in range(steps):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        begin = time.perf_counter()
        name = versions.publish()
        seconds.append(time.perf_counter() - begin)
        shutil.copytree(place / "served" / name, place / "kept" / name)
        sizes.append(sum(each.stat().st_size for each in (place / "kept" / name).iterdir()))
        memory.append(resident(port))
        ranks.append(tuner.ranks().values())
        local = LocalModel(model, rows.tolist(), 4)
        own = float((local.scores() - local.scores_with(factors(read_folder(place / "kept" / name)))).abs().max())
        assert own < 1e-3, (step, own)  # the file is the model's adapter
        if not askers:
            askers = [Asker(versions, row) for row in rows[:2].tolist()]
            for each in askers:
                each.start()
        print(f"{step + 1:4}  {seconds[-1]:.2f} s  ranks {min(ranks[-1])} to {max(ranks[-1])}  {memory[-1] >> 20} MiB")
        for each in askers:
            if each.problem is not None:
                raise each.problem
    for each in askers:
        each.over.set()
        each.join()

    found = {
        name: {asker: [answer for one, answer in asker.found if one == name] for asker in askers}
        for name in dict.fromkeys(name for asker in askers for name, _ in asker.found)
    }
    differs = [
        worst(model, place / "kept" / name, asker.prompt, answers)
        for name, by in found.items()
        for asker, answers in by.items()
        if answers
    ]
    early = statistics.median(memory[steps // 10 : steps // 5])
    print(
        f"{len(seconds)} publishes, ranks {min(map(min, ranks))} to {max(map(max, ranks))}; median "
        f"{statistics.median(seconds):.2f} s, largest {max(seconds):.2f} s\n"
        f"{sum(len(each.found) for each in askers)} answers of {len(found)} versions beside them; log-probabilities "
        f"differ from their version's by {max(differs):.1e} at most\n"
        f"most versions loaded: {max(each.most for each in askers)} (keep {keep})\n"
        f"a version has {statistics.median(sizes) / 1e6:.1f} MB, a merged sync {size / 1e6:.0f} MB\n"
        f"the server's memory at the end: {statistics.median(memory[-steps // 10 :]) / early:.3f} of that after a tenth"
    )
    shutil.rmtree(place)


if __name__ == "__main__":
    typer.run(main)
