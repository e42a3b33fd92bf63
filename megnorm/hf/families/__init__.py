"""Classes of transformers that hold some megnorm models exactly. ``registry.FAMILIES`` lists them in order of trial."""
