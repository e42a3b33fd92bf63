"""An encoder that tells a class, or a number, from a text or a pair of texts: what a masked language model is fine-tuned to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megnorm.layers.embedding import Embedding
from megnorm.layers.env import Env
from megnorm.layers.sublayer import Dropout
from megnorm.layers.transform import WholeLinear
from megnorm.models.config import ModelConfig
from megnorm.models.masked import MaskedTokens, encode, stream_edge
from megnorm.models.stack import Stack
from megnorm.norms.resolve import Resolved
from megnorm.parallel.collectives import gather_sequence


class Classifier(Stack):
    """The layers [first, last) of the encoder, and behind the last one a pooler on the first token and the class scores.

    Its input has labels [b]: class numbers, or with one class the numbers that are to be told; loss_mask [b].
    """

    def __init__(
        self, cfg: ModelConfig, resolved: Resolved, padded_vocab: int, env: Env, layers: tuple[int, int] | None = None
    ) -> None:
        begin, end = layers or (0, cfg.layers)
        embed = Embedding(cfg, resolved.embedding, padded_vocab, env) if begin == 0 else None
        super().__init__(cfg, resolved, env, (begin, end), embed)
        self.first, self.last = self.begins, self.ends
        if self.last:
            self.pooler = WholeLinear(cfg.width, cfg.width, env, by_token=False) if cfg.pooler else None
            self.dropout = Dropout(cfg.dropout, env, "classifier", local=False)
            self.classifier = WholeLinear(cfg.width, cfg.classes, env, by_token=False)

    def units(self) -> list[nn.Module]:
        """The parts that forward calls, in order."""
        if not self.last:
            return super().units()
        return [*super().units(), *([self.pooler] if self.pooler is not None else []), self.classifier]

    def edge(self, batch: MaskedTokens, *, into: bool) -> tuple[tuple[int, ...], torch.dtype]:
        """What stages exchange for a micro-batch: the residual stream [s, b, d] ([s/tp, b, d])."""
        return stream_edge(self, batch)

    def states(self, batch: MaskedTokens, carry: Tensor | None = None) -> Tensor:
        """The stream behind this stage; behind the last one the scores [b, classes], the same on every tp rank."""
        x = encode(self, batch, carry)
        if not self.last:
            return x
        # With sequence parallelism the first rank has the first token, and all compute with it.
        y = gather_sequence(x[:1], self.env.mesh.sp, partial=False)[0]
        y = y if self.pooler is None else torch.tanh(self.pooler(y))
        scores: Tensor = self.classifier(self.dropout(y))
        return scores

    def forward(self, batch: MaskedTokens, carry: Tensor | None = None) -> Tensor:
        """The last stage: sum of the sequences' losses, a scalar in fp32 (fp64 for fp64); others: the stream."""
        x = self.states(batch, carry)
        if not self.last:
            return x
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.cfg.classes == 1:
            losses = (z[:, 0] - batch.labels.to(z.dtype)).square()
        else:
            smoothing = self.cfg.label_smoothing if self.training else 0.0
            losses = F.cross_entropy(z, batch.labels, reduction="none", label_smoothing=smoothing)
        return (losses * batch.loss_mask).sum()
