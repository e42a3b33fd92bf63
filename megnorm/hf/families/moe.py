"""Mixtures of experts before which an RMSNorm stands: Mixtral, OLMoE, and those of Qwen 2 and 3."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megnorm.hf.families.base import Pattern, Windows, wanted
from megnorm.hf.families.llama import PRE, PROJECTIONS, QK, Llama, Qwen3
from megnorm.hf.fold import State
from megnorm.models.config import ModelConfig, MoEConfig
from megnorm.norms.resolve import Resolved

KEPT = {ours: theirs for ours, theirs in (PROJECTIONS | PRE).items() if ".ffn." not in ours or "norm" in ours}
EXPERTS = {
    "blocks.{i}.ffn.router": "model.layers.{i}.mlp.gate",
    "blocks.{i}.ffn.experts.{e}.up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "blocks.{i}.ffn.experts.{e}.gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "blocks.{i}.ffn.experts.{e}.down": "model.layers.{i}.mlp.experts.{e}.down_proj",
}


class Olmoe(Llama):
    """Also the base of the others. count, width: config.json's names of the experts' number and width."""

    architecture = "OlmoeForCausalLM"
    pattern = Pattern("rmsnorm", frozenset({"input", "q", "k"}), frozenset({"input"}))
    names: Mapping[str, str] = KEPT | QK | EXPERTS
    patch: Mapping[str, Any] = {"layer": {"attention": {"q": {}, "k": {}}}}
    biases = False
    experts = True
    normalizes: bool | None = None  # None: as its config says
    dense_layers = False
    shares = False
    count, width = "num_experts", "intermediate_size"

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        moe = model.moe
        if moe.score != "softmax" or moe.bias_rate:
            return "moe.score, moe.bias_rate: the class chooses by a softmax alone"
        if self.normalizes is not None and moe.normalize != self.normalizes:
            return "moe.normalize: in the class the weights of the chosen experts sum to 1"
        if self.shares != (moe.shared_ffn > 0):
            return (
                f"moe.shared_ffn: {'the class, not the model,' if self.shares else 'the model, not the class,'} has one"
            )
        if not self.dense_layers and model.sparse_layers < model.layers:
            return "moe.first, moe.every: the class has experts in every layer"
        if self.architecture == Olmoe.architecture and model.hd * model.heads != model.width:
            return "head_dim: the class has width / heads"
        return super().refuse(model, resolved)

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        moe, fields = model.moe, super().config(model, resolved)
        del fields["attention_bias"]
        fields |= {self.width: model.expert_ffn, self.count: moe.experts, "num_experts_per_tok": moe.top_k}
        if self.normalizes is None:
            fields["norm_topk_prob"] = moe.normalize
        if moe.balance_loss and (moe.balance_over, moe.balance_across) == ("micro_batch", "layers"):
            # the class adds shares over the k choices, and so has a loss k times as large
            fields |= {"output_router_logits": True, "router_aux_loss_coef": moe.balance_loss / moe.top_k}
        if self.dense_layers:
            dense = [i for i in range(model.layers) if not model.sparse(i)]
            fields |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        return fields

    def transform(self, state: State, model: ModelConfig) -> State:
        """The weights of experts times ``moe.scale``, in W_down."""
        ends = tuple(f".experts.{e}.down.weight" for e in range(model.moe.experts))
        return {name: tensor * model.moe.scale if name.endswith(ends) else tensor for name, tensor in state.items()}

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        wanted(config, clip_qkv=None)
        model = super().read_config(config)
        moe = MoEConfig(
            config[self.count],
            config["num_experts_per_tok"],
            ffn=None if config[self.width] == model.ffn else config[self.width],
            normalize=bool(config.get("norm_topk_prob", False)) if self.normalizes is None else self.normalizes,
        )
        if config.get("output_router_logits") and config.get("router_aux_loss_coef"):
            coefficient = config["router_aux_loss_coef"] * moe.top_k
            moe = replace(moe, balance_loss=coefficient, balance_over="micro_batch", balance_across="layers")
        return replace(model, moe=_placed(moe, model, config))


def _placed(moe: MoEConfig, model: ModelConfig, config: Mapping[str, Any]) -> MoEConfig:
    """``moe`` in those layers that a config.json names."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    wished = [i not in dense and (i + 1) % step == 0 for i in range(model.layers)]
    for every in range(1, model.layers + 1):
        for first in range(model.layers):
            placed = replace(moe, first=first, every=every)
            if [replace(model, moe=placed).sparse(i) for i in range(model.layers)] == wished:
                return placed
    raise ValueError(
        f"config.json: mlp_only_layers is {dense}; megnorm has experts in every n-th layer from some layer on"
    )


class Mixtral(Olmoe):
    architecture = "MixtralForCausalLM"
    pattern = Llama.pattern
    names: Mapping[str, str] = KEPT | {
        "blocks.{i}.ffn.router": "model.layers.{i}.block_sparse_moe.gate",
        "blocks.{i}.ffn.experts.{e}.up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
        "blocks.{i}.ffn.experts.{e}.gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "blocks.{i}.ffn.experts.{e}.down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
    }
    patch: Mapping[str, Any] = {}
    windows: Windows = "all"
    normalizes = True
    count = "num_local_experts"


class Qwen3Moe(Olmoe):
    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    pattern = Qwen3.pattern
    names: Mapping[str, str] = PROJECTIONS | PRE | QK | EXPERTS
    patch = Qwen3.patch
    dense_layers = True
    width = "moe_intermediate_size"


class Qwen2Moe(Olmoe):
    """Its shared expert is weighed by a gate, which is written as one that says 1/2 to all."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    pattern = Llama.pattern
    names: Mapping[str, str] = PROJECTIONS | PRE | EXPERTS | {
        "blocks.{i}.ffn.shared.up": "model.layers.{i}.mlp.shared_expert.up_proj",
        "blocks.{i}.ffn.shared.gate": "model.layers.{i}.mlp.shared_expert.gate_proj",
        "blocks.{i}.ffn.shared.down": "model.layers.{i}.mlp.shared_expert.down_proj",
        "blocks.{i}.ffn.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
    }  # fmt: skip
    dense_layers = True
    shares = True
    width = "moe_intermediate_size"

    def refuse_biases(self, model: ModelConfig) -> str | None:
        return "bias: the class has them on q, k, v alone" if model.biased_o or model.bias else None

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        own = {"shared_expert_intermediate_size": model.moe.shared_ffn, "qkv_bias": model.biased_qkv}
        return super().config(model, resolved) | own

    def transform(self, state: State, model: ModelConfig) -> State:
        made = super().transform(state, model)
        for name in [name for name in made if name.endswith(".shared.down.weight")]:
            made[name] = 2.0 * made[name]
            made[name.replace("shared.down", "shared_gate")] = made[name].new_zeros(1, model.width)
        return made

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        raise ValueError("config.json: megnorm has no gate on a shared expert, and does not read Qwen2-MoE folders")
