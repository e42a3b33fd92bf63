"""Encoder-decoders of megnorm models in transformers.

Self-contained with encoder_megnorm.py, modeling_megnorm.py and the files that they import.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder

from .configuration_megnorm import MegnormConfig
from .encoder_megnorm import MegnormEncoder
from .layers_megnorm import Attention, Block, CrossAttention
from .modeling_megnorm import MegnormModel, MegnormPreTrainedModel


class MegnormDecoder(MegnormModel):
    """The decoder of an encoder-decoder; with a shared embedding the encoder has the tokens' table."""

    _can_record_outputs = {
        "hidden_states": Block,
        "attentions": OutputRecorder(Attention, index=1, layer_name="attention"),
        "cross_attentions": OutputRecorder(CrossAttention, index=1),
    }

    def __init__(self, config: MegnormConfig):
        super().__init__(config, cross=True, table=not config.shared_embedding)


class MegnormSeq2SeqModel(MegnormPreTrainedModel):
    """Both stacks without the head. Each has a table of tokens of its own, or the encoder's serves both."""

    def __init__(self, config: MegnormConfig):
        super().__init__(config)
        self.encoder = MegnormEncoder(config)
        self.decoder = MegnormDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.encoder.embed.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        if not self.config.shared_embedding:
            raise ValueError("encoder and decoder have each their table of tokens; neither is replaced alone")
        self.encoder.embed.token = value

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """attention_mask [b, s]: 0 at padding of the source. encoder_outputs: in place of input_ids."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        memory = encoder_outputs.last_hidden_state
        if decoder_inputs_embeds is None:
            table = (self.encoder if self.config.shared_embedding else self.decoder).embed.token
            decoder_inputs_embeds = table(decoder_input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        mask = create_bidirectional_mask(self.config, decoder_inputs_embeds, attention_mask, memory)
        outputs = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            past_key_values=None if past_key_values is None else past_key_values.self_attention_cache,
            use_cache=False,
            cross={"memory": memory, "attention_mask": mask, "past_key_values": past_key_values},
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.get("cross_attentions"),
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class MegnormForConditionalGeneration(MegnormPreTrainedModel, GenerationMixin):
    def __init__(self, config: MegnormConfig):
        super().__init__(config)
        source = "encoder" if config.shared_embedding else "decoder"
        self._tied_weights_keys = {"lm_head.weight": f"model.{source}.embed.token.weight"}
        self.model = MegnormSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's input for what it is to say, [b, t]; -100 becomes padding."""
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or padding is None:
            raise ValueError("config.json: set decoder_start_token_id and pad_token_id, or give decoder_input_ids")
        return F.pad(labels[:, :-1].masked_fill(labels[:, :-1] == -100, padding), (1, 0), value=start)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """labels [b, t]: what the decoder is to say, -100 is ignored. For the rest see MegnormSeq2SeqModel."""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        kwargs |= {"decoder_input_ids": decoder_input_ids, "decoder_inputs_embeds": decoder_inputs_embeds}
        outputs = self.model(input_ids, attention_mask, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.scores(self.lm_head, outputs.last_hidden_state[:, keep])
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        found = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **found)


__all__ = ["MegnormDecoder", "MegnormForConditionalGeneration", "MegnormSeq2SeqModel"]
