"""Configs for parity tests: tiny models over every registered scheme, and a pairwise-covering choice of them."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megnorm.config import RunConfig
from megnorm.data.config import DataConfig
from megnorm.models.config import AttentionConfig, ModelConfig, MoEConfig, RopeScaling
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.parallel.config import ParallelConfig
from megnorm.train.config import TrainConfig

# Beyond the defaults of each scheme: options that change what is sharded or summed.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "normformer+post_projection+resscale": (
        "normformer",
        {"head_scale": "post_projection", "residual_scale": True},
    ),
}
# Where branches grow with the step, so fast that they count in the first one.
GROWN: dict[str, dict[str, Any]] = {"prores": {"steps": 3}, "branchnorm": {"steps": 2}}
# Models that differ in all that may interact with sharding.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"activation": "swiglu", "positions": "rotary"},
    "gpt2": {"activation": "gelu", "positions": "learned", "bias": True, "tied_head": True, "head_bias": True},
    "fairseq": {
        "activation": "relu_squared",
        "positions": "sinusoidal",
        "padding_id": 1,
        "embedding_scale": "sqrt_width",
    },
}
# What attention can be asked beside: layers that differ, biases that belong to heads, options on either end of the model.
FEATURED: dict[str, dict[str, Any]] = {
    "windows": {
        "attention": AttentionConfig(
            scale=0.4, softcap=2.0, window=3, window_layers=("window", "full"), window_rope_theta=100.0
        ),
        "rope_scaling": RopeScaling("dynamic", 4.0, original=5),
        "logit_scale": 0.7,
        "logit_softcap": 3.0,
        "tied_head": True,
        "qkv_bias": True,
    },
    "alibi": {"positions": "alibi", "bias": True, "o_bias": False, "attention": AttentionConfig(window=5)},
    "yarn": {
        "rope_scaling": RopeScaling("yarn", 2.0, original=8),
        "rope_fraction": 0.5,
        "o_bias": True,
        "head_bias": True,
        "logit_scale": 2.0,
    },
}
# Other families, likewise: what is tied over which stages differs, and so do positions.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {
        "family": "masked",
        "activation": "gelu",
        "positions": "learned",
        "bias": True,
        "tied_head": True,
        "head_bias": True,
        "segments": 2,
        "head_transform": True,
    },
    "roberta": {
        "family": "masked",
        "activation": "gelu",
        "positions": "learned",
        "bias": True,
        "padding_id": 1,
        "relative_buckets": 8,
        "relative_distance": 16,
    },
    "classifier": {
        "family": "classifier",
        "activation": "gelu",
        "positions": "learned",
        "bias": True,
        "segments": 2,
        "classes": 3,
        "relative_buckets": 8,
        "relative_distance": 16,
    },
    "nmt": {
        "family": "encdec",
        "activation": "relu",
        "positions": "sinusoidal",
        "embedding_scale": "sqrt_width",
        "bias": True,
        "shared_embedding": True,
        "tied_head": True,
        "label_smoothing": 0.1,
    },
    "t5": {
        "family": "encdec",
        "activation": "geglu_tanh",
        "positions": "none",
        "relative_buckets": 8,
        "relative_distance": 16,
        "shared_embedding": True,
    },
    "bart": {
        "family": "encdec",
        "encoder_layers": 3,
        "activation": "gelu",
        "positions": "learned",
        "bias": True,
        "tied_head": True,
        "head_bias": True,
    },
}
TASK = {"causal": "causal", "masked": "masked", "encdec": "spans", "classifier": "classes"}
# Mixtures of experts, which between them have all that may interact with sharding.
MIXTURES: dict[str, dict[str, Any]] = {
    "": {},
    "dropless": {"experts": 4, "top_k": 2, "ffn": 24, "balance_loss": 0.3, "z_loss": 0.1},
    "sigmoid": {
        "experts": 4, "top_k": 3, "ffn": 16, "shared_ffn": 8, "score": "sigmoid", "normalize": True, "scale": 1.5,
        "balance_loss": 0.3, "bias_rate": 0.05,
    },
    "capacity": {
        "experts": 8, "top_k": 2, "ffn": 16, "capacity": 0.75, "balance_loss": 0.2, "balance_over": "micro_batch",
        "z_loss": 0.1, "first": 1,
    },
}  # fmt: skip


def schemes() -> list[str]:
    """Every registered scheme, and those of OPTIONS."""
    return [*registry.names(), *OPTIONS]


def config(
    scheme: str,
    *,
    kv: int = 2,
    kind: str = "rmsnorm",
    model: str = "llama",
    precision: str = "fp64",
    recompute: str = "",
    moe: str = "",
    **parallel: Any,
) -> RunConfig:
    """A model of two layers or more (one for every stage), width 32, 4 heads and a vocabulary of 97, which no layout divides.

    recompute: modes, with + between them. moe: of MIXTURES.
    """
    name, options = OPTIONS.get(scheme, (scheme, GROWN.get(scheme, {})))
    layers = 3 if name in ("mixln", "keel", "hybridnorm_mix_ln") else 2
    chosen = (MODELS | FEATURED | FAMILIES)[model]
    family = chosen.get("family", "causal")
    stages = parallel.get("pp", 1) * parallel.get("virtual_stages", 1)
    layers = max(layers, -(-stages // 2) if family == "encdec" else stages)
    sizes = ModelConfig(layers=layers, width=32, heads=4, kv_heads=kv, ffn=48, vocab_size=97, max_positions=16)
    norm = NormConfig(name, options, kind=kind)  # type: ignore[arg-type]
    modes = tuple(recompute.split("+")) if recompute else ()
    return RunConfig(
        model=replace(sizes, norm=norm, moe=MoEConfig(**MIXTURES[moe]), **chosen),
        data=DataConfig(task=TASK[family]),  # type: ignore[arg-type]
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(
            sequence_length=8,
            micro_batch=2,
            global_batch=8,
            precision=precision,
            recompute=modes,  # type: ignore[arg-type]
        ),
    )


def pairwise(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases such that every two values of different factors meet in one of them (greedy, deterministic)."""
    names = list(factors)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }  # fmt: skip
    cases: list[dict[str, Any]] = []
    while missing:
        case: dict[str, Any] = {}
        for name in sorted(names, key=lambda n: -len(factors[n])):
            case[name] = max(
                factors[name], key=lambda value: (_gain(missing, {**case, name: value}), -_used(cases, name, value))
            )
        if not _covered(missing, case):  # greedy found nothing new: take one missing pair as it is
            (a, x), (b, y) = sorted(missing, key=str)[0]
            case |= {a: x, b: y}
        missing -= _covered(missing, case)
        cases.append(case)
    return cases


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def _covered(missing: set[Pair], case: dict[str, Any]) -> set[Pair]:
    return {pair for pair in missing if all(name in case and case[name] == value for name, value in pair)}


def _gain(missing: set[Pair], case: dict[str, Any]) -> int:
    return len(_covered(missing, case))


def _used(cases: list[dict[str, Any]], name: str, value: Any) -> int:
    return sum(case[name] == value for case in cases)
