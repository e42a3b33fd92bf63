"""The causal language model: embedding, blocks, final norm, head, as the slice that one pipeline stage holds."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megnorm.layers.attention import attention_mask
from megnorm.layers.block import Block, run_blocks
from megnorm.layers.embedding import Embedding, Head, full_logits
from megnorm.layers.env import Context, Env
from megnorm.layers.init import initialize
from megnorm.layers.loss import cross_entropy
from megnorm.layers.norm import norm_or_identity
from megnorm.layers.rope import rope_table, token_positions
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved, resolve


@dataclass(frozen=True)
class Tokens:
    """Input of one micro-batch. tokens, labels [s, b] int64; loss_mask [s, b] float; positions [s, b] or None.

    documents: packed rows, b = 1: lengths of the documents that lie one behind the other and do not see each other.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None
    documents: tuple[int, ...] | None = None


class CausalLM(nn.Module):
    """A decoder-only language model."""

    def __init__(self, cfg: ModelConfig, resolved: Resolved, padded_vocab: int, env: Env) -> None:
        super().__init__()
        self.cfg, self.env = cfg, env
        self.embed = Embedding(cfg, resolved.embedding, padded_vocab, env)
        self.blocks = nn.ModuleDict({str(i): Block(layer, cfg, env, i) for i, layer in enumerate(resolved.layers)})
        self.final_norm = norm_or_identity(resolved.final, "final", 1, cfg.width, env)
        self.head = Head(cfg, padded_vocab, env, self.embed.token.weight if cfg.tied_head else None)

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, documents: tuple[int, ...] | None = None
    ) -> Tensor:
        """tokens [s, b] -> the stream after the final norm, [s, b, d] ([s/tp, b, d] with sequence parallelism)."""
        where = token_positions(tokens, self.cfg.padding_id) if positions is None else positions
        x = self.embed(tokens, where)
        rope = None
        if self.cfg.positions == "rotary":
            rope = rope_table(where.clamp_min(0), self.cfg.hd, self.cfg.rope_theta, x.dtype)
        context = Context(rope, attention_mask(tokens, self.cfg.padding_id), documents)
        return self.final_norm(run_blocks(list(self.blocks.values()), x, context, self.env))

    def forward(self, batch: Tokens) -> Tensor:
        """Sum of the masked token losses, a scalar in fp32 (fp64 for fp64)."""
        logits = self.head(self.hidden(batch.tokens, batch.positions, batch.documents))
        losses = cross_entropy(logits, batch.labels, self.head.first, self.head.logical, self.env.mesh.tp)
        return (losses * batch.loss_mask).sum()

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """[s, b, v] on every rank, without padding rows; no gradient."""
        return full_logits(self.head(self.hidden(tokens, positions)), self.head, self.cfg.vocab_size)


def build_model(
    cfg: ModelConfig,
    env: Env | None = None,
    *,
    seed: int = 0,
    resolved: Resolved | None = None,
    vocab_multiple: int = 64,
) -> CausalLM:
    """The model of a config with its initial weights.

    env None: one process, fp32, CPU. resolved None: resolve the config's scheme. The vocabulary is stored in the least
    multiple of vocab_multiple * tp rows that holds it.
    """
    env = env or Env()
    resolved = resolved or resolve(cfg.norm, cfg.layers)
    step = vocab_multiple * env.mesh.tp.size
    model = CausalLM(cfg, resolved, -(-cfg.vocab_size // step) * step, env)
    initialize(model, cfg, resolved, seed)
    return model
