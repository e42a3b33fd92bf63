"""The verb ``convert``."""

import argparse
import os
import sys
from pathlib import Path


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Export a run as a folder that transformers loads, or read such a folder."
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["hf"], help="write a Hugging Face folder from a run or checkpoint")
    way.add_argument("--from", dest="source_format", choices=["hf"], help="write a run folder from such a folder")
    parser.add_argument("source", type=Path, help="run folder, checkpoint folder or Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (default: data.tokenizer)")
    parser.add_argument("--no-tokenizer", action="store_true", help="write none")
    parser.add_argument("--custom", action="store_true", help="ship the custom class even where a native one is exact")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest allowed logit difference in fp32; relative to logits above 1",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a weight file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--license", default="unknown", help="for the model card, e.g. apache-2.0")
    parser.add_argument("--language", action="append", default=[], help="for the model card, e.g. en; may be repeated")
    parser.add_argument("--dataset", action="append", default=[], help="for the model card; may be repeated")


def run_convert(args: argparse.Namespace) -> int:
    """0 done; 2 and nothing written when the model does not fit or the logits differ."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError("convert needs transformers: pip install megnorm[hf]") from None
    return _to_hf(args) if args.to else _from_hf(args)


def _to_hf(args: argparse.Namespace) -> int:
    import torch

    from megnorm.hf.card import Card
    from megnorm.hf.convert import to_hf
    from megnorm.hf.native import native_forward, read_native

    run = read_native(args.source)
    tokenizer = None if args.no_tokenizer else args.tokenizer or (run.tokenizer and Path(run.tokenizer))
    if tokenizer is None and not args.no_tokenizer:
        raise ValueError(f"{run.path}: the run names no tokenizer; give --tokenizer, or --no-tokenizer to go without")
    print(f"read {run.path}: {sum(t.numel() for t in run.state.values()):,} parameters, scheme {run.resolved.scheme}")
    export = to_hf(
        run.state,
        run.model,
        run.resolved,
        out=args.out,
        tokenizer=tokenizer or None,
        native=not args.custom,
        dtype=getattr(torch, args.dtype),
        reference=native_forward(run.state, run.model, run.resolved),
        exact=lambda: native_forward(run.state, run.model, run.resolved, dtype=torch.float64),
        tolerance=args.tolerance,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        card=Card(args.license, args.language, args.dataset),
        ids=run.ids,
    )
    for architecture, reason in export.refused.items():
        print(f"  not {architecture}: {reason}")
    print(f"wrote {export.folder} as {export.architecture}, weights in {args.dtype}")
    print(f"max |logit difference| between megnorm and transformers, {export.precision}: {export.difference:.3g}")
    return 0


def _from_hf(args: argparse.Namespace) -> int:
    from megnorm.hf.convert import from_hf
    from megnorm.hf.native import write_native

    read = from_hf(args.source)
    own = args.source if (args.source / "tokenizer.json").is_file() else None
    tokenizer = None if args.no_tokenizer else args.tokenizer or own
    beside = None if tokenizer is None else str(tokenizer)
    path = write_native(args.out, read.model, read.resolved, read.state, tokenizer=beside, ids=read.ids)
    if tokenizer is None and not args.no_tokenizer:
        print(f"{args.source} holds no tokenizer; set data.tokenizer in {args.out / 'config.yaml'}", file=sys.stderr)
    print(f"read {args.source} ({read.architecture}) and wrote {path}")
    return 0
