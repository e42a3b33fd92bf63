"""Hold megnorm's models against goldens: ``python tools/check_goldens.py DIR [--tp N] [--pp N] [--verbose]``.

Every golden under DIR (neutral and frontier pairs NAME.json + NAME.safetensors, Hugging Face folders) is built by the
training code's builder from a config derived from its json alone (a folder's by the import of ``megnorm convert``), run
forward and backward, and compared: one line a golden, then ``N passed, M failed, K not covered``. The exit status is 1 if
any failed, 2 for wrong arguments.

Errors and limits: neutral sets and folders in float64, logits and loss 1e-10 relative to max(1, largest magnitude) (1e-7
where the reference computed in float32: GPT-J's rotary angles, balance losses of experts), each gradient 1e-6 of max(its
norm, 1e-3 of the global norm); frontier sets in float32, logits and loss 2e-4 absolute, each gradient 1e-3 by the same
rule. Errors are largest over elements (logits) and over parameters (gradients).
"""

import argparse
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # megnorm from this clone, installed or not

import torch
import torch.distributed as dist
from goldens import case as cases
from goldens import frontier, hf, mixed, neutral
from goldens.case import Case, NotCovered
from goldens.run import Errors, mesh_of, run

from megnorm.norms import registry

FINISHED = 64  # what a rank that ran to the end adds to its exit status, to tell it from one that died


@dataclass(frozen=True)
class Line:
    """The verdict on one golden."""

    name: str
    status: str  # pass | fail | not covered
    scheme: str = "-"
    errors: Errors | None = None
    reason: str = ""

    def __str__(self) -> str:
        numbers = ""
        if self.errors is not None:
            e = self.errors
            kind = "" if e.relative else " absolute"
            numbers = f"  logits {e.logits:.1e}{kind}  loss {e.loss:.1e}{kind}  gradients {e.worst[1]:.1e}"
        return f"{self.name}: {self.scheme}{numbers}  {self.status}{f' ({self.reason})' if self.reason else ''}"


def load(path: Path) -> Case:
    """The golden at ``path``. Raises NotCovered for a kind that is not built, ValueError if it cannot be read."""
    if path.is_dir():
        return hf.case(path)
    data, tensors = cases.read(path)
    reader = neutral if any(name.startswith(("weight/", "input/")) for name in tensors) else frontier
    return reader.case(data, tensors)


def scheme_name(case: Case) -> str:
    """The scheme with those options that are not its defaults, whether it is patched, and norms of unusual kind."""
    norm = case.model.norm
    usual = {name: parameter.default for name, parameter in registry.options(norm.scheme).items()}
    options = ", ".join(f"{key}={value}" for key, value in norm.options.items() if value != usual[key])
    kind = "" if norm.kind in ("layernorm", "rmsnorm") else f" of {norm.kind}"
    return norm.scheme + (f"({options})" if options else "") + (" patched" if norm.patch else "") + kind


def check(path: Path, name: str, *, tp: int = 1, pp: int = 1, say: Callable[[str], None] = lambda text: None) -> Line:
    """Read, run and judge one golden. say: takes the text of --verbose. With tp or pp above 1 every rank must call it."""
    scheme, mesh = "-", None
    try:
        case = load(path)
        scheme = scheme_name(case)
        mesh = mesh_of(case, tp, pp) if tp * pp > 1 else None
        say(cases.to_yaml(case.model))
        errors = mixed.run(case, mesh) if isinstance(case, mixed.StreamCase) else run(case, mesh)
    except NotCovered as reason:
        return Line(name, "not covered", scheme, reason=str(reason))
    except Exception as error:
        if mesh is not None and not isinstance(error, ValueError):
            raise  # the ranks may be out of step; ValueErrors are the same on all of them
        return Line(name, "fail", scheme, reason=str(error) if isinstance(error, ValueError) else repr(error))
    say(f"# worst gradient: {errors.worst[0]} {errors.worst[1]:.1e}; zero here and absent there: {sorted(case.zero)}")
    limit = case.tolerance
    over = [
        f"{what} {error:.1e} > {most:.0e}"
        for what, error, most in (
            ("logits", errors.logits, limit.logits),
            ("loss", errors.loss, limit.loss),
            (f"gradient of {errors.worst[0]}", errors.worst[1], limit.gradient),
        )
        if not error <= most
    ]
    return Line(name, "fail" if over else "pass", scheme, errors, "; ".join(over))


def check_all(folder: Path, *, tp: int = 1, pp: int = 1, verbose: bool = False, out: bool = True) -> int:
    """Check every golden under ``folder``; print if ``out``. Returns the exit status."""
    say: Callable[[str], None] = print if verbose and out else lambda text: None
    counts = {"pass": 0, "fail": 0, "not covered": 0}
    for path in cases.find(folder):
        name = path.name if path == folder else path.relative_to(folder).as_posix().removesuffix(".json")
        line = check(path, name, tp=tp, pp=pp, say=say)
        counts[line.status] += 1
        if out:
            print(line, flush=True)
    if out:
        if not any(counts.values()):
            print(f"no goldens under {folder}; give the folder that holds NAME.json and NAME.safetensors")
        print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['not covered']} not covered", flush=True)
    return 1 if counts["fail"] else 0 if any(counts.values()) else 2


def _rank(rank: int, tp: int, pp: int, port: int, folder: Path, verbose: bool) -> None:
    """One rank of many: all check the same goldens, rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=tp * pp)
    status = check_all(folder, tp=tp, pp=pp, verbose=verbose, out=rank == 0)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(FINISHED + status)


def _start_ranks(tp: int, pp: int, folder: Path, verbose: bool) -> int:
    """Check on ``tp * pp`` processes of our own. Returns rank 0's exit status, or 1 if a rank died."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, tp, pp, port, folder, verbose)) for rank in range(tp * pp)
    ]
    for process in ranks:
        process.start()
    finished = [FINISHED + status for status in range(3)]
    while any(process.exitcode is None for process in ranks):
        time.sleep(0.05)
        if any(process.exitcode not in (None, *finished) for process in ranks):
            break
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    dead = [f"rank {rank}" for rank, code in enumerate(codes) if code not in (None, *finished)]
    if dead:
        print(f"{', '.join(dead)} of {tp * pp} ended early (exit codes {codes}); the run is void", file=sys.stderr)
        return 1
    return int(codes[0] or FINISHED) - FINISHED


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks, started here")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages, started here")
    parser.add_argument("--verbose", action="store_true", help="print each golden's config as YAML")
    given = parser.parse_args(arguments)
    if not given.folder.is_dir():
        parser.error(f"there is no folder {given.folder}")
    if given.tp < 1 or given.pp < 1:
        parser.error("--tp and --pp count ranks; give 1 or more")
    if given.tp * given.pp > 1:
        return _start_ranks(given.tp, given.pp, given.folder, given.verbose)
    torch.set_num_threads(1)
    return check_all(given.folder, verbose=given.verbose)


if __name__ == "__main__":
    sys.exit(main())
