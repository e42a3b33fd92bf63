"""Options of optimization."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

UNDECAYED = ("norm", "bias", "scale")  # roles without weight decay unless ``decay`` names them


@dataclass(frozen=True)
class MuonConfig:
    """Muon (optim.name=muon) for the matrices of attention and feed-forward; the rest of the model stays with AdamW.

    momentum: weight of the past in the moving average of gradients; nesterov: look one step ahead with it.
    ns_steps: Newton-Schulz iterations; 5 bring singular values of all but the smallest near 1, not to it.
    scale: of an update. rms: 0.2 sqrt(max(rows, columns)), about the size of AdamW's updates, so that lr and weight_decay
    found for AdamW serve (arXiv:2502.16982). shape: sqrt(max(1, rows / columns)), K. Jordan's own, which wants a rate of
    its own (his runs: about 0.02). rate: factor on lr and, since decay is decoupled, on weight decay of these matrices.
    precision: of the iteration and its messages. auto: bf16 on accelerators, on the CPU that of the masters (fp32; fp64
    for train.precision=fp64); bf16 or master: that one everywhere.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    scale: Literal["rms", "shape"] = "rms"
    rate: float = 1.0
    precision: Literal["auto", "bf16", "master"] = "auto"

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optim.muon.momentum is {self.momentum}; it must be in [0, 1)")
        if self.ns_steps < 1:
            raise ValueError(f"optim.muon.ns_steps is {self.ns_steps}; it must be at least 1")
        if not self.rate >= 0.0:
            raise ValueError(f"optim.muon.rate is {self.rate}; a factor is not negative")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and groups.

    name: adamw, or muon for matrices and AdamW for the rest (MuonConfig). betas, eps: AdamW's.
    lr: peak. Schedules begin with ``warmup_steps`` of linear warm-up from ``warmup_start_lr``. wsd: decay over the last
    ``decay_steps``; the others decay until ``decay_steps`` (None: the end of the run).
    weight_decay: of matrices; decay: factor on it by role (embed, position, q, k, v, o, up, gate, down, router, mix, head,
    norm, bias, scale), where a role is not named 0 for norm, bias and scale and 1 for the others. rate: factor on lr by role.
    clip: largest global gradient norm, 0 for none.
    loss_scale: initial scale of fp16; it doubles after loss_scale_window good steps and halves on overflow.
    """

    name: Literal["adamw", "muon"] = "adamw"
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
    muon: MuonConfig = field(default_factory=MuonConfig)

    def decay_of(self, role: str) -> float:
        """Weight decay of a role's matrices."""
        return self.weight_decay * self.decay.get(role, 0.0 if role in UNDECAYED else 1.0)
