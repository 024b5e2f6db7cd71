"""The commands of the command line, and `main`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from sculpt.cache import cache_folder
from sculpt.cli.console import error_line, make_console, print_any_text
from sculpt.cli.devices import (
    make_a_device_of_every_core,
    require_device,
    use_compilation_cache,
    wait_for_devices,
)
from sculpt.cli.options import make_parser
from sculpt.cli.show import info
from sculpt.interrupts import EXIT_CODE, check_interrupt, deferred_interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 130 when interrupted.

    The first Ctrl-C ends it after the step under way, the second at once.

    A mistake of the user is one line on stderr; `--debug` shows where it came from.
    """
    print_any_text()
    with deferred_interrupts():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = vars(make_parser().parse_args(arguments))
    command, parser, debug = (options.pop(name) for name in ("command", "parser", "debug"))
    try:
        use_compilation_cache()
        if command == "info":
            info(options)
        elif command == "evaluate" and set(options) != {"run"}:
            _evaluate_policies(options)
        elif command == "export" and "format" in options:
            _export_formats(options)
        elif command == "report" and "tensorboard" in options:
            _write_events(options)
        elif command == "bench":
            _bench_latency(options)
        else:
            _run(command, options)
        check_interrupt()
    # RuntimeError: what jax raises where a device is absent, or its memory is full.
    except (ValueError, OSError, RuntimeError) as error:
        if debug:
            raise
        print(error_line(parser.in_options(str(error), options)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(error_line("interrupted; the same command resumes"), file=sys.stderr)
        wait_for_devices()
        return EXIT_CODE
    return 0


def _run(command: str, options: dict[str, Any]) -> None:
    from sculpt.pipeline import STAGES, Pipeline
    from sculpt.pipeline.closing import caption_of, rows_of
    from sculpt.pipeline.progress import watching
    from sculpt.report import RunDirectory, closing_table

    require_device()
    folder, devices = options.pop("run"), options.pop("devices", None)
    begins = command in ("train", "prune")
    run = RunDirectory.open(folder) if begins else RunDirectory.existing(folder)
    console = make_console()
    with watching(console) as watcher:
        pipeline = Pipeline(run, options, watcher, devices, cache_folder())
        pipeline.execute(STAGES if command == "prune" else (command,))
    if command in ("prune", "evaluate", "report"):
        record = run.record("evaluate")
        console.print(closing_table(rows_of(record), caption_of(record, pipeline.train_settings.seed)))
    if command in ("prune", "report"):
        console.print(f"report: {run.path / 'report.html'}", soft_wrap=True, highlight=False)


def _evaluate_policies(options: dict[str, Any]) -> None:
    from sculpt.pipeline.policies import PLAN_FIELDS, PolicyOptions, score_policies_of_run
    from sculpt.pipeline.progress import watching
    from sculpt.report import RunDirectory
    from sculpt.scoring.journal import StreamReport
    from sculpt.scoring.plan import EvaluationPlan
    from sculpt.scoring.precision import PrecisionGap
    from sculpt.scoring.tune import Tuning

    if missing := sorted({"policies", "out"} - set(options)):
        raise ValueError(f"scores of many policies need --{' and --'.join(missing)}")
    make_a_device_of_every_core()
    require_device()
    run = RunDirectory.existing(options.pop("run"))
    plan = {name: options.pop(name) for name in PLAN_FIELDS if name in options}
    asked = PolicyOptions(plan=plan, **options)
    console = make_console()

    def on_plan(chosen: EvaluationPlan, tuning: Tuning | None, gap: PrecisionGap | None) -> None:
        lines = [f"plan: {chosen.describe()}"] if tuning is None or not asked.explain else tuning.describe()
        if gap is not None:
            lines = [*lines, gap.describe(chosen.precision)]
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)

    with watching(console) as watcher:
        watcher.start("evaluate")

        def on_progress(report: StreamReport, total: int) -> None:
            note = f"{report.hit_rate:.0%} remembered"
            watcher.progress(report.policies, total, "policies", note)

        report = score_policies_of_run(run, asked, cache_folder(), on_plan, on_progress)
        watcher.finish("evaluate", report.seconds)
    console.print(
        f"policies in {asked.out}: {report.policies}, {report.resumed} of them from before; "
        f"{report.evaluated} evaluated, {report.hit_rate:.0%} remembered, "
        f"{report.policies_per_second:.1f} policies/s",
        highlight=False,
        soft_wrap=True,
    )


def _export_formats(options: dict[str, Any]) -> None:
    from sculpt.pipeline.bench import export_formats
    from sculpt.report import RunDirectory

    require_device()
    run = RunDirectory.existing(options["run"])
    for name in export_formats(run, options["format"]):
        print(run.path / name)


def _write_events(options: dict[str, Any]) -> None:
    from sculpt.report import RunDirectory
    from sculpt.report.tensorboard import write_events

    run = RunDirectory.existing(options["run"])
    folder = run.path / "tensorboard"
    write_events(run.metrics(), folder)
    print(folder)


def _bench_latency(options: dict[str, Any]) -> None:
    from sculpt.pipeline.bench import LatencyOptions, bench_latency
    from sculpt.pipeline.progress import watching
    from sculpt.report import RunDirectory, latency_table

    require_device()
    run = RunDirectory.existing(options["run"])
    given = {"batches" if name == "batch" else name: options[name] for name in set(options) - {"run", "what"}}
    asked = LatencyOptions(**given)
    console = make_console()
    with watching(console) as watcher:
        watcher.start("latency")
        rows = bench_latency(
            run, asked, lambda done, total, what: watcher.progress(done, total, "comparisons", what)
        )
    console.print(latency_table(rows))
