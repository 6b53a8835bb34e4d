"""Settings from outside of the script: a file, the environment, the command line; and their merge.

The dataclasses of core/config.py are the one definition of names, types, defaults and help; nothing
is listed twice. A key is the path of a field, `tier` or `comm.bucket_mib`. A later source wins:

    default < file < MAGI_SETTINGS < command line < Config in Python

The last step is field by field: a Config that the script makes wins where it differs from the
default, so `magi run --magi.tier=eager` reaches a script whose Config only sets a bucket size. What
is overruled so is said in the report. `magi run` hands its settings to the ranks in MAGI_SETTINGS,
`key=value` words as a shell would split them; `config=FILE` among them names a file. A value that
is a word for nothing is `none`, as TOML has no null.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import os
import shlex
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from magi_train.core import config as definitions
from magi_train.core.config import Config
from magi_train.core.errors import SettingError

VARIABLE = "MAGI_SETTINGS"
FILE_KEY = "config"
"""`config=FILE`, on the command line or in the variable, names a file of settings."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key: a field of Config or of one of its parts.

    Attributes:
        key: Path of the field.
        hint: Its type, as annotated.
        default: Its default.
        help: What the text under the field says.
    """

    key: str
    hint: Any
    default: Any
    help: str

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        return " or ".join(dict.fromkeys(_words(self.hint)))


@dataclasses.dataclass(frozen=True)
class Sourced:
    """A value and where it came from."""

    value: Any
    source: str


@functools.cache
def known_settings() -> dict[str, Setting]:
    """Return every setting by its key, in the order of the dataclasses."""
    return {setting.key: setting for setting in _settings_of(Config, Config(), "")}


def _settings_of(kind: type, defaults: Any, prefix: str) -> Iterable[Setting]:
    hints, helps = get_type_hints(kind), _field_helps().get(kind.__name__, {})
    for field in dataclasses.fields(kind):
        key, default = prefix + field.name, getattr(defaults, field.name)
        part, hint = _part_of(hints[field.name]), hints[field.name]
        if part is None or type(None) in get_args(hint):
            hint = type(None) if part else hint  # of a part as a whole, text can only say none
            yield Setting(key, hint, default, helps.get(field.name, ""))
        if part is not None:
            yield from _settings_of(part, default, f"{key}.")


def is_part(key: str) -> bool:
    """Return whether a key means a group of settings, which text can only leave out (`none`)."""
    return known_settings()[key].hint is type(None)


def _part_of(hint: Any) -> type | None:
    return next((h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)), None)  # type: ignore[return-value]


@functools.cache
def _field_helps() -> dict[str, dict[str, str]]:
    """Return the strings under the fields of each dataclass; {} where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(definitions))
    except OSError:
        return {}
    helps: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    if isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant):
                        words = " ".join(str(text.value.value).split())
                        helps.setdefault(node.name, {})[field.target.id] = words
    return helps


# -- one value ---------------------------------------------------------------------------------


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the plain types and Literals that a hint is the union of."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for part in get_args(hint) for choice in _choices(part))
    return (hint,)


def _words(hint: Any) -> list[str]:
    plain = {bool: "true or false", float: "a number", int: "a whole number", str: "text"}
    words: list[str] = []
    for choice in _choices(hint):
        if get_origin(choice) is Literal:
            words += [str(value) for value in get_args(choice)]
        else:
            words.append("none" if choice is type(None) else plain.get(choice, str(choice)))
    return words


def _read(choice: Any, value: Any, is_text: bool) -> Any:
    """Return `value` as one type of a union; raise ValueError if it is none of that type."""
    if choice is type(None):
        if value is None or value == "none":
            return None
    elif get_origin(choice) is Literal:
        for allowed in get_args(choice):
            if str(allowed) == value if is_text else (allowed == value):
                return allowed
    elif choice is bool:
        if is_text and value in ("true", "false"):
            return value == "true"
        if isinstance(value, bool):
            return value
    elif choice in (int, float) and not isinstance(value, bool):
        if is_text or isinstance(value, int | choice):
            return choice(value)
    elif choice is str and isinstance(value, str):
        return value
    raise ValueError(value)


def read(key: str, value: Any, source: str) -> Any:
    """Return `value` in the type of the setting `key`.

    Args:
        key: Path of a field.
        value: Text, or what a file holds.
        source: "command line", the variable's name, or a file; for the message, and text is
            converted only where it does not come from a file, which has types of its own.

    Raises:
        SettingError: No such key, or not of its type.
    """
    setting = known_settings().get(key)
    if setting is None:
        raise SettingError(_unknown(key, source))
    is_text = isinstance(value, str) and source in (COMMAND_LINE, VARIABLE)
    for choice in sorted(_choices(setting.hint), key=lambda choice: choice is str):
        try:
            return _read(choice, value, is_text)
        except (ValueError, TypeError):
            continue
    raise SettingError(
        f"{key} ({source}) must be {setting.wanted}, got {value!r} ({type(value).__name__})"
    )


COMMAND_LINE = "command line"


def _unknown(key: str, source: str) -> str:
    keys = [*known_settings(), *(k.partition(".")[0] for k in known_settings() if "." in k)]
    leaf = [k for k in known_settings() if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no setting {key!r} ({source}); {hint}`magi config keys` lists all"


# -- the sources -------------------------------------------------------------------------------


def read_file(path: str | os.PathLike[str]) -> dict[str, Sourced]:
    """Return the settings of a TOML file (or YAML, where pyyaml is installed).

    Raises:
        SettingError: The file is missing or broken, or has an unknown key or a wrong type.
    """
    name = str(path)
    try:
        table = _table(Path(path))
    except (OSError, ValueError) as error:  # tomllib's and UnicodeDecodeError are ValueErrors
        raise SettingError(f"{name} cannot be read as settings: {error}") from error
    flat = _flatten(table, "", name)
    return {key: Sourced(read(key, value, name), name) for key, value in flat.items()}


def _table(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        return tomllib.loads(path.read_text())
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError("its name must end in .toml, .yaml or .yml")
    try:
        import yaml
    except ImportError as error:
        raise ValueError("YAML needs pyyaml (pip install pyyaml); TOML needs nothing") from error
    try:
        table = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(error) from error
    if not isinstance(table, dict):
        raise ValueError("it must hold keys and values")
    return table


def _flatten(table: Mapping[str, Any], prefix: str, source: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}".replace("-", "_")
        if isinstance(value, dict):
            if not any(known.startswith(f"{key}.") for known in known_settings()):
                raise SettingError(_unknown(key, source))
            flat |= _flatten(value, f"{key}.", source)
        else:
            flat[key] = value
    return flat


def read_words(words: Iterable[str], source: str) -> dict[str, Sourced]:
    """Return the settings of `key=value` words; `config=FILE` reads a file, below the other words.

    Raises:
        SettingError: A word has no `=`, or see `read` and `read_file`.
    """
    files: dict[str, Sourced] = {}
    given: dict[str, Sourced] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.replace("-", "_")
        if not equals:
            raise SettingError(f"{source}: {word!r} must be key=value")
        if key == FILE_KEY:
            files |= read_file(text)
        else:
            given[key] = Sourced(read(key, text, source), source)
    return files | given


def gather(words: Iterable[str] = (), file: str | None = None) -> dict[str, Sourced]:
    """Return the settings of file, environment and command line, the later over the earlier.

    Args:
        words: `key=value`, from the command line.
        file: A file of settings; one that `words` name counts above it.

    Raises:
        SettingError: A source is wrong, or they contradict what Config allows.
    """
    found = read_file(file) if file else {}
    outside, inside = from_environment(), read_words(words, COMMAND_LINE)
    for source in (outside, inside):  # files stay below variables and words
        found |= {k: v for k, v in source.items() if v.source not in (VARIABLE, COMMAND_LINE)}
    for source in (outside, inside):
        found |= {k: v for k, v in source.items() if v.source in (VARIABLE, COMMAND_LINE)}
    apply(Config(), found)
    return found


def from_environment() -> dict[str, Sourced]:
    """Return the settings of the variable MAGI_SETTINGS; {} if it is not set."""
    try:
        words = shlex.split(os.environ.get(VARIABLE, ""))
    except ValueError as error:
        raise SettingError(f"{VARIABLE} must be key=value words: {error}") from error
    return read_words(words, VARIABLE)


def to_words(values: Mapping[str, Sourced]) -> str:
    """Return the text of MAGI_SETTINGS that means `values`."""
    return shlex.join(f"{key}={as_text(each.value)}" for key, each in values.items())


def as_text(value: object) -> str:
    """Return a value as the command line takes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# -- the merge ---------------------------------------------------------------------------------


def apply(config: Config, values: Mapping[str, Sourced]) -> tuple[Config, list[str]]:
    """Return `config` with `values` where it still has the default, and what was overruled.

    Raises:
        SettingError: The result contradicts itself; names the sources.
    """
    overruled: list[str] = []
    tree: dict[str, Any] = {}
    for key, given in values.items():
        current, default = _field(config, key), known_settings()[key].default
        if current != default and current != given.value:
            text = current if current is not _NO_PART else f"without {key.partition('.')[0]}"
            overruled.append(
                f"{key}={as_text(given.value)} ({given.source}) has no effect: the script's Config "
                f"says {text}"
            )
            continue
        part, _, name = key.rpartition(".")
        tree.setdefault(part, {})[name] = given.value
    top = tree.pop("", {})
    try:
        for part, changes in tree.items():
            if part in top:
                raise ValueError(f"{part} is none, so {part}.{next(iter(changes))} has no place")
            top[part] = dataclasses.replace(getattr(config, part), **changes)
        return (dataclasses.replace(config, **top) if top else config), overruled
    except (ValueError, TypeError) as error:
        sources = sorted({each.source for each in values.values()})
        raise SettingError(f"{error} (settings from {', '.join(sources)})") from error


def sources(config: Config, outside: Mapping[str, Sourced]) -> dict[str, str]:
    """Return {key: where it came from} of the settings of `config` that are not the default.

    Args:
        config: As it holds, `outside` applied.
        outside: What came from files, variables and the command line.
    """
    found: dict[str, str] = {}
    for key, setting in known_settings().items():
        value = _field(config, key)
        if value is _NO_PART or value == setting.default:
            continue
        given = outside.get(key)
        mine = given is not None and given.value == value
        found[key] = given.source if given is not None and mine else "Config in Python"
    return found


_NO_PART = object()


def _field(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        if value is None:
            return _NO_PART
        value = getattr(value, name)
    return value
