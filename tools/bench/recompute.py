"""What each recompute mode saves and costs: whole steps in alternating pairs with none, time and peak memory.

    python tools/bench/recompute.py [--pairs 20] [--scheme NAME] [MODES ...] [-- key=value ...]

MODES are joined with +, e.g. norms+activations. The first line is none against itself: the spread that this machine shows
where there is nothing to show. Peak memory is that of the whole process, weights and optimizer included;
gained: MB less than none.
"""

import argparse
import sys

from alternate import Ratio, Worker, alternate

MODES = ("norms", "activations", "norms+activations", "attention", "attention+norms+activations+projections", "block")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--scheme", default="normformer")
    parser.add_argument("words", nargs="*", metavar="MODES or key=value")
    args = parser.parse_args()
    overrides = [f"model.norm.scheme={args.scheme}", *(word for word in args.words if "=" in word)]
    modes = [word for word in args.words if "=" not in word] or MODES
    print(
        f"{args.scheme}\n{'recompute':<42}{'time ratio':>11}{'middle half':>18}{'peak MB':>9}{'gained':>8}", flush=True
    )
    for mode in ("", *modes):
        none = Worker.start("none", overrides)
        again = Worker.start(mode or "none", [*overrides, f"train.recompute=[{mode.replace('+', ',')}]"])
        alternate([none, again], args.pairs)
        ratio = Ratio.of(again.seconds, none.seconds)
        span = f"{ratio.low:.3f} to {ratio.high:.3f}"
        gained = none.peak_mb - again.peak_mb
        label = mode or "none (control)"
        print(f"{label:<42}{ratio.median:>11.3f}{span:>18}{again.peak_mb:>9.0f}{gained:>8.0f}", flush=True)
        none.stop()
        again.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
