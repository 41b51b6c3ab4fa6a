"""LLaMA and the architectures that kept its module names (compared module by module in Transformers 5.23)."""

from __future__ import annotations

from peftcli.models.family import Family

FAMILY = Family(
    name="llama",
    model_types=(
        "llama",
        "gemma",
        "granite",
        "helium",
        "ministral",
        "mistral",
        "olmo",
        "olmo2",
        "olmo3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
    ),
    roles={
        "attention.q": r"self_attn\.q_proj",
        "attention.k": r"self_attn\.k_proj",
        "attention.v": r"self_attn\.v_proj",
        "attention.o": r"self_attn\.o_proj",
        "mlp.up": r"mlp\.up_proj",
        "mlp.gate": r"mlp\.gate_proj",
        "mlp.down": r"mlp\.down_proj",
        "embed": r"embed_tokens",
        "norm": r"\w*norm",
        "head": r"lm_head|score",
    },
    default_targets=("attention.q", "attention.v"),
    blocks=r"layers\.\d+",
)
