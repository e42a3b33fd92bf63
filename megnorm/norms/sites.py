"""Where norms stand under tensor parallelism: the one table that decides sharding, statistics and gradient sums.

    site                          tensor on a rank            over    weight  statistics  gradient sum over tp
    input output post embedding   [s/tp, b, d] with sequence  width   whole   local       only with sequence
    final, start, read, x, y,     parallelism, else [s, b, d]                             parallelism
    mix, learned scales
    q, context                    [s, b, (h/tp) hd]           head    whole   local       always
    k, v                          [s, b, (kv/tp) hd]          head    whole   local       always
    q, k, v, context              as above                    width   split   over tp     over replicas of kv heads
    inner                         [s, b, f/tp]                width   split   over tp     never

The row "always" is the easy one to miss: a per-head gain is shared by all heads, and each rank sees only its own.
"""

from dataclasses import dataclass
from typing import Literal

STREAM_SITES = ("input", "output", "post", "embedding", "final", "start", "read", "mix", "x", "y")
QUERY_SITES = ("q", "context")
KV_SITES = ("k", "v")


@dataclass(frozen=True)
class Placement:
    """weight: held "whole" by every rank or "split" with the tensor. statistics: "local" or summed over "tp".

    grad_sum: "tp" (partial on every rank), "sp" (partial with sequence parallelism), "kv" (partial on the replicas of a
    key/value head) or None. A split weight is summed over "kv" just where
    several ranks hold its head, which the layer sees from its own slice (a gain per head likewise).
    """

    weight: Literal["whole", "split"]
    statistics: Literal["local", "tp"]
    grad_sum: Literal["tp", "sp", "kv"] | None


def placement(site: str, over: str) -> Placement:
    """The row of the table for a norm at ``site`` that normalizes ``over`` "width" or "head"."""
    if site in STREAM_SITES:
        return Placement("whole", "local", "sp")
    if over == "head":
        return Placement("whole", "local", "tp")
    return Placement("split", "tp", "kv" if site in KV_SITES else None)
