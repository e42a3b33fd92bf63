"""Break a small training job in every way that a cluster does, and see that nothing is lost.

    python tools/chaos.py --kills 50 --save-cuts 200 --corruptions 100 --seed 1
    python tools/chaos.py --soak 10000

kills: SIGKILL at any moment, start-up and saves included; the restarted run must end with the weights of an undisturbed
one, bit for bit. save-cuts: a save ends at one of its calls into the file system, on half of them together with the power
of the machine; a whole checkpoint must remain. corruptions: a damaged checkpoint must be found and told before the first
step, and the one before it used. soak: a long run with all of that inside; memory, descriptors and disk must not grow.
A line for each kind, then "N passed, M failed"; exit code 1 on a failure.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tools.faults import corruptions, cuts, kills, soak
from tools.faults.job import Failed, Tally

KINDS: dict[str, Callable[[Path, int, int], Tally]] = {
    "kills": kills.run,
    "save-cuts": cuts.run,
    "corruptions": corruptions.run,
    "soak": soak.run,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="STEPS" if kind == "soak" else "N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="work there, and leave the files of what failed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    root = args.folder or Path(tempfile.mkdtemp(prefix="megnorm-chaos-"))
    tallies = []
    try:
        for kind, run in KINDS.items():
            count = getattr(args, kind.replace("-", "_"))
            if count > 0:
                tallies.append(_one(root / kind, kind, run, count, args.seed))
    finally:
        if args.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    failed = sum(tally.failed for tally in tallies)
    print(f"{sum(tally.passed for tally in tallies)} passed, {failed} failed")
    return 1 if failed or not tallies else 0


def _one(folder: Path, kind: str, run: Callable[[Path, int, int], Tally], count: int, seed: int) -> Tally:
    """Do one kind in an empty folder, and say how it went."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begun = time.monotonic()
    try:
        tally = run(folder, count, seed)
    except Failed as error:
        tally = Tally(kind)
        tally.fail(str(error))
    print(f"{tally.line()}; {time.monotonic() - begun:.0f} s", flush=True)
    for reason in tally.failures or []:
        print(f"  FAILED {reason}", flush=True)
    return tally


if __name__ == "__main__":
    sys.exit(main())
