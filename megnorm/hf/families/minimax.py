"""MiniMax with full attention and one expert: Post-RMSNorm with a constant skip, after a norm on the embedding.

Its layers begin with the norm that ends ours, so the norms move by one sub-layer; this is DeepNorm in Llama form.
"""

from collections.abc import Mapping
from typing import Any

from megnorm.hf.families.base import Pattern, skips
from megnorm.hf.families.llama import PROJECTIONS, Llama
from megnorm.hf.fold import State
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved

KEPT = {ours: theirs for ours, theirs in PROJECTIONS.items() if ".ffn." not in ours and ours != "final_norm"}
MLP = "model.layers.{i}.mlp"


class MiniMax(Llama):
    architecture = "MiniMaxForCausalLM"
    pattern = Pattern("rmsnorm", frozenset({"post"}), frozenset({"post"}), embedding=True, final=False)
    biases = False

    def accepts(self, model: ModelConfig, resolved: Resolved) -> str | None:
        reason = self.pattern.refuse(resolved) or self.refuse_sizes(model) or self.refuse(model, resolved)
        if reason is None and any(len(skips(resolved, part)) > 1 for part in ("attention", "ffn")):
            reason = "residual.skip: the class has one factor for all layers"
        return reason

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        fields = super().config(model, resolved)
        del fields["attention_bias"]
        return fields | {
            "rms_norm_eps": resolved.embedding.eps if resolved.embedding else None,
            "layer_types": ["full_attention"] * model.layers,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "full_attn_alpha_factor": skips(resolved, "attention").pop(),
            "full_attn_beta_factor": 1,
            "mlp_alpha_factor": skips(resolved, "ffn").pop(),
            "mlp_beta_factor": 1,
        }

    def rename(self, state: Mapping[str, Any], model: ModelConfig) -> State:
        import torch

        made: State = {}
        own = {ours.format(i=i): theirs.format(i=i) for ours, theirs in KEPT.items() for i in range(model.layers)}
        for name, tensor in state.items():
            path, _, kind = name.rpartition(".")
            if path in own:
                made[f"{own[path]}.{kind}"] = tensor
        for i in range(model.layers):
            block, mlp = f"blocks.{i}", MLP.format(i=i)
            first = "embed.norm" if i == 0 else f"blocks.{i - 1}.ffn.post_norm"
            made[f"model.layers.{i}.input_layernorm.weight"] = state[f"{first}.weight"]
            made[f"model.layers.{i}.post_attention_layernorm.weight"] = state[f"{block}.attention.post_norm.weight"]
            fused = torch.cat([state[f"{block}.ffn.gate.weight"], state[f"{block}.ffn.up.weight"]])
            made[f"{mlp}.experts.gate_up_proj"] = fused[None]
            made[f"{mlp}.experts.down_proj"] = state[f"{block}.ffn.down.weight"][None].contiguous()
            made[f"{mlp}.gate.weight"] = fused.new_zeros(1, model.width)
        made["model.norm.weight"] = state[f"blocks.{model.layers - 1}.ffn.post_norm.weight"]
        return made

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        raise ValueError("config.json: megnorm writes MiniMax folders and does not read them; keep the checkpoint")
