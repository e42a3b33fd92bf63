"""The verb ``norms`` with the column that the norms themselves cannot know: the Hugging Face class of each scheme."""

import argparse

from megnorm.hf.families.target import native_of
from megnorm.norms import commands

add_norms_arguments = commands.add_norms_arguments


def run_norms(args: argparse.Namespace) -> int:
    return commands.run_norms(args, native_of)
