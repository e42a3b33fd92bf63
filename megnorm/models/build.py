"""The model of every family, behind one door."""

from collections.abc import Callable
from typing import Any

from megnorm.layers.env import Env
from megnorm.models.causal import CausalLM, Tokens, initialized
from megnorm.models.classifier import Classifier
from megnorm.models.config import ModelConfig
from megnorm.models.encdec import EncoderDecoder, Pairs
from megnorm.models.masked import MaskedLM

Model = CausalLM | MaskedLM | EncoderDecoder | Classifier
Input = Tokens | Pairs  # of a micro-batch
FAMILIES: dict[str, Callable[..., Model]] = {
    "causal": CausalLM,
    "masked": MaskedLM,
    "encdec": EncoderDecoder,
    "classifier": Classifier,
}


def build_model(cfg: ModelConfig, env: Env | None = None, **rest: Any) -> Model:
    """The model of a config, or a stage of it, with its initial weights; ``rest`` is what ``causal.initialized`` takes."""
    return initialized(FAMILIES[cfg.family], cfg, env, **rest)
