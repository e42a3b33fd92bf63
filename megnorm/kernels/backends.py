"""Importing this module registers every backend's offers. An optional library is imported by its own file only."""

from megnorm.kernels import torch_ref

REFERENCE = torch_ref.__name__
