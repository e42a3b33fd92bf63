"""Options of a model: sizes, positions, activation, initialization."""

from dataclasses import dataclass, field
from typing import Literal

from megnorm.norms.config import NormConfig

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


@dataclass(frozen=True)
class InitConfig:
    """Base initialization; a scheme may bring its own distribution for hidden matrices and a gain by role.

    distribution: of hidden matrices (q, k, v, o, up, gate, down). normal and truncated_normal (at 3 std) use std;
    xavier_normal and xavier_uniform use each logical matrix's own fans; uniform_fan_in is U(+-1/sqrt(fan_in)).
    std None: 0.02. depth_scaled: divide o and down by sqrt(2 L). embedding_std, position_std, head_std None: std; these
    three are always normal, truncated with truncated_normal.
    """

    distribution: Literal["normal", "truncated_normal", "xavier_normal", "xavier_uniform", "uniform_fan_in"] = "normal"
    std: float | None = None
    depth_scaled: bool = False
    embedding_std: float | None = None
    position_std: float | None = None
    head_std: float | None = None


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions stretched beyond the length that a model was first trained for; names and meanings of transformers.

    kind: linear divides positions by factor; dynamic (NTK) enlarges theta where a row is longer than original; yarn and
    llama3 divide by factor only what turns slowly, between beta_fast and beta_slow turns, or low_freq and high_freq, over
    original. original: positions of the first training; None: model.max_positions.
    attention_factor: yarn's factor on cos and sin; None: 0.1 ln(factor) + 1. truncate: yarn's bounds are whole features.
    """

    kind: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq: float = 1.0
    high_freq: float = 4.0

    def __post_init__(self) -> None:
        _refuse(not self.factor >= 1.0, f"model.rope_scaling.factor is {self.factor}; it must be at least 1")
        _refuse(self.original is not None and self.original < 1, "model.rope_scaling.original must be at least 1")
        idle = self.kind == "none" and (self.factor != 1.0 or self.original is not None)
        _refuse(idle, "model.rope_scaling says how far but not how; set its kind")
        if self.kind == "yarn":
            fast, slow, factor = self.beta_fast, self.beta_slow, self.attention_factor
            ordered = f"model.rope_scaling.beta_fast={fast} must be above beta_slow={slow}, and that above 0"
            _refuse(not fast > slow > 0.0, ordered)
            _refuse(
                factor is not None and not factor > 0.0,
                f"model.rope_scaling.attention_factor is {factor}; it must be above 0",
            )
        if self.kind == "llama3":
            low, high = self.low_freq, self.high_freq
            _refuse(
                not high > low > 0.0,
                f"model.rope_scaling.high_freq={high} must be above low_freq={low}, and that above 0",
            )


@dataclass(frozen=True)
class AttentionConfig:
    """What happens to attention scores beside causality.

    scale: factor on q k; None: 1 / sqrt(head_dim). softcap: c in c tanh(score / c), before masks.
    window: how many tokens a token sees, itself included. window_layers: the layers that have it, repeated over depth, as
    ["window", "full"]. window_rope_theta: rotary base of these layers, then without rope_scaling; None: as the others.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    window_layers: tuple[Literal["window", "full"], ...] = ("window",)
    window_rope_theta: float | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "softcap", "window", "window_rope_theta"):
            value = getattr(self, name)
            _refuse(value is not None and not value > 0, f"model.attention.{name} is {value}; it must be above 0")
        _refuse("window" not in self.window_layers, "model.attention.window_layers names no layer 'window'; add one")
        alone = self.window is None and (self.window_layers != ("window",) or self.window_rope_theta is not None)
        _refuse(alone, "model.attention.window is missing; window_layers and window_rope_theta need it")

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, counted from 0; None: it sees all before it."""
        return self.window if self.window_layers[layer % len(self.window_layers)] == "window" else None


def _refuse(wrong: bool, sentence: str) -> None:
    if wrong:
        raise ValueError(sentence)


@dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers: a token passes ``top_k`` of ``experts`` FFNs. experts 0: every layer is dense.

    ffn: width of an expert; None: model.ffn. shared_ffn: width of one more FFN that all tokens pass; 0: none.
    first: layers at the start that stay dense; every: of the layers behind them each n-th is sparse (2: the second, ...).
    score: of a token for an expert, softmax over all experts or sigmoid of each, in fp32. normalize: the weights of the
    chosen ones are divided by their sum; scale: then multiplied.
    balance_loss, z_loss: coefficients of the losses that layers/router.py defines, means over tokens and sparse layers.
    balance_over: what the balance loss counts experts in: each sequence (the same in every layout and micro-batch size),
    or a rank's whole micro-batch (as published models were trained; another train.micro_batch is another loss).
    balance_across: each layer balances by itself, or all "layers" together (Mixtral's and OLMoE's classes in transformers).
    bias_rate: balance without a loss: after each step the score by which an expert is chosen, and not its weight, moves by
    this much against its load (arXiv:2408.15664). capacity: an expert takes at most capacity * top_k / experts of the
    tokens of a sequence, the earlier ones; the others go on without it. None: it takes all (dropless).
    """

    experts: int = 0
    top_k: int = 2
    ffn: int | None = None
    shared_ffn: int = 0
    first: int = 0
    every: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    balance_over: Literal["sequence", "micro_batch"] = "sequence"
    balance_across: Literal["layer", "layers"] = "layer"
    bias_rate: float = 0.0
    capacity: float | None = None

    def __post_init__(self) -> None:
        if 0 < self.experts < self.top_k:
            raise ValueError(f"model.moe.top_k={self.top_k} is more than model.moe.experts={self.experts}; lower it")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(
                f"model.moe.capacity is {self.capacity}; give a number above 0, or null to serve all tokens"
            )
        if not self.scale > 0:
            raise ValueError(f"model.moe.scale is {self.scale}; it must be above 0")


@dataclass(frozen=True)
class ModelConfig:
    """A transformer. Letters: d = width, h = heads, kv = kv_heads, hd = head_dim, f = ffn, v = vocab_size.

    kv_heads None: heads. head_dim None: width // heads. ffn: width of the FFN (of each half where gated).
    max_positions: rows of the learned position table, and the longest sequence the model takes.
    positions: "rotary" turns halves (Llama), of a share rope_fraction of each head's features; "sinusoidal" is fairseq's
    table; "alibi" lowers scores by slope * distance. With
    padding_id set, learned and sinusoidal positions count real tokens only and padding gets none, and attention does not
    look at padding. embedding_scale: factor on token embeddings, a number or "sqrt_width". tied_head: head = token embedding.
    logit_scale: factor on logits; logit_softcap: c in c tanh(logit / c), after it.
    bias: on every linear layer of the blocks; qkv_bias, o_bias: on q, k, v and on W_o alone (None: as bias); head_bias: on
    the head. vocab_size is logical: storage is padded for speed and tensor parallelism, and the padding never shows.
    parallel_block: x + A(..) + F(..), both branches reading x; parallel_norm: through a norm each, or through the
    attention's "one" (GPT-J, PaLM).
    label_smoothing: share of a training target that is spread evenly over the vocabulary; evaluation has none.

    family: "causal", "masked" (an encoder with a masked-LM head), "encdec" (encoder-decoder) or "classifier" (an encoder with
    scores for classes: fine-tuning). What follows is of these three. layers are the decoder's in an encoder-decoder;
    encoder_layers None: as many. max_source_positions: rows of the encoder's position table; None: max_positions.
    shared_embedding: encoder and decoder have one token table (with tied_head the head is the same one).
    relative_buckets: T5's position bias on self-attention, a table of so many buckets for each stack, the farther half
    growing up to relative_distance; None: no such bias. segments: token types (BERT's are 2) with an embedding each; 0:
    none. head_transform: dense layer, activation and norm before a masked-LM head (BERT). classes: of a classifier; 1: it
    tells a number. pooler: a dense layer and tanh on the first token before them.
    """

    family: Literal["causal", "masked", "encdec", "classifier"] = "causal"
    layers: int = 12
    encoder_layers: int | None = None
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int = 3072
    vocab_size: int = 50257
    max_positions: int = 1024
    max_source_positions: int | None = None
    activation: Literal[
        "gelu", "gelu_tanh", "relu", "relu_squared", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"
    ] = "swiglu"
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_fraction: float = 1.0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    padding_id: int | None = None
    embedding_scale: float | Literal["sqrt_width"] = 1.0
    tied_head: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    bias: bool = False
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    head_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    parallel_block: bool = False
    parallel_norm: Literal["each", "one"] = "each"
    label_smoothing: float = 0.0
    shared_embedding: bool = False
    relative_buckets: int | None = None
    relative_distance: int = 128
    segments: int = 0
    head_transform: bool = False
    classes: int = 0
    pooler: bool = True
    moe: MoEConfig = MoEConfig()
    norm: NormConfig = field(default_factory=NormConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        scale = self.embedding_scale
        _refuse(not (scale == "sqrt_width" or scale > 0), f"model.embedding_scale is {scale}; it must be above 0")
        cap, scaling, rotary = self.logit_softcap, self.rope_scaling.kind, self.positions == "rotary"
        _refuse(cap is not None and not cap > 0, f"model.logit_softcap is {cap}; it must be above 0, or null")
        needs = f"is for rotary positions, but model.positions={self.positions}; drop it"
        _refuse(not rotary and scaling != "none", f"model.rope_scaling.kind={scaling} {needs}")
        local = self.attention.window_rope_theta is not None
        _refuse(not rotary and local, f"model.attention.window_rope_theta {needs}")
        narrow = scaling == "dynamic" and self.hd < 4
        _refuse(narrow, f"model.rope_scaling.kind=dynamic needs a head_dim of 4 or more, not {self.hd}")
        share, turned = self.rope_fraction, self.rotary_dim
        _refuse(not rotary and share != 1.0, f"model.rope_fraction={share} {needs}")
        whole = 0.0 < share <= 1.0 and turned >= 2 and turned % 2 == 0
        fits = f"model.rope_fraction={share} of head_dim={self.hd} is {turned} features"
        _refuse(rotary and not whole, f"{fits}; it must be an even number from 2 to {self.hd}")
        padded = self.positions == "alibi" and self.padding_id is not None
        _refuse(padded, "model.positions=alibi counts padding in its distances; set model.padding_id=null")

    @property
    def hd(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def rotary_dim(self) -> int:
        """Features of each head that rotary positions turn."""
        return int(self.hd * self.rope_fraction)

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def biased_qkv(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def biased_o(self) -> bool:
        return self.bias if self.o_bias is None else self.o_bias

    @property
    def source_layers(self) -> int:
        """Layers of the encoder that an encoder-decoder has beside ``layers``; 0 for other families."""
        return (self.encoder_layers or self.layers) if self.family == "encdec" else 0

    @property
    def head_weights(self) -> int:
        """In the matrices behind the last layer, tied or not."""
        if self.family == "classifier":
            return self.width * (self.classes + self.pooler * self.width)
        return self.width * (self.vocab_size + self.head_transform * self.width)

    @property
    def source_positions(self) -> int:
        return self.max_source_positions or self.max_positions

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def expert_ffn(self) -> int:
        """Width of an expert."""
        return self.moe.ffn or self.ffn

    def sparse(self, layer: int) -> bool:
        """Whether the feed-forward of a layer (0-based) is a mixture of experts."""
        moe = self.moe
        return moe.experts > 0 and layer >= moe.first and (layer - moe.first + 1) % moe.every == 0

    @property
    def sparse_layers(self) -> int:
        return sum(self.sparse(layer) for layer in range(self.layers))

    def ffn_weights(self, layer: int) -> int:
        """Weights of the feed-forward matrices of a layer that one token meets."""
        per_feature = (3 if self.gated else 2) * self.width
        if not self.sparse(layer):
            return per_feature * self.ffn
        return per_feature * (self.moe.top_k * self.expert_ffn + self.moe.shared_ffn) + self.width * self.moe.experts
