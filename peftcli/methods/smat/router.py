"""From a support set to logits of the experts. C classes, D features, M experts.

The classes' mean features under the untouched base and a token of its own go through one Transformer block; the token
then asks each expert's key. Nothing tells the classes' order, so nothing depends on it, nor on the rows' order.

After the released code of Chen et al., ICML 2024, which reads the answer off the first class (and so depends on which
is first), and whose keys are neither trained nor saved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATIO = 2
"""Width of the block's MLP over that of the features."""


class Router(nn.Module):
    """The hypernetwork.

    Args:
        width: D.
        experts: M.
        heads: Of the block's attention; as many as divide the width.
    """

    def __init__(self, width: int, experts: int, heads: int = 4):
        super().__init__()
        self.heads = max(h for h in range(1, heads + 1) if width % h == 0)
        self.token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.up = nn.Linear(width, RATIO * width)
        self.down = nn.Linear(RATIO * width, width)
        self.after = nn.LayerNorm(width)
        self.keys = nn.Parameter(torch.randn(experts, width) * width**-0.5)

    def forward(self, prototypes_CD: Tensor) -> Tensor:
        """Logits of the experts [M] for a task.

        Args:
            prototypes_CD: Mean features of the classes; their lengths say nothing and are taken out.
        """
        scaled_CD = F.normalize(prototypes_CD.to(self.token.dtype), dim=1) * self.token.shape[1] ** 0.5
        x_TD = torch.cat([self.token, scaled_CD])
        x_TD = x_TD + self._attend(self.before(x_TD))
        x_TD = x_TD + self.down(F.gelu(self.up(self.between(x_TD))))
        return self.keys @ self.after(x_TD[0])

    def _attend(self, x_TD: Tensor) -> Tensor:
        tokens, width = x_TD.shape
        q, k, v = self.qkv(x_TD).view(tokens, 3, self.heads, width // self.heads).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self.out(mixed.transpose(0, 1).reshape(tokens, width))
