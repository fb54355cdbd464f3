"""Everything that is decided and checked before the first replica starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs import check
from configs.catalogue import SIM_BYTES
from configs.errors import ConfigError
from configs.load import Profile, load_profile, setting
from configs.runtime import home_dir
from configs.tokenizer import ModelFiles, find_model, load_model_files
from ops.errors import OperationError
from ops.memory import BASE_BYTES, ModelShape
from ops.picture import check_can_plot
from ops.progress import Progress
from ops.tune.errors import TuneError
from ops.tune.findings import Findings, Value
from ops.tune.knobs import Asked, Room, merged, parse_sweep, space_of
from ops.tune.report import LATENCY_PICTURE
from ops.tune.subject import Subject
from ops.tune.sweep import Plan, Side, Sweep
from ops.tune.trial import Place
from ops.tune.workload import Slo, Workload
from replicas.contract import EngineError

_MEMORY_SHARE = 0.8
"""Of the memory that is free now, for the KV caches of a trial and its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A command line."""

    profile: str
    folder: Path
    settings: Sequence[str] = ()
    group: str | None = None
    input_tokens: int = 512
    shared_tokens: int = 128
    output_tokens: int = 64
    requests: int = 64
    rates: tuple[float, ...] = ()
    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    share: float = 0.95
    sweeps: tuple[str, ...] = ()
    grid: bool = False
    compare: str = "native"
    minutes: float = 20.0
    retry_failed: bool = False

    @property
    def workload(self) -> Workload:
        return Workload(
            input_tokens=self.input_tokens,
            shared_tokens=self.shared_tokens,
            output_tokens=self.output_tokens,
            num_requests=self.requests,
            rates=self.rates,
        )

    @property
    def slo(self) -> Slo:
        return Slo(ttft_s=self.ttft_ms / 1000, tpot_s=self.tpot_ms / 1000, share=self.share)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sweep that can begin. `notes`: what a reader of its report must know."""

    profile: str
    sweep: Sweep
    notes: tuple[str, ...]


def prepare(wanted: Wanted, env: Mapping[str, str], progress: Progress) -> Prepared:
    """Checks everything that can be checked beforehand. Raises ConfigError, OperationError."""
    sweeps = merged([parse_sweep(text) for text in wanted.sweeps])
    overrides = tuple(setting(text) for text in wanted.settings)
    loaded = load_profile(wanted.profile, env, overrides)
    subject = Subject(wanted.profile, _group_index(loaded, wanted.group), overrides, env)
    subject.tree({})  # what is written at the end must not need the environment
    home = home_dir(env)
    files = _check_model(loaded, subject, home)
    _check_engine(subject)
    _check_lengths(wanted.workload, subject, files)
    check_can_plot(wanted.folder / LATENCY_PICTURE)
    other, notes = _other(subject, wanted.compare, home)
    plan = Plan(wanted.workload, wanted.slo, wanted.minutes, wanted.grid)
    sides = [_side(one, plan, sweeps, home) for one in (subject, other) if one is not None]
    _check_sweeps(sweeps, sides)
    findings = Findings(wanted.folder / "findings.jsonl", retry=wanted.retry_failed)
    if findings.num_found:
        progress.say(f"{findings.num_found} findings of earlier calls in {wanted.folder}")
    for note in notes:
        progress.say(note)
    place = Place(home, files.tokenizer, wanted.folder)
    return Prepared(Path(wanted.profile).stem, Sweep(plan, sides, findings, place, progress), notes)


def _group_index(loaded: Profile, name: str | None) -> int:
    names = [group.name for group in loaded.config.groups]
    origin = loaded.document.origin_of(("groups",))
    if name is None and len(names) > 1:
        raise ConfigError(f"there are {', '.join(names)}: choose one with --group", key=("groups",), origin=origin)
    if name is not None and name not in names:
        raise ConfigError(f"no group {name!r}; there is: {', '.join(names)}", key=("groups",), origin=origin)
    return 0 if name is None else names.index(name)


def _check_model(loaded: Profile, subject: Subject, home: Path) -> ModelFiles:
    model = loaded.config.model_named(subject.group.model)
    assert model is not None, "the profile's checks have looked"
    for problem in check.missing_models(subject.alone(), home):
        key = ("models", loaded.config.models.index(model), "source")
        raise loaded.error(check.Problem(key, problem.reason))
    return load_model_files(model.source, home)


def _check_engine(subject: Subject) -> None:
    kind = subject.group.engine.kind
    if kind == "openai":
        raise TuneError(f"group {subject.group.name} is a server that runs already: tune it where it is started")
    if kind == "vllm":
        _check_vllm()


def _check_vllm() -> None:
    from replicas.vllm.versions import check_installed

    try:
        check_installed()
    except EngineError as error:
        raise TuneError(str(error)) from error


def _check_lengths(workload: Workload, subject: Subject, files: ModelFiles) -> None:
    if workload.shared_tokens > workload.input_tokens:
        raise TuneError(f"--shared-tokens {workload.shared_tokens} is more than --input-tokens {workload.input_tokens}")
    engine = subject.group.engine
    made_for = engine.sim.max_model_len if engine.kind == "sim" else files.max_model_len
    longest = min((length for length in (engine.max_model_len, made_for) if length is not None), default=None)
    if longest is not None and workload.input_tokens + workload.output_tokens > longest:
        raise TuneError(
            f"--input-tokens {workload.input_tokens} and --output-tokens {workload.output_tokens} are beyond the "
            f"context of {longest} tokens"
        )


def _other(subject: Subject, kind: str, home: Path) -> tuple[Subject | None, tuple[str, ...]]:
    """What is compared with, or a note that says why nothing is."""
    if kind == "none":
        return None, ()
    if subject.group.engine.kind == kind:
        more = "; --compare vllm tunes vLLM beside it" if kind == "native" else ""
        return None, (f"Nothing is compared: the profile's own engine is {kind}{more}.",)
    try:
        other = subject.on(kind)
        if kind == "native":
            _check_family(other, home)
        else:
            _check_vllm()
    except ConfigError as error:
        return None, (f"{kind} is left out: {error.reason}.",)
    except (EngineError, OperationError) as error:
        return None, (f"{kind} is left out: {error}.",)
    return other, ()


def _check_family(subject: Subject, home: Path) -> None:
    """Raises EngineError where the in-house engine does not know the model."""
    from replicas.engine.families import read_spec

    read_spec(find_model(subject.alone().models[0].source, home))


def _side(subject: Subject, plan: Plan, sweeps: Mapping[str, tuple[Value, ...]], home: Path) -> Side:
    asked = Asked(subject.group, plan.workload, plan.slo, _room(subject, home))
    return Side(subject, space_of(asked, sweeps))


def _check_sweeps(sweeps: Mapping[str, tuple[Value, ...]], sides: Sequence[Side]) -> None:
    for name in sweeps:
        if not any(name in side.space for side in sides):
            engines = " and ".join(side.name for side in sides)
            there = ", ".join(dict.fromkeys(knob for side in sides for knob in side.space))
            raise TuneError(f"--sweep {name}: {engines} here has no such knob; there is {there}")


def _room(subject: Subject, home: Path) -> Room:
    config = subject.alone()
    group, model = config.groups[0], config.models[0]
    if model.source == SIM_BYTES or group.engine.kind == "sim":
        return Room()
    shape = ModelShape.read(find_model(model.source, home))
    engine = group.engine
    held = BASE_BYTES[engine.kind] + shape.weights_in(engine.dtype, engine.quantization)
    free = int(psutil.virtual_memory().available * _MEMORY_SHARE) - group.replicas * held
    dtype = "float32" if engine.dtype == "auto" else engine.dtype
    # vLLM refuses a cache that one request of the longest context does not fit into; ours shortens the context.
    longest = engine.max_model_len or (shape.max_model_len if engine.kind == "vllm" else 0)
    return Room(shape.kv_bytes_per_token(dtype, engine.kv_cache_dtype), max(0, free), longest)
