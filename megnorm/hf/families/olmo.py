"""OLMo 2: norms on the outputs of both sub-layers and on the whole width of q and k."""

from collections.abc import Mapping
from typing import Any, Literal

from megnorm.hf.families.base import Pattern
from megnorm.hf.families.llama import PROJECTIONS, QK, Llama
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved


class Olmo2(Llama):
    architecture = "Olmo2ForCausalLM"
    pattern = Pattern("rmsnorm", frozenset({"output", "q", "k"}), frozenset({"output"}))
    names = PROJECTIONS | QK | {
        "blocks.{i}.attention.output_norm": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.ffn.output_norm": "model.layers.{i}.post_feedforward_layernorm",
    }  # fmt: skip
    biases = False
    cast: Literal["before_gain", "after_gain"] = "after_gain"
    patch: Mapping[str, Any] = {
        "layer": {
            "attention": {"input": None, "output": {}, "q": {}, "k": {}},
            "ffn": {"input": None, "output": {}},
        }
    }

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        if model.hd * model.heads != model.width:
            return "head_dim: the class has width / heads"
        return super().refuse(model, resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        fields = super().config(model, resolved)
        del fields["head_dim"]
        return fields
