"""The trainer's settings: sections of checked fields, read from YAML and from `section.field=value` on a command line.

Below each field stand its meaning, its unit and its range. Whatever is wrong is refused under the field's full name, as
in `pipeline.lag = 0: it must be at least 1`, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import yaml

ScheduleName: TypeAlias = Literal["DNI", "1F1B", "GPipe"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Fields that check themselves: first their types, then, in _check(), their ranges."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            value = _typed(f"{self.section}.{each.name}", getattr(self, each.name), hints[each.name])
            object.__setattr__(self, each.name, value)
        self._check()

    def _check(self) -> None:
        """Calls _require() for each field that has a range."""

    def _require(self, field_name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{self.section}.{field_name} = {getattr(self, field_name)!r}: it must be {rule}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """What is trained."""

    section: ClassVar[str] = "model"

    factory: str = "gpt:byte_gpt"
    """A function that makes an nn.Sequential, as "module:function"; the module may lie beside the script that runs."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory."""

    def _check(self) -> None:
        module, colon, function = self.factory.partition(":")
        names = [*module.split("."), function]
        self._require("factory", bool(colon) and all(n.isidentifier() for n in names), 'of the form "module:function"')


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What it is trained on: bytes of text."""

    section: ClassVar[str] = "data"

    files: list[str] = field(default_factory=list)
    """Paths of text files, at least 20; every 20th is for validation. Empty: the installed Python's own sources."""
    seq_len: int = 128
    """Bytes in a sequence; at least 1."""
    max_mb: float = 8.0
    """Millions of bytes to read at most, of both splits together; above 0."""

    def _check(self) -> None:
        self._require("seq_len", self.seq_len >= 1, "at least 1")
        self._require("max_mb", self.max_mb > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Section):
    """How the stages work together. policy, interface, lag and unlock_after_steps matter to the schedule DNI alone."""

    section: ClassVar[str] = "pipeline"

    schedule: ScheduleName = "DNI"
    """DNI, 1F1B or GPipe."""
    num_microbatches: int = 4
    """Micro-batches in a step; at least 1, a divisor of run.batch_size, and for 1F1B at least the number of stages."""
    policy: Literal["auto", "wait", "synthetic"] = "auto"
    """Which gradient a stage uses: see dnipipe/schedule/policy.py."""
    interface: Literal["auto", "linear", "mlp", "conv", "local_head", "transformer"] = "auto"
    """What predicts it; auto chooses by the activation's layout: see dnipipe/interface/choose.py."""
    lag: int = 2
    """Micro-batches from an activation to the true gradient that travels beside it; at least 1."""
    unlock_after_steps: int | None = None
    """Steps under `wait` before the policy begins; at least 0, null for the policy's own number."""

    def _check(self) -> None:
        self._require("num_microbatches", self.num_microbatches >= 1, "at least 1")
        self._require("lag", self.lag >= 1, "at least 1")
        unlock = self.unlock_after_steps
        self._require("unlock_after_steps", unlock is None or unlock >= 0, "at least 0, or null")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """How weights move: AdamW on every stage by itself, and Adam on its predictor."""

    section: ClassVar[str] = "optim"

    learning_rate: float = 1e-3
    """Step size after the warm-up; above 0."""
    interface_learning_rate: float = 1e-3
    """Step size of the predictors, which have no warm-up; above 0."""
    weight_decay: float = 0.1
    """Decoupled decay per unit of learning rate; at least 0."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0; at least 0."""
    clip: float = 1.0
    """Largest gradient norm of one stage; at least 0, and 0 does not clip."""

    def _check(self) -> None:
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("interface_learning_rate", self.interface_learning_rate > 0, "above 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("warmup_steps", self.warmup_steps >= 0, "at least 0")
        self._require("clip", self.clip >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """How long, how often it is measured, and where its files go."""

    section: ClassVar[str] = "run"

    seed: int = 0
    """Of weights and batches; at least 0."""
    batch_size: int = 16
    """Sequences in a step, over all its microbatches; at least 1."""
    train_seconds: float = 60.0
    """Seconds of training, evaluation not counted; at least 0, and 0 trains for run.steps instead."""
    steps: int = 0
    """Optimizer steps, if run.train_seconds is 0; then at least 1, else 0."""
    eval_every_s: float = 10.0
    """Seconds of training between two evaluations; at least 0, and 0 evaluates only at the end."""
    eval_batches: int = 8
    """Validation batches of run.batch_size sequences in an evaluation; at least 1."""
    log_every_steps: int = 20
    """Steps between two lines of metrics; also how often all ranks learn how much time is left; at least 1."""
    sample_bytes: int = 200
    """Bytes of text to write at the end; at least 0."""
    sample_prompt: str = "\n"
    """What that text goes on from; at least one character."""
    sample_temperature: float = 0.8
    """Above 0; the lower, the more often the likeliest byte is drawn."""
    output_dir: str = "runs/latest"
    """The folder of the run's files, relative to where it was started; made if missing."""
    compare_with: list[ScheduleName] = field(default_factory=list)
    """Schedules that train the same model on the same batches after pipeline.schedule, each for as long."""
    trace_steps: list[int] = field(default_factory=list)
    """Two numbers: the first step to trace, and the first no longer to trace. Empty traces none."""

    def _check(self) -> None:
        for name in ("seed", "train_seconds", "steps", "eval_every_s", "sample_bytes"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("batch_size", "eval_batches", "log_every_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("sample_prompt", self.sample_prompt != "", "at least one character")
        self._require("sample_temperature", self.sample_temperature > 0, "above 0")
        self._require("steps", self.train_seconds > 0 or self.steps > 0, "at least 1 where run.train_seconds is 0")
        self._require(
            "steps",
            self.train_seconds == 0 or self.steps == 0,
            "0, or run.train_seconds 0, for one of them ends the run",
        )
        self._require("output_dir", self.output_dir != "", "a folder")
        window = self.trace_steps
        in_order = window == [] or (len(window) == 2 and 0 <= window[0] < window[1])
        self._require("trace_steps", in_order, "empty or two growing numbers from 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; Config() is the embedded example."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.run.batch_size % self.pipeline.num_microbatches:
            raise ValueError(
                f"run.batch_size = {self.run.batch_size}: it must be a multiple of pipeline.num_microbatches = "
                f"{self.pipeline.num_microbatches}"
            )

    def to_yaml(self) -> str:
        """Every setting, given or default, as load_config() reads it back."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


SECTIONS: tuple[type[Section], ...] = (ModelConfig, DataConfig, PipelineConfig, OptimConfig, RunConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, then overrides, the last one winning.

    Args:
        path: sections of fields; what is missing keeps its default.
        overrides: each `section.field=value`, the value in YAML; `model.options.depth=4` sets one entry of a mapping.

    Raises: ValueError: no YAML, an unknown name or a bad value; it names the setting and the nearest that exists.
    """
    content = _read_yaml(str(path), Path(path).read_text(encoding="utf-8"))
    given: dict[str, dict[str, Any]] = {kind.section: {} for kind in SECTIONS}
    for section, values in _mapping(str(path), content).items():
        for name, value in _mapping(str(section), values).items():
            _put(given, f"{section}.{name}", value)
    for override in overrides:
        full_name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r}: an override is written section.field=value")
        _put(given, full_name, _read_yaml(override, text))
    return Config(
        model=ModelConfig(**given["model"]),
        data=DataConfig(**given["data"]),
        pipeline=PipelineConfig(**given["pipeline"]),
        optim=OptimConfig(**given["optim"]),
        run=RunConfig(**given["run"]),
    )


def _read_yaml(source: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error


def _mapping(name: str, value: Any) -> dict[Any, Any]:
    if value is None:  # an empty file, or a section whose fields are all commented out
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold `name: value` lines, got {value!r}")
    return value


def _put(given: dict[str, dict[str, Any]], full_name: str, value: Any) -> None:
    known = {f"{kind.section}.{each.name}": each for kind in SECTIONS for each in fields(kind)}
    section, _, rest = full_name.partition(".")
    name, _, entry = rest.partition(".")
    each = known.get(f"{section}.{name}")
    if each is None or (entry and each.default_factory is not dict):
        beside = [other for other in known if other.startswith(f"{section}.")] or given
        raise ValueError(f"there is no setting {full_name}; {_nearest(full_name, known, beside)}")
    if entry:
        value = {**given[section].get(name, {}), entry: value}
    given[section][name] = value


def _nearest(wrong: str, known: Iterable[str], otherwise: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(wrong.lower(), by_lower, n=1)
    return f"did you mean {by_lower[close[0]]}?" if close else f"there are {', '.join(otherwise)}"


def _typed(full_name: str, value: Any, hint: Any) -> Any:
    """The value as the type that its field declares; a whole number will do for a float, and so will 1e-3."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{full_name} = {value!r}; {_nearest(str(value), arguments, arguments)}")
    if origin is UnionType:
        inner = next(argument for argument in arguments if argument is not NoneType)
        return None if value is None else _typed(full_name, value, inner)
    if origin is list and isinstance(value, list):
        return [_typed(f"{full_name}[{index}]", item, arguments[0]) for index, item in enumerate(value)]
    if hint is float:
        return _number(full_name, value)
    if isinstance(value, bool) or not isinstance(value, origin or hint):
        raise ValueError(f"{full_name} = {value!r}: it must be a {(origin or hint).__name__}")
    return value


def _number(full_name: str, value: Any) -> float:
    try:  # YAML 1.1 takes 1e-3, without a point, for text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{full_name} = {value!r}: it must be a finite number")
    return number
