"""What the two image backbones share: reading an ONNX graph's weights, and saving a checked Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from peftcli.config.errors import CheckFailed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read(path: Path):
    """The graph's nodes, and its initialisers as tensors by name (float32, in ONNX's layout)."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    return graph.node, {i.name: torch.tensor(numpy_helper.to_array(i)) for i in graph.initializer}


def save(model_class, config, weights: dict[str, torch.Tensor], out: Path, mean=IMAGENET_MEAN, **options) -> None:
    """Writes config, weights and image preprocessing, then loads them once to see that nothing is left over.

    Args:
        model_class: The Transformers class whose hub names `weights` uses.
        mean: What the pixels (0 to 1, RGB) are centred on before they are divided by ImageNet's deviations.
        options: For the check's `from_pretrained`.

    Raises:
        CheckFailed: `sample-conversion`: a tensor is missing or unknown.
    """
    from safetensors.torch import save_file

    out.mkdir(exist_ok=True)
    config.save_pretrained(out)
    save_file({k: v.contiguous() for k, v in weights.items()}, out / "model.safetensors", metadata={"format": "pt"})
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(IMAGENET_STD),
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")
    _, loaded = model_class.from_pretrained(out, output_loading_info=True, **options)
    odd = {kind: sorted(map(str, loaded[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(odd.values()):
        said = "; ".join(f"{kind}: {keys[:5]}" for kind, keys in odd.items() if keys)
        raise CheckFailed("sample-conversion", f"{model_class.__name__} in {out.name}: {said}")
