"""Machines that are not there: a process as if it had a Hopper device and all libraries."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from megnorm.kernels import libraries
from megnorm.kernels.registry import OPS, Need
from megnorm.layers.env import Env
from tests.kernels import fakes, faking


@contextmanager
def installed() -> Iterator[None]:
    """All libraries, as fakes; needs that name a CUDA device are served on the CPU."""
    _forget()
    faking.CALLS.clear()
    made = fakes.modules()
    before = {path: sys.modules.get(path) for path in made}
    sys.modules.update(made)
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
    ):
        try:
            yield
        finally:
            _forget()
            for path, module in before.items():
                sys.modules.pop(path, None)
                if module is not None:
                    sys.modules[path] = module


def _forget() -> None:
    libraries.probe.cache_clear()
    libraries.no_device.cache_clear()


@contextmanager
def asked_of_cuda(ops: Collection[str] = tuple(OPS), dtype: torch.dtype | None = None) -> Iterator[None]:
    """Layers ask for these operations as if they stood on a CUDA device, and in ``dtype`` if there is one."""
    need = Env._need

    def asked(self: Env, op: str, detail: dict[str, Any]) -> Need:
        plain = need(self, op, detail)
        return replace(plain, device="cuda", dtype=dtype or plain.dtype) if op in ops else plain

    with mock.patch.object(Env, "_need", asked):
        yield
