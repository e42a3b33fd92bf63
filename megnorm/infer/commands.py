"""The verb ``generate``."""

import argparse
import os
import sys
from pathlib import Path


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continue a text with a trained model: a run, a checkpoint, or an exported folder."
    parser.add_argument("source", type=Path, help="run folder, checkpoint folder or Hugging Face folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", help="text to continue; may be repeated; '-' reads standard input")
    prompt.add_argument("--tokens", nargs="+", type=int, metavar="ID", help="token ids to continue; prints ids")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (default: the model's own)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="the most likely token each time: --temperature 0")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k most likely (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that make this probability")
    parser.add_argument("--count", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", help="e.g. cpu, cuda (default: cuda where there is one)")


def run_generate(args: argparse.Namespace) -> int:
    """Print each continuation after its prompt; the exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers.utils import logging
    except ImportError:
        raise ValueError("generate needs transformers: pip install megnorm[hf]") from None
    import torch

    from megnorm.infer.generate import Sampling, generate, load

    logging.disable_progress_bar()
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        count=args.count,
    )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = load(args.source, dtype=getattr(torch, args.dtype), device=device, tokenizer=args.tokenizer)
    if args.tokens:
        for row in generate(generator, [args.tokens], sampling):
            print(*args.tokens, *row)
        return 0
    if generator.tokenizer is None:
        raise ValueError(f"{args.source} has no tokenizer; give --tokenizer, or token ids by --tokens")
    texts = [sys.stdin.read() if text == "-" else text for text in args.prompt]
    prompts = [generator.tokenizer(text)["input_ids"] for text in texts]
    rows = generate(generator, prompts, sampling)
    for i, row in enumerate(rows):
        text = texts[i // sampling.count]
        print(text + generator.tokenizer.decode(row, skip_special_tokens=True))
        if i + 1 < len(rows):
            print("-" * 40)
    return 0
