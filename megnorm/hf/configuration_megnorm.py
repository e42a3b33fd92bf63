"""Configuration of a megnorm model in transformers. Needs transformers alone; shipped beside the exported weights."""

from typing import Any

from transformers import PreTrainedConfig


class MegnormConfig(PreTrainedConfig):
    """A transformer whose norms, scales and residuals are all written out in ``norm``.

    norm: the normalization scheme, resolved: ``layers`` (one entry a layer, with ``attention`` and ``ffn``),
    ``embedding`` and ``final``. Every number is there; the scheme's name is kept for people only.
    family: causal | masked | classifier | encdec; see the end. positions: learned | sinusoidal | rotary | alibi | none.
    activation: gelu, gelu_tanh, relu, relu_squared, silu, or the gated swiglu, geglu, geglu_tanh, reglu.
    position_padding_id: without an attention mask, tokens of this id are padding;
    positions count real tokens only and padding has none. None: the attention mask alone says what is padding, and
    does not move positions. parallel_block: attention and feed-forward read the same stream,
        parallel_norm: through a norm each, or through the attention's ("one").
    rope_parameters, layer_types, sliding_window, attn_logit_softcapping and final_logit_softcapping mean what they do in
    transformers' own models. attention_scale: factor on scores, None: 1 / sqrt(head_dim). logit_scale: factor on logits.
    linear_bias: on every linear layer of the blocks; qkv_bias, o_bias: on these alone, None: as linear_bias.
    moe: of a causal model with sparse layers, the options of their experts by megnorm's names; sparse_layers: which they are.
    segments: token types of an encoder with an embedding each. transform_norm: the norm behind a dense layer before a masked-LM
    head; None: no such layer. pooler: of a classifier. relative_buckets: of T5's position bias, growing up to
    relative_distance; None: no such bias. An encoder-decoder has encoder_layers beside num_hidden_layers, which are the
    decoder's, and ``norm["encoder"]``; shared_embedding: one token table for both; max_source_positions: the encoder's.
    norm_config: the options that ``norm`` was resolved from, for reading the folder back into megnorm.
    """

    model_type = "megnorm"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed": (["input_ids"], ["hidden_states"]),
        "blocks": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "joined": (["hidden_states"], ["hidden_states"]),
        "final_norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        family: str = "causal",
        vocab_size: int = 50257,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 1024,
        activation: str = "swiglu",
        positions: str = "rotary",
        rope_parameters: dict[str, Any] | None = None,
        position_padding_id: int | None = None,
        embedding_scale: float = 1.0,
        layer_types: list[str] | None = None,
        sliding_window: int | None = None,
        attention_scale: float | None = None,
        attn_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        linear_bias: bool = False,
        qkv_bias: bool | None = None,
        o_bias: bool | None = None,
        head_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        parallel_block: bool = False,
        parallel_norm: str = "each",
        moe: dict[str, Any] | None = None,
        sparse_layers: list[int] | None = None,
        segments: int = 0,
        transform_norm: dict[str, Any] | None = None,
        pooler: bool = True,
        relative_buckets: int | None = None,
        relative_distance: int = 128,
        encoder_layers: int = 0,
        max_source_positions: int | None = None,
        shared_embedding: bool = False,
        norm: dict[str, Any] | None = None,
        norm_config: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        decoder_start_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.family = family
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.activation = activation
        self.positions = positions
        if positions == "rotary":
            self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.position_padding_id = position_padding_id
        self.embedding_scale = embedding_scale
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.attention_scale = attention_scale
        self.attn_logit_softcapping = attn_logit_softcapping
        self.logit_scale = logit_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.linear_bias = linear_bias
        self.qkv_bias = linear_bias if qkv_bias is None else qkv_bias
        self.o_bias = linear_bias if o_bias is None else o_bias
        self.head_bias = head_bias
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.parallel_block = parallel_block
        self.parallel_norm = parallel_norm
        self.moe = moe
        self.sparse_layers = sparse_layers or []
        self.segments = segments
        self.transform_norm = transform_norm
        self.pooler = pooler
        self.relative_buckets = relative_buckets
        self.relative_distance = relative_distance
        self.encoder_layers = encoder_layers
        self.max_source_positions = max_source_positions
        self.shared_embedding = shared_embedding
        self.norm = norm
        self.norm_config = norm_config
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.decoder_start_token_id = decoder_start_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**{"is_encoder_decoder": family == "encdec", **kwargs})

    def layer_norms(self) -> list[dict[str, Any]]:
        """The norms of each layer; a config without any is a plain Pre-LN transformer with RMSNorm."""
        if self.norm is None:
            self.norm = _default(self.num_hidden_layers)
        if len(self.norm["layers"]) != self.num_hidden_layers:
            raise ValueError(
                f"config.json: norm.layers has {len(self.norm['layers'])} entries and num_hidden_layers is "
                f"{self.num_hidden_layers}; they must be equal"
            )
        return self.norm["layers"]

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Linear layers that may be split: those whose inner norms and scales do not look across heads or features."""
        if self.family == "encdec":
            return {}
        attention = [layer["attention"] for layer in self.layer_norms()]
        ffn = [layer["ffn"] for layer in self.layer_norms()]
        plan: dict[str, str] = {}
        alike = self.positions != "alibi" and self.relative_buckets is None  # else scores get a bias of all heads
        if alike and not any(
            a["head_scale"] or any(_spans(a[site]) for site in ("q", "k", "v", "context")) for a in attention
        ):
            plan |= {f"blocks.*.attention.{name}": "colwise" for name in "qkv"} | {"blocks.*.attention.o": "rowwise"}
        if not any(f["inner"] for f in ffn):
            plan |= {f"blocks.*.ffn.{name}": "colwise" for name in ("up", "gate")} | {"blocks.*.ffn.down": "rowwise"}
        return plan


def _spans(norm: dict[str, Any] | None) -> bool:
    """Whether a norm inside attention needs more than one head at a time, or a parameter for each."""
    return norm is not None and (norm["over"] == "width" or norm["gain"] == "per_head")


def _default(layers: int) -> dict[str, Any]:
    norm = {"over": "width", "kind": "rmsnorm", "gain": "vector", "bias": False, "eps": 1e-5, "cast": "before_gain"}
    norm |= {"alpha": 0.5, "weight_init": 1.0, "scale": 1.0}
    scale = {"value": 1.0, "learned": None, "shared": False}
    residual = {"rule": "add", "skip": scale, "branch": scale, "source": "stream", "layer_input": False}
    sites = {"input": norm, "output": None, "post": None, "residual": residual}
    attention = sites | {"q": None, "k": None, "v": None, "context": None, "head_scale": None}
    layer = {"attention": attention, "ffn": sites | {"inner": None}, "cross_attention": None}
    return {"scheme": "unnamed", "layers": [layer] * layers, "embedding": None, "final": norm}
