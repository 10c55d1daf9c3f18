"""What vLLM does with an adapter."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tunerkit_serving import mends, signs
from tunerkit_serving.adapter_folder import CONFIG, Folder
from tunerkit_serving.findings import Engine, Rule, Severity
from tunerkit_serving.gguf_header import GgufAdapter
from tunerkit_serving.gguf_signs import only_folders
from tunerkit_serving.mends import quoted
from tunerkit_serving.scaling import Scale, constant, misscaled, peft_scale, ratio, scaled

if TYPE_CHECKING:
    from torch import Tensor

RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
DEFAULT: Final = 16
_HELPER: Final = "vllm/lora/peft_helper.py"
_NAMES: Final = "vllm/lora/utils.py"
_HEADS: Final = ("classifier", "score")
_TABLES: Final = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def scale(folder: Folder) -> Scale:
    """Return the rule of vLLM 0.32 and 0.33: PEFT's own, patterns and rank stabilisation included."""
    return peft_scale(folder)


def scale_before(folder: Folder) -> Scale:
    """Return the rule up to vLLM 0.31: one scale for the whole adapter."""
    return constant(ratio(folder.alpha, folder.r, stabilised=bool(folder.config.get("use_rslora"))))


def delta(folder: Folder) -> Mapping[str, "Tensor"]:
    """Return what vLLM 0.33 adds to each weight."""
    return _without_packed(folder, scaled(folder, scale(folder)))


def delta_before(folder: Folder) -> Mapping[str, "Tensor"]:
    """Return what vLLM up to 0.31 adds to each weight."""
    return _without_packed(folder, scaled(folder, scale_before(folder)))


def _without_packed(folder: Folder, deltas: Mapping[str, "Tensor"]) -> Mapping[str, "Tensor"]:
    return {path: each for path, each in deltas.items() if path not in folder.packed}


def allowed(rank: int) -> int | None:
    """Return the least ``--max-lora-rank`` for a rank, or None if there is none."""
    return next((size for size in RANKS if size >= rank), None)


def _too_large(folder: Folder, max_rank: int | None) -> list[str]:
    limit = DEFAULT if max_rank is None else min(max_rank, RANKS[-1])
    return [f"{CONFIG}: rank {folder.rank}, the server allows {limit}"] if folder.rank > limit else []


def _other_heads(folder: Folder, max_rank: int | None) -> list[str]:
    names = folder.config.get("modules_to_save") or ()
    return signs.saved_modules(folder, max_rank) if any(name not in _HEADS for name in names) else []


def _other_names(folder: Folder, max_rank: int | None) -> list[str]:
    tables = [name for name in signs.base_tables(folder, max_rank) if not name.endswith(_TABLES)]
    return tables + signs.strange_tensors(folder, max_rank)


def _skipped_tables(folder: Folder, max_rank: int | None) -> list[str]:
    return [name for name in signs.base_tables(folder, max_rank) if name.endswith(_TABLES)]


def _no_base(folder: Folder, max_rank: int | None) -> list[str]:
    return [f"{CONFIG}: base_model_name_or_path=None"] if folder.base == "BASE" else []


def _padded(folder: Folder, max_rank: int | None) -> list[str]:
    size = allowed(folder.rank)
    found = folder.is_lora and size is not None and size != folder.rank
    return [f"rank {folder.rank} in buffers of {size}"] if found else []


def serves(adapter: Folder | GgufAdapter) -> str:
    """Return the command that serves a folder."""
    if not isinstance(adapter, Folder):
        return ""
    size = allowed(adapter.rank)
    name = quoted(f"{adapter.path.name}={adapter.path}")
    return f"vllm serve {quoted(adapter.base)} --enable-lora --max-lora-rank {size} --lora-modules {name}"


def _larger(folder: Folder) -> str:
    return mends.merged(folder) if allowed(folder.rank) is None else serves(folder)


def _refused(says: str, finds: signs.Finds, *, source: str = _HELPER, by_peft: bool = False) -> Rule[Folder]:
    mend = mends.merged_by_peft if by_peft else mends.merged
    return Rule(severity=Severity.REFUSED, says=says, source=source, finds=finds, mend=mend)


ENGINE: Final = Engine(
    name="vllm",
    version="vLLM 0.33.0",
    reads=_HELPER,
    serves=serves,
    delta=delta,
    file_rules=only_folders("vLLM", "vllm/lora/lora_model.py"),
    folder_rules=(
        _refused("only LoRA is served.", signs.other_method, by_peft=True),
        Rule(
            severity=Severity.REFUSED,
            says="tensors must be named lora_A.weight and lora_B.weight; AdaLoRA has lora_A, lora_B and lora_E.",
            source=_NAMES,
            finds=signs.adalora,
            mend=mends.uniform,
        ),
        Rule(
            severity=Severity.REFUSED,
            says="the rank must not exceed --max-lora-rank (16 by default; 1, 8, 16, 32, 64, 128, 256, 320 or 512).",
            source=_HELPER,
            finds=_too_large,
            mend=_larger,
        ),
        _refused("DoRA is not supported.", signs.setting("use_dora"), by_peft=True),
        _refused(
            "variants of LoRA are not supported.",
            signs.setting("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"),
            by_peft=True,
        ),
        _refused(
            "a start such as PiSSA changes the base, which the server does not do.", signs.changed_base, by_peft=True
        ),
        _refused("trained biases are not supported.", signs.bias),
        _refused("of modules_to_save only classifier and score are supported.", _other_heads),
        _refused(
            "only linear layers and embeddings have adapters.", signs.convolutions, source="vllm/lora/lora_model.py"
        ),
        _refused("it refuses tensors that it does not know by name.", _other_names, source=_NAMES),
        Rule(
            severity=Severity.WRONG,
            says="experts that PEFT has packed into one pair are dropped, without a message; pairs for each expert "
            "are served.",
            source="vllm/lora/lora_model.py",
            finds=signs.packed_experts,
            mend=mends.experts,
        ),
        Rule(
            severity=Severity.WRONG,
            says="up to 0.31 all modules are scaled by one lora_alpha / r; patterns are read from 0.32 on.",
            source=_HELPER,
            version="vLLM 0.30.0 and 0.31.0",
            finds=lambda folder, max_rank: misscaled(folder, scale_before(folder)) if folder.is_lora else (),
            mend=mends.uniform,
        ),
        Rule(
            severity=Severity.IGNORED,
            says="the base's own table is skipped.",
            source=_NAMES,
            finds=_skipped_tables,
            mend=mends.none,
        ),
        Rule(
            severity=Severity.IGNORED,
            says="a server that looks adapters up in VLLM_LORA_RESOLVER_CACHE_DIR passes over those that do not name "
            "its base, without a message; --lora-modules takes them.",
            source="vllm/plugins/lora_resolvers/filesystem_resolver.py",
            finds=_no_base,
            mend=mends.none,
        ),
        Rule(
            severity=Severity.SLOW,
            says="buffers have one of the allowed ranks; the rest is multiplied as zeros.",
            source="vllm/config/lora.py",
            finds=_padded,
            mend=mends.none,
        ),
    ),
)
