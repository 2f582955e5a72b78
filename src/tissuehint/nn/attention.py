"""Self-attention over the cells of a feature map: criss-cross, position, and consistency correlation attention.

Feng et al., Weakly Supervised Gland Segmentation with Class Semantic Consistency and Purified Labels Filtration, AAAI
2025, Eq. 1 and 2, on Huang et al., CCNet, ICCV 2019, and Fu et al., Dual Attention Network, CVPR 2019.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError

REDUCTION = 8  # C' = C / 8 in CCNet, DANet and the released code; the paper writes C / 4


class _SelfAttention(nn.Module):
    """What the attentions share: query and key of C' channels, a value of C channels, and gamma.

    Args:
        channels: C of the map.
        reduction: C' = C / reduction, at least 1.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction)):
            if value < 1:
                raise InputError(f"{name} {value} of an attention", "is not at least 1", "give a whole number above 0")
        inner = max(1, channels // reduction)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))


class CrissCrossAttention(_SelfAttention):
    r"""Each cell attends to the H + W - 1 cells of its own row and column.

    .. math::
        y_u = x_u + \gamma \sum_{i \in N(u)} \frac{\exp(q_u \cdot k_i)}{\sum_{j \in N(u)} \exp(q_u \cdot k_j)}\, v_i

    with N(u) the row and the column of cell u, u itself once, and q, k, v 1x1 convolutions of x. Feng et al. 2025,
    Eq. 1, which has no gamma; it starts at 0 as in Huang et al. 2019, so that pretrained features pass through
    unchanged at first, and it is trained. Two of them in a row reach every cell.

    Time and memory O(HW (H + W)) against O((HW)^2) of ``PositionAttention``.

    Args:
        channels: C of the map.
        reduction: queries and keys have C / reduction channels.

    Raises:
        InputError: channels or reduction below 1.

    Example:
        >>> attention = CrissCrossAttention(16)
        >>> features = torch.rand(2, 16, 5, 7)
        >>> torch.equal(attention(features), features)  # gamma is 0
        True
    """

    def forward(self, features: Tensor) -> Tensor:
        """(B,C,H,W) to (B,C,H,W)."""
        query, key, value = self.query(features), self.key(features), self.value(features)
        height = features.shape[-2]
        column = torch.einsum("bcyx,bczx->byxz", query, key)  # cell (y,x) with cell (z,x)
        row = torch.einsum("bcyx,bcyz->byxz", query, key)  # cell (y,x) with cell (y,z)
        # the row holds the cell itself already
        itself = torch.eye(height, dtype=torch.bool, device=features.device)[:, None, :]
        column = column.masked_fill(itself, float("-inf"))
        weights = torch.cat([column, row], -1).softmax(-1).to(value.dtype)
        from_column = torch.einsum("byxz,bczx->bcyx", weights[..., :height], value)
        from_row = torch.einsum("byxz,bcyz->bcyx", weights[..., height:], value)
        # the map first: a sum has the memory layout of its first term
        attended: Tensor = features + self.gamma * (from_column + from_row)
        return attended


class PositionAttention(_SelfAttention):
    r"""Each cell attends to all cells.

    .. math::
        y_j = x_j + \gamma \sum_k \frac{\exp(H_j \cdot M_k)}{\sum_l \exp(H_j \cdot M_l)}\, N_k

    with H (``query``), M (``key``) and N (``value``) 1x1 convolutions of x. Feng et al. 2025, Eq. 2; as printed there
    the sum below the line runs over the queries j, here it runs over the keys, as in Fu et al. 2019, where the residual
    and gamma (starts at 0, trained) come from too.

    Time and memory O((HW)^2).

    Args:
        channels: C of the map.
        reduction: queries and keys have C / reduction channels.

    Raises:
        InputError: channels or reduction below 1.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(B,C,H,W) to (B,C,H,W)."""
        # as one head: kernels that never hold all pairs at once take four dimensions only
        query, key, value = (
            part(features).flatten(2).transpose(1, 2)[:, None] for part in (self.query, self.key, self.value)
        )
        gathered = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        attended: Tensor = features + self.gamma * gathered[:, 0].transpose(1, 2).reshape(features.shape)
        return attended


class ConsistencyCorrelationAttention(nn.Module):
    """Criss-cross, position, criss-cross: three attentions in a row, each with weights and a gamma of its own.

    Feng et al. 2025, Fig. 2 (b). The first criss-cross gathers context along rows and columns (Eq. 1), the position
    attention relates all cells (Eq. 2), the second criss-cross spreads the result over the whole image.

    Args:
        channels: C of the map.
        reduction: queries and keys have C / reduction channels.

    Raises:
        InputError: channels or reduction below 1.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.first = CrissCrossAttention(channels, reduction)
        self.position = PositionAttention(channels, reduction)
        self.second = CrissCrossAttention(channels, reduction)

    def forward(self, features: Tensor) -> Tensor:
        """(B,C,H,W) to (B,C,H,W)."""
        related: Tensor = self.second(self.position(self.first(features)))
        return related
