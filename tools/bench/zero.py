"""ZeRO-1 against plain data parallelism: both in the same processes, step by step in turn.

    python tools/bench/zero.py [--pairs 20] [key=value ...]        model S unless the words say other

Two workers of the same configuration differ by 10% and more by where their memory happens to lie; here all that lies
elsewhere are weights, gradients and moments. The control is a second plain run beside the two. Ratios are over the first
plain run. The gather of updated weights, which hides behind the next forward pass in training, counts whole.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from alternate import in_turn, table
from worker import MODEL_S, RandomTokens

from megnorm import config as configs
from megnorm.parallel.pages import keep_pages
from megnorm.plan import make_plan
from megnorm.train.build import build
from megnorm.train.step import train_step

RUNS = {"plain": "parallel.zero=0", "control": "parallel.zero=0", "zero": "parallel.zero=1"}
WORDS = ("parallel.dp=2", "train.threads=1", "train.micro_batch=4")


def serve(rank: int, world: int, store: str, words: list[str], pairs: int) -> None:
    """Build the three runs on this rank and step them in turn, the order reversed every other round; rank 0 prints."""
    keep_pages()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

    def stepping(zero: str) -> Callable[[], None]:
        config = configs.load(None, [*MODEL_S, *WORDS, *words, zero])
        run = build(make_plan(config, world), torch.device("cpu"), RandomTokens(config))

        def step() -> None:
            dist.barrier()
            train_step(run)
            run.flat.wait_weights()

        return step

    seconds = in_turn({name: stepping(zero) for name, zero in RUNS.items()}, pairs)
    if rank == 0:
        print(table(seconds))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    world = configs.load(None, [*MODEL_S, *WORDS, *args.words]).parallel.dp or 2
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (world, os.path.join(folder, "store"), args.words, args.pairs), nprocs=world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
