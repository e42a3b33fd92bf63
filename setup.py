"""The package megnorm: what it needs, what it can use, and its one command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "megnorm" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

HF = ["transformers>=5.0"]
TENSORBOARD = ["tensorboard>=2.16"]
ZSTD = ["zstandard>=0.22"]
DATA = ["pyarrow>=15.0", "sentencepiece>=0.2", "tiktoken>=0.7"] + ZSTD  # files and tokenizers met in the wild
REMOTE = ["fsspec>=2024.2"]  # each kind of store has its own package beside it: s3fs, gcsfs, adlfs, ...
MPI = ["mpi4py>=4.0"]  # brings no MPI of its own: the system's, or `pip install mpich`
SCORES = ["sacrebleu>=2.4", "scikit-learn>=1.4", "scipy>=1.11"]  # of translations and classifiers
DEV = ["hypothesis>=6.100", "mypy>=1.13", "psutil>=5.9", "pytest>=8.0", "pytest-xdist>=3.5", "ruff>=0.8"] + SCORES

setup(
    name="megnorm",
    version=VERSION.group(1),
    description="Transformer pretraining in which the normalization scheme is a value",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megnorm", "megnorm.*"]),
    # the self-contained model files are copied as they stand into every exported folder
    package_data={"megnorm.hf": ["*.py"], "megnorm": ["py.typed"]},
    install_requires=[
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "tokenizers>=0.20",
        "torch>=2.7",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={
        "hf": HF,
        "tensorboard": TENSORBOARD,
        "wandb": ["wandb>=0.18"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "flash": ["flash-attn>=2.6"],
        "liger": ["liger-kernel>=0.8"],
        "triton": ["triton>=3.0"],  # torch for CUDA brings its own; this is for the interpreter on a CPU
        "mpi": MPI,
        "scores": SCORES,
        "eval": ["lm-eval>=0.4.5"] + SCORES,
        "data": DATA,
        "remote": REMOTE,
        "zstd": ZSTD,
        "dev": DEV,
        "all-cpu": HF + TENSORBOARD + DATA + REMOTE + SCORES + MPI,
    },
    entry_points={"console_scripts": ["megnorm = megnorm.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
