"""megnorm: transformer pretraining in which the normalization scheme is a value."""

__version__ = "0.1.0"
