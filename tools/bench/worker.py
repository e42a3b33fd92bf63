"""One training worker that steps when told to, so that several can be timed in turn.

    python tools/bench/worker.py [--config run.yaml] [key=value ...]        the model S below, unless the config says other

Protocol, on stdin and stdout, one JSON object a line: it prints {"event": "ready", ...}, answers each line ``step N`` with
{"event": "steps", "sec": [...], "loss": [...]}, and ends on ``quit``. Every step is megnorm's own train_step: forward,
backward, clipping, AdamW. With parallel.tp (or dp) above 1 it starts the other ranks itself; rank 0 speaks.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megnorm import config as configs
from megnorm.config import RunConfig
from megnorm.data.batch import Batch
from megnorm.metrics.throughput import flops_per_token
from megnorm.parallel.pages import keep_pages
from megnorm.parallel.rng import derive
from megnorm.plan import make_plan, predicted
from megnorm.train.build import Run, build
from megnorm.train.step import train_step

# 8 layers of width 512 over a vocabulary of 50304: small enough for a CPU, with the shape of GPT-2.
MODEL_S = (
    "model.layers=8", "model.width=512", "model.heads=8", "model.ffn=2048", "model.vocab_size=50304",
    "model.max_positions=512", "model.activation=gelu", "model.positions=learned", "model.tied_head=true",
    "model.bias=true", "model.norm.kind=layernorm", "train.sequence_length=512", "train.global_batch=8",
    "train.micro_batch=8", "train.steps=1000000", "optim.schedule=constant", "train.eval_batches=0",
    "train.precision=bf16",
)  # fmt: skip


class RandomTokens:
    """Uniform tokens, a function of the sample id; the loss stays at log(vocabulary)."""

    def __init__(self, config: RunConfig) -> None:
        self.length, self.vocab = config.train.sequence_length, config.model.vocab_size

    def batch(self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        rows = count // dp_size
        generator = torch.Generator().manual_seed(derive(0, first_sample + dp_rank * rows))
        tokens = torch.randint(0, self.vocab, (self.length + 1, rows), generator=generator)
        return Batch(tokens[:-1], tokens[1:], torch.ones(self.length, rows))

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return {}


def answer(run: Run, count: int) -> dict[str, Any]:
    """Time ``count`` steps."""
    results = [train_step(run) for _ in range(count)]
    return {"event": "steps", "sec": [r.seconds for r in results], "loss": [r.loss for r in results]}


def serve(rank: int, world: int, store: str, config: RunConfig, stdin: int) -> None:
    """Rank 0 reads commands and tells the others how many steps to take."""
    keep_pages()
    torch.set_num_threads(config.train.threads or max(1, len(os.sched_getaffinity(0)) // world))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    plan = make_plan(config, world)
    run = build(plan, torch.device("cpu"), RandomTokens(config))
    lines = os.fdopen(os.dup(stdin), encoding="utf-8") if rank == 0 else None
    if rank == 0:
        ready = {
            "event": "ready",
            "tokens_per_step": plan.tokens_per_step,
            "flops_per_token": flops_per_token(config.model, config.train.sequence_length, predicted(config)),
            "dtype": config.train.precision,
            "parameters": plan.parameters,
        }
        print(json.dumps(ready), flush=True)
    while True:
        count = _next(lines)
        if world > 1:
            told = torch.tensor(count)
            dist.broadcast(told, 0)
            count = int(told)
        if count == 0:
            break
        result = answer(run, count)
        if rank == 0:
            result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps(result), flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _next(lines: Any) -> int:
    """Steps that the next command asks for; 0 to leave (and on the other ranks, which are told)."""
    if lines is None:
        return 0
    words = lines.readline().split()
    return int(words[1]) if words and words[0] == "step" else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    base = () if args.config else MODEL_S
    config = configs.load(args.config, [*base, *args.overrides])
    sizes = config.parallel
    world = sizes.tp * sizes.pp * (sizes.dp or 1)
    if world == 1:
        serve(0, 1, "", config, sys.stdin.fileno())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        context = mp.get_context("spawn")
        others = [
            context.Process(target=serve, args=(rank, world, store, config, 0), daemon=True) for rank in range(1, world)
        ]
        for process in others:
            process.start()
        serve(0, world, store, config, sys.stdin.fileno())
        for process in others:
            process.join(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
