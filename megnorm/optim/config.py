"""Options of optimization."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

UNDECAYED = ("norm", "bias", "scale")  # roles without weight decay unless ``decay`` names them


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and its groups.

    lr: peak. Schedules begin with ``warmup_steps`` of linear warm-up from ``warmup_start_lr``. wsd: decay over the last
    ``decay_steps``; the others decay until ``decay_steps`` (None: the end of the run).
    weight_decay: of matrices; decay: factor on it by role (embed, position, q, k, v, o, up, gate, down, head, norm, bias,
    scale), where a role is not named 0 for norm, bias and scale and 1 for the others. rate: factor on lr by role.
    clip: largest global gradient norm, 0 for none.
    loss_scale: initial scale of fp16; it doubles after loss_scale_window good steps and halves on overflow.
    """

    lr: float = 3e-4
    min_lr: float = 0.0
    schedule: Literal["constant", "cosine", "wsd", "inverse_sqrt", "polynomial"] = "cosine"
    warmup_steps: int = 0
    warmup_start_lr: float = 0.0
    decay_steps: int | None = None
    decay_shape: Literal["linear", "1-sqrt", "cosine"] = "linear"
    power: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Mapping[str, float] = field(default_factory=dict)
    rate: Mapping[str, float] = field(default_factory=dict)
    clip: float = 1.0
    loss_scale: float = 65536.0
    loss_scale_window: int = 1000

    def decay_of(self, role: str) -> float:
        """Weight decay of a role's matrices."""
        return self.weight_decay * self.decay.get(role, 0.0 if role in UNDECAYED else 1.0)
