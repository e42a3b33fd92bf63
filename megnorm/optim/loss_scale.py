"""Dynamic loss scaling for fp16."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """Multiplies the loss; halves on a step with Inf or NaN (which is skipped), doubles after ``window`` good ones."""

    scale: float
    window: int
    good: int = 0

    def update(self, finite: bool) -> None:
        if not finite:
            self.scale, self.good = max(self.scale / 2.0, 1.0), 0
            return
        self.good += 1
        if self.good == self.window:
            self.scale, self.good = self.scale * 2.0, 0
