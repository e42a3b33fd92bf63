"""Which class of transformers a scheme can leave as, asked of the usual models around it."""

from dataclasses import replace

from megnorm.hf.families.registry import choose
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.registry import options
from megnorm.norms.resolve import Resolved, resolve

CUSTOM = "custom"
USUAL = (
    ("rmsnorm", ModelConfig(activation="swiglu", positions="rotary")),
    ("layernorm", ModelConfig(activation="gelu_tanh", positions="learned", bias=True, tied_head=True)),
    (
        "rmsnorm",
        ModelConfig(activation="swiglu", positions="rotary", norm=NormConfig(options={"embedding_norm": True})),
    ),
)
"""Norm kind and model: Llama's, GPT-2's, and Llama's with a norm on the embedding where the scheme has that option."""


def native_classes(norm: NormConfig, layers: int) -> str:
    """The native classes that hold the scheme of ``norm`` in one of the usual models, e.g. "Llama, GPT2", or "custom"."""
    found: list[str] = []
    for kind, model in USUAL:
        if not set(model.norm.options) <= set(options(norm.scheme)):
            continue
        asked = replace(norm, kind=kind, options={**norm.options, **model.norm.options})  # type: ignore[arg-type]
        family, _ = choose(replace(model, norm=asked), resolve(asked, layers))
        name = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") if family else None
        if name is not None and name not in found:
            found.append(name)
    return ", ".join(found) or CUSTOM


def native_of(norm: NormConfig, resolved: Resolved) -> str:
    """``native_classes`` for the table of ``megnorm norms``."""
    return native_classes(norm, len(resolved.layers))
