"""Goldens: tensors that reference implementations produced, and how megnorm's models are held against them."""
