"""A megnorm model in transformers: a decoder that reads where its norms stand from the config.

Self-contained: needs torch, transformers and the files beside it. No normalization scheme is known here by name;
``config.norm`` lists, for every layer, the norms, the residual's factors and its source. Parameter names are megnorm's, under
``model.``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_megnorm import alibi, relative_buckets, rotary_angles
from .configuration_megnorm import MegnormConfig
from .layers_megnorm import Attention, Block, Embedding
from .norms_megnorm import Ends, Mixing, Norm, Residual, SecondStream, make_norm


class MegnormPreTrainedModel(PreTrainedModel):
    config_class = MegnormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    @property
    def _supports_sdpa(self) -> bool:  # it has no softcap
        return self._supports_flash_attn and self.config.attn_logit_softcapping is None

    @property
    def _supports_flash_attn(self) -> bool:  # it knows no such bias
        return self.config.positions != "alibi" and self.config.relative_buckets is None

    @property
    def _supports_flex_attn(self) -> bool:
        return self._supports_flash_attn

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Norm | Residual | SecondStream | Mixing):
            module.reset()
        elif isinstance(module, Attention) and module.scaled:
            init.ones_(module.head_scale)

    def _stack(self, norm: dict[str, Any], rows: int, *, table: bool = True, **kind: Any) -> None:
        """Make what a stack of blocks has; norm: where its norms stand. rows: of positions. kind: of its blocks."""
        config = self.config
        self.embed = Embedding(config, norm["embedding"], rows, table=table)
        if config.relative_buckets is not None:
            self.relative = nn.Embedding(config.relative_buckets, config.num_attention_heads)
        self.blocks = nn.ModuleList(Block(config, layer, i, **kind) for i, layer in enumerate(norm["layers"]))
        self.joined = Ends(norm.get("streams"), config.hidden_size)
        self.final_norm = make_norm(norm["final"], config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed.token if hasattr(self, "embed") else self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        if hasattr(self, "embed"):
            self.embed.token = value
        else:
            self.model.set_input_embeddings(value)

    def scores(self, head: nn.Module, states: Tensor) -> Tensor:
        """[..., v] of states [..., d] behind the last norm."""
        logits, scale, cap = head(states), self.config.logit_scale, self.config.final_logit_softcapping
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def bias(self, positions: Tensor, keys: Tensor, *, causal: bool) -> Tensor | None:
        """What is added to the scores of queries at places [s] of a row and keys at places [t]: [heads, s, t], or None."""
        if self.config.positions == "alibi":
            return alibi(self.config.num_attention_heads, positions, keys)
        if self.config.relative_buckets is None:
            return None
        buckets, longest = self.config.relative_buckets, self.config.relative_distance
        return self.relative(relative_buckets(buckets, longest, positions, keys, causal=causal)).permute(2, 0, 1)


class MegnormModel(MegnormPreTrainedModel):
    """The decoder without its head. cross: it reads an encoder's output too. table: False where that has the tokens' table."""

    def __init__(self, config: MegnormConfig, *, cross: bool = False, table: bool = True):
        super().__init__(config)
        config.layer_norms()
        self._stack(config.norm, config.max_position_embeddings, table=table, cross=cross)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """inputs_embeds: rows of the token embedding, before embedding_scale."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        token = self.embed.token(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        attention_mask, real = self._padding(input_ids, attention_mask, token.shape[1], past)
        if position_ids is None and real is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1)[:, -token.shape[1] :] * real
        if position_ids is None:
            position_ids = torch.arange(token.shape[1], device=token.device)[None] + past
        hidden_states = self.embed(token, position_ids, real)
        shared = self._by_type(hidden_states, attention_mask, past_key_values, position_ids, past)
        hidden_states = self.joined.begin(hidden_states)
        for block, layer_type in zip(self.blocks, self.config.layer_types, strict=True):
            kwargs |= shared[layer_type]
            hidden_states = block(hidden_states, past_key_values=past_key_values, real=real, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(self.joined(hidden_states)), past_key_values=past_key_values
        )

    def _by_type(
        self, x: Tensor, mask: Tensor | None, cache: Cache | None, position_ids: Tensor, past: int
    ) -> dict[str, dict[str, Any]]:
        """What the layers of a type are given: mask, angles, and the scores' bias if there is one."""
        config, s, found = self.config, x.shape[1], {}
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        given = {"inputs_embeds": x, "attention_mask": mask, "past_key_values": cache, "position_ids": position_ids}
        for name in set(config.layer_types):
            angles = rotary_angles(config, name, position_ids, x.dtype)
            made = mask[name] if isinstance(mask, dict) else makers[name](config=config, **given)
            # a cache of layers with a window holds the last keys alone
            count, first = (s, 0) if cache is None else cache.get_mask_sizes(s, config.layer_types.index(name))
            places = torch.arange(max(s, count), device=x.device)
            bias = self.bias(places[:s] + past, places[:count] + first, causal=True)
            found[name] = {"attention_mask": made, "angles": angles} | ({} if bias is None else {"bias": bias})
        return found

    def _padding(
        self, input_ids: Tensor | None, mask: Tensor | None, length: int, past: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The attention mask [b, past + s] and which of the s tokens are real; (mask, None) where all are.

        Without a mask padding is found by its id, but not behind a cache: there a caller who pads gives the mask.
        """
        ready = isinstance(mask, dict) or (mask is not None and mask.dim() != 2)  # by generate, for a static cache
        if self.config.position_padding_id is None or ready:
            return mask, None
        if mask is None and past == 0 and input_ids is not None:
            mask = (input_ids != self.config.position_padding_id).long()
        return mask, None if mask is None else mask[:, -length:].bool()


class MegnormForCausalLM(MegnormPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed.token.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: MegnormConfig):
        super().__init__(config)
        self.model = MegnormModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels [b, s]: shifted inside, -100 is ignored."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.scores(self.lm_head, outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MegnormForCausalLM", "MegnormModel", "MegnormPreTrainedModel"]
