"""Megatron's preprocessing command, by its flag names: the same files come out of megnorm's own code."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megnorm.data.commands import run_job
from megnorm.data.errors import DataError
from megnorm.data.preprocess import Job


def arguments() -> argparse.ArgumentParser:
    """Megatron's flags; the last group is ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, nargs="+", help="JSONL files or quoted globs")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys to extract; one output for each")
    parser.add_argument("--split-sentences", action="store_true")
    parser.add_argument(
        "--keep-newlines", action="store_true", help="newlines are always kept; accepted for old scripts"
    )
    parser.add_argument(
        "--tokenizer-type", default="HuggingFaceTokenizer", help="told by the files; accepted for old scripts"
    )
    parser.add_argument("--tokenizer-model", help="tokenizer.json, its folder, a SentencePiece .model file")
    parser.add_argument("--vocab-file", help="vocab.json (with --merge-file) or vocab.txt")
    parser.add_argument("--merge-file", help="merges.txt beside the vocabulary")
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument(
        "--partitions", type=int, default=1, help="input is always cut in units; accepted for old scripts"
    )
    parser.add_argument(
        "--log-interval", type=int, default=1000, help="a progress bar is shown instead; accepted for old scripts"
    )
    parser.add_argument("--eod-token", help="name of the end-of-document token (default: the tokenizer's own)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad line")
    parser.add_argument("--unit-bytes", type=int, help="input is cut in units of this size")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def tokenizer_path(args: argparse.Namespace) -> str:
    """Which of the three flags names the tokenizer."""
    if args.tokenizer_model:
        return str(args.tokenizer_model)
    if args.vocab_file is None:
        if args.tokenizer_type == "ByteLevelTokenizer":
            return "bytes"
        raise DataError("no tokenizer: give --tokenizer-model, or --vocab-file (and --merge-file).")
    vocab = Path(args.vocab_file)
    if args.merge_file and (Path(args.merge_file).name, vocab.name) != ("merges.txt", "vocab.json"):
        raise DataError(f"{vocab} and {args.merge_file}: name them vocab.json and merges.txt, in one folder.")
    if args.merge_file and Path(args.merge_file).resolve().parent != vocab.resolve().parent:
        raise DataError(f"{vocab} and {args.merge_file}: put them in one folder.")
    return str(vocab)


def main(argv: list[str] | None = None) -> int:
    """Preprocess as the flags say; 1 and a sentence where they are wrong."""
    args = arguments().parse_args(argv)
    try:
        return run_job(
            Job(
                inputs=tuple(args.input),
                output=args.output_prefix,
                tokenizer=tokenizer_path(args),
                keys=tuple(args.json_keys),
                append_eod=args.append_eod,
                eod_token=args.eod_token,
                sentences=args.split_sentences,
                strict=args.strict,
                workers=args.workers,
                names="megatron",
                unit_bytes=args.unit_bytes,
                progress=not args.quiet,
            )
        )
    except DataError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
