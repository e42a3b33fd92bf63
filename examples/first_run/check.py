"""Three questions to the first run, each asked on the held-out text.

    python examples/first_run/check.py entropy PREFIX            how well can one do without context?
    python examples/first_run/check.py loss    RUN PREFIX        is the trained model clearly better than that?
    python examples/first_run/check.py logits  RUN FOLDER PREFIX does the exported folder compute the same?

PREFIX: of the token files, RUN: the run folder, FOLDER: the export. The unigram entropy is the lowest loss that a model
can reach which knows how often each token occurs and nothing of their order; whatever lies below was learned from
context. ``loss`` and ``logits`` exit with 1 when the answer is no.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

MARGIN = 0.25  # how far below the unigram entropy the held-out loss has to lie
TOLERANCE = 1e-5  # largest difference of a logit, in fp32
ROWS, LENGTH = 4, 256  # of the text on which logits are compared


def unigram_entropy(prefix: Path) -> float:
    """Entropy in nats of the token frequencies of PREFIX.bin."""
    from megnorm.data.indexed import IndexedDataset

    counts = np.unique(IndexedDataset(prefix).tokens, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def entropy(args: argparse.Namespace) -> bool:
    print(f"{unigram_entropy(args.prefix):.4f}")
    return True


def loss(args: argparse.Namespace) -> bool:
    from megnorm.metrics.record import Record

    bound, losses = unigram_entropy(args.prefix), Record.read(args.run).series("valid_loss")[1]
    if not losses:
        raise ValueError(f"{args.run}: no held-out loss was recorded; train with data.valid set")
    margin = 1 - losses[-1] / bound
    print(f"unigram entropy of the held-out text  {bound:.3f} nats a token")
    print(f"held-out loss after training          {losses[-1]:.3f} nats a token")
    print(f"margin                                {margin:.1%} below (at least {MARGIN:.0%} wanted)")
    return margin >= MARGIN


def logits(args: argparse.Namespace) -> bool:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megnorm.data.indexed import IndexedDataset
    from megnorm.hf.native import native_forward, read_native

    disable_progress_bar()
    text = IndexedDataset(args.prefix).tokens[: ROWS * LENGTH].astype(np.int64)
    tokens = torch.from_numpy(text).view(ROWS, LENGTH)
    native = read_native(args.run)
    loaded = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = native_forward(native.state, native.model, native.resolved)(tokens)
        theirs = loaded(tokens).logits
    difference = (ours - theirs).abs().max().item()
    print(f"{args.folder}: {type(loaded).__name__}, {loaded.num_parameters():,} parameters")
    print(
        f"max |logit difference| on {tokens.numel()} held-out tokens  {difference:.2e} (at most {TOLERANCE:.0e} wanted)"
    )
    return difference <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for answer, names in ((entropy, ["prefix"]), (loss, ["run", "prefix"]), (logits, ["run", "folder", "prefix"])):
        sub = verbs.add_parser(answer.__name__)
        sub.set_defaults(answer=answer)
        for name in names:
            sub.add_argument(name, type=Path)
    args = parser.parse_args()
    return 0 if args.answer(args) else 1


if __name__ == "__main__":
    sys.exit(main())
