"""What the attention projectors share: attention of four plain linear layers, and the MLPs around it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid, check_count
from vision_remember.ops import local_attention
from vision_remember.projectors.checkpoints import taken


class Attention(nn.Module):
    """Multi-head cross-attention whose four projections are modules of their own.

    ``nn.MultiheadAttention`` reads its weights past its children, so that a LoRA layer, a quantised layer or a sharding
    hook put there is skipped; here each is called. Starts as ``nn.MultiheadAttention`` does.

    Args:
        dim: E, width of the queries, of the attention and of what it returns.
        num_heads: heads, a divisor of E.
        source_dim: width of keys and values as they come in; None for E.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, *, source_dim: int | None = None) -> None:
        super().__init__()
        check_count("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the attention width {dim}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(source_dim or dim, dim)
        self.value = nn.Linear(source_dim or dim, dim)
        self.out = nn.Linear(dim, dim)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))  # as one fused (3E, E) matrix would draw it
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, regions: tuple[Grid, Grid] | None = None) -> Tensor:
        """(B, N, E) queries over (B, M, source_dim) keys and values -> (B, N, E).

        Args:
            query: (B, N, E).
            key: (B, M, source_dim).
            value: (B, M, source_dim).
            regions: the grids of queries and keys; each query then attends to the cells under it only.
        """
        queries = self._heads(self.query(query))
        keys, values = self._heads(self.key(key)), self._heads(self.value(value))
        if regions is None:
            read = F.scaled_dot_product_attention(queries, keys, values)
        else:
            read = local_attention(queries, keys, values, query_grid=regions[0], key_grid=regions[1])
        return self.out(read.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, E) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def unfused_attention(state: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The weights of an ``nn.MultiheadAttention`` called ``source``, for an :class:`Attention` called ``target``.

    Raises:
        ValueError: one of them is missing.
    """
    weights = taken(state, f"{source}.in_proj_weight").chunk(3)
    biases = taken(state, f"{source}.in_proj_bias").chunk(3)
    unfused = {}
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        unfused[f"{target}.{name}.weight"], unfused[f"{target}.{name}.bias"] = weight, bias
    for name in ("weight", "bias"):
        unfused[f"{target}.out.{name}"] = taken(state, f"{source}.out_proj.{name}")
    return unfused


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))
