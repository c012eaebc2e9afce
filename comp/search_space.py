"""Search spaces: a YAML file of config keys and what may be tried for each, checked like a config.

    optimizer.lr: {kind: float, low: 1.0e-5, high: 3.0e-4, log: true}
    training.batch_size: [8, 16, 32]                       # short for {kind: choice, values: [8, 16, 32]}
    groups.layout: [unified, llrd]
    groups.decay: {kind: float, low: 0.8, high: 1.0, when: {groups.layout: llrd}}

Before the first trial every corner of the space (each choice, each end of a range, together) is tried on the config.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from comp.catalog import nearest
from comp.config_file import ConfigError, Source, read_yaml
from comp.config_section import Section

__all__ = ["Asker", "Space", "overrides_of", "read_space", "told"]

Values: TypeAlias = dict[str, Any]
MOST_CORNERS = 1000
"""Corners that are tried; of a larger space a sample, in which every value is at least once."""
FIXED = {
    "competition": "it would be another competition",
    "folds": "scores on other folds are not comparable",
    "metric": "scores by another metric are not comparable",
    "tracking": "it changes no result",
    "training.seed": "the luckiest seed would win; finalists are trained under several by --seeds",
    "training.max_rows": "scores on other rows are not comparable",
    "evaluation.every": "the more often it is looked, the more the best look flatters",
    "evaluation.schedule": "the more often it is looked, the more the best look flatters",
    "evaluation.start_percent": "the more often it is looked, the more the best look flatters",
}
"""Keys that a search must not change, and why."""


class Asker(Protocol):
    """What chooses a value: an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...


class _Row(Section):
    when: dict[str, Any] = Field(default_factory=dict)
    """Only where other keys of the space have these values (one, or a list of them); {} = always."""

    def allowed(self, key: str) -> list[Any]:
        """Return the values of `key` under which this row is searched."""
        return self.when[key] if isinstance(self.when[key], list) else [self.when[key]]


class Choice(_Row):
    kind: Literal["choice"]
    values: list[Any] = Field(min_length=2)
    """The values, of any kind, whole sections included."""

    @model_validator(mode="after")
    def _each_once(self) -> Choice:
        texts = [_json(value) for value in self.values]
        if len(set(texts)) < len(texts):
            raise ValueError(f"a value is given twice: {', '.join(texts)}")
        return self

    def corners(self) -> list[Any]:
        return list(self.values)

    def ask(self, key: str, asker: Asker) -> Any:
        return json.loads(asker.suggest_categorical(key, [_json(value) for value in self.values]))


class Int(_Row):
    kind: Literal["int"]
    low: int
    high: int
    """Both ends are tried."""
    step: int = Field(1, ge=1)
    log: bool = False
    """Draw on a logarithmic scale."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Int:
        _check_range(self.low, self.high, None if self.step == 1 else self.step, log=self.log)
        return self

    def corners(self) -> list[Any]:
        return [self.low, self.high]

    def ask(self, key: str, asker: Asker) -> Any:
        return asker.suggest_int(key, self.low, self.high, step=self.step, log=self.log)


class Float(_Row):
    kind: Literal["float"]
    low: float
    high: float
    """Both ends are tried."""
    step: float | None = Field(None, gt=0)
    """Distance of the values from `low` on; null = any number."""
    log: bool = False
    """Draw on a logarithmic scale."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Float:
        _check_range(self.low, self.high, self.step, log=self.log)
        return self

    def corners(self) -> list[Any]:
        return [self.low, self.high]

    def ask(self, key: str, asker: Asker) -> Any:
        return asker.suggest_float(key, self.low, self.high, step=self.step, log=self.log)


def _check_range(low: float, high: float, step: float | None, *, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low must be below high, got {low} and {high}; leave out a key that has one value")
    if log and low <= 0:
        raise ValueError(f"log needs low above 0, got {low}")
    if log and step is not None:
        raise ValueError("log and step do not go together; leave one of them out")
    if step is not None and not math.isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9):
        raise ValueError(f"high must be low plus a multiple of step, got {low}, {high} and step {step}")


Row: TypeAlias = Choice | Int | Float
ROW: TypeAdapter[Row] = TypeAdapter(Annotated[Row, Field(discriminator="kind")])
KINDS: dict[str, type[Row]] = {"choice": Choice, "int": Int, "float": Float}


@dataclass(frozen=True)
class Space:
    """Config keys and what may be tried for each; a key that another one depends on stands before it."""

    file: str
    rows: Mapping[str, Row]

    def ask(self, asker: Asker) -> Values:
        """Return one value for each key that is searched under the values before it."""
        values: Values = {}
        for key, row in self.rows.items():
            if _holds(row, values):
                values[key] = row.ask(key, asker)
        return values

    def told(self, answers: Mapping[str, Any]) -> Values:
        """Return the values that an asker's answers stand for: choices are told as JSON."""
        rows = {key: row for key, row in self.rows.items() if key in answers}
        return {k: json.loads(answers[k]) if isinstance(row, Choice) else answers[k] for k, row in rows.items()}

    def corners(self) -> Iterator[Values]:
        """Yield every combination of choices and ends of ranges; a sample of them where they are many."""
        sides = {key: row.corners() for key, row in self.rows.items()}
        if math.prod(map(len, sides.values())) <= MOST_CORNERS:
            seen = set()
            for chosen in itertools.product(*sides.values()):
                found = self._searched(dict(zip(sides, chosen, strict=True)))
                if (text := _json(found)) not in seen:
                    seen.add(text)
                    yield found
            return
        draw = random.Random(0)
        wanted = [(key, value) for key, side in sides.items() for value in side]
        for place in range(max(MOST_CORNERS, len(wanted))):
            chosen_one = {key: draw.choice(side) for key, side in sides.items()}
            yield self._searched({**chosen_one, **(self.alone(*wanted[place]) if place < len(wanted) else {})})

    def _searched(self, values: Values) -> Values:
        found: Values = {}
        for key, row in self.rows.items():
            if _holds(row, found):
                found[key] = values[key]
        return found

    def alone(self, key: str, value: Any) -> Values:
        """Return one value, and those of other keys without which it is not searched."""
        found = {key: value}
        for other in self.rows[key].when:
            found = {**self.alone(other, self.rows[key].allowed(other)[0]), **found}
        return {name: found[name] for name in self.rows if name in found}


def overrides_of(values: Values) -> list[str]:
    """Return values as `key=value` texts, as --set takes them."""
    return [f"{key}={_json(value)}" for key, value in values.items()]


def told(value: Any, *, short: bool = True) -> str:
    """Return a value as a table shows it; `short`: four figures of a number."""
    if isinstance(value, float):
        return f"{value:.4g}" if short else repr(value)
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _holds(row: Row, values: Values) -> bool:
    return all(key in values and any(_json(values[key]) == _json(one) for one in row.allowed(key)) for key in row.when)


# --- reading and checking --------------------------------------------------------------------------------------------


def read_space(path: str | Path, source: Source, overrides: Sequence[str] = ()) -> Space:
    """Read a space file and try its corners on a config.

    Raises ConfigError with every fault: keys and bounds of the rows, keys that the config has not, values that it
    refuses, and values that do not go together.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--space {path}: no such file; write one line a key: optimizer.lr: {{kind: float, low: ...}}")
    data = read_yaml(file)
    if not isinstance(data, dict) or not data:
        got = type(data).__name__ if data else "nothing"
        raise ConfigError(str(file), [f"a space is a mapping from config keys to what may be tried, got {got}"])
    faults: list[str] = []
    rows: dict[str, Row] = {}
    for key, given in data.items():
        found = _read_row(key, given, faults)
        if found is not None:
            rows[key] = found
    faults += _misplaced(rows, data)
    if faults:
        conditions = {key for key, row in rows.items() if row.when}
        sound = Space(str(file), {key: row for key, row in rows.items() if key not in conditions})
        raise ConfigError(str(file), list(dict.fromkeys([*faults, *_refused_values(sound, source, overrides)])))
    space = Space(str(file), _in_order(rows))
    faults = _refused_values(space, source, overrides) or _refused_corners(space, source, overrides)
    if faults:
        raise ConfigError(str(file), faults)
    return space


def _read_row(key: str, given: Any, faults: list[str]) -> Row | None:
    """Return one row of the file, or None and what is wrong with it."""
    for fixed, why in FIXED.items():
        if key == fixed or key.startswith(f"{fixed}."):
            faults.append(f"{key}: cannot be searched: {why}")
            return None
    if isinstance(given, list):
        given = {"kind": "choice", "values": given}
    if not isinstance(given, dict):
        faults.append(f"{key}: wanted a list of values, or {{kind: {' | '.join(KINDS)}, ...}}; got {given!r}")
        return None
    try:
        return ROW.validate_python(given)
    except ValidationError as fault:
        faults += [_said(key, error, given) for error in fault.errors()]
        return None


def _said(key: str, error: Any, given: Mapping[str, Any]) -> str:
    """Return one fault of a row in words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "union_tag_not_found":
        return f"{key}: `kind` is missing. Allowed: {', '.join(KINDS)}."
    if kind == "union_tag_invalid":
        hint = nearest(context["tag"], KINDS) or "."
        return f"{key}: unknown kind '{context['tag']}'{hint} Allowed: {', '.join(KINDS)}."
    inside = ".".join(str(part) for part in error["loc"][1:])  # the first is the kind
    where = f"{key}.{inside}" if inside else key
    fields = KINDS[given["kind"]].model_fields
    if kind == "extra_forbidden":
        allowed = ["kind", *(name for name in fields if name not in ("kind", "when")), "when"]
        return f"{where}: unknown key{nearest(inside, allowed) or '.'} Allowed: {', '.join(allowed)}."
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "value_error":
        return f"{where}: {context['error']}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _misplaced(rows: Mapping[str, Row], data: Mapping[str, Any]) -> list[str]:
    """Return what is wrong between rows: a key inside another one, conditions that never hold or go in a circle."""
    faults = [
        f"{inner}: is inside {outer}, which the space holds too; leave one of them out"
        for outer, inner in itertools.permutations(data, 2)
        if inner.startswith(f"{outer}.")
    ]
    for key, row in rows.items():
        for other in row.when:
            if other not in data:
                hint = nearest(other, [name for name in data if name != key]) or "."
                faults.append(f"{key}.when: '{other}' is no key of this space{hint} Set it in the config instead")
            elif other in rows:
                tried = rows[other]
                absent = [one for one in row.allowed(other) if not _may_be(tried, one)]
                if absent:
                    faults.append(f"{key}.when: {other} is never {', '.join(map(_json, absent))} in this space")
    if rows and not faults and not _in_order(rows):
        faults.append(
            f"when: conditions go in a circle, among {', '.join(key for key, row in rows.items() if row.when)}"
        )
    return faults


def _may_be(row: Row, value: Any) -> bool:
    if isinstance(row, Choice):
        return any(_json(value) == _json(one) for one in row.values)
    return isinstance(row, Int) and isinstance(value, int) and value in range(row.low, row.high + 1, row.step)


def _in_order(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the rows, those before others that these depend on; {} where they depend on each other in a circle."""
    placed: dict[str, Row] = {}
    while len(placed) < len(rows):
        ready = [key for key, row in rows.items() if key not in placed and all(other in placed for other in row.when)]
        if not ready:
            return {}
        placed[ready[0]] = rows[ready[0]]
    return placed


def _refused_values(space: Space, source: Source, overrides: Sequence[str]) -> list[str]:
    """Return the faults of single values: of keys that the config has not, and of values that it never takes."""
    told: dict[tuple[str, str], str] = {}
    for key, row in space.rows.items():
        for value in row.corners():
            for fault in _faults(source, overrides, space.alone(key, value)):
                where = fault.partition(" (")[0].partition(":")[0]
                if f"{key}.".startswith(f"{where}.") or f"{where}.".startswith(f"{key}.") or f"--set {key}" in fault:
                    words = fault.removeprefix(f"--set {key}: ").removeprefix(f"{key}: ")
                    told.setdefault((key, words), f"{_listed({key: value})}: {words}")  # a key that is none: once
    return list(told.values())


def _refused_corners(space: Space, source: Source, overrides: Sequence[str]) -> list[str]:
    """Return the faults of values together, each with the values that all corners with this fault share."""
    shared: dict[str, Values] = {}
    for corner in space.corners():
        for fault in _faults(source, overrides, corner):
            before = shared.get(fault, corner)
            shared[fault] = {k: v for k, v in before.items() if k in corner and _json(corner[k]) == _json(v)}
    advice = "say `when` one of them is to be searched, or take a value out"
    told = [f"{_listed(values) or 'every trial'}: {fault}; {advice}" for fault, values in shared.items()]
    return [*told[:10], *([f"and {len(told) - 10} more like these"] if len(told) > 10 else [])]


def _listed(values: Values) -> str:
    return ", ".join(f"{key} = {_json(value)}" for key, value in values.items())


def _faults(source: Source, overrides: Sequence[str], values: Values) -> list[str]:
    try:
        source.config([*overrides, *overrides_of(values)])
    except ConfigError as refused:
        return [fault.replace(" (--set)", "") for fault in refused.faults]
    return []
