"""`tune_plan`: measures a few evaluation plans on the devices and picks the fastest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.arguments import checked
from sculpt.files import written_whole
from sculpt.inputs import number_of
from sculpt.interrupts import check_interrupt
from sculpt.ir.lowering import Precision
from sculpt.model import Model
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import score_compiled
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.problem import Repair, make_problem

Choices = Sequence[tuple[str, Sequence[Any]]]
"""(field of `EvaluationPlan`, values to try); settled one after the other, the first values of all being the start. The name
"mesh" stands for `(policy_shards, image_shards)`."""

_ON_CPU: Choices = (
    ("convolution", ("lax", "im2col")),
    ("images_per_batch", (64, 32, 128)),
    ("policies_per_chunk", (1, 2)),
)
_ON_ACCELERATOR: Choices = (
    ("policies_per_chunk", (1, 8, 32)),
    ("convolution", ("lax", "im2col")),
    ("images_per_batch", (256, 1024, 64)),
    ("policies_per_chunk", (1, 4, 16, 64)),
)
_USABLE = 0.8
"""Share of the free memory that a plan may ask for."""
_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one plan did."""

    plan: EvaluationPlan
    """The plan."""
    policies_per_second: float | None
    """On all images, median of a few runs; None where it was not run."""
    memory: int | None
    """Bytes of temporary arrays on each device, as the compiler plans them; None where it does not tell."""
    compile_seconds: float
    """To trace and compile."""
    note: str = ""
    """Why it was not run."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The plan that was chosen, and why."""

    plan: EvaluationPlan
    """The fastest of those that fit."""
    trials: tuple[Trial, ...]
    """In the order in which they were tried."""
    device: str
    """Where: kind and number of devices."""
    memory_limit: int | None
    """Bytes that temporary arrays may take on each device; None where the device does not tell."""
    remembered: bool = False
    """Whether this comes from the cache of an earlier run."""

    def describe(self) -> list[str]:
        """Lines for people: the choice, then every trial."""
        limit = "unknown" if self.memory_limit is None else f"{self.memory_limit / 2**20:.0f} MiB"
        source = "an earlier run" if self.remembered else "this run"
        lines = [
            f"plan: {self.plan.describe()}",
            f"chosen in {source} on {self.device}; memory limit {limit}",
        ]
        for trial in self.trials:
            memory = "?" if trial.memory is None else f"{trial.memory / 2**20:.0f} MiB"
            rate = trial.note or f"{trial.policies_per_second:.2f} policies/s"
            lines.append(
                f"  {rate:>18}  {memory:>9}  compiled in {trial.compile_seconds:.1f} s  {trial.plan.describe()}"
            )
        return lines


@checked
def tune_plan(
    model: Model,
    space: Space,
    images: Any,
    labels: Any,
    calibration: Any = None,
    *,
    precision: Precision = "float32",
    choices: Choices | None = None,
    cache: str | Path | None = None,
    repair: Repair = "recalibrate",
) -> Tuning:
    """Finds the fastest plan for `evaluate_policies` with these arguments.

    One field of the plan after the other is settled by timing a few policies; all devices share the policies, or pairs of
    them the images of a policy. What the compiler says a plan needs is held against the free memory before the plan is run,
    so that none runs out.

    Args:
      model: the dense network.
      space: sites and patterns.
      images: float32 `[n, ...]`, as for `evaluate_policies`.
      labels: integers `[n]`.
      calibration: as for `evaluate_policies`.
      precision: of the scores; never chosen for speed, since it changes them.
      choices: values to try; None: what pays on this kind of device.
      cache: folder to keep the result in, by network, shapes, devices and versions; None: it is found anew each time.
      repair: as for `evaluate_policies`.

    Raises:
      ValueError: if no plan fits into memory, `choices` name no field of a plan, the arguments do not fit, or there are
        several hosts, whose clocks would choose differently.
    """
    if jax.process_count() > 1:
        raise ValueError("tune_plan runs on one host: tune there, and pass the plan on every host")
    kind, number = jax.devices()[0].device_kind, len(jax.devices())
    if choices is None:
        pairs = [("mesh", [(number, 1), (number // 2, 2)])] if number % 2 == 0 else []
        choices = [*(_ON_CPU if jax.default_backend() == "cpu" else _ON_ACCELERATOR), *pairs]
    _check_choices(choices)
    file, limit = None, _memory_limit()
    if cache is not None:
        file = (
            Path(cache) / f"plan-{_key(model, space, images, calibration, precision, choices, repair)}.json"
        )
        if (found := _read(file)) is not None and _fits(found, limit):
            return found
    trials: list[Trial] = []

    def attempt(plan: EvaluationPlan) -> Trial:
        # A batch larger than all images is all images.
        plan = dataclasses.replace(plan, images_per_batch=min(plan.images_per_batch, number_of(images)))
        for trial in trials:
            if trial.plan == plan:
                return trial
        trials.append(_try(model, space, images, labels, calibration, plan, repair, limit))
        return trials[-1]

    best = EvaluationPlan(precision=precision, policy_shards=number)
    for name, values in reversed(choices):
        best = _with(best, name, values[0])
    best = attempt(best)
    while best.policies_per_second is None and best.plan.images_per_batch > 1:
        best = attempt(dataclasses.replace(best.plan, images_per_batch=best.plan.images_per_batch // 2))
    if best.policies_per_second is None:
        raise ValueError(f"no plan fits into memory: {best.note}; use fewer images or a smaller network")
    for name, values in choices:
        settled = best.plan
        for value in values:
            trial = attempt(_with(settled, name, value))
            if (trial.policies_per_second or 0.0) > (best.policies_per_second or 0.0):
                best = trial
    tuning = Tuning(best.plan, tuple(trials), f"{number} x {kind}", limit)
    if file is not None:
        _write(file, tuning)
    return tuning


def _with(plan: EvaluationPlan, name: str, value: Any) -> EvaluationPlan:
    changed = {name: value} if name != "mesh" else dict(zip(("policy_shards", "image_shards"), value))
    return dataclasses.replace(plan, **changed)


def _try(
    model: Model,
    space: Space,
    images: Any,
    labels: Any,
    calibration: Any,
    plan: EvaluationPlan,
    repair: Repair,
    limit: int | None,
) -> Trial:
    """Compiles a plan, and times it where it fits."""
    if plan.devices > len(jax.devices()):
        return Trial(plan, None, None, 0.0, f"needs {plan.devices} devices, there are {len(jax.devices())}")
    problem = make_problem(model, space, images, labels, calibration, plan, repair)
    count = plan.policies_per_chunk * plan.policy_shards
    # Nothing is pruned: what is does not change the work.
    policies = plan.place(jnp.zeros((count, space.num_sites), jnp.int32))
    arguments = problem, policies, plan.place(jnp.int32(count))
    compile_seconds, memory, seconds = 0.0, None, []
    try:
        begun = time.perf_counter()
        compiled = score_compiled.lower(*arguments).compile()
        compile_seconds = time.perf_counter() - begun
        analysis = compiled.memory_analysis()
        memory = None if analysis is None else int(analysis.temp_size_in_bytes)
        if limit is not None and memory is not None and memory > limit:
            note = f"needs {memory / 2**20:.0f} MiB, {limit / 2**20:.0f} are free"
            return Trial(plan, None, memory, compile_seconds, note)
        for _ in range(_RUNS + 1):
            check_interrupt()
            begun = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - begun)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Trial(plan, None, memory, compile_seconds, "ran out of memory")
    return Trial(plan, count / statistics.median(seconds[1:]), memory, compile_seconds)


def _memory_limit() -> int | None:
    """Bytes that one device has free for temporary arrays, with a margin."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(_USABLE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    if device.platform != "cpu" or (free := _available()) is None:
        return None
    return int(_USABLE * free / jax.local_device_count())


def _available() -> int | None:
    """Bytes of the host's memory that programs can have, what the page cache would give back included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # only Linux tells in this way
        return None
    rows = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else None


def _fits(tuning: Tuning, limit: int | None) -> bool:
    """Whether a remembered plan fits into the memory that is free now."""
    needs = {trial.plan: trial.memory for trial in tuning.trials}.get(tuning.plan)
    return limit is None or needs is None or needs <= limit


def _check_choices(choices: Choices) -> None:
    fields = {field.name for field in dataclasses.fields(EvaluationPlan)} - {"precision"} | {"mesh"}
    if not all(name in fields and len(values) for name, values in choices):
        raise ValueError(
            f"choices must be (field, values to try), fields being of EvaluationPlan or mesh ({', '.join(sorted(fields))}), "
            f"got {list(choices)}"
        )


def _key(
    model: Model,
    space: Space,
    images: Any,
    calibration: Any,
    precision: Precision,
    choices: Choices,
    repair: Repair,
) -> str:
    """Tells apart what the speed of a plan depends on: network, shapes, devices, versions."""
    program = space.trace.program
    equations = [
        (eqn.name, [program.shape(o) for o in (*eqn.inputs, *eqn.outputs)]) for eqn in program.equations
    ]
    devices = [(device.platform, device.device_kind) for device in jax.devices()]
    shapes = [
        None if x is None else [tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(x)]
        for x in (images, calibration)
    ]
    cores = os.cpu_count()
    about = (
        equations,
        len(space.sites),
        shapes,
        devices,
        cores,
        jax.__version__,
        precision,
        list(choices),
        repair,
    )
    return hashlib.sha256(repr(about).encode()).hexdigest()[:24]


def _read(file: Path) -> Tuning | None:
    """What an earlier run kept; None where there is nothing, or nothing that can be read."""
    try:
        kept = json.loads(file.read_text())
        trials = tuple(Trial(**(row | {"plan": EvaluationPlan(**row["plan"])})) for row in kept["trials"])
        return Tuning(EvaluationPlan(**kept["plan"]), trials, kept["device"], kept["memory_limit"], True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _write(file: Path, tuning: Tuning) -> None:
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(tuning), indent=1))
