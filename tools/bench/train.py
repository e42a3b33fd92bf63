"""Whole training steps of several set-ups in turn, on this machine.

    python tools/bench/train.py [--rounds 20] "name: key=value ..." "other: key=value ..."

Every set-up is a worker (tools/bench/worker.py: model S unless --config is among its words). The first is the base.
"""

import argparse
import statistics
import sys

from alternate import Ratio, Worker, alternate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("setups", nargs="+", metavar="'name: key=value ...'")
    args = parser.parse_args()
    workers = []
    for setup in args.setups:
        name, _, words = setup.partition(":")
        workers.append(Worker.start(name.strip(), words.split()))
    alternate(workers, args.rounds)
    print(f"{'name':<24}{'s/step':>9}{'tokens/s':>10}{'GFLOP/s':>9}{'time ratio':>12}{'middle half':>16}{'peak MB':>9}")
    for worker in workers:
        seconds, ratio = statistics.median(worker.seconds), Ratio.of(worker.seconds, workers[0].seconds)
        tokens = worker.ready["tokens_per_step"]
        rate = tokens * worker.ready["flops_per_token"] / seconds / 1e9
        span = f"{ratio.low:.3f} to {ratio.high:.3f}"
        speed = f"{seconds:>9.3f}{tokens / seconds:>10.0f}{rate:>9.0f}"
        print(f"{worker.name:<24}{speed}{ratio.median:>12.3f}{span:>16}{worker.peak_mb:>9.0f}")
        worker.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
