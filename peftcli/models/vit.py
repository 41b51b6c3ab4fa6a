"""Vision transformers as Transformers names them: ViT, DeiT and DINOv2 (compared module by module in 5.23)."""

from __future__ import annotations

from peftcli.models.family import Family

FAMILY = Family(
    name="vit",
    model_types=("vit", "deit", "dinov2", "dinov2_with_registers"),
    roles={
        "attention.q": r"attention\.q_proj",
        "attention.k": r"attention\.k_proj",
        "attention.v": r"attention\.v_proj",
        "attention.o": r"attention\.o_proj",
        "mlp.up": r"mlp\.(?:fc1|weights_in)",
        "mlp.down": r"mlp\.(?:fc2|weights_out)",
        "embed": r"patch_embeddings\.projection|embeddings\.(?:\w+_tokens?|position_embeddings)",
        "norm": r"layernorm\w*|norm[12]",
        "head": r"classifier",
    },
    default_targets=("attention.q", "attention.v"),
    blocks=r"layers?\.\d+",
    idle=r"embeddings\.mask_token",
)
