"""Pipeline files: YAML -> steps, each checked against the commands of comp, or one message that lists every fault."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from comp import config_file
from comp.catalog import nearest
from comp.config_file import ConfigError
from comp.config_section import Section

__all__ = ["Call", "Command", "Option", "Pipeline", "read_pipeline"]


@dataclass(frozen=True)
class Option:
    """What an option of a command takes."""

    flag: bool
    several: bool
    required: bool


@dataclass(frozen=True)
class Command:
    """What a command of comp takes."""

    options: Mapping[str, Option]
    """By name, without dashes."""
    needed: int
    """Arguments that must be there."""
    most: float
    """Arguments that may be there."""


class Step(Section):
    """One command."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the step, once in a file."""
    command: str
    """A command of comp and its arguments: train, "bundle verify bundles/x", ..."""
    config: str | None = None
    """--config, looked up beside the pipeline file first."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Options without their dashes: {fold: all, set: [training.epochs=2], restart: true}."""
    inputs: list[str] = Field(default_factory=list)
    """Files and folders that go into the step and stand neither in its arguments nor in its config."""
    outputs: list[str] = Field(default_factory=list)
    """Files and folders that it makes, where they do not follow from its command."""


class Pipeline(Section):
    """Steps in the order in which they run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of runs/<name>.pipeline.json."""
    steps: list[Step] = Field(min_length=1)


def read_pipeline(path: str | Path, commands: Mapping[str, Command]) -> tuple[Pipeline, list[Call]]:
    """Read a pipeline file; check every step against the commands there are, and every config it names.

    Raises ConfigError with all faults.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"pipeline file '{path}' not found; give its path, like configs/two-stage/pipeline.yaml")
    data = config_file.read_yaml(file)
    if not isinstance(data, dict):
        raise ConfigError(str(file), [f"a pipeline is a mapping with name and steps, got {type(data).__name__}"])
    try:
        pipeline = Pipeline.model_validate(data)
    except ValidationError as refused:
        raise ConfigError(str(file), [_said(error, data) for error in refused.errors()]) from None
    faults: list[str] = []
    names = [step.name for step in pipeline.steps]
    faults += [f"steps: two are named '{name}'" for name in dict.fromkeys(names) if names.count(name) > 1]
    calls = [call for step in pipeline.steps if (call := _call(step, file.parent, commands, faults)) is not None]
    if faults:
        raise ConfigError(str(file), faults)
    return pipeline, calls


def _said(error: Any, data: Any) -> str:
    keys, kind = error["loc"], error["type"]
    if len(keys) > 1 and keys[0] == "steps":
        step = data["steps"][keys[1]]
        name = step.get("name", keys[1]) if isinstance(step, dict) else keys[1]
        where, allowed = ".".join(map(str, (f"step '{name}'", *keys[2:]))), list(Step.model_fields)
    else:
        where, allowed = ".".join(map(str, keys)), list(Pipeline.model_fields)
    if kind == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(keys[-1]), allowed) or '.'} Allowed: {', '.join(allowed)}."
    if kind == "missing":
        return f"{where}: is missing"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


@dataclass(frozen=True)
class Call:
    """A step that was checked."""

    step: Step
    command: str
    """Its name alone."""
    positional: Sequence[str]
    config: Path | None
    args: Mapping[str, list[str]]
    """Option -> its values; none for a flag that is set."""

    @property
    def words(self) -> list[str]:
        """The command line behind `comp`."""
        words = [*self.command.split(), *self.positional]
        if self.config is not None:
            words += ["--config", str(self.config)]
        for name, values in self.args.items():
            words += [word for value in values for word in (f"--{name}", value)] if values else [f"--{name}"]
        return words

    @property
    def outputs(self) -> list[str]:
        """Files and folders that it makes. Raises ValueError where they do not follow from the arguments."""
        return [*_outputs(self), *self.step.outputs]

    def load(self) -> Any:
        """Return its resolved config; None without one."""
        return None if self.config is None else config_file.load(self.config, self.args.get("set", []))

    def one(self, option: str, default: str | None = None) -> str | None:
        values = self.args.get(option)
        return values[0] if values else default


def _call(step: Step, folder: Path, commands: Mapping[str, Command], faults: list[str]) -> Call | None:
    """Return a step as a command line, or None and what is wrong with it."""
    where, words = f"step '{step.name}'", shlex.split(step.command)
    name = next((" ".join(words[:end]) for end in (2, 1) if " ".join(words[:end]) in commands), None)
    if name is None or name == "pipeline":
        known = [command for command in commands if command != "pipeline"]
        hint = nearest(words[0], known) if words else ""
        faults.append(f"{where}: unknown command '{step.command}'{hint or '.'} Allowed: {', '.join(known)}.")
        return None
    command, positional = commands[name], words[len(name.split()) :]
    before = len(faults)
    if any(word.startswith("-") for word in positional):
        faults.append(f"{where}: options stand in `args`, like {{fold: all}}, not in the command '{step.command}'")
    elif not command.needed <= len(positional) <= command.most:
        wanted = f"{command.needed}" if command.needed == command.most else f"{command.needed} or more"
        faults.append(f"{where}: `comp {name}` takes {wanted} arguments, got {len(positional)}")
    args: dict[str, list[str]] = {}
    for key, value in step.args.items():
        option = command.options.get(key)
        if option is None or key == "config":
            allowed = [known for known in command.options if known != "config"]
            hint = "; it is a key of the step" if key == "config" else nearest(key, allowed)
            faults.append(f"{where}.args.{key}: no option of `comp {name}`{hint or '.'} Allowed: {', '.join(allowed)}.")
        elif option.flag:
            if not isinstance(value, bool):
                faults.append(f"{where}.args.{key}: is a switch, true or false; got {value!r}")
            elif value:
                args[key] = []
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            if (len(values) > 1 and not option.several) or not values or not all(map(_is_plain, values)):
                wanted = "one value or a list of them" if option.several else "one value"
                faults.append(f"{where}.args.{key}: wanted {wanted}, text or a number; got {value!r}")
            else:
                args[key] = [str(one) for one in values]
    given = {*args, *(["config"] if step.config else [])}
    absent = [key for key, option in command.options.items() if option.required and key not in given]
    if absent:
        faults.append(f"{where}: `comp {name}` needs {', '.join(absent)}")
    call = Call(step, name, positional, _find_config(step, folder, command, name, faults), args)
    if len(faults) == before:
        try:
            call.load()
            call.outputs  # noqa: B018 - for what it raises
        except ConfigError as fault:
            faults += [f"{where}: {fault.args[0].partition(':')[0]}: {one}" for one in fault.faults]
        except ValueError as fault:
            faults.append(f"{where}: {fault}")
    return call if len(faults) == before else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _find_config(step: Step, folder: Path, command: Command, name: str, faults: list[str]) -> Path | None:
    if step.config is None:
        return None
    if "config" not in command.options:
        faults.append(f"step '{step.name}'.config: `comp {name}` takes no config")
        return None
    beside = folder / step.config
    try:
        return beside if beside.is_file() else config_file.find(step.config)
    except ValueError as fault:
        faults.append(f"step '{step.name}'.config: {fault}")
        return None


def _outputs(call: Call) -> list[str]:
    """Return what a command makes, as far as that follows from its arguments."""
    stem = None if call.config is None else call.config.stem
    run = call.one("run", stem)
    match call.command:
        case "train" if "seeds" in call.args:
            seeds = [seed.strip() for seed in (call.one("seeds") or "").split(",")]
            return [f"runs/{run}.seeds.json", *(f"runs/{run}-seed{seed}" for seed in seeds)]
        case "train":
            return [] if "check-determinism" in call.args else [f"runs/{run}{'-debug' if 'debug' in call.args else ''}"]
        case "pretrain":
            fold = call.one("fold")
            return [f"runs/{call.one('run') or f'{stem}-pretrain' + ('' if fold is None else f'-fold{fold}')}"]
        case "classical":
            features = [name.replace(":", "-") for name in call.args["features"]]
            return [f"runs/{call.one('run', '-'.join([*features, call.one('estimator', 'ridge') or '']))}"]
        case "pseudo":
            return [f"pseudo/{call.one('name', Path(call.args['run'][0]).name)}"]
        case "blend":
            return [f"blends/{call.one('name', 'blend')}"]
        case "search":
            return [f"searches/{call.one('name', stem)}/best.yaml"]
        case "infer":
            source = call.one("blend", call.one("run"))
            if source is None:
                raise ValueError("`comp infer` of a pipeline needs run or blend: the newest run may be any")
            return [call.one("out") or f"submissions/{Path(source).name}.csv"]
        case "bundle" | "features":
            return call.args.get("out", [])
        case "report":
            return [] if "text" in call.args else [call.one("out") or f"{call.positional[0]}/report.html"]
        case "folds":
            return [f"folds/{call.load().fold_name}.csv"]
        case "init":
            return [call.one("out") or f"configs/{call.one('name')}.yaml"]
    return []
