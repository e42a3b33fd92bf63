"""RunConfig: the options of a run, composed from each package's own; YAML files and ``a.b=value`` overrides."""

import dataclasses
import difflib
import functools
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megnorm.checkpoint.config import CheckpointConfig
from megnorm.data.config import DataConfig
from megnorm.kernels.config import KernelConfig
from megnorm.metrics.config import MetricsConfig
from megnorm.models.config import ModelConfig
from megnorm.optim.config import OptimConfig
from megnorm.parallel.config import ParallelConfig
from megnorm.train.config import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)


MAX_BYTES, MAX_VALUES = 4 << 20, 100_000  # of a YAML file
MAX_BASES = 4  # files that one may begin from, and how deep they may be nested


class ConfigError(ValueError):
    """A config that cannot be read; the message names file, key and remedy."""


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file (None: all defaults) with ``a.b.c=value`` overrides, values parsed as YAML.

    A file may begin from others: its key ``base`` names one or several that lie beside it; where keys meet the later wins.
    Raises ConfigError for a file that is missing or broken, an unknown key (naming the nearest), a value of another type.
    """
    source = str(path) if path is not None else "command line"
    data: dict[str, Any] = {} if path is None else _whole(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is no override; write key=value, e.g. model.layers=24")
        _set(data, key, _parse(text, override), override)
    return from_dict(data, source)


def from_dict(data: Mapping[str, Any], source: str) -> RunConfig:
    """Check and convert a nested mapping; ``source`` names it in messages."""
    data = _checked(data, RunConfig, "", source)
    try:
        return _adapter().validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of a section's own check, which names the field
            raise ConfigError(f"{source}: {first['ctx']['error']}") from None
        where = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
        given = first.get("input")
        raise ConfigError(f"{source}: {where}: {first['msg']}; it is {reprlib.repr(given)}") from None


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The effective config as plain values; ``from_dict`` gives the same config back."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def save(config: RunConfig, path: Path) -> None:
    """Write the effective config as YAML; ``load`` repeats the run."""
    path.write_text(yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False), encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once, and 1e-4 is a number (for YAML 1.1 it is a word)."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.composer.ComposerError(None, None, f"the key '{key}' stands twice", node.start_mark)
            seen.add(key)
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back: a word that looks like 1e-4 in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _whole(path: Path, above: int = 0) -> dict[str, Any]:
    """A file's keys over those of its bases. above: files between it and the one that was asked for."""
    if above > MAX_BASES:
        raise ConfigError(f"{path}: base leads through more than {MAX_BASES} files; does it lead back?")
    data = _read(path)
    made: dict[str, Any] = {}
    bases = data.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and len(bases) <= MAX_BASES and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"{path}: base names a file, or a list of up to {MAX_BASES}; it is {reprlib.repr(bases)}")
    for base in bases:
        made = _merged(made, _whole(path.parent / base, above + 1))
    return _merged(made, data)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, mappings key by key."""
    made = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = _merged(made[key], value) if both else value
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: a config is not larger than {MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        data = _parsed(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top of the file must be keys such as model: and train:")
    return data


def _parse(text: str, override: str) -> Any:
    try:
        return _parsed(text)
    except yaml.YAMLError:
        raise ConfigError(f"'{override}': the value is broken YAML; quote it") from None


def _parsed(text: str) -> Any:
    """YAML as plain values. Raises YAMLError, also for what is nested deep or grows huge through its aliases."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MAX_VALUES} values")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep, or in itself") from None
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """Values in a node, those behind an alias as often as it stands there."""
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in flat)
    return known[id(node)]


def _set(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"'{override}': {parent} is a value, it has no keys below it")
    data[last] = value


def _checked(data: Any, cls: type, path: str, source: str) -> dict[str, Any]:
    """``data`` without sections that are empty (null); its keys are known, and no true or false stands for a number."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: {path.rstrip('.')}: expected keys below it, got {data!r}")
    hints, found = typing.get_type_hints(cls), {}
    for key, value in data.items():
        if key not in hints:
            raise ConfigError(f"{source}: unknown key '{path}{key}'{_nearest(path, str(key))}")
        hint = hints[key]
        if is_dataclass(hint):
            if value is not None:
                found[key] = _checked(value, typing.cast(type, hint), f"{path}{key}.", source)
            continue
        if isinstance(value, bool) and hint is not bool and bool not in typing.get_args(hint):
            raise ConfigError(
                f"{source}: {path}{key}: {str(value).lower()} is no value for it; quote it if it is a word"
            )
        found[key] = value
    return found


def _nearest(path: str, key: str) -> str:
    """The known key that was probably meant: one of the same name elsewhere, or one spelt alike."""
    known = [*all_keys(), *RunConfig.__dataclass_fields__]
    here = [name for name in known if name.startswith(path)]
    same = [name for name in known if name.rsplit(".", 1)[-1] == key]
    close = (
        same or difflib.get_close_matches(path + key, here, n=1) or difflib.get_close_matches(path + key, known, n=1)
    )
    return f"; did you mean '{close[0]}'?" if close else "; `megnorm train --help-config` lists all keys"


def all_keys(cls: type = RunConfig, path: str = "") -> Iterator[str]:
    """Every key of the config, dotted."""
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from all_keys(typing.cast(type, hint), f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _is_union_branch(part: int | str) -> bool:
    """pydantic puts the tried branch of a union into the location (``float``, ``literal['a']``); no key looks so."""
    return isinstance(part, str) and (part in {"float", "int", "str", "bool", "none"} or "[" in part)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping | types.MappingProxyType):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
