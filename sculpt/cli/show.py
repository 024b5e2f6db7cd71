"""`sculpt info`: lists networks and data sets, describes a network, or a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt.cli.console import make_console
from sculpt.cli.devices import require_device

if TYPE_CHECKING:
    from rich.console import Console


def info(options: dict[str, Any]) -> None:
    """Says what there is about a network, a run, or this package; `options` are those that were given."""
    console = make_console()
    if "network" in options:
        if "model" in options:
            raise ValueError(
                f"name the network once, got {options['network']} and --model {options['model']}"
            )
        options["model"] = options.pop("network")
    if "run" in options:
        if others := sorted(name.replace("_", "-") for name in set(options) - {"run"}):
            raise ValueError(f"info about a run goes without --{' and --'.join(others)}")
        _info_run(console, options["run"])
        return
    require_device()
    if options:
        if "model" not in options:
            raise ValueError("info about a network needs its name: sculpt info MODEL")
        if "dataset" not in options and (others := sorted({"data_dir", "stream"} & set(options))):
            raise ValueError(f"--{others[0].replace('_', '-')} goes with --dataset")
        _info_model(console, options)
    else:
        _info_package(console)


def _info_package(console: Console) -> None:
    from rich.table import Table

    from sculpt import nets
    from sculpt.environment import device_name, versions
    from sculpt.pruning.families.patterns import FAMILIES

    rows = Table.grid(padding=(0, 3))
    rows.add_row("networks", ", ".join(nets.list_models()))
    for name, family in FAMILIES.items():
        heading = "families" if name == next(iter(FAMILIES)) else ""
        rows.add_row(heading, f"{name}: faster on {family.realised_by}")
    rows.add_row("device", device_name())
    rows.add_row("versions", ", ".join(f"{name} {version}" for name, version in versions().items()))
    console.print(rows, highlight=False)


def _info_run(console: Console, folder: Path) -> None:
    from sculpt.pipeline import STAGES
    from sculpt.pipeline.closing import caption_of, rows_of
    from sculpt.report import RunDirectory, closing_table

    run = RunDirectory.existing(folder)
    for section, settings in run.config.items():
        console.print(f"{section:<9} {', '.join(f'{k}={v}' for k, v in settings.items())}", highlight=False)
    done = [stage for stage in STAGES if run.done(stage)]
    console.print(f"complete  {', '.join(done) or 'nothing yet'}", highlight=False)
    if "evaluate" in done:
        record = run.record("evaluate")
        console.print(closing_table(rows_of(record), caption_of(record, run.config["train"]["seed"])))


def _info_model(console: Console, options: dict[str, Any]) -> None:
    from sculpt.pipeline.artefacts import describe
    from sculpt.pruning.families.patterns import FAMILIES
    from sculpt.report import frozen_lines, layers_table, sites_table

    space = describe(options)
    trace = space.trace
    console.print(layers_table(space))
    console.print(sites_table(space))
    low, high = space.reachable
    console.print(
        f"{trace.macs:,} MACs per image of {' x '.join(map(str, trace.input_shape))}, {trace.num_params:,} weights, "
        f"{len(trace.layers)} layers, {space.num_sites} sites; budgets from {low:.4f} to {high:.0f} can be reached",
        highlight=False,
        soft_wrap=True,
    )
    for name in space.families:
        if not FAMILIES[name].compacts:
            console.print(
                f"{name}: zeros stay in place; faster on {FAMILIES[name].realised_by}",
                highlight=False,
                soft_wrap=True,
            )
    for line in frozen_lines(space):
        console.print(f"frozen: {line}", highlight=False, soft_wrap=True)
