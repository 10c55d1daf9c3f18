"""What engines look for in a GGUF file: each function returns the keys or tensors that it found."""

from tunerkit.errors import shown
from tunerkit_serving.findings import Rule, Severity
from tunerkit_serving.gguf_header import GgufAdapter
from tunerkit_serving.mends import quoted

_ENDINGS = (".lora_a", ".lora_b", "_norm.weight")


def any_file(adapter: GgufAdapter, max_rank: int | None) -> list[str]:
    """Find the file itself, for engines that read folders."""
    return [adapter.path.name]


def not_an_adapter(adapter: GgufAdapter, max_rank: int | None) -> list[str]:
    """Find a file that is a model, or an adapter of another kind."""
    wanted = {"general.type": "adapter", "adapter.type": "lora"}
    return [
        f"{key}={shown(adapter.metadata.get(key))}"
        for key, value in wanted.items()
        if adapter.metadata.get(key) != value
    ]


def strange_tensors(adapter: GgufAdapter, max_rank: int | None) -> list[str]:
    """Find tensors with other endings than ``.lora_a`` and ``.lora_b``; those of norms are passed over."""
    return [name for name in adapter.tensors if not name.endswith(_ENDINGS)]


def broken_pairs(adapter: GgufAdapter, max_rank: int | None) -> list[str]:
    """Find half pairs, and pairs of two ranks. The embedding's A is stored transposed."""
    found = []
    for base, halves in adapter.halves.items():
        if len(halves) < 2:
            found.append(f"{base} (half a pair)")
            continue
        a, b = halves["lora_a"], halves["lora_b"]
        rank = a[0 if base.endswith("token_embd.weight") else -1] if a else 0
        if len(a) != 2 or len(b) != 2 or rank != b[0]:
            found.append(f"{base} (lora_a {a}, lora_b {b})")
    return found


def no_alpha(adapter: GgufAdapter, max_rank: int | None) -> list[str]:
    """Find a file without alpha."""
    return [] if adapter.alpha else [f"adapter.lora.alpha={shown(adapter.metadata.get('adapter.lora.alpha'))}"]


def unequal_ranks(adapter: GgufAdapter, max_rank: int | None) -> list[str]:
    """Find the ranks, if there are several."""
    ranks = sorted(set(adapter.ranks.values()))
    return [f"ranks {ranks[0]} to {ranks[-1]}"] if len(ranks) > 1 else []


def to_folder(adapter: GgufAdapter) -> str:
    """Write it as a PEFT folder."""
    out = quoted(adapter.path.with_suffix("").as_posix() + "-peft")
    return f"tunerkit convert {quoted(adapter.path)} --to peft --out {out} --base BASE"


def only_folders(engine: str, source: str) -> tuple[Rule[GgufAdapter], ...]:
    """Return the rule of an engine that reads no GGUF adapters."""
    says = f"{engine} reads adapters in PEFT's layout, not in GGUF."
    return (Rule(severity=Severity.REFUSED, says=says, source=source, finds=any_file, mend=to_folder),)
