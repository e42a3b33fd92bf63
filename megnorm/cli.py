"""The command ``megnorm``: one verb each, every verb's arguments and work lie beside the code it calls."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import megnorm

# verb: (what it does, the module that holds add_<verb>_arguments(parser) and run_<verb>(args) -> exit code)
VERBS = {
    "train": ("train a model", "megnorm.train.main"),
    "finetune": ("train with several seeds, and tell the median", "megnorm.train.finetune"),
    "plan": ("look before launch: sizes, parameters, refusals", "megnorm.train.commands"),
    "preprocess": ("JSONL to .bin/.idx", "megnorm.data.commands"),
    "data": ("inspect, verify, merge, split token files", "megnorm.data.commands"),
    "tokenizer": ("train a tokenizer", "megnorm.data.commands"),
    "convert": ("to and from Hugging Face", "megnorm.hf.commands"),
    "checkpoint": ("inspect, verify, compare checkpoints", "megnorm.checkpoint.commands"),
    "generate": ("continue a text", "megnorm.infer.commands"),
    "eval": ("perplexity of texts, tasks of lm-eval", "megnorm.infer.commands"),
    "translate": ("lines of text through an encoder-decoder, with BLEU", "megnorm.infer.commands"),
    "plot": ("draw a run's figures", "megnorm.metrics.commands"),
    "compare": ("several runs as a table and a figure", "megnorm.metrics.commands"),
    "norms": ("the normalization schemes: table, numbers, drawings", "megnorm.hf.schemes"),
    "doctor": ("what is installed and which kernel serves what", "megnorm.train.commands"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code. A mistake of the user's (ValueError) is one sentence on stderr and code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("megnorm", description=megnorm.__doc__)
    parser.add_argument("--version", action="version", version=megnorm.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    chosen = next((word for word in words if not word.startswith("-")), None)
    for verb, (summary, module) in VERBS.items():
        sub = verbs.add_parser(verb, help=summary)
        if verb == chosen:
            getattr(importlib.import_module(module), f"add_{verb}_arguments")(sub)
    args = parser.parse_args(words)
    try:
        return int(getattr(importlib.import_module(VERBS[args.verb][1]), f"run_{args.verb}")(args))
    except ValueError as error:
        print(f"megnorm {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
