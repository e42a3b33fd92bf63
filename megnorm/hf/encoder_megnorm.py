"""Encoders of megnorm models in transformers: masked language models, and classifiers.

Self-contained with modeling_megnorm.py and the files that it imports.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_megnorm import rotary_angles
from .configuration_megnorm import MegnormConfig
from .ffn_megnorm import activation
from .modeling_megnorm import MegnormPreTrainedModel
from .norms_megnorm import make_norm


class MegnormEncoder(MegnormPreTrainedModel):
    """A stack that sees both sides, without its head; the encoder of an encoder-decoder too."""

    def __init__(self, config: MegnormConfig):
        super().__init__(config)
        config.layer_norms()
        norm = config.norm.get("encoder") or config.norm
        self._stack(norm, config.max_source_positions or config.max_position_embeddings, causal=False)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """attention_mask [b, s]: 0 at padding, which enters the first layer as zero; None: padding is found by
        ``position_padding_id``, if that is set. inputs_embeds: rows of the token embedding, before embedding_scale."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        token = self.embed.token(input_ids) if inputs_embeds is None else inputs_embeds
        padding, places = self.config.position_padding_id, torch.arange(token.shape[1], device=token.device)
        if attention_mask is None and padding is not None and input_ids is not None:
            attention_mask = input_ids != padding
        real = None if attention_mask is None else attention_mask.bool()
        counted = None if padding is None else real  # positions count real tokens only
        if position_ids is None:
            position_ids = places[None] if counted is None else (counted.long().cumsum(-1) - 1) * counted
        x = self.embed(token, position_ids, counted, token_type_ids if self.config.segments else None)
        x = x if real is None else x * real[..., None]
        kwargs |= {
            "attention_mask": create_bidirectional_mask(self.config, x, real),
            "angles": rotary_angles(self.config, "full_attention", position_ids, x.dtype),
            "bias": self.bias(places, places, causal=False),
        }
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        x = self.joined.begin(x)
        for block in self.blocks:
            x = block(x, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(self.joined(x)))


class Transform(nn.Module):
    """N(act(W x + b)) before a masked-LM head."""

    def __init__(self, config: MegnormConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = activation(config)
        self.norm = make_norm(config.transform_norm, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))


class MegnormForMaskedLM(MegnormPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed.token.weight"}

    def __init__(self, config: MegnormConfig):
        super().__init__(config)
        self.model = MegnormEncoder(config)
        self.transform = Transform(config) if config.transform_norm else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """labels [b, s]: the true tokens, -100 is ignored. For the rest see MegnormEncoder."""
        outputs = self.model(input_ids, attention_mask, token_type_ids, **kwargs)
        x = outputs.last_hidden_state
        logits = self.scores(self.lm_head, x if self.transform is None else self.transform(x))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class MegnormForSequenceClassification(MegnormPreTrainedModel):
    """Scores for classes, or with one class a number, behind the first token."""

    def __init__(self, config: MegnormConfig):
        super().__init__(config)
        self.model = MegnormEncoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.pooler else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """labels [b]: class numbers, or with one class numbers that are to be told. For the rest see MegnormEncoder."""
        outputs = self.model(input_ids, attention_mask, token_type_ids, **kwargs)
        x = outputs.last_hidden_state[:, 0]
        x = x if self.pooler is None else torch.tanh(self.pooler(x))
        logits = self.classifier(F.dropout(x, self.config.dropout, self.training))
        loss = None
        if labels is not None:
            z = logits.float()
            loss = F.mse_loss(z[:, 0], labels.float()) if z.shape[1] == 1 else F.cross_entropy(z, labels)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = ["MegnormEncoder", "MegnormForMaskedLM", "MegnormForSequenceClassification"]
