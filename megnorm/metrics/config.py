"""Options of metrics: where they are shown, and what is probed."""

from dataclasses import dataclass
from typing import Literal

Probe = Literal[
    "grad_norm", "weight_norm", "update_norm", "update_ratio", "norm_gain", "stream_rms", "branch_rms", "norm_rms"
]


@dataclass(frozen=True)
class MetricsConfig:
    """``metrics.jsonl`` is always written; the rest shows the same numbers elsewhere.

    tensorboard: event files in the run folder. wandb: Weights & Biases, with its project and name (None: the folder's
    name). progress: a bar on a terminal, plain lines elsewhere.
    probe_every: steps between probes, 0 for none. probes: which (metrics/observe.py says what each measures).
    Probes cost nothing on the steps between; update_norm and update_ratio hold a second copy of the weights during
    the update of a probed step.
    """

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "megnorm"
    wandb_name: str | None = None
    progress: bool = True
    probe_every: int = 0
    probes: tuple[Probe, ...] = ("grad_norm", "weight_norm", "update_ratio", "stream_rms", "branch_rms")

    def __post_init__(self) -> None:
        if self.probe_every < 0:
            raise ValueError(f"metrics.probe_every: {self.probe_every} is negative; give 0 for no probes")
