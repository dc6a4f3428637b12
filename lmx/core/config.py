"""Experiments as values: nested frozen dataclasses, their command line, their JSON, and what differs between two of them.

Fields are scalars, strings, booleans, paths, literals, tuples, optionals, dataclasses, and unions of dataclasses. Every field has a
dotted name (`model.layers`); a field whose type is a union with dataclasses also has a value of its own, the class's name
(`optimizer = AdamW`).
"""

import dataclasses
import difflib
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAliasType, Union, get_args, get_origin, get_type_hints

Source = Literal["default", "experiment", "command line"]
PACKAGES = ("lmx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class ConfigError(ValueError):
    """A wrong knob or value, told in one line that says what to do."""


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
"""What a field is compared with where the other side has no such field."""


@dataclass(frozen=True)
class _Knob:
    name: str
    annotation: Any
    value: Any
    default: Any


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _members(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, TypeAliasType):
        return _members(annotation.__value__)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _classes(annotation: Any) -> dict[str, type]:
    return {member.__name__: member for member in _members(annotation) if dataclasses.is_dataclass(member)}


def _element(annotation: Any, index: int) -> Any:
    """The type of a tuple's element; `Any` where the annotation does not say."""
    for member in _members(annotation):
        if get_origin(member) is tuple and (types := get_args(member)):
            return types[0] if types[-1] is Ellipsis else types[index] if index < len(types) else Any
    return Any


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ABSENT if field.default is dataclasses.MISSING else field.default


def _knobs(config: Any, default: Any = ABSENT, prefix: str = "") -> Iterator[_Knob]:
    """Every field that has a value of its own, in order. `default` is what an enclosing class sets this one to, if it does."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        standard = getattr(default, field.name) if type(default) is type(config) else _default(field)
        yield from _visit(prefix + field.name, hints[field.name], getattr(config, field.name), standard)


def _visit(name: str, annotation: Any, value: Any, default: Any) -> Iterator[_Knob]:
    if _is_config(value):
        if len(_members(annotation)) > 1:
            yield _Knob(name, annotation, value, default)
        yield from _knobs(value, default, name + ".")
    elif isinstance(value, tuple) and any(map(_is_config, value)):
        for index, item in enumerate(value):
            standard = default[index] if isinstance(default, tuple) and index < len(default) else ABSENT
            yield from _visit(f"{name}.{index}", _element(annotation, index), item, standard)
    else:
        yield _Knob(name, annotation, value, default)


def _shown(value: Any) -> Any:
    return type(value).__name__ if _is_config(value) else value


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or repr(a) == repr(b)  # the second for nan


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant; None when none is close. A right last part in a wrong group counts as close."""

    def closeness(choice: str) -> float:
        a, b = word.lower().replace("-", "_").lstrip("_"), choice.lower().replace("-", "_")
        last = difflib.SequenceMatcher(None, a.split(".")[-1], b.split(".")[-1]).ratio()
        return max(difflib.SequenceMatcher(None, a, b).ratio(), 0.9 * last)

    best = max(choices, key=closeness, default=None)
    return best if best is not None and closeness(best) >= 0.6 else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _hint(word: str, choices: Iterable[str], spell: Callable[[str], str] = str) -> str:
    near = nearest(word, choices)
    return "" if near is None else f"; did you mean {spell(near)}?"


def _expected(annotation: Any) -> str:
    """A type in words: "an integer or None", "one of fp32, bf16"."""
    words = {int: "an integer", float: "a number", bool: "True or False", str: "text", Path: "a path", NoneType: "None"}
    names = list(_classes(annotation))
    parts = [f"one of {', '.join(names)}"] if len(names) > 1 else names
    for member in _members(annotation):
        if get_origin(member) is Literal:
            parts.append(f"one of {', '.join(map(str, get_args(member)))}")
        elif get_origin(member) is tuple:
            types = get_args(member)
            several = len(types) == 2 and types[1] is Ellipsis
            parts.append(f"a list, each {_expected(types[0])}" if several else f"{len(types)} values: {', '.join(map(_expected, types))}")
        elif not dataclasses.is_dataclass(member):
            parts.append(words.get(member, str(getattr(member, "__name__", member))))
    return " or ".join(parts)


def _choices(annotation: Any) -> list[str]:
    names = list(_classes(annotation))
    for member in _members(annotation):
        if get_origin(member) is Literal:
            names += map(str, get_args(member))
        elif get_origin(member) is tuple:
            names += [name for part in get_args(member) for name in _choices(part)]
    return names


def _wrong(given: str, text: str, annotation: Any) -> ConfigError:
    choices = _choices(annotation)
    bad = next((word for word in text.split() if word not in choices), text)
    return ConfigError(f"{given} is not {_expected(annotation)}{_hint(bad, choices)}")


# The command line. tyro reads each value by its field's type and writes the help; the walk over the experiment says which flags there
# are. One value at a time, because tyro tells of an error in a box of several lines, and its hooks for errors are private.


def _flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    given: list[tuple[str, list[str]]] = []
    for token in argv:
        if re.match(r"--?[A-Za-z_]", token) and token.lower() not in ("-inf", "-nan"):
            flag, equals, value = token.partition("=")
            given.append((flag, [value] if equals else []))
        elif given:
            given[-1][1].append(token)
        else:
            raise ConfigError(f"{token!r} belongs to no knob; write --name value (--help lists all)")
    return given


def _parsed(flag: str, values: list[str], annotation: Any) -> Any:
    members, text = _members(annotation), " ".join(values)
    if NoneType in members and text.lower() == "none":
        return None
    if bool in members and text.lower() in ("", "true", "false"):
        return text.lower() != "false"
    if not values and not any(get_origin(member) is tuple for member in members):
        raise ConfigError(f"{flag} needs a value: {_expected(annotation)}")
    import tyro

    # One value is joined to its flag, so that it may begin with a dash.
    argv = ["--value=" + text] if len(values) == 1 else ["--value", *values]
    plain = tuple(member for member in members if not dataclasses.is_dataclass(member))
    if not plain:
        raise _wrong(f"{flag}={text}", text, annotation)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            holder = dataclasses.make_dataclass("Holder", [("value", Union[plain])])  # noqa: UP007
            return tyro.cli(holder, args=argv, console_outputs=False).value
    except SystemExit:
        raise _wrong(f"{flag}={text}", text, annotation) from None


def _chosen(flag: str, values: list[str], knob: _Knob) -> Any:
    """The dataclass named on the command line (`--optimizer Lion`): as the experiment has it, or with its own defaults."""
    text, classes = " ".join(values), _classes(knob.annotation)
    cls = next((cls for name, cls in classes.items() if name.lower() == re.sub("[-_]", "", text).lower()), None)
    if cls is None:
        return _parsed(flag, values, knob.annotation)
    try:
        return knob.value if type(knob.value) is cls else cls()
    except TypeError:
        raise ConfigError(f"{flag}={text} has fields without defaults; give it in the experiment's module") from None


def _replaced(config: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """`config` with fields set by dotted name, all at once, so that a class's own checks see the final values only."""

    def new(name: str, value: Any) -> Any:
        if name in changes:
            return changes[name]
        if not any(key.startswith(name + ".") for key in changes):
            return value
        if isinstance(value, tuple):
            return tuple(new(f"{name}.{index}", item) for index, item in enumerate(value))
        return _replaced(value, changes, name + ".")

    return dataclasses.replace(config, **{f.name: new(prefix + f.name, getattr(config, f.name)) for f in dataclasses.fields(config)})


def parse(experiment: Any, argv: Sequence[str]) -> tuple[Any, dict[str, Source]]:
    """Sets fields of an experiment from flags, and says who set each field.

    `--a.b value`, `--a.b=value`, `-` or `_` within names, several values for tuples, `--a.flag`, `--a.no-flag` or `--a.flag False` for
    booleans, `--optimizer Lion` for another member of a union of dataclasses (with its own defaults). The last of equal flags wins.

    Returns:
      The new experiment, and for every field `"default"` (its class's), `"experiment"` (set differently by the module, or without a
      default) or `"command line"` (given, even if equal).

    Raises:
      ConfigError: an unknown flag, a value of the wrong type on the command line or in the experiment, or one its class refuses.
    """
    given, named = [(flag, flag.removeprefix("--").replace("-", "_"), values) for flag, values in _flags(argv)], set()
    try:
        last = {name: (flag, name, values) for flag, name, values in given}
        for flag, name, values in sorted(last.values(), key=lambda item: item[1].count(".")):  # an outer choice makes the inner flags
            knob = {knob.name: knob for knob in _knobs(experiment)}.get(name)
            if knob is not None and _classes(knob.annotation):
                experiment, named = _replaced(experiment, {name: _chosen(flag, values, knob)}), named | {name}
        knobs = {knob.name: knob for knob in _knobs(experiment)}
        flips = {re.sub(r"(\w+)$", r"no_\1", name): name for name, knob in knobs.items() if bool in _members(knob.annotation)}
        negated = {no: name for no, name in flips.items() if no not in knobs}
        for flag, name, _ in given:
            if name not in knobs and name not in negated:
                group = [_flag(other) for other in knobs if other.startswith(name + ".")]
                if group:
                    raise ConfigError(f"{flag} is a group of knobs, not a knob; it has {', '.join(group)}")
                raise ConfigError(f"{flag} is not a knob{_hint(name, knobs, _flag)} (--help lists all)")
        changes = {}
        for flag, name, values in given:
            if name in negated:
                if values:
                    raise ConfigError(f"{flag} takes no value; write {flag} or {_flag(negated[name])} {values[0]}")
                changes[negated[name]] = False
            elif name not in named:
                changes[name] = _parsed(flag, values, knobs[name].annotation)
        experiment = _replaced(experiment, changes)
        from_json(type(experiment), to_json(experiment))  # what the module itself set is checked as strictly
    except ValueError as error:
        raise ConfigError(_one_line(error)) from error

    def source(knob: _Knob) -> Source:
        if knob.name in changes or knob.name in named:
            return "command line"
        return "default" if _same(_shown(knob.value), _shown(knob.default)) else "experiment"

    return experiment, {knob.name: source(knob) for knob in _knobs(experiment)}


def command_line(experiment: Any, argv: Sequence[str] | None = None, *, description: str) -> tuple[Any, dict[str, Source]]:
    """`parse` for a program: `--help` explains every knob and exits with 0; an error is one line on stderr and exits with 2.

    Args:
      experiment: its values are the defaults.
      argv: without the program's name; the process's own when None.
      description: what the program does, for `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    wanted = [token for token in argv if token not in ("-h", "--help")]
    with exits_with_one_line():
        if len(wanted) == len(argv):
            return parse(experiment, argv)
        with suppress(ConfigError):  # `--optimizer Lion --help` lists Lion's knobs; but who asks for help gets help
            experiment, _ = parse(experiment, wanted)
    import tyro

    kinds = [knob for knob in _knobs(experiment) if _classes(knob.annotation)]
    lines = [f"{_flag(knob.name)} is {_shown(knob.value)}; it may be {_expected(knob.annotation)}." for knob in kinds]
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    tyro.cli(
        type(experiment),
        prog=f"python -m {module.name.removesuffix('.__main__')}" if module else None,
        default=experiment,
        args=["--help"],
        description="\n\n".join([description, *lines]),
        config=(tyro.conf.AvoidSubcommands,),
    )
    raise AssertionError("tyro's --help exits")


# JSON, and comparisons.


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; `from_json` gives exactly the same config back.

    A dataclass in a union (an optional one too) carries its name under `"class"`; nan and infinities are the strings "nan", "inf", "-inf".

    Raises:
      ConfigError: a value that is not of the kinds a config is made of.
    """
    return _encoded(config, type(config), "")


def _encoded(value: Any, annotation: Any, name: str) -> Any:
    if _is_config(value):
        if type(value) not in _classes(annotation).values():
            raise ConfigError(f"{name}={type(value).__name__} is not {_expected(annotation)}")
        hints, prefix = get_type_hints(type(value)), f"{name}." if name else ""
        body = {f.name: _encoded(getattr(value, f.name), hints[f.name], prefix + f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **body} if len(_members(annotation)) > 1 else body
    if isinstance(value, tuple):
        return [_encoded(item, _element(annotation, index), f"{name}.{index}") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if type(value) is float and not math.isfinite(value):
        return repr(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    tuples = isinstance(value, list) and any(get_origin(member) is tuple for member in _members(annotation))
    raise ConfigError(f"{name}={value!r} is not {'a tuple, which Python needs for ' if tuples else ''}{_expected(annotation)}")


def from_json(cls: type, data: Mapping[str, Any]) -> Any:
    """The config that `to_json` wrote. A field that is missing takes its class's default, and a union that names no
    class its first, so old records stay readable.

    Raises:
      ConfigError: an unknown field, a missing one without a default, or a value of the wrong type, by name.
    """
    return _decoded(data, cls, "")


def require_types(config: Any) -> None:
    """Raises ConfigError, by name, for a value that is not of its field's type: Python looks at none where a module builds a config, and a
    word that is no choice would be taken for another."""
    from_json(type(config), to_json(config))


def _decoded(data: Any, annotation: Any, name: str) -> Any:
    classes = _classes(annotation)
    if isinstance(data, Mapping) and classes:
        body = dict(data)
        first = next(iter(classes))  # what a record from before there were several is
        kind = body.pop("class", first) if len(_members(annotation)) > 1 else first
        if kind not in classes:
            raise _wrong(f"{name}={kind}", str(kind), annotation)
        cls, prefix = classes[kind], f"{name}." if name else ""
        fields, hints = {field.name: field for field in dataclasses.fields(cls)}, get_type_hints(cls)
        for key in body:
            if key not in fields:
                raise ConfigError(f"{prefix}{key} is not a field of {cls.__name__}{_hint(key, fields, lambda near: prefix + near)}")
        for key, field in fields.items():
            if key not in body and _default(field) is ABSENT:
                raise ConfigError(f"{prefix}{key} is missing, and {cls.__name__} has no default for it")
        try:
            return cls(**{key: _decoded(value, hints[key], prefix + key) for key, value in body.items()})
        except ValueError as error:
            raise ConfigError(_one_line(error)) from error
    for member in _members(annotation):
        if (value := _fitted(data, member, name)) is not ABSENT:
            return value
    raise _wrong(f"{name or 'the config'}={data}", str(data), annotation)


def _fitted(data: Any, member: Any, name: str) -> Any:
    """A JSON value as one member of a union, or ABSENT where it is not of that type."""
    if get_origin(member) is Literal:
        return next((choice for choice in get_args(member) if type(choice) is type(data) and choice == data), ABSENT)
    if get_origin(member) is tuple and isinstance(data, list | tuple):
        types = get_args(member)
        if types[-1] is not Ellipsis and len(types) != len(data):
            return ABSENT
        return tuple(_decoded(item, _element(member, index), f"{name}.{index}") for index, item in enumerate(data))
    if member is Path:
        return Path(data) if isinstance(data, str) else ABSENT
    if member is float:
        special = isinstance(data, str) and data in ("nan", "inf", "-inf")
        return float(data) if special else data if type(data) in (int, float) else ABSENT
    return data if member is Any or type(data) is member else ABSENT


def flatten(config: Any) -> dict[str, Any]:
    """Values by dotted name, in order, of a config or of its JSON. A member of a union of dataclasses is its class's name."""
    if not isinstance(config, Mapping):
        return {knob.name: _shown(knob.value) for knob in _knobs(config)}
    flat: dict[str, Any] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(name if key == "class" else f"{name}.{key}" if name else key, item)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                visit(f"{name}.{index}", item)
        else:
            flat[name] = tuple(value) if isinstance(value, list) else value

    visit("", config)
    return flat


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configs (or the JSON of two): old and new value by dotted name, `ABSENT` where one has no such field."""
    a, b = flatten(old), flatten(new)
    pairs = {name: (a.get(name, ABSENT), b.get(name, ABSENT)) for name in [*a, *(name for name in b if name not in a)]}
    return {name: pair for name, pair in pairs.items() if not _same(*pair)}


def refuse_changes(old: Any, new: Any, *, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError naming every field that changed, unless its name or a group it is in is `allowed` (`"layout"`, `"steps"`)."""
    may_change = tuple(group + "." for group in allowed)
    changed = {name: pair for name, pair in diff(old, new).items() if not (name + ".").startswith(may_change)}
    # Another class has other fields: that it is another class says so already.
    told = {name: pair for name, pair in changed.items() if ABSENT not in pair or not any(name.startswith(o + ".") for o in changed)}
    if told:
        what = "; ".join(f"{name} was {before} and is now {after}" for name, (before, after) in told.items())
        may = f" (only {', '.join(allowed)} may change)" if allowed else ""
        raise ConfigError(f"{what}: give the old values, or start a new run{may}")


def versions() -> dict[str, str]:
    """Versions of Python, lmx and what it computes with, and the platform, from the packages' metadata: imports none of them."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {"python": platform.python_version(), **{package: of(package) for package in PACKAGES}, "platform": platform.platform()}


def _one_line(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file or folder"
    return " ".join(str(error).split()) or type(error).__name__


def subcommand(commands: Any, argv: Sequence[str] | None, *, prog: str, description: str | None, usage: str) -> Any:
    """The one of a union of dataclasses that a command line means, filled in.

    Raises:
      ConfigError: one line with the usage, where it means none (tyro would tell so in a box).
    """
    import tyro

    try:
        with redirect_stderr(io.StringIO()):
            return tyro.cli(commands, args=argv, prog=prog, description=description)
    except SystemExit as stop:
        if stop.code:
            said = " ".join(sys.argv[1:] if argv is None else argv) or "no command"
            raise ConfigError(f"{said}: not understood; usage: {usage}") from None
        raise


@contextmanager
def exits_with_one_line() -> Iterator[None]:
    """Turns a ValueError (ConfigError too) or FileNotFoundError into one red line on stderr and exit code 2.

    Meant around the checks at a program's door; around long work it would hide where an unforeseen error came from.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        line = _one_line(error)
        print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr)
        raise SystemExit(2) from error
