"""ResNet as Transformers names it.

A bottleneck block narrows (`conv.reduce`, 1x1), convolves (`conv.spatial`, 3x3) and widens (`conv.expand`, 1x1). A
basic block has two 3x3 convolutions, which go by the first two of these names.
"""

from __future__ import annotations

from peftcli.models.family import Family

FAMILY = Family(
    name="resnet",
    model_types=("resnet",),
    roles={
        "conv.reduce": r"layers\.\d+\.layer\.0\.convolution",
        "conv.spatial": r"layers\.\d+\.layer\.1\.convolution",
        "conv.expand": r"layers\.\d+\.layer\.2\.convolution",
        "conv.shortcut": r"shortcut\.convolution",
        "embed": r"embedder\.embedder\.convolution",
        "norm": r"normalization",
        "head": r"classifier",
    },
    default_targets=("conv.reduce", "conv.spatial"),
    blocks=r"stages\.\d+\.layers\.\d+",
)
