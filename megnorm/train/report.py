"""What a run that goes on says about where it goes on from."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megnorm.checkpoint.commands import flatten
from megnorm.checkpoint.io import Resumed
from megnorm.config import to_dict
from megnorm.parallel.config import ParallelConfig
from megnorm.plan import Plan

MAY_DIFFER = ("train.out", "train.stop_after", "parallel.")  # the last is told as the layout


def lines(plan: Plan, found: Resumed) -> Iterator[str]:
    """Step, samples by source, layout then and now, changed settings, what was verified."""
    record = found.meta
    yield f"resumed at step {record['step']}, {record['consumed_samples']} samples consumed{_sources(record['data'])}"
    then, now = _layout(record["config"], record.get("ranks")), _layout(to_dict(plan.config), plan.world)
    yield f"  layout: {now}, as it was" if then == now else f"  layout: {then} when saved, {now} now"
    changed = list(_changed(flatten(record["config"]), flatten(to_dict(plan.config))))
    if changed:
        yield f"  settings: {'; '.join(changed)}"
    what = f"{found.tensors} tensors, {found.bytes / 1e6:.1f} MB on this rank"
    if found.verified:
        yield f"  verified: manifest, meta and the checksums of {what}"
    else:
        yield f"  NOT verified: {what}, because checkpoint.verify is false"


def _sources(state: Mapping[str, Any]) -> str:
    """Samples by source, where the order of the data counts them."""
    counted = [source for source in state.get("sources", ()) if isinstance(source, Mapping) and "consumed" in source]
    if not counted:
        return ""
    return ": " + ", ".join(f"{source['consumed']} of {source['path']}" for source in counted)


def _layout(config: Mapping[str, Any], ranks: int | None) -> str:
    """Ranks, and the options of the layout that are not what they are by default."""
    usual = asdict(ParallelConfig())
    chosen = [
        f"{key} {value}"
        for key, value in config["parallel"].items()
        if key not in ("dp", "timeout", "vocab_multiple", "bucket_mb") and value != usual.get(key)
    ]
    return ", ".join([f"{'?' if ranks is None else ranks} rank(s)", *chosen])


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(then.keys() | now.keys()):
        if not key.startswith(MAY_DIFFER) and then.get(key) != now.get(key):
            yield f"{key} {then.get(key)!r} -> {now.get(key)!r}"
