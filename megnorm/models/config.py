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
class ModelConfig:
    """A transformer. Letters: d = width, h = heads, kv = kv_heads, hd = head_dim, f = ffn, v = vocab_size.

    kv_heads None: heads. head_dim None: width // heads. ffn: width of the FFN (of each half where gated).
    max_positions: rows of the learned position table, and the longest sequence the model takes.
    positions: "rotary" turns halves (Llama); "sinusoidal" is fairseq's table; with padding_id set, learned and sinusoidal
    positions count real tokens only and padding gets none, and attention does not look at padding.
    embedding_scale: factor on token embeddings, a number or "sqrt_width". tied_head: head = token embedding.
    bias: on every linear layer of the blocks; head_bias: on the head. vocab_size is logical: storage is padded for speed
    and tensor parallelism, and the padding never shows. parallel_block: x + A(..) + F(..), both branches reading x.
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
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "rotary"
    rope_theta: float = 10000.0
    padding_id: int | None = None
    embedding_scale: float | Literal["sqrt_width"] = 1.0
    tied_head: bool = False
    bias: bool = False
    head_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    parallel_block: bool = False
    label_smoothing: float = 0.0
    shared_embedding: bool = False
    relative_buckets: int | None = None
    relative_distance: int = 128
    segments: int = 0
    head_transform: bool = False
    classes: int = 0
    pooler: bool = True
    norm: NormConfig = field(default_factory=NormConfig)
    init: InitConfig = field(default_factory=InitConfig)

    @property
    def hd(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

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
