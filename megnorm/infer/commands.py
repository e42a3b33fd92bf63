"""The verbs ``generate``, ``eval`` and ``translate``."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megnorm.infer.beam import Beam
    from megnorm.infer.translate import Translator


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
    generator = load(args.source, dtype=getattr(torch, args.dtype), device=_device(args), tokenizer=args.tokenizer)
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


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Judge a trained model (run, checkpoint or exported folder) by texts, tasks of lm-eval, translations."
    )
    parser.add_argument("source", type=Path, help="run folder, checkpoint folder or Hugging Face folder")
    parser.add_argument("--text", nargs="+", default=[], help="JSONL files: perplexity by token, byte and word")
    parser.add_argument("--key", default="text", help="of the text in a line (default: %(default)s)")
    parser.add_argument("--tasks", default="", help="tasks of lm-eval, with commas between (needs megnorm[eval])")
    parser.add_argument("--include", type=Path, help="folder of task files beside lm-eval's own")
    parser.add_argument("--shots", type=int, help="examples in front of each question (default: as the task says)")
    parser.add_argument(
        "--task", choices=["translation"], help="BLEU and chrF of --pairs by an encoder-decoder (needs megnorm[scores])"
    )
    parser.add_argument("--pairs", type=Path, nargs="+", default=[], help="TSV files: text, translation")
    parser.add_argument("--limit", type=int, help="only the first of each file or task")
    parser.add_argument("--batch", type=int, help="rows computed at a time (default: 8)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (default: the model's own)")
    parser.add_argument("--device", help="e.g. cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, help="file that the results are appended to (default: eval.jsonl of a run)")
    parser.add_argument(
        "--follow", type=float, metavar="SECONDS",
        help="judge every checkpoint of a run while it trains, looking for new ones this often; ends with the run's last step",
    )  # fmt: skip
    _add_beam_arguments(parser)


def _add_beam_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("translation")
    group.add_argument("--to", metavar="LANGUAGE", help="to translate to, where the model knows several")
    group.add_argument(
        "--target", metavar="LANGUAGE", help="of the references, e.g. zh: how sacrebleu cuts words (default: --to)"
    )
    group.add_argument("--beam", type=int, default=4, help="hypotheses; 1 is greedy (default: %(default)s)")
    group.add_argument("--length-penalty", type=float, default=1.0, help="power of the length (default: %(default)s)")
    group.add_argument("--longest", type=int, help="tokens of an output (default: what the model takes)")
    group.add_argument(
        "--end", metavar="TOKEN", help="that ends a text (default: the tokenizer's own end of a document)"
    )


def run_eval(args: argparse.Namespace) -> int:
    """Print the results, and append them to a file; the exit code."""
    if args.task and not args.pairs:
        raise ValueError("eval --task translation: nothing to judge by; give --pairs")
    theirs = {"--text": args.text, "--tasks": args.tasks, "--include": args.include}
    theirs |= {"--shots": args.shots, "--batch": args.batch}
    own = {
        "--pairs": args.pairs,
        "--to": args.to,
        "--target": args.target,
        "--longest": args.longest,
        "--end": args.end,
    }
    for option, given in (theirs if args.task else own).items():
        if given:
            place = "not for" if args.task else "for"
            raise ValueError(f"eval: {option} is {place} --task translation; leave it out, or run eval twice")
    if args.task and args.dtype != "float32":
        raise ValueError("eval: --task translation computes in float32; leave --dtype out")
    if not args.text and not args.tasks and not args.task:
        raise ValueError("eval: nothing to judge by; give --text, --tasks or --task translation")
    judge = (_judge_of_translations if args.task else _judge_of_texts)(args)
    if args.follow is None:
        judge(args.source)
        return 0
    return _follow(args, judge)


Judge = Callable[[Path], None]
"""Judges the model of a path, and reports; what it judges by has been read."""


def _judge_of_texts(args: argparse.Namespace) -> Judge:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers.utils import logging
    except ImportError:
        raise ValueError("eval needs transformers: pip install megnorm[hf]") from None
    import torch

    from megnorm.infer.evaluate import read_texts, text_loss
    from megnorm.infer.generate import load
    from megnorm.infer.harness import run_tasks

    logging.disable_progress_bar()
    batch = args.batch or 8
    texts = {name: read_texts([name], args.key, args.limit) for name in args.text}
    tasks = _tasks(args)

    def judge(source: Path) -> None:
        generator = load(source, dtype=getattr(torch, args.dtype), device=_device(args), tokenizer=args.tokenizer)
        results = {name: text_loss(generator, found, batch=batch).values() for name, found in texts.items()}
        if tasks:
            options = {"include": args.include, "shots": args.shots, "limit": args.limit, "batch": batch}
            results |= run_tasks(generator, tasks, **options)
        _report(args, source, results, {})

    return judge


def _judge_of_translations(args: argparse.Namespace) -> Judge:
    from megnorm.infer.translate import load, quality, read_pairs, scorer, translate

    scorer()
    pairs = {str(path): read_pairs(path, args.limit) for path in args.pairs}

    def judge(source: Path) -> None:
        one = load(source, device=_device(args), tokenizer=args.tokenizer and str(args.tokenizer), end=args.end)
        results, signatures = {}, {}
        for name, (texts, references) in pairs.items():
            said = translate(one, texts, _beam(args, one), to=args.to)
            found = quality(said, references, target=args.target or one.target(args.to) or "")
            results[name], signatures[name] = found.values(), found.signatures
        _report(args, source, results, signatures)

    return judge


def _device(args: argparse.Namespace) -> str:
    """Where to compute; a CPU's memory is kept from one token to the next."""
    import torch

    from megnorm.parallel.pages import keep_pages

    device = str(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device == "cpu":
        keep_pages()
    return device


def _beam(args: argparse.Namespace, one: "Translator") -> "Beam":
    from megnorm.infer.beam import Beam

    return Beam(one.start, one.end, args.beam, args.length_penalty, args.longest or one.model.cfg.max_positions)


def _report(
    args: argparse.Namespace,
    source: Path,
    results: Mapping[str, Mapping[str, float]],
    signatures: Mapping[str, Mapping[str, str]],
) -> None:
    """Print results, and append them to the file that is meant."""
    from megnorm.infer.evaluate import RESULTS, Report, table

    print(f"{source}\n{table(results)}")
    for name, found in signatures.items():
        print(*(f"{name:<24} {metric:<20} {signature}" for metric, signature in found.items()), sep="\n")
    sys.stdout.flush()
    step = _step(source)
    out = args.out or (args.source / RESULTS if step is not None and args.source == source else None)
    if out is None and args.follow is not None:
        out = args.source / RESULTS
    if out is not None:
        Report(str(source), step, results, signatures, _asked(args)).append(out)


def _asked(args: argparse.Namespace) -> list[str]:
    """What is judged by: names of files and tasks."""
    return [*args.text, *_tasks(args), *map(str, args.pairs)]


def _tasks(args: argparse.Namespace) -> list[str]:
    return [task for task in args.tasks.split(",") if task]


def _step(source: Path) -> int | None:
    """Of the checkpoint that a path means; None: it is an exported folder."""
    from megnorm.checkpoint import io
    from megnorm.hf.native import checkpoint_of

    return None if (source / "config.json").is_file() else int(io.read_meta(checkpoint_of(source))["step"])


def _follow(args: argparse.Namespace, judge: Judge) -> int:
    """Judge the checkpoints of a run that have not been yet, oldest first, until that of its last step is."""
    from megnorm.checkpoint import folder, io
    from megnorm.infer.evaluate import RESULTS, done_steps

    out = args.out or args.source / RESULTS
    while True:
        done = done_steps(out, _asked(args))
        for path in folder.steps(args.source / "checkpoints"):
            if not folder.is_complete(path):  # being deleted by the run: it keeps the newest ones
                continue
            meta: dict[str, Any] = io.read_meta(path)
            if meta["step"] not in done:
                judge(path)
            if meta["step"] >= meta["config"]["train"]["steps"]:
                return 0
        time.sleep(args.follow)


def add_translate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Translate lines of text with a trained encoder-decoder, by beam search."
    parser.add_argument("source", type=Path, help="run folder or checkpoint folder")
    parser.add_argument(
        "--input", type=Path, help="file, a line a text; of a TSV the first column (default: standard input)"
    )
    parser.add_argument(
        "--references", action="store_true", help="score against the second column of --input, with sacrebleu"
    )
    parser.add_argument("--tokenizer", help="default: the run's own")
    parser.add_argument("--device", help="e.g. cpu, cuda (default: cuda where there is one)")
    _add_beam_arguments(parser)


def run_translate(args: argparse.Namespace) -> int:
    """Print a line for each line, then the scores on standard error; the exit code."""
    from megnorm.infer.translate import load, quality, scorer, translate

    if args.references:
        scorer()
    one = load(args.source, device=_device(args), tokenizer=args.tokenizer, end=args.end)
    text = sys.stdin.read() if args.input is None else args.input.read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")] if text else []
    if args.references and min(map(len, rows), default=0) < 2:
        raise ValueError("--references needs two columns in --input, text and translation, with a tab between")
    said = translate(one, [row[0] for row in rows], _beam(args, one), to=args.to)
    print("\n".join(said))
    if args.references:
        target = args.target or one.target(args.to) or ""
        print(*quality(said, [row[1] for row in rows], target=target).lines, sep="\n", file=sys.stderr)
    return 0
