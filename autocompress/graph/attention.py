"""Attention whose projections are linear layers, which techniques can take one by one."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph.layers import linear_of


def is_packed_attention(module: nn.Module) -> bool:
    """Whether `Attention` can stand for a module."""
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
    )


@final
class Attention(nn.Module):
    """Computes what an `nn.MultiheadAttention` does; `num_heads` may fall.

    Its layers are called `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    Args:
        module: one that `is_packed_attention`; gives its weights and settings, and is not changed.
    """

    # Encoder layers ask for these before they choose a fused kernel, which knows no layers.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = module.embed_dim, module.num_heads
        self.head_dim, self.dropout = module.head_dim, module.dropout
        self.batch_first = module.batch_first
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        if module.in_proj_weight is None:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        else:
            weights = module.in_proj_weight.chunk(3)
        q, k, v = (linear_of(*pair) for pair in zip(weights, biases, strict=True))
        self.q_proj, self.k_proj, self.v_proj = q, k, v
        self.out_proj = linear_of(module.out_proj.weight, module.out_proj.bias)

    def forward(  # noqa: PLR0913 - the arguments of the module that it stands for
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; a causal mask is applied as any other."""
        batched = query.dim() == 3
        # Samples first inside, (batch, length, width).
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self._heads(self.q_proj(query))
        k = self._heads(self.k_proj(key))
        v = self._heads(self.v_proj(value))
        mask = self._mask(attn_mask, key_padding_mask, q.dtype)
        rate = self.dropout if self.training else 0.0
        shares = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            shares = (scores if mask is None else scores + mask).softmax(-1)
            shares = F.dropout(shares, rate, self.training)
            mixed = shares @ v
            shares = shares.mean(1) if average_attn_weights else shares
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, rate)
        out = self.out_proj(mixed.transpose(1, 2).reshape(*query.shape[:2], -1))
        if not batched:
            return out.squeeze(0), None if shares is None else shares.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), shares

    def _heads(self, x: Tensor) -> Tensor:
        """Shape (batch, length, heads * head_dim) to (batch, heads, length, head_dim)."""
        # Exported graphs must not hold the number of heads.
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _mask(
        self, every: Tensor | None, padding: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to the scores, to be broadcast to (batch, heads, length, length)."""
        found: Tensor | None = None
        if every is not None:
            found = _additive(every, dtype)
            if found.dim() == 3:
                found = found.reshape(-1, self.num_heads, *found.shape[1:])
        if padding is not None:
            hidden = _additive(padding, dtype)[:, None, None, :]
            found = hidden if found is None else found + hidden
        return found


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
