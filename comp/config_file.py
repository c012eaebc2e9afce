"""Config files: YAML + `extends` + `--set` -> a checked Config, or one message that lists every fault.

Later wins: defaults < files named by `extends` (in order) < the file itself < `--set key=value`. `extends` is relative
to the file that says it; every other path is relative to the current directory. Booleans are true and false only (YAML
1.1's `on`, `off`, `yes`, `no` stay text) and `2e-5` is a number.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from comp.catalog import nearest
from comp.config import Config

__all__ = [
    "ConfigError",
    "Source",
    "differences",
    "dump",
    "find",
    "load",
    "load_base",
    "parse_pairs",
    "parse_yaml",
    "read_yaml",
    "schema",
]

FOLDER = Path("configs")
Keys = tuple[str | int, ...]


class ConfigError(ValueError):
    """Every fault of a configuration; `str()` is the message for the user."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        many = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{source}: {many}\n" + "\n".join(f"  - {fault}" for fault in self.faults))


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and numbers, and an error for a key given twice."""


_TAG = "tag:yaml.org,2002:"
_REPLACED = {f"{_TAG}{kind}" for kind in ("bool", "int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"),
    list("-+.0123456789"),
)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ValueError(f"line {line}: keys are text, got {key!r}")
        if key in seen:
            raise ValueError(f"line {line}: key '{key}' is given twice (first in line {seen[key]})")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(f"{_TAG}int", _construct_int)
_Loader.add_constructor(f"{_TAG}map", _construct_mapping)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document. Raises ValueError with the line of the fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as fault:
        where = f"line {fault.problem_mark.line + 1}: " if fault.problem_mark else ""
        raise ValueError(f"{where}not valid YAML: {fault.problem or fault.context}") from None
    except yaml.YAMLError as fault:  # a character that YAML does not allow
        raise ValueError(f"not valid YAML: {' '.join(str(fault).split())}") from None
    except RecursionError:
        raise ValueError("nested too deeply: a config has few levels; look for a bracket that is not closed") from None


def parse_pairs(texts: Iterable[str], option: str) -> dict[str, Any]:
    """Return "key=value" texts as a mapping, values as YAML. `option`: of the command line, for the message.

    Raises ValueError for a text without "=", or whose key is no name.
    """
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"{option} '{text}': wanted key=value")
        pairs[key.strip()] = parse_yaml(value)
    return pairs


# --- the schema, walked along a dotted key ---------------------------------------------------------------------------


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _tags(model: type[BaseModel], discriminator: str) -> tuple[Any, ...]:
    return get_args(model.model_fields[discriminator].annotation)


def _schema_at(keys: Keys, data: Any) -> tuple[list[type[BaseModel]], str | None]:
    """Return the section classes possible at `keys` (one, or the variants) and the key that tells variants apart.

    `data` is the merged mapping; its tags choose the variant on the way.
    """
    models: list[type[BaseModel]] = [Config]
    discriminator: str | None = None
    for key in keys:
        if isinstance(key, int):  # an item of a list of sections; the class is already chosen
            data = data[key] if isinstance(data, list) and key < len(data) else None
            continue
        model = _chosen(models, discriminator, data)
        if model is None or key not in model.model_fields:
            return [], None
        field = model.model_fields[key]
        annotation = field.annotation
        if get_origin(annotation) is list:
            annotation = get_args(annotation)[0]
        models = _models(annotation)
        discriminator = field.discriminator if isinstance(field.discriminator, str) else None
        data = data.get(key) if isinstance(data, dict) else None
    return models, discriminator


def _chosen(models: list[type[BaseModel]], discriminator: str | None, data: Any) -> type[BaseModel] | None:
    if discriminator is None:
        return models[0] if models else None
    tag = data.get(discriminator) if isinstance(data, dict) else None
    if tag is None:  # an optimizer without a name is the first
        return models[0] if models else None
    return next((model for model in models if tag in _tags(model, discriminator)), None)


# --- merging ---------------------------------------------------------------------------------------------------------


class _Merged:
    """The merged mapping and, for every key set, where it was set."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.sources: dict[Keys, str] = {}

    def merge(self, new: dict[str, Any], source: str) -> None:
        self._merge(self.data, new, (), source)

    def _merge(self, old: dict[str, Any], new: dict[str, Any], keys: Keys, source: str) -> None:
        self._drop_stale(old, new, keys)
        for key, value in new.items():
            here = (*keys, key)
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                self._merge(old[key], value, here, source)
            else:
                old[key] = _copied(value)
            self.sources[here] = source

    def _drop_stale(self, old: dict[str, Any], new: dict[str, Any], keys: Keys) -> None:
        """When `new` chooses another variant (another optimizer, say), drop what that variant does not know."""
        models, discriminator = _schema_at(keys, self.data)
        if discriminator is None or discriminator not in new or discriminator not in old:
            return
        if new[discriminator] == old[discriminator]:
            return
        variant = _chosen(models, discriminator, new)
        if variant is not None:
            for key in [key for key in old if key not in variant.model_fields]:
                del old[key]

    def assign(self, assignment: str) -> None:
        """Apply one `--set a.b=value`. Raises ValueError when it cannot be read or placed."""
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted.strip():
            raise ValueError(f"--set wants key=value, got '{assignment}'; for example --set training.epochs=2")
        parts: list[str | int] = [
            int(part) if part.isdecimal() else part for part in re.split(r"\.|\[|\]\.?", dotted.strip()) if part
        ]
        value: Any = parse_yaml(text)
        if not any(isinstance(part, int) for part in parts):
            for part in reversed(parts):
                value = {part: value}
            self.merge(value, "--set")
            return
        last_index = max(index for index, part in enumerate(parts) if isinstance(part, int))
        target: Any = self.data
        for part in parts[: last_index + 1]:
            inside = isinstance(target, list) and isinstance(part, int) and part < len(target)
            if not (inside or (isinstance(target, dict) and part in target)):
                raise ValueError(f"--set {dotted}: there is no '{part}' to set; give the whole list instead")
            if part is parts[last_index] and last_index == len(parts) - 1:
                target[part] = value
                return
            target = target[part]
        for part in reversed(parts[last_index + 1 :]):
            value = {part: value}
        if not isinstance(target, dict):
            raise ValueError(f"--set {dotted}: '{parts[last_index]}' is {target!r}, which has no keys inside")
        self._merge(target, value, tuple(parts[: last_index + 1]), "--set")

    def source_of(self, keys: Keys) -> str | None:
        while keys:
            if keys in self.sources:
                return self.sources[keys]
            keys = keys[:-1]
        return None


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


# --- files -----------------------------------------------------------------------------------------------------------


def find(path: str | Path) -> Path:
    """Return the config file for `path`; a bare name is also looked up in configs/, with or without .yaml.

    Raises ValueError that lists what is there.
    """
    given = Path(path)
    tries = [given, FOLDER / given]
    if not given.suffix:
        tries += [given.with_suffix(".yaml"), FOLDER / given.with_suffix(".yaml")]
    for file in tries:
        if file.is_file():
            return file
    known = sorted(file.name for file in FOLDER.glob("*.yaml"))
    near = difflib.get_close_matches(given.name, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise ValueError(
        f"config file '{path}' not found{hint} Looked for {', '.join(str(file) for file in tries)}. "
        f"In {FOLDER}/: {', '.join(known) or 'nothing'}. `comp init` writes a first one."
    )


def read_yaml(file: Path) -> Any:
    """Read a YAML file. Raises ConfigError where it is none."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as fault:
        raise ConfigError(str(file), [f"not UTF-8 text (byte {fault.start}); save it as UTF-8"]) from None
    except ValueError as fault:
        raise ConfigError(str(file), [str(fault)]) from None


def _read(file: Path, merged: _Merged, chain: tuple[Path, ...]) -> None:
    resolved = file.resolve()
    if resolved in chain:
        circle = " -> ".join(link.name for link in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(str(file), [f"extends goes in a circle: {circle}"])
    data = read_yaml(file)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(str(file), [f"a config file is a mapping of keys, got {type(data).__name__}"])
    parents = data.pop("extends", None)
    if parents is None:
        parents = []
    if not isinstance(parents, str | list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(str(file), [f"extends is a file name or a list of them, got {parents!r}"])
    for name in [parents] if isinstance(parents, str) else parents:
        parent = file.parent / name
        if not parent.is_file():
            raise ConfigError(str(file), [f"extends: '{name}' not found beside it (looked for {parent})"])
        _read(parent, merged, (*chain, resolved))
    merged.merge(data, str(file))


class Source:
    """A config file that has been read, to be checked with one set of overrides after another."""

    def __init__(self, path: str | Path) -> None:
        """Read the file and what it extends. Raises ConfigError where they cannot be read."""
        self.file = find(path)
        self._merged = _Merged()
        _read(self.file, self._merged, ())

    def config(self, overrides: Iterable[str] = ()) -> Config:
        """Return the checked config; `overrides` are `key=value` texts, the last one wins.

        Raises ConfigError with every fault, as `load` does.
        """
        merged = deepcopy(self._merged)
        faults = []
        for override in overrides:
            try:
                merged.assign(override)
            except ValueError as fault:
                faults.append(str(fault))
        config = None
        try:
            config = Config.model_validate(merged.data)
        except ValidationError as fault:
            faults += [_said(error, merged) for error in fault.errors()]
        if faults or config is None:
            raise ConfigError(str(self.file), list(dict.fromkeys(faults)))
        return config


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read, merge and check a config file; `overrides` are `key=value` texts, the last one wins.

    Raises ConfigError (a ValueError) with every fault: its dotted key, the file it stands in, what was got, what is
    allowed and the nearest valid name.
    """
    return Source(path).config(overrides)


def load_base(config: Config) -> tuple[Config, str]:
    """Return what `config` would be without its own settings, and where that comes from, in words.

    Competition, tasks, metric and backbone are kept; the rest is configs/base.yaml over the defaults, or the defaults
    alone where there is no such file, or it does not go together with those.
    """
    kept = config.model_dump(mode="json", include={"competition": True, "tasks": True, "metric": True})
    kept["model"] = {"backbone": config.model.backbone}
    file = FOLDER / "base.yaml"
    if file.is_file():
        merged = _Merged()
        merged.merge(kept, "run")
        try:
            _read(file, merged, ())
            return Config.model_validate(merged.data), f"{file} as it is now"
        except ValueError:  # pydantic's is one, too
            pass
    return Config.model_validate(kept), "the defaults"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) where two dumped configs differ; None for a key that one has not.

    `tracking` is left out: it changes no result.
    """
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**after, **before} if not key.startswith("tracking.")]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}".strip(".")).items()}
    return {key: value}


# --- saying what is wrong --------------------------------------------------------------------------------------------


def _plain_keys(location: Sequence[str | int], data: Any, missing: bool) -> Keys:
    """Drop from a pydantic location what is not a key of the file: variant tags and union branches."""
    keys: list[str | int] = []
    for position, key in enumerate(location):
        last = position == len(location) - 1
        inside = (isinstance(data, dict) and key in data) or (isinstance(data, list) and isinstance(key, int))
        if inside:
            keys.append(key)
            data = data[key] if isinstance(data, dict) or (isinstance(key, int) and key < len(data)) else None
        elif last and missing:
            keys.append(key)
        elif _is_section_default(keys, key):
            keys.append(key)
            data = None
    return tuple(keys)


def _is_section_default(keys: list[str | int], key: str | int) -> bool:
    models, _ = _schema_at(tuple(keys), {})
    return any(key in model.model_fields for model in models)


def _said(error: Any, merged: _Merged) -> str:
    kind, context = error["type"], error.get("ctx", {})
    keys = _plain_keys(error["loc"], merged.data, missing=kind == "missing")
    parent_models, discriminator = _schema_at(keys[:-1], merged.data)
    got = f"got {error['input']!r}"
    if kind == "extra_forbidden":
        section = _chosen(parent_models, discriminator, _value_at(merged.data, keys[:-1]))
        allowed = list(section.model_fields) if section else []
        text = f"unknown key{nearest(str(keys[-1]), allowed) or '.'} Allowed: {', '.join(allowed)}."
    elif kind == "missing":
        section = _chosen(parent_models, discriminator, _value_at(merged.data, keys[:-1]))
        field = section.model_fields.get(str(keys[-1])) if section else None
        about = (field.description or "").split("\n")[0] if field else ""
        text = "is missing" + (f": {about}" if about else "")
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        models, tag_key = _schema_at(keys, merged.data)
        names = [str(tag) for model in models for tag in _tags(model, tag_key or "name")]
        if kind == "union_tag_not_found":
            text = f"`{tag_key}` is missing. Allowed: {', '.join(names)}."
        else:
            hint = nearest(context["tag"], names) or "."
            text = f"unknown {tag_key} '{context['tag']}'{hint} Allowed: {', '.join(names)}."
    elif kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        hint = nearest(str(error["input"]), names) or "."
        text = f"{got}{hint} Allowed: {', '.join(names)}."
    elif kind == "value_error":
        text = str(context["error"])
    else:
        text = f"{error['msg'][0].lower()}{error['msg'][1:]}, {got}"
    source = merged.source_of(keys) if kind != "missing" else merged.source_of(keys[:-1])
    where = ".".join(str(key) for key in keys) or "config"
    return f"{where}{f' ({source})' if source else ''}: {text}"


def _value_at(data: Any, keys: Keys) -> Any:
    for key in keys:
        if isinstance(data, dict):
            data = data.get(str(key))
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return None
    return data


# --- writing ---------------------------------------------------------------------------------------------------------


def dump(config: Config) -> str:
    """Return the resolved config as YAML that `load` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, for editors; `extends` included, nothing required by a single file."""
    document = Config.model_json_schema()
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    document["properties"]["extends"] = {**names, "description": "Config file(s) this one starts from; later wins."}
    document.pop("required", None)
    return document
