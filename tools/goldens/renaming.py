"""From one parameter of a reference to one or more logical matrices."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Renamed:
    """A canonical name and which part of the reference's tensor it is.

    rows: (part, parts) of dimension 0, or None for all. drop: a dimension of size 1 to leave out. vector: a scalar
    becomes [1]. plus: what the reference adds to the stored value (1 for gains stored minus one).
    """

    name: str
    rows: tuple[int, int] | None = None
    drop: int | None = None
    vector: bool = False
    plus: float = 0.0

    def select(self, value: Tensor) -> Tensor:
        """The part of a weight as stored, or of its gradient."""
        if self.rows is not None:
            value = value.chunk(self.rows[1])[self.rows[0]]
        if self.drop is not None:
            value = value.squeeze(self.drop)
        return value.reshape(1) if self.vector else value

    def weight(self, value: Tensor) -> Tensor:
        """The weight that megnorm stores."""
        return self.select(value) + self.plus
