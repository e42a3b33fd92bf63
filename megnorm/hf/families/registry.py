"""The families in order of trial, and the question which of them holds a model."""

from megnorm.hf.families.alibi import Bloom, Mpt
from megnorm.hf.families.bart import Bart, MBart
from megnorm.hf.families.base import Family
from megnorm.hf.families.bert import BertClasses, BertMasked, RobertaClasses, RobertaMasked
from megnorm.hf.families.gemma2 import Gemma2, Gemma3
from megnorm.hf.families.gpt2 import GPT2, GPTBigCode
from megnorm.hf.families.gptj import GPTJ
from megnorm.hf.families.llama import Llama, Ministral, Mistral, Qwen2, Qwen3
from megnorm.hf.families.minimax import MiniMax
from megnorm.hf.families.moe import Mixtral, Olmoe, Qwen2Moe, Qwen3Moe
from megnorm.hf.families.neox import GPTNeoX
from megnorm.hf.families.olmo import Olmo2
from megnorm.hf.families.opt import OPTPostLN, OPTPreLN
from megnorm.hf.families.t5 import T5
from megnorm.hf.fold import fold
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved

FAMILIES: tuple[Family, ...] = (
    *(Llama(), Mistral(), Ministral(), Qwen2(), Qwen3(), Olmo2(), Gemma2(), Gemma3()),
    *(GPT2(), GPTBigCode(), OPTPostLN(), OPTPreLN(), Bloom(), Mpt(), GPTNeoX(), GPTJ(), MiniMax()),
    *(Mixtral(), Olmoe(), Qwen3Moe(), Qwen2Moe(), BertMasked(), BertClasses(), RobertaMasked(), RobertaClasses()),
    *(T5(), MBart(), Bart()),
)


def choose(model: ModelConfig, resolved: Resolved) -> tuple[Family | None, dict[str, str]]:
    """The first family that holds the model exactly (None: the custom class), and why each one before it does not.

    Looks at the declaration only: no tensor, no torch.
    """
    plain_model, plain, _ = fold(model, resolved)
    reasons: dict[str, str] = {}
    for family in FAMILIES:
        if not family.serves(model):
            continue
        prepared, _ = family.prepare(plain, {})
        reason = family.accepts(plain_model, prepared)
        if reason is None:
            return family, reasons
        reasons[family.architecture] = reasons.get(family.architecture, reason)
    return None, reasons


def by_model_type(model_type: str, architecture: str = "", *, before: bool = False) -> Family:
    """The family that reads a config.json of this ``model_type`` and class; before: its Pre-LN form. Raises ValueError."""
    found = [family for family in FAMILIES if family.name == model_type]
    if not found:
        known = sorted({family.name for family in FAMILIES} | {"megnorm"})
        raise ValueError(f"config.json: model_type '{model_type}' cannot be read; megnorm reads {', '.join(known)}")
    named = [family for family in found if family.architecture == architecture]
    if not named and found[0].family != "causal":
        known = sorted(family.architecture for family in found)
        raise ValueError(f"config.json: class '{architecture}' cannot be read; megnorm reads {', '.join(known)}")
    found = named or found
    return found[-1] if before else found[0]
