"""What processes do that build one cached index; apart from its test, so that they start without torch."""

import os
import time

import numpy as np

from megnorm.data.cache import cached


def one_of_many(folder: str, log: str) -> None:
    def build() -> dict[str, np.ndarray]:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return {"a": np.arange(5)}

    assert cached(folder, "x", build)["a"].tolist() == [0, 1, 2, 3, 4]


def dies_while_building(folder: str) -> None:
    cached(folder, "x", lambda: os._exit(9))
