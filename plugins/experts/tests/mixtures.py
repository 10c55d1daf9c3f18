"""Tiny mixtures of eight kinds, and the plain loop over dense experts that they are compared with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks

VOCABULARY = 64
_TINY: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_FOUR: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24}
}


def _mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_TINY, **_LOCAL))


def _olmoe() -> nn.Module:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**_TINY, **_FOUR))


def _qwen3() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**{**_TINY, **_FOUR, "head_dim": 8}, moe_intermediate_size=24, mlp_only_layers=[])
    )


def _granite() -> nn.Module:
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**_TINY, **_LOCAL))


def _deepseek() -> nn.Module:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes: dict[str, Any] = {**_TINY, **_ROUTED, **latent, "num_key_value_heads": 4}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, first_k_dense_replace=1, n_shared_experts=1))


def _gpt_oss() -> nn.Module:
    return hf.GptOssForCausalLM(hf.GptOssConfig(**_TINY, **_LOCAL, head_dim=8, layer_types=["full_attention"] * 2))


def _square() -> nn.Module:
    sizes: dict[str, Any] = {**_TINY, "hidden_size": 32, "intermediate_size": 32}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **_LOCAL, head_dim=8, layer_types=["full_attention"] * 2))


def _nemotron() -> nn.Module:
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "moe_shared_expert_intermediate_size": 24}
    sizes = {name: size for name, size in {**_TINY, **_ROUTED, **mamba}.items() if name != "num_hidden_layers"}
    return hf.NemotronHForCausalLM(hf.NemotronHConfig(**sizes, head_dim=8, layers_block_type=["attention", "moe"]))


def _llama4() -> nn.Module:
    own: dict[str, Any] = {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "attn_implementation": "eager"}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**_TINY, **_LOCAL, **own, head_dim=8))


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    **{"Mixtral": _mixtral, "OLMoE": _olmoe, "Qwen3-MoE": _qwen3, "Granite-MoE": _granite, "DeepSeek-V3": _deepseek},
    **{"gpt-oss": _gpt_oss, "Nemotron-H": _nemotron, "Llama-4": _llama4},
}


def mixture(name: str, *, dtype: torch.dtype = torch.float32, form: str = "eager") -> Any:
    """Return a tiny mixture with random weights that matter; "square" is gpt-oss's with square down projections."""
    torch.manual_seed(1)
    model: Any = {**MIXTURES, "square": _square}[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    if name != "Llama-4":
        model.set_experts_implementation(form)
    return model.to(dtype)


def tokens(seed: int = 0, rows: int = 2) -> Tensor:
    """Return ids of tokens, (rows, 9)."""
    return torch.randint(3, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, seed: int = 0) -> Tensor:
    """Return the loss of some tokens."""
    ids = tokens(seed)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def train(model: Any, steps: int, *, optimizer: torch.optim.Optimizer, first: int = 0) -> None:
    """Take optimizer steps, each on tokens of its own."""
    model.train()
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of the adapter's parameters."""
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)


@contextmanager
def dense_experts(model: Any) -> Iterator[None]:
    """Compute with W + ΔW of each expert, by a loop over experts, instead of what the plugin does."""
    products = _products(model)
    places = {path.partition(".stacks.")[0] for path in products}
    before = {place: vars(model.get_submodule(place)).get("forward") for place in places}
    for place in places:
        experts = model.get_submodule(place)
        deltas = {path.rpartition(".")[2]: each for path, each in products.items() if path.startswith(f"{place}.")}
        vars(experts)["forward"] = partial(_loop, experts, deltas)
    yield
    for place, forward in before.items():
        own = vars(model.get_submodule(place))
        own.pop("forward") if forward is None else own.update(forward=forward)


def _products(model: nn.Module) -> dict[str, Tensor]:
    """ΔW (E, out, in) of each target, with gradients."""
    tuner = tunerkit.tuner(model)
    found = {}
    for target in tuner.targets:
        if ".stacks." in target.path:
            slots: Any = target.module.tunerkit
            factors = hooks.factors(target.path, tuner.method, tuner.adapters()[target.path], slots.base)
            found[target.path] = torch.einsum("eor,eri->eoi", factors.p, factors.q)
    assert found
    return found


def _loop(experts: Any, deltas: dict[str, Tensor], hidden: Tensor, ids: Any = None, scores: Any = None) -> Tensor:
    """The plain form of all eight: one expert after the other."""
    first = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    is_llama4 = ids is None
    is_transposed = is_llama4 or experts.is_transposed
    out = torch.zeros_like(hidden)
    for expert in range(experts.num_experts):

        def linear(x: Tensor, name: str, expert: int = expert) -> Tensor:
            weight = getattr(experts, name)[expert]
            weight = (weight.T if is_transposed else weight) + deltas[name][expert].to(weight.dtype)
            bias = getattr(experts, f"{name}_bias", None)
            return x @ weight.T if bias is None else x @ weight.T + bias[expert]

        if is_llama4:
            each = len(hidden) // experts.num_experts
            rows = slice(expert * each, (expert + 1) * each)
            gate, up = linear(hidden[rows], first).chunk(2, dim=-1)
            out[rows] = linear(up * experts.act_fn(gate), "down_proj")
            continue
        token, choice = torch.where(ids == expert)
        inner = linear(hidden[token], first)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        out = out.index_add(0, token, linear(inner, "down_proj") * scores[token, choice, None])
    return out
