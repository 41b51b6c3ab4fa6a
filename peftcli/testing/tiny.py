"""Base models small enough for a test and exact enough for float64.

Shapes: B rows, L tokens, V words, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.models import families
from peftcli.models.family import Family

WORDS, WIDTH, LABELS, PIXELS = 64, 32, 3, 16


@dataclass(frozen=True)
class Base:
    """An untouched, frozen base model with a batch that it understands.

    Attributes:
        model: The model, in evaluation mode.
        family: Its family.
        batch: Keyword arguments of its forward pass.
        targets: What the loss compares with: word ids [B, L], -100 where nothing is asked, or labels [B].
    """

    model: Any
    family: Family
    batch: dict[str, torch.Tensor]
    targets: torch.Tensor

    def outputs(self, model: Any) -> torch.Tensor:
        """Logits of the batch's own positions: [B, L, V], or [B, classes] with a head."""
        logits = model(**self.batch).logits
        return logits if logits.dim() == 2 else logits[:, -self.targets.shape[1] :]

    def loss(self, model: Any) -> torch.Tensor:
        """Mean cross-entropy, in the type of the logits."""
        return nn.functional.cross_entropy(self.outputs(model).flatten(0, -2), self.targets.flatten())


def llama_shape(**changes: Any) -> Any:
    """The configuration of two narrow layers of LLaMA with grouped queries."""
    from transformers import LlamaConfig

    usual = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**usual, **changes})


def llama(dtype: torch.dtype = torch.float64, architecture: str = "causal-lm") -> Base:
    """Two layers of LLaMA with grouped queries; the same weights at every call. The second row is padded."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    classifies = architecture == "sequence-classification"
    return _base(LlamaForSequenceClassification if classifies else LlamaForCausalLM, llama_shape(), dtype)


def mamba_shape(**changes: Any) -> Any:
    """The configuration of two narrow layers of Mamba."""
    from transformers import MambaConfig

    usual = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "state_size": 4,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "residual_in_fp32": False,  # true would be float32 in a float64 model too
        "tie_word_embeddings": False,
    }
    return MambaConfig(**{**usual, **changes})


def mamba(dtype: torch.dtype = torch.float64, architecture: str = "causal-lm") -> Base:
    """Two layers of Mamba with this package's forward pass; the same weights at every call, the second row padded."""
    from transformers import MambaForCausalLM

    from peftcli.models import mamba_gaps, mamba_mixer

    classifies = architecture == "sequence-classification"
    kind = mamba_gaps.MambaForSequenceClassification if classifies else MambaForCausalLM
    base = _base(kind, mamba_shape(), dtype)
    mamba_mixer.install(base.model)
    mamba_gaps.draw_exactly(base.model)
    if not classifies:
        _exact_logits(base.model)
    return base


def _base(kind: Any, shape: Any, dtype: torch.dtype) -> Base:
    shape.num_labels = LABELS
    with torch.random.fork_rng():
        torch.manual_seed(10)
        model = kind(shape)
        ids_BL = torch.randint(1, WORDS, (2, 7))
    _exact_norms(model)
    model.config.use_cache = False
    ids_BL[1, 5:] = 0
    batch = {"input_ids": ids_BL, "attention_mask": (ids_BL != 0).long()}
    targets = torch.tensor([0, 2]) if hasattr(model, "score") else _next_words(ids_BL)
    return Base(model.to(dtype).requires_grad_(False).eval(), families.find(shape.model_type), batch, targets)


def vit_shape(**changes: Any) -> Any:
    """The configuration of two narrow layers of ViT over sixteen patches."""
    from transformers import ViTConfig

    usual = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": PIXELS,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    return ViTConfig(**{**usual, **changes})


def vit(dtype: torch.dtype = torch.float64, architecture: str = "image-classification") -> Base:
    """Two layers of ViT; the same weights at every call."""
    from transformers import ViTForImageClassification

    return _pictures(ViTForImageClassification, vit_shape(), dtype)


def dinov2(dtype: torch.dtype = torch.float64, architecture: str = "image-classification") -> Base:
    """Two layers of DINOv2, with its layer scale; the same weights at every call."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    usual = {name: getattr(vit_shape(), name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    shape = Dinov2Config(**usual, mlp_ratio=2, image_size=PIXELS, patch_size=4, initializer_range=0.2)
    return _pictures(Dinov2ForImageClassification, shape, dtype)


def resnet_shape(**changes: Any) -> Any:
    """The configuration of two narrow stages of ResNet with bottlenecks."""
    from transformers import ResNetConfig

    usual = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck"}
    return ResNetConfig(**{**usual, **changes})


def resnet(dtype: torch.dtype = torch.float64, architecture: str = "image-classification") -> Base:
    """Three bottleneck blocks of ResNet, its BatchNorm at rest with statistics of its own; always the same weights."""
    from peftcli.models import batch_norm

    base = resnet_awake(dtype, architecture)
    batch_norm.rest(base.model)
    return base


def resnet_awake(dtype: torch.dtype = torch.float64, architecture: str = "image-classification") -> Base:
    """The same with a BatchNorm that trains, as with `model.batch_norm=trained`."""
    from transformers import ResNetForImageClassification

    from peftcli.models import batch_norm

    base = _pictures(ResNetForImageClassification, resnet_shape(), dtype)
    generator = torch.Generator().manual_seed(11)
    for name, tensor in base.model.named_buffers():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.5 * torch.rand(tensor.shape, generator=generator))
    batch_norm.widen(base.model)
    return base


def _pictures(kind: Any, shape: Any, dtype: torch.dtype) -> Base:
    shape.num_labels = LABELS
    with torch.random.fork_rng():
        torch.manual_seed(10)
        model = kind(shape)
        pixels_BCSS = torch.randn(3, 3, PIXELS, PIXELS)
    model.to(dtype).requires_grad_(False).eval()
    batch = {"pixel_values": pixels_BCSS.to(dtype)}
    return Base(model, families.find(shape.model_type), batch, torch.tensor([0, 2, 1]))


def _next_words(ids_BL: torch.Tensor) -> torch.Tensor:
    next_BL = torch.full_like(ids_BL, -100)
    next_BL[:, :-1] = ids_BL[:, 1:]
    return next_BL.masked_fill(next_BL == 0, -100)


def _exact_norms(model: nn.Module) -> None:
    """Transformers computes RMS norms in float32 whatever it is given, which no finite difference survives."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.RMSNorm(WIDTH, module.variance_epsilon))


def _exact_logits(model: Any) -> None:
    """Transformers rounds Mamba's logits to float32 whatever they are: give back what the head computed."""
    computed: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, logits: torch.Tensor) -> None:
        computed[:] = [logits]

    def give_back(_: nn.Module, __: Any, output: Any) -> None:
        output.logits = computed.pop()

    model.lm_head.register_forward_hook(keep)
    model.register_forward_hook(give_back)
