"""The error that data problems raise."""


class DataError(ValueError):
    """Data or options are wrong; the sentence names the file, row or field and the remedy."""
