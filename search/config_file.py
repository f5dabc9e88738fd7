"""`treesurgeon search --config FILE`: a configuration as TOML or YAML, by the names of `Config`'s fields.

What is said on the command line comes before what the file says. `config.json` stays the record of a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from treesurgeon.search.config import Config, RunError

FLAG = "--config"


def named_in(arguments: Sequence[str]) -> Path | None:
    """The file that command-line arguments name with `--config`; the last one counts."""
    found = None
    for here, following in zip(arguments, [*arguments[1:], None], strict=True):
        if here == FLAG and following is not None:
            found = Path(following)
        elif here.startswith(FLAG + "="):
            found = Path(here.removeprefix(FLAG + "="))
    return found


def defaults(path: Path | None) -> Config:
    """A configuration with what the file says, else the defaults; what must be said and is not is `tyro.MISSING`.

    Raises:
        RunError: the file cannot be read, or has a key or a value that no option has.
    """
    values = {} if path is None else read(path)
    for field in dataclasses.fields(Config):
        if field.default is dataclasses.MISSING:
            values.setdefault(field.name, tyro.MISSING)
    return Config(**values)


def read(path: Path) -> dict[str, Any]:
    """The values of a TOML or YAML file by field, checked; paths in it are from the current directory."""
    content = _parse(path)
    if not isinstance(content, Mapping):
        raise RunError(f"--config {path}: expected options by name, got a {type(content).__name__}")
    hints, out = typing.get_type_hints(Config, include_extras=False), {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}"
            raise RunError(f"--config {path}: no option {key!r}; {hint}")
        found = _fit(hints[name], value)
        if found is _MISFIT:
            raise RunError(f"--config {path}: {key} = {value!r}: expected {_describe(hints[name])}")
        out[name] = found
    return out


def write(config: Config) -> str:
    """A configuration as TOML that `read` reads back; options without a value are left out."""
    lines = ["# treesurgeon search --config THIS_FILE"]
    for name, value in dataclasses.asdict(config).items():
        if value is not None:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)  # TOML writes strings, booleans and whole numbers as JSON does


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"--config {path}: cannot be read: {error}") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RunError(f"--config {path}: not TOML: {error}") from error
    if path.suffix in (".yaml", ".yml"):
        import yaml  # Flax depends on it

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RunError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    raise RunError(f"--config {path}: expected a .toml, .yaml or .yml file")


_MISFIT = object()


def _fit(hint: Any, value: Any) -> Any:
    """A value as this type, or `_MISFIT`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fit(parts[0], value)
    if origin in (Union, types.UnionType):
        return next((found for part in parts if (found := _fit(part, value)) is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if value in parts else _MISFIT
    if origin is tuple:
        entries = [_fit(parts[0], entry) for entry in value] if isinstance(value, list) else [_MISFIT]
        return _MISFIT if any(entry is _MISFIT for entry in entries) else tuple(entries)
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else _MISFIT


def _describe(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts if part is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple:
        return f"a list of such: {_describe(parts[0])}"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
