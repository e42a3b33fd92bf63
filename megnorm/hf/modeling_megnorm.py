"""A megnorm model in transformers: one decoder that reads where its norms stand from the config.

Self-contained: needs torch, transformers and the three files beside it: configuration_, norms_ and attention_megnorm.py.
No normalization scheme is known here by name; ``config.norm`` lists, for every layer, the norms, the residual's factors
and its source. Parameter names are megnorm's, under ``model.``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_megnorm import alibi, eager_attention, rotary_angles, rotate
from .configuration_megnorm import MegnormConfig
from .norms_megnorm import Norm, Residual, Spec, make_norm, over_heads

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
LOG = math.log(10000.0)
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


class Embedding(nn.Module):
    """Token embedding times a constant, plus positions; then a norm and dropout."""

    def __init__(self, config: MegnormConfig):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = make_norm(config.norm["embedding"], config.hidden_size)

    def forward(self, token: Tensor, positions: Tensor, real: Tensor | None) -> Tensor:
        """token: embeddings [b, s, d]; positions [b, s]; real [b, s] is False on padding, which has no position."""
        x = token if self.config.embedding_scale == 1.0 else token * self.config.embedding_scale
        if self.config.positions in ("learned", "sinusoidal"):
            rows = self.position(positions) if self.config.positions == "learned" else self._waves(positions, x.dtype)
            x = x + (rows if real is None else rows * real[..., None])
        return F.dropout(self.norm(x), self.config.dropout, self.training)

    def _waves(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[sin(q w), cos(q w)], w_i = exp(-i log 10000 / (half - 1)); the first token has q = padding id + 1, or 1."""
        half, pad = self.config.hidden_size // 2, self.config.position_padding_id
        # in fp32 whatever the model's dtype, as in the first implementation, whose table is part of its models
        w = torch.exp(torch.arange(half, device=positions.device, dtype=torch.float32) * (-LOG / max(half - 1, 1)))
        angles = (positions + (1 if pad is None else pad + 1))[..., None].float() * w
        rows = torch.cat([angles.sin(), angles.cos()], -1)
        return F.pad(rows, (0, self.config.hidden_size - 2 * half)).to(dtype)


class Attention(nn.Module):
    """Self-attention and the norms and scales inside it: [b, s, d] after the input norm -> branch [b, s, d]."""

    is_causal = True

    def __init__(self, config: MegnormConfig, spec: Spec, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.scaled = config, layer_idx, spec["head_scale"]
        d, heads, kv, self.head_dim = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        scale, windowed = config.attention_scale, config.layer_types[layer_idx] == "sliding_attention"
        self.num_key_value_groups, self.scaling = heads // kv, self.head_dim**-0.5 if scale is None else scale
        self.sliding_window = config.sliding_window if windowed else None
        self.input_norm = make_norm(spec["input"], d)
        self.q = nn.Linear(d, heads * self.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(d, kv * self.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(d, kv * self.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(heads * self.head_dim, d, bias=config.o_bias)
        for site, n in (("q", heads), ("k", kv), ("v", kv), ("context", heads)):
            size = self.head_dim * (n if spec[site] and spec[site]["over"] == "width" else 1)
            setattr(self, f"{site}_norm", make_norm(spec[site], size, n))
        if self.scaled:
            self.head_scale = nn.Parameter(torch.ones(heads))
        self.output_norm, self.post_norm = make_norm(spec["output"], d), make_norm(spec["post"], d)
        self.residual = Residual(spec["residual"], d)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q = over_heads(self.q_norm, self.q(hidden_states), self.head_dim)
        k = over_heads(self.k_norm, self.k(hidden_states), self.head_dim)
        v = over_heads(self.v_norm, self.v(hidden_states), self.head_dim)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        kwargs |= {"softcap": self.config.attn_logit_softcapping, "sliding_window": self.sliding_window}
        context, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        context = over_heads(self.context_norm, context, self.head_dim)
        if self.scaled == "pre_projection":
            context = context * self.head_scale[:, None]
        y = self.o(context.flatten(-2))
        if self.scaled == "post_projection":
            y = (y.unflatten(-1, (self.head_scale.shape[0], -1)) * self.head_scale[:, None]).flatten(-2)
        return F.dropout(self.output_norm(y), self.config.dropout, self.training), weights


class FeedForward(nn.Module):
    """down(inner(act(gate) * up)) or down(inner(act(up))): [b, s, d] after the input norm -> branch [b, s, d]."""

    def __init__(self, config: MegnormConfig, spec: Spec, attention: Attention):
        super().__init__()
        self.config, d, f = config, config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[GATED.get(config.activation, config.activation)]
        self.input_norm = make_norm(spec["input"], d)
        self.up = nn.Linear(d, f, bias=config.linear_bias)
        self.gate = nn.Linear(d, f, bias=config.linear_bias) if config.activation in GATED else None
        self.inner_norm = make_norm(spec["inner"], f)
        self.down = nn.Linear(f, d, bias=config.linear_bias)
        self.output_norm, self.post_norm = make_norm(spec["output"], d), make_norm(spec["post"], d)
        self.residual = Residual(spec["residual"], d, attention.residual)

    def forward(self, hidden_states: Tensor) -> Tensor:
        up = self.up(hidden_states)
        h = self.act(up) if self.gate is None else self.act(self.gate(hidden_states)) * up
        return F.dropout(self.output_norm(self.down(self.inner_norm(h))), self.config.dropout, self.training)


class Block(GradientCheckpointingLayer):
    """A transformer layer: two residual sub-layers, one after the other or side by side."""

    def __init__(self, config: MegnormConfig, layer_idx: int):
        super().__init__()
        spec = config.norm["layers"][layer_idx]
        self.parallel = config.parallel_block
        self.attention = Attention(config, spec["attention"], layer_idx)
        self.ffn = FeedForward(config, spec["ffn"], self.attention)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x, attention, ffn = hidden_states, self.attention, self.ffn
        u = attention.input_norm(x)
        y, _ = attention(u, **kwargs)
        middle = attention.post_norm(attention.residual(x, u, y, x))
        u = ffn.input_norm(x if self.parallel else middle)
        return ffn.post_norm(ffn.residual(middle, u, ffn(u), x, attention.residual))


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
        return self.config.positions != "alibi" and self.config.attn_logit_softcapping is None

    @property
    def _supports_flash_attn(self) -> bool:  # it knows no such bias
        return self.config.positions != "alibi"

    @property
    def _supports_flex_attn(self) -> bool:
        return self.config.positions != "alibi"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Norm | Residual):
            module.reset()
        elif isinstance(module, Attention) and module.scaled:
            init.ones_(module.head_scale)


class MegnormModel(MegnormPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MegnormConfig):
        super().__init__(config)
        config.layer_norms()
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = make_norm(config.norm["final"], config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed.token = value

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
        for block, layer_type in zip(self.blocks, self.config.layer_types, strict=True):
            hidden_states = block(hidden_states, past_key_values=past_key_values, **shared[layer_type], **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )

    def _by_type(
        self, x: Tensor, mask: Tensor | None, cache: Cache | None, position_ids: Tensor, past: int
    ) -> dict[str, dict[str, Any]]:
        """What the layers of a type are given: mask, angles, and ALiBi's biases if there are any."""
        config, s, found = self.config, x.shape[1], {}
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        given = {"inputs_embeds": x, "attention_mask": mask, "past_key_values": cache, "position_ids": position_ids}
        for name in set(config.layer_types):
            angles = rotary_angles(config, name, position_ids, x.dtype)
            made = mask[name] if isinstance(mask, dict) else makers[name](config=config, **given)
            found[name] = {"attention_mask": made, "angles": angles}
            if config.positions == "alibi":  # a cache of layers with a window holds the last keys alone
                count, first = (s, 0) if cache is None else cache.get_mask_sizes(s, config.layer_types.index(name))
                places = torch.arange(max(s, count), device=x.device)
                found[name]["alibi"] = alibi(config.num_attention_heads, places[:s] + past, places[:count] + first)
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

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed.token = value

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
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        logits = logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
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
