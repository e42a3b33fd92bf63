"""The schemes by name: a factory each, whose keyword parameters are the scheme's options."""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from megnorm.norms.scheme import Scheme, SchemeError

Factory = Callable[..., Scheme]
F = TypeVar("F", bound=Factory)
_factories: dict[str, Factory] = {}
_plugins: set[str] = set()


def register(factory: F) -> F:
    """Decorator: make the scheme that ``factory()`` returns known under its own name.

    The factory is called once, without options, so that an impossible scheme is refused here. Raises SchemeError.
    """
    scheme = factory()
    if not isinstance(scheme, Scheme):
        raise SchemeError(f"{factory.__name__}: a scheme's factory returns a Scheme, not {type(scheme).__name__}")
    known = _factories.get(scheme.name)
    if known is not None and (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
        raise SchemeError(
            f"{scheme.name}: the name is taken by {known.__module__}.{known.__qualname__}; choose another"
        )
    _factories[scheme.name] = factory
    return factory


def load_plugin(source: str) -> None:
    """Import a file (``path/to/mine.py``) or module (``package.mine``) that registers schemes. Once per source."""
    if source in _plugins:
        return
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise SchemeError(f"norm.plugins: there is no file '{source}'; give a path relative to where you start")
        spec = importlib.util.spec_from_file_location(f"megnorm_plugin_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    else:
        try:
            importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise SchemeError(f"norm.plugins: no module '{source}' ({error}); install it or give a .py file") from None
    _plugins.add(source)


def _load_shipped() -> None:
    from megnorm.norms import schemes

    for module in pkgutil.iter_modules(schemes.__path__):
        importlib.import_module(f"{schemes.__name__}.{module.name}")


def names() -> list[str]:
    """Every registered scheme, sorted."""
    _load_shipped()
    return sorted(_factories)


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options a scheme takes, by name."""
    return dict(inspect.signature(_factory(name)).parameters)


def get(name: str, **given: Any) -> Scheme:
    """The scheme ``name`` with these options. Raises SchemeError, naming the nearest name for an unknown one."""
    factory = _factory(name)
    allowed = inspect.signature(factory).parameters
    for key in given:
        if key not in allowed:
            hint = _nearest(key, list(allowed))
            raise SchemeError(f"norm.options.{key}: scheme '{name}' has no such option{hint}")
    hints = typing.get_type_hints(factory)
    for key, value in given.items():
        if not _fits(value, hints.get(key, Any)):
            raise SchemeError(f"norm.options.{key}: scheme '{name}' takes {_words(hints[key])} here, not {value!r}")
    return factory(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether an option's value is of its annotated type; annotations other than these are not looked at."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(word) for word in typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(hint))
    names = {bool: "true or false", float: "a number", int: "a whole number", str: "a word", type(None): "null"}
    return names.get(hint, str(hint))


def _factory(name: str) -> Factory:
    _load_shipped()
    if name not in _factories:
        raise SchemeError(f"norm.scheme: no scheme '{name}'{_nearest(name, list(_factories))}")
    return _factories[name]


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are {', '.join(sorted(known))}" if known else "; it takes none"
