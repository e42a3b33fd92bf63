"""What the choice of kernels costs a training step on the CPU: as chosen, against torch's own functions in the layers' hands.

    python tools/bench/registry.py [--pairs 20] [key=value ...]        model S unless the words say other

Three runs of the same weights in one process, step by step in turn: "chosen" and its control get what the registry chooses;
"bare" gets offers that this file registers, a bare call of torch's function each, with no case but model S's in it.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from alternate import in_turn, table
from torch import Tensor
from worker import MODEL_S, RandomTokens

from megnorm import config as configs
from megnorm.kernels.registry import offer
from megnorm.parallel.pages import keep_pages
from megnorm.plan import make_plan
from megnorm.train.build import build
from megnorm.train.step import train_step


def _norm(x: Tensor, p: Mapping[str, Tensor], args: Any) -> Tensor:
    return F.layer_norm(x, (512,), p["weight"], p["bias"], 1e-5)


def _add_norm(x: Tensor, f: Tensor, p: Mapping[str, Tensor], args: Any, skip: float, branch: float, keep: bool) -> Any:
    s = x + f
    return (F.layer_norm(s, (512,), p["weight"], p["bias"], 1e-5), s) if keep else _norm(s, p, args)


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    heads = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True).permute(2, 0, 1, 3)


def _adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


BARE: dict[str, Callable[..., Any]] = {
    "norm": _norm,
    "add_norm": _add_norm,
    "attention": _attention,
    "linear": F.linear,
    "activation": F.gelu,
    "adamw": _adamw,
}


class Steps:
    """A run that is built; a call trains one step of it. losses: of the steps so far."""

    def __init__(self, words: list[str], prefer: Iterable[str] = ()) -> None:
        config = configs.load(None, [*MODEL_S, *words, *prefer])
        self.run = build(make_plan(config, 1), torch.device("cpu"), RandomTokens(config))
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.losses.append(train_step(self.run).loss)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    keep_pages()
    torch.set_num_threads(2)
    for op, function in BARE.items():
        offer(op, "bare", -1, lambda need: None)(lambda need, function=function: function)
    prefer = [f"kernels.prefer.{op}=bare" for op in BARE]
    calls = {"chosen": Steps(args.words), "control": Steps(args.words), "bare": Steps(args.words, prefer)}
    print(table(in_turn(calls, args.pairs)))
    same = calls["chosen"].losses == calls["bare"].losses
    print(f"losses of all {len(calls['bare'].losses)} steps: {'the same bits' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
