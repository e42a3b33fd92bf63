"""Ranks of a preprocessing job: one, or those that mpirun or srun started."""

import os
import time
from dataclasses import dataclass
from typing import Any

from megnorm.data.errors import DataError

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass
class Ranks:
    """This process among its like."""

    rank: int = 0
    size: int = 1
    comm: Any = None

    @staticmethod
    def find() -> "Ranks":
        """MPI where a launcher says so, else a single process."""
        if max((int(os.environ.get(name, "1")) for name in SIZES), default=1) == 1:
            return Ranks()
        try:
            from mpi4py import MPI
        except ImportError:
            raise DataError("started by mpirun, but mpi4py is missing: pip install megnorm[mpi].") from None
        return Ranks(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD)

    def barrier(self) -> None:
        if self.comm is not None:
            self.comm.Barrier()

    def abort(self) -> None:
        """End all ranks: the others would wait for ever."""
        if self.comm is not None:
            time.sleep(0.5)  # launchers drop what they have not yet forwarded: let the sentence out first
            self.comm.Abort(1)
