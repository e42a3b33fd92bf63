"""lm-eval's tasks on any model that ``infer.generate.load`` loads. Needs megnorm[eval]."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megnorm.hf.families.rope import longest_input
from megnorm.infer.evaluate import begin_of, text_loss, tokenizer_of
from megnorm.infer.generate import Generator, Sampling, generate
from megnorm.infer.score import Row, likelihoods

DEFAULT_NEW_TOKENS = 256


def run_tasks(
    generator: Generator,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 1234,
) -> dict[str, dict[str, float]]:
    """Metric values by task. include: folder of task files. shots: examples in front of each question; None: as the task says.

    Nothing is fetched: tasks and their data must lie on this machine. Raises ValueError for an unknown task.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("tasks need lm-eval: pip install megnorm[eval]") from None
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"--tasks: lm-eval knows no '{unknown[0]}'; name one of its own, or give the folder of yours by --include"
        )
    answer = lm_eval.simple_evaluate(
        model=model_of(generator, batch, seed),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    return {task: _values(values) for task, values in answer["results"].items()}


def _values(values: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` as acc; what is no number is left out."""
    named = {name.removesuffix(",none").replace(",", "_"): value for name, value in values.items()}
    named = {name.replace("_stderr_", "_") + "_stderr" if "_stderr_" in name else name: v for name, v in named.items()}
    numbers = {name: value for name, value in named.items() if isinstance(value, int | float) and name != "sample_len"}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def model_of(generator: Generator, batch: int, seed: int = 1234) -> Any:
    """The generator as lm-eval's LM."""
    from lm_eval.api.model import LM

    class Model(LM):
        """Requests hold texts; what is asked of them lies in ``args``."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            rows = [pair(generator, *request.args) for request in requests]
            longest = longest_input(generator.model.config)
            rows = [(given, asked if longest is None else asked[-longest:]) for given, asked in rows]
            found = likelihoods(generator.model, rows, longest=longest, batch=batch)
            return [(one.log, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [-text_loss(generator, request.args, batch=batch).nats for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [continuation(generator, *request.args, seed=seed) for request in requests]

    return Model()


def encode(generator: Generator, text: str) -> list[int]:
    ids: list[int] = tokenizer_of(generator)(text, add_special_tokens=False)["input_ids"]
    return ids


def pair(generator: Generator, context: str, continuation: str) -> Row:
    """The tokens of a context and of what follows it, cut where the context's own tokens end.

    Spaces at the end of a context belong to the continuation, with which they make a token.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [begin_of(generator)], encode(generator, continuation)
    given = encode(generator, context)
    return given, encode(generator, context + continuation)[len(given) :]


def continuation(generator: Generator, context: str, options: dict[str, Any], *, seed: int) -> str:
    """Text behind a context up to the first of ``until``, which is left out."""
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    new = int(options.get("max_gen_toks", options.get("max_tokens", DEFAULT_NEW_TOKENS)))
    ids, longest = encode(generator, context) or [begin_of(generator)], longest_input(generator.model.config)
    if longest is not None:
        new = min(new, longest - 1)
        ids = ids[-(longest - new) :]
    temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
    sampling = Sampling(new, temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)), seed)
    text: str = tokenizer_of(generator).decode(generate(generator, [ids], sampling)[0], skip_special_tokens=True)
    for end in filter(None, until):
        text = text.split(end)[0]
    return text
