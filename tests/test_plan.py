"""The plan's numbers are the built model's."""

from dataclasses import replace

import pytest

from megnorm.models.causal import build_model
from megnorm.models.config import ModelConfig
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve
from megnorm.parallel.layout import named_matrices
from megnorm.plan import count_parameters

SIZES = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=24, vocab_size=31, max_positions=8)
MODELS = {
    "rmsnorm": SIZES,
    "layernorm": replace(SIZES, positions="learned", bias=True, head_bias=True, tied_head=True, activation="gelu"),
    "derf": SIZES,
    "seednorm": SIZES,
}


@pytest.mark.parametrize("scheme", registry.names())
def test_parameters_by_role(scheme: str) -> None:
    for kind, sizes in MODELS.items():
        cfg = replace(sizes, norm=NormConfig(scheme, kind=kind))  # type: ignore[arg-type]
        counted: dict[str, int] = {}
        for named in named_matrices(build_model(cfg)):
            size = named.view().numel()
            counted[named.matrix.role] = counted.get(named.matrix.role, 0) + size
        assert count_parameters(cfg, resolve(cfg.norm, cfg.layers)) == counted
