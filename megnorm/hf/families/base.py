"""A family: a norm pattern and a name table that turn a megnorm model into a class of transformers, and back.

A class is accepted when it computes the same in exact arithmetic. Where an RMSNorm rounds, before or after its gain,
differs between classes and matters in low precision only; it is not compared.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megnorm.hf.families.rope import FULL, layer_types
from megnorm.hf.fold import SITES, State, embedding_scale, parts, stacks
from megnorm.models.config import GATED, ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import Norm, Scale, SubLayer

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = {name: name for name in ("gelu", "relu", "silu")} | {
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu_squared": "relu2",
}
"""megnorm's name of an activation -> transformers'."""
BACK = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh", "swish": "silu"}
GATE_BACK = {ours: gated for gated, ours in GATED.items()}
UNREAD = "embed.position.unread"
"""Rows of a class's position table that no token but padding has; what is read in keeps them, to go out unchanged."""


Windows = Literal["none", "all", "each"]


@dataclass(frozen=True)
class Pattern:
    """The norms a class has: kind, sites by sub-layer, "head" or "width" for q and k, and the norms outside."""

    kind: str
    attention: frozenset[str] = frozenset()
    ffn: frozenset[str] = frozenset()
    over: Mapping[str, str] = field(default_factory=dict)
    embedding: bool = False
    final: bool = True

    def refuse(self, resolved: Resolved) -> str | None:
        """Why the norms of a folded model are not this pattern; None if they are."""
        for path, stack in stacks(resolved):
            for i, layer in enumerate(stack.layers):
                for part, sub in parts(path, layer).items():
                    reason = self._refuse_part(f"{path}blocks.{i}.{part}", sub, part)
                    if reason is not None:
                        return reason
            for name, norm, wanted in (
                ("embedding", stack.embedding, self.embedding),
                ("final", stack.final, self.final),
            ):
                if (norm is not None) != wanted:
                    return f"{path}{name}: {_only(wanted)} has a norm there"
        return self._refuse_kind(resolved)

    def _refuse_part(self, path: str, sub: SubLayer, part: str) -> str | None:
        sites = self.ffn if part == "ffn" else self.attention
        for site in SITES[part]:
            norm, name = getattr(sub, site), f"{path}.{site}"
            if (norm is not None) != (site in sites):
                return f"{name}: {_only(site in sites)} has a norm there"
            over = self.over.get(site, "width")
            if norm is not None and norm.over != over:
                return f"{name}: the class normalizes over {over}, the model over {norm.over}"
        residual = sub.residual
        if (
            residual.rule != "add"
            or residual.source != "stream"
            or residual.layer_input
            or residual.gate
            or sub.second
            or sub.mix
        ):
            return f"{path}.residual: the class adds the plain stream"
        if residual.branch != Scale() or residual.skip.learned is not None:
            return f"{path}.residual: the class has no learned factor there"
        return None

    def _refuse_kind(self, resolved: Resolved) -> str | None:
        for name, norm in norms(resolved):
            if norm.kind != self.kind:
                return f"{name}: the class has {self.kind}, the model {norm.kind}"
            if norm.gain == "per_head":
                return f"{name}: the class shares one gain among heads"
            if norm.bias and self.kind == "rmsnorm":
                return f"{name}: the class has no bias there"
        return None


def _only(theirs: bool) -> str:
    return "the class, not the model," if theirs else "the model, not the class,"


def norms(resolved: Resolved) -> list[tuple[str, Norm]]:
    """Every norm of a model with its place."""
    found: list[tuple[str, Norm | None]] = []
    for path, stack in stacks(resolved):
        found += [(f"{path}embedding", stack.embedding), (f"{path}final", stack.final)]
        for i, layer in enumerate(stack.layers):
            for part, sub in parts(path, layer).items():
                found += [(f"{path}blocks.{i}.{part}.{site}", getattr(sub, site)) for site in SITES[part]]
    return [(name, norm) for name, norm in found if norm is not None]


def one_eps(resolved: Resolved) -> str | None:
    """Why a class with one eps does not fit; None if all norms share theirs."""
    found = sorted({norm.eps for _, norm in norms(resolved) if norm.eps is not None})
    return None if len(found) == 1 else f"eps: the class has one, the model {found}"


def skips(resolved: Resolved, part: str) -> set[float]:
    """Factors on the skip of one kind of sub-layer, in all stacks."""
    found = [parts(path, layer) for path, stack in stacks(resolved) for layer in stack.layers]
    return {subs[part].residual.skip.value for subs in found if part in subs}


class Family:
    """One class of transformers. A subclass says what it accepts and how its config and tensors look.

    windows, two_thetas, softcaps: what it has of ``AttentionConfig``; the factor on scores can always be folded.
    partial_rotary, side_by_side: it may turn a part of each head, and run both branches beside each other; one_norm: these read
    one norm. biased_head: its head may have a bias.
    family, experts: of what models it is a class.
    names: canonical name -> theirs, ``{i}`` for the layer index, ``{e}`` for an expert's; both directions of the conversion
    read it.
    """

    architecture: str
    pattern: Pattern
    names: Mapping[str, str]
    windows: Windows = "none"  # layers may have one: none, all alike, each as it likes
    two_thetas = False
    softcaps = False
    partial_rotary = False
    side_by_side = False
    one_norm = False
    biased_head = False
    family = "causal"  # model.family
    experts = False

    @property
    def name(self) -> str:
        """transformers' model_type: the class's name in lower case, but for the oldest."""
        return self.architecture.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").lower()

    def serves(self, model: ModelConfig) -> bool:
        """Whether it is a class for such models at all: of their family, with experts or without."""
        return self.family == model.family and self.experts == (model.moe.experts > 0)

    def prepare(self, resolved: Resolved, state: State) -> tuple[Resolved, State]:
        """A further exact rewrite that this class needs; before ``accepts``."""
        return resolved, state

    def accepts(self, model: ModelConfig, resolved: Resolved) -> str | None:
        """Why this class cannot hold the (folded) model exactly; None if it can."""
        reason = self.pattern.refuse(resolved) or self.refuse_sizes(model)
        if reason is None and any(skips(resolved, part) - {1.0} for part in SITES):
            reason = "residual.skip: the class adds the stream with factor 1"
        return reason or self.refuse(model, resolved)

    def refuse_sizes(self, model: ModelConfig) -> str | None:
        """What no class here has."""
        if model.head_bias and not self.biased_head:
            return "head_bias: the class has no bias on the head"
        if model.rope_fraction != 1.0 and not self.partial_rotary:
            return "rope_fraction: the class turns whole heads"
        if model.parallel_block and not self.side_by_side:
            return "parallel_block: the class runs attention and feed-forward one after the other"
        if (model.parallel_norm == "one") != self.one_norm:
            return f"parallel_norm: the class has {'one' if self.one_norm else 'a norm for each branch'}"
        if model.padding_id is not None:
            return "padding_id: the class does not look for padding by itself"
        if embedding_scale(model) != 1.0:
            return "embedding_scale: the class has none, and a tied head keeps it out of the embedding"
        if model.logit_scale != 1.0:
            return "logit_scale: the class has none, and a tied head without a final norm keeps it out of the weights"
        if not self.softcaps and (model.attention.softcap, model.logit_softcap) != (None, None):
            return "softcap: the class has none"
        return self._refuse_window(model)

    def _refuse_window(self, model: ModelConfig) -> str | None:
        types = set(layer_types(model))
        if types != {FULL} and self.windows == "none":
            return "attention.window: the class has none"
        if len(types) > 1 and self.windows == "all":
            return "attention.window_layers: the class has a window in all layers or in none"
        if model.attention.window_rope_theta is not None and not self.two_thetas:
            return "attention.window_rope_theta: the class has one theta"
        return None

    def takes_scale(self, model: ModelConfig) -> bool:
        """Whether its config says the factor on scores; else it is folded into W_q."""
        return model.attention.scale is None

    def refuse(self, model: ModelConfig, resolved: Resolved) -> str | None:
        """Anything else of this class. Abstract."""
        raise NotImplementedError

    def config(self, model: ModelConfig, resolved: Resolved) -> dict[str, Any]:
        """Fields of config.json. Abstract."""
        raise NotImplementedError

    def transform(self, state: State, model: ModelConfig) -> State:
        """Canonical tensors as the class wants them, before renaming."""
        return state

    def restore(self, state: State, model: ModelConfig) -> State:
        """The inverse of ``transform``."""
        return state

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json. Abstract. Raises ValueError naming what megnorm cannot express."""
        raise NotImplementedError

    def told(self, config: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
        """``config`` with what the names of the weights tell beside it."""
        return config

    def rename(self, state: Mapping[str, "Tensor"], model: ModelConfig) -> State:
        return _renamed(state, dict(self._table(model)), self.name)

    def unrename(self, state: Mapping[str, "Tensor"], model: ModelConfig) -> State:
        return _renamed(state, {theirs: ours for ours, theirs in self._table(model)}, self.name)

    def _table(self, model: ModelConfig) -> list[tuple[str, str]]:
        return self.table_of(self.names, model)

    @staticmethod
    def table_of(names: Mapping[str, str], model: ModelConfig) -> list[tuple[str, str]]:
        """(our name, theirs) of every tensor that a model may have."""
        table = []
        for ours, theirs in names.items():
            layers = model.source_layers if ours.startswith("encoder.") else model.layers
            for i in range(layers) if "{i}" in ours else range(1):
                for e in range(model.moe.experts) if "{e}" in ours else range(1):
                    for kind in ("weight", "bias"):
                        table.append((f"{ours.format(i=i, e=e)}.{kind}", f"{theirs.format(i=i, e=e)}.{kind}"))
        return table


def _renamed(state: Mapping[str, "Tensor"], table: Mapping[str, str], family: str) -> State:
    unknown = sorted(set(state) - set(table))
    if unknown:
        raise ValueError(f"{family}: no name for the tensor '{unknown[0]}' ({len(unknown)} in all); this is a defect")
    return {table[name]: tensor for name, tensor in state.items()}


def wanted(config: Mapping[str, Any], **values: Any) -> None:
    """Refuse a config.json whose fields differ from what megnorm can express; a missing field is as wanted."""
    for name, value in values.items():
        if name in config and config[name] != value:
            raise ValueError(f"config.json: {name} is {config[name]!r}; megnorm reads this class only with {value!r}")


def label_fields(classes: int) -> dict[str, Any]:
    """Names of the classes in config.json."""
    names = {str(i): f"LABEL_{i}" for i in range(classes)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def classes_of(config: Mapping[str, Any]) -> int:
    """How many classes a config.json names; transformers leaves out its default, two."""
    return len(config.get("id2label") or range(2))


def activation(name: str, *, gated: bool) -> str:
    """megnorm's activation of a transformers' name. Raises ValueError for an unknown one."""
    plain = BACK.get(name)
    if plain is None or (gated and plain not in GATE_BACK):
        raise ValueError(f"config.json: the activation '{name}' is unknown to megnorm; it has {', '.join(BACK)}")
    return GATE_BACK[plain] if gated else plain
