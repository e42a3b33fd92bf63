"""One file per normalization scheme. Importing the package registers nothing; ``norms.registry`` loads the files."""
