"""What SGLang does with an adapter."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tunerkit.errors import shown
from tunerkit_serving import mends, signs
from tunerkit_serving.adapter_folder import CONFIG, Folder
from tunerkit_serving.findings import Engine, Rule, Severity
from tunerkit_serving.gguf_header import GgufAdapter
from tunerkit_serving.gguf_signs import only_folders
from tunerkit_serving.mends import quoted
from tunerkit_serving.scaling import Scale, constant, misscaled, scaled

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG: Final = "sglang/srt/lora/lora_config.py"
_LORA: Final = "sglang/srt/lora/lora.py"
_MANAGER: Final = "sglang/srt/lora/lora_manager.py"
_POOL: Final = "sglang/srt/lora/mem_pool.py"
_UTILS: Final = "sglang/srt/lora/utils.py"
_LAYER: Final = re.compile(r"layers\.(\d+)\.")
_OUTSIDE: Final = ("embed_tokens", "lm_head", "unembed_tokens")  # taken although they lie in no numbered layer
_KNOWN: Final = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj"),
    *("down_proj", "embed_tokens", "lm_head", "unembed_tokens", "in_proj", "in_proj_qkvz", "in_proj_q", "in_proj_k"),
    *("in_proj_v", "in_proj_z", "x_proj", "qkvr", "wq_du", "wk_dv", "wv_dv", "wr_du", "wo_ud", "fc1_latent_proj"),
    *("fc2_latent_proj", "q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"),
    *("wq_b", "wk", "weights_proj", "w1", "w2", "w3"),
)


def scale(folder: Folder) -> Scale:
    """Return SGLang's rule: lora_alpha / r for all modules."""
    return constant(folder.alpha / folder.r)


def delta(folder: Folder) -> Mapping[str, "Tensor"]:
    """Return what SGLang adds to each weight. Its buffers have rank ``r``: a tensor of another rank is refused."""
    return scaled(folder, scale(folder))


def _too_large(folder: Folder, max_rank: int | None) -> list[str]:
    found = max_rank is not None and folder.rank > max_rank
    return [f"{CONFIG}: rank {folder.rank}, the server allows {max_rank}"] if found else []


def _no_list(folder: Folder, max_rank: int | None) -> list[str]:
    names = folder.config.get("target_modules")
    taken = names in ("all", "all-linear") or isinstance(names, list)
    return [] if taken else [f"{CONFIG}: target_modules={shown(names)}"]


def _strangers(folder: Folder, max_rank: int | None) -> list[str]:
    paths = (path for path in folder.pairs if path not in folder.packed)
    return [path for path in paths if path.rpartition(".")[2] not in _KNOWN]


def _outside(folder: Folder, max_rank: int | None) -> list[str]:
    return [path for path in folder.pairs if not _LAYER.search(path) and path.rpartition(".")[2] not in _OUTSIDE]


def _halves(folder: Folder, max_rank: int | None) -> list[str]:
    """Find layers in which a fused projection lacks the part from which it is put together."""
    names: dict[str, set[str]] = defaultdict(set)
    for parent, leaf in signs.leaves(folder):
        names[parent].add(leaf)
    found = []
    for parent, here in names.items():
        if "q_proj" in here and "v_proj" not in here:
            found.append(f"{parent} (q_proj without v_proj)")
        if "q_proj" not in here and here & {"k_proj", "v_proj"}:
            found.append(f"{parent} ({' and '.join(sorted(here & {'k_proj', 'v_proj'}))} without q_proj)")
        if "up_proj" in here and "gate_proj" not in here:
            found.append(f"{parent} (up_proj without gate_proj)")
    return found


def _unnamed(folder: Folder, max_rank: int | None) -> list[str]:
    """Find tensors of an embedding that `target_modules` does not name."""
    names = folder.config.get("target_modules")
    if not isinstance(names, list):
        return []
    last = {str(name).rpartition(".")[2] for name in names}
    outside = [path for path in folder.pairs if not _LAYER.search(path)]
    return [path for path in outside if path.rpartition(".")[2] in _OUTSIDE and path.rpartition(".")[2] not in last]


def serves(adapter: Folder | GgufAdapter) -> str:
    """Return the command that serves a folder."""
    name = quoted(f"{adapter.path.name}={adapter.path}")
    base = adapter.base if isinstance(adapter, Folder) else "BASE"
    return f"python -m sglang.launch_server --model-path {quoted(base)} --enable-lora --lora-paths {name}"


def _larger(folder: Folder) -> str:
    return f"{serves(folder)} --max-lora-rank {folder.rank}"


def _rule(severity: Severity, says: str, source: str, finds: signs.Finds, mend: mends.Mend) -> Rule[Folder]:
    return Rule(severity=severity, says=says, source=source, finds=finds, mend=mend)


_REFUSED: Final = Severity.REFUSED
_WRONG: Final = Severity.WRONG
ENGINE: Final = Engine(
    name="sglang",
    version="SGLang 0.5.23",
    reads=_LORA,
    serves=serves,
    delta=delta,
    file_rules=only_folders("SGLang", _CONFIG),
    folder_rules=(
        _rule(_REFUSED, "peft_type must be LORA.", _LORA, signs.other_method, mends.merged_by_peft),
        _rule(_REFUSED, "peft_type must be LORA.", _LORA, signs.adalora, mends.uniform),
        _rule(_REFUSED, "DoRA is not supported.", _MANAGER, signs.setting("use_dora"), mends.merged_by_peft),
        _rule(_REFUSED, "the rank must not exceed --max-lora-rank.", _POOL, _too_large, _larger),
        _rule(_REFUSED, "target_modules must be a list of names, or 'all-linear'.", _MANAGER, _no_list, mends.uniform),
        _rule(
            _REFUSED,
            "every tensor must have rank r; another one is refused when its first request comes.",
            _POOL,
            signs.unequal_ranks,
            mends.uniform,
        ),
        _rule(
            _REFUSED,
            "q, k and v become one projection, and gate and up: q_proj needs v_proj, k_proj and v_proj need q_proj, "
            "up_proj needs gate_proj.",
            _LORA,
            _halves,
            mends.merged,
        ),
        _rule(
            _REFUSED,
            "experts are read from pairs for each expert, or from (E, r, in) and (E, out, r), and not as PEFT packs "
            "them.",
            _UTILS,
            signs.packed_experts,
            mends.experts,
        ),
        _rule(
            _REFUSED,
            "other modules are served only if the model's class names them.",
            _UTILS,
            _strangers,
            mends.merged,
        ),
        _rule(
            _WRONG,
            "every module is scaled by lora_alpha / r; use_rslora and patterns are not read.",
            _LORA,
            lambda folder, max_rank: list(misscaled(folder, scale(folder))) if folder.is_lora else [],
            mends.uniform,
        ),
        _rule(_WRONG, "tensors outside layers.N are dropped.", _LORA, _outside, mends.merged),
        _rule(
            _WRONG,
            "embed_tokens and lm_head are dropped if target_modules does not name them.",
            _LORA,
            _unnamed,
            mends.uniform,
        ),
        _rule(_WRONG, "a bias takes the place of a lora_B, or is lost.", _POOL, signs.bias, mends.merged),
        _rule(_WRONG, "modules that were trained in full are dropped.", _LORA, signs.saved_modules, mends.merged),
        _rule(
            _WRONG,
            "init_lora_weights is not read: the factors meet an unchanged base.",
            _CONFIG,
            signs.changed_base,
            mends.merged_by_peft,
        ),
        _rule(
            _WRONG,
            "settings of LoRA's variants are not read.",
            _CONFIG,
            signs.setting("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"),
            mends.merged_by_peft,
        ),
    ),
)
