"""The verb ``finetune``: one config with several seeds, and the median of what they reach."""

import argparse
import statistics
from pathlib import Path

from megnorm import config as configs
from megnorm.metrics.record import Record
from megnorm.parallel import launch
from megnorm.train.main import run_train


def add_finetune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a config once for each seed, in folders seed-N of train.out, and print what each reaches on the validation "
        "split, and the median. Usually with checkpoint.init_from, the run of a masked language model."
    )
    parser.add_argument("--config", type=Path, help="YAML file")
    parser.add_argument("--seeds", default="1,2,3", metavar="N,N,...", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run_finetune(args: argparse.Namespace) -> int:
    """The exit code of the first run that is not 0, else 0. Raises ValueError."""
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {args.seeds}: give whole numbers with commas between, as in 1,2,3") from None
    if launch.world().size > 1:
        raise ValueError(
            "finetune starts its runs itself, one behind the other; on several ranks use train with train.seed"
        )
    out = Path(configs.load(args.config, args.overrides).train.out)
    folders = {seed: out / f"seed-{seed}" for seed in seeds}
    for seed, folder in folders.items():
        own = [f"train.seed={seed}", f"train.out={folder}"]
        given = argparse.Namespace(
            config=args.config, overrides=[*args.overrides, *own], fresh=False, help_config=False
        )
        code = run_train(given)
        if code != 0:
            return code
    print(table({seed: reached(folder) for seed, folder in folders.items()}))
    return 0


def reached(run: Path) -> dict[str, float]:
    """The last of everything that was measured on the validation split."""
    record = Record.read(run)
    return {key.removeprefix("valid_"): record.series(key)[1][-1] for key in record.keys("valid_")}


def table(found: dict[int, dict[str, float]]) -> str:
    """A line for each metric: its median, then the seeds' values."""
    lines = [f"{'':<12}{'median':>10}" + "".join(f"{f'seed {seed}':>12}" for seed in found)]
    for name in next(iter(found.values())):
        values = [one[name] for one in found.values()]
        lines.append(f"{name:<12}{statistics.median(values):>10.4f}" + "".join(f"{value:>12.4f}" for value in values))
    return "\n".join(lines)
