"""What each normalization scheme costs against the base scheme: whole steps in alternating pairs, time and memory.

    python tools/bench/schemes.py [--pairs 40] [--base NAME] [SCHEME ...] [-- key=value ...]

For every scheme two workers, the base's and the scheme's, take steps in turn. The first line is the base against itself:
the spread that this machine shows where there is nothing to show.
"""

import argparse
import sys

from alternate import Ratio, Worker, alternate

from megnorm.norms import registry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--base", default="preln")
    parser.add_argument("words", nargs="*", metavar="SCHEME or key=value")
    args = parser.parse_args()
    overrides = [word for word in args.words if "=" in word]
    schemes = [word for word in args.words if "=" not in word] or registry.names()
    print(f"{'scheme':<28}{'time ratio':>11}{'middle half':>18}{'memory ratio':>14}{'parameters':>12}", flush=True)
    for scheme in [args.base, *schemes]:
        base = Worker.start(args.base, [*overrides, f"model.norm.scheme={args.base}"])
        other = Worker.start(scheme, [*overrides, f"model.norm.scheme={scheme}"])
        alternate([base, other], args.pairs)
        ratio = Ratio.of(other.seconds, base.seconds)
        span = f"{ratio.low:.3f} to {ratio.high:.3f}"
        label = f"{scheme} (control)" if scheme == args.base else scheme
        memory, extra = other.peak_mb / base.peak_mb, other.ready["parameters"] - base.ready["parameters"]
        print(f"{label:<28}{ratio.median:>11.3f}{span:>18}{memory:>14.3f}{extra:>+12}", flush=True)
        base.stop()
        other.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
