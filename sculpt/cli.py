"""The command line: `sculpt train | search | finetune | compact | evaluate | export | report | bench | info | prune`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sculpt.cache import cache_folder

if TYPE_CHECKING:
    from rich.console import Console

_STAGES = {
    "train": "train the dense network, or take pretrained weights",
    "search": "search a policy within the budget",
    "finetune": "fine-tune the pruned network, its zeros held",
    "compact": "take the zeros out: smaller arrays, the same function",
    "evaluate": "read the test split, once, and write result.json",
    "export": "write the compact network as StableHLO, or as ONNX",
    "report": "write plots and report.html",
}
_COMMANDS = {
    **_STAGES,
    "bench": "measure the compact network beside the dense one in engines",
    "info": "say what a network offers to prune, what a run holds, or what there is",
    "prune": "all of it, into one run directory; run again to resume",
}

_CACHE_OPTION = "jax_compilation_cache_dir"
_MOST_CPU_DEVICES = 16
_WIDTH_OF_FILES = 200
_RECIPES = ("residual", "plain", "photographs", "mobile", "transformer", "small_transformer")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, no usage text."""
        raise SystemExit(_fail(f"{message} (see {self.prog} --help)"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 130 when interrupted.

    A mistake of the user is one line on stderr; `--debug` shows where it came from.
    """
    options = vars(make_parser().parse_args(arguments))
    command, debug = options.pop("command"), options.pop("debug")
    try:
        _use_compilation_cache()
        if command == "info":
            _info(options)
        elif command == "evaluate" and set(options) != {"run"}:
            _evaluate_policies(options)
        elif command == "export" and "format" in options:
            _export_formats(options)
        elif command == "bench":
            _bench_latency(options)
        else:
            _run(command, options)
    # RuntimeError: what jax raises where a device is absent, or its memory is full.
    except (ValueError, OSError, RuntimeError) as error:
        if debug:
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes")
        _wait_for_devices()
        return 130
    return 0


def _wait_for_devices() -> None:
    """Python must not end under a program that is still running."""
    jax = sys.modules.get("jax")
    for array in jax.live_arrays() if jax is not None else ():
        with contextlib.suppress(RuntimeError):
            array.block_until_ready()


def _fail(message: str) -> int:
    print(f"sculpt: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Options that are not given are absent from the result."""
    parser = _Parser(prog="sculpt", description="Automatic pattern pruning for JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="|".join(_COMMANDS), parser_class=_Parser
    )
    for name, text in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        command.add_argument("--run", type=Path, required=name != "info", help="the run directory")
        command.add_argument("--debug", action="store_true", default=False, help="show tracebacks of errors")
        if name == "info":
            command.add_argument(
                "network",
                nargs="?",
                metavar="MODEL",
                help="the network, at its published size without --dataset",
            )
        if name in ("train", "info", "prune"):
            _network_options(command)
        if name in ("train", "prune"):
            _train_options(command, ["--epochs"] if name == "train" else [])
        if name in ("search", "info", "prune"):
            _space_options(command)
        if name in ("search", "prune"):
            _search_options(command)
        if name in ("finetune", "prune"):
            _finetune_options(command)
        if name in ("train", "search", "finetune", "prune"):
            command.add_argument(
                "--devices",
                type=int,
                help="devices that share the search's evaluations (all) and each batch of training (1); not fixed by the run",
            )
        if name == "evaluate":
            _policies_options(command)
        if name == "export":
            command.add_argument(
                "--format", type=_names, help="stablehlo, onnx, or both with a comma (stablehlo)"
            )
        if name == "bench":
            _bench_options(command)
    return parser


def _network_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the network")
    group.add_argument("--model", help="name of a network (`sculpt info` lists them)")
    group.add_argument(
        "--dataset",
        help="digits, fashion_mnist, folder, parquet, cifar10-jpeg, or a name of TensorFlow Datasets such as cifar10 or imagenette",
    )
    group.add_argument("--data-dir", help="folder of the data set")
    group.add_argument(
        "--image-size", type=int, help="scale shorter sides to it and cut middle squares out (as they are)"
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="leave train images on disk, read them while they are used: for data larger than memory",
    )


def _train_options(command: argparse.ArgumentParser, short: Sequence[str]) -> None:
    group = command.add_argument_group("training")
    group.add_argument(
        "--weights", help="safetensors file of pretrained weights; without it the network is trained"
    )
    group.add_argument("--seed", type=int, help="of every random draw (0)")
    group.add_argument(
        "--augment",
        help="none, shift, crop_flip or resized_crop (shift for grey images; the others, which mirror, for colour ones)",
    )
    group.add_argument(
        "--new-head",
        action="store_true",
        help="draw the head of the weights anew, for other classes, and train",
    )
    group.add_argument("--recipe", help=f"{', '.join(_RECIPES)} (by the network and the size of the images)")
    group.add_argument("--batch-size", type=int, help="images per step of training and fine-tuning (64)")
    group.add_argument("--train-epochs", *short, type=int, help="epochs of dense training (20)")
    group.add_argument("--train-learning-rate", type=float, help="its peak (the recipe's)")
    group.add_argument("--train-clip-norm", type=float, help="largest norm of its gradients (any)")


def _space_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what can go")
    group.add_argument("--budget", type=float, help="MACs kept / dense, at the most (0.5)")
    group.add_argument(
        "--families",
        type=_names,
        help="pattern families, separated by commas (channels,rect); sculpt info lists them",
    )
    group.add_argument("--round-to", type=int, help="kept channels are multiples of it (1)")


def _search_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the search")
    group.add_argument(
        "--importance",
        help="which channels stay: energy, l1, l2, batch_norm, geometric_median, taylor, activation or random (energy)",
    )
    group.add_argument(
        "--method",
        help="agent, or a control: table, random, evolution, cma_es, greedy, uniform, magnitude, lamp (agent)",
    )
    group.add_argument("--objective", help="what policies are scored by: accuracy or loss (accuracy)")
    group.add_argument("--evaluations", type=int, help="policies scored (512)")
    group.add_argument("--score-images", type=int, help="train images that each is scored on (256)")
    group.add_argument("--calibration-images", type=int, help="train images for its BatchNorm (128)")
    group.add_argument("--rerank", type=int, help="policies fine-tuned briefly for the last choice (4)")


def _finetune_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("fine-tuning")
    group.add_argument("--finetune-epochs", "--epochs", type=int, help="epochs (15)")
    group.add_argument("--finetune-learning-rate", type=float, help="its peak (the recipe's)")
    group.add_argument("--finetune-clip-norm", type=float, help="largest norm of the gradients (any)")
    group.add_argument(
        "--distillation", type=float, help="share of the loss that the dense network sets (0.5)"
    )
    group.add_argument(
        "--gradual",
        type=float,
        help="share of the steps over which pruned weights fade, instead of at once (0)",
    )


def _policies_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("many policies of the dense network, instead of the test split")
    group.add_argument("--policies", type=Path, help="file of policies: .jsonl, .npz or .npy")
    group.add_argument(
        "--out", type=Path, help="file for their scores: .jsonl or .parquet; run again to resume"
    )
    group.add_argument("--images", type=int, help="validation images that each is scored on (512, or all)")
    group.add_argument("--calibration-images", type=int, help="train images for its BatchNorm (128)")
    group.add_argument("--precision", help="float32 or bfloat16 (float32)")
    group.add_argument("--explain", action="store_true", help="show how the plan was found")
    plan = command.add_argument_group("the plan of their evaluation; without any of these it is tuned")
    plan.add_argument("--policies-per-chunk", type=int, help="policies side by side on a device")
    plan.add_argument("--images-per-batch", type=int, help="images in one forward pass")
    plan.add_argument("--convolution", help="lax or im2col")
    plan.add_argument("--policy-shards", type=int, help="groups of devices that share the policies")
    plan.add_argument("--image-shards", type=int, help="devices in a group, which share the images")


def _bench_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", choices=("latency",), help="what is measured")
    command.add_argument(
        "--engines", type=_names, help="xla, onnxruntime, openvino, litert, with commas (xla,onnxruntime)"
    )
    command.add_argument("--threads", type=int, help="CPU cores that an engine has (all)")
    command.add_argument("--batch", type=_numbers, help="images per call, with commas (1,8,32)")
    command.add_argument("--repeats", type=int, help="samples of each network (30)")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas, such as 1,8,32, got {text!r}"
        ) from None


def _console() -> Console:
    """For the terminal, or a file, whose lines are long."""
    from rich.console import Console

    console = Console(markup=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _version() -> str:
    from sculpt import __version__

    return f"sculpt {__version__}"


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs, in `$SCULPT_CACHE_DIR` or `~/.cache/sculpt`."""
    import jax

    if getattr(jax.config, _CACHE_OPTION) is None:
        jax.config.update(_CACHE_OPTION, str(cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _make_a_device_of_every_core() -> None:
    """Where JAX runs on the CPU and is not told otherwise: they score policies faster than one device with as many threads.

    Not for commands that measure latency: calls that are over in milliseconds take longer once programs ran on two devices.
    """
    import jax

    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices == -1 and not told:  # type: ignore[attr-defined]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Too late where a program that calls `main` has used JAX before.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(cores, _MOST_CPU_DEVICES))


def _require_device() -> None:
    """Raises ValueError where the device that JAX is told to use is absent, which JAX may say with an empty assertion."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"no device for JAX_PLATFORMS={jax.config.jax_platforms or ''}: set it to cpu, or to what is here "  # type: ignore[attr-defined]
            f"({str(error) or 'JAX found none'})"
        ) from error


def _run(command: str, options: dict[str, Any]) -> None:

    from sculpt.pipeline import STAGES, Pipeline
    from sculpt.pipeline.closing import caption_of, rows_of
    from sculpt.pipeline.progress import watching
    from sculpt.report import RunDirectory, closing_table

    _require_device()
    folder, devices = options.pop("run"), options.pop("devices", None)
    begins = command in ("train", "prune")
    run = RunDirectory.open(folder) if begins else RunDirectory.existing(folder)
    console = _console()
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
    from sculpt.scoring import EvaluationPlan, PrecisionGap, StreamReport, Tuning

    if missing := sorted({"policies", "out"} - set(options)):
        raise ValueError(f"scores of many policies need --{' and --'.join(missing)}")
    _make_a_device_of_every_core()
    _require_device()
    run = RunDirectory.existing(options.pop("run"))
    plan = {name: options.pop(name) for name in PLAN_FIELDS if name in options}
    asked = PolicyOptions(plan=plan, **options)
    console = _console()

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
        f"{report.policies} policies in {asked.out}, {report.resumed} of them from before; "
        f"{report.evaluated} evaluated, {report.hit_rate:.0%} remembered, "
        f"{report.policies_per_second:.1f} policies/s",
        highlight=False,
        soft_wrap=True,
    )


def _export_formats(options: dict[str, Any]) -> None:
    from sculpt.pipeline.bench import export_formats
    from sculpt.report import RunDirectory

    _require_device()
    run = RunDirectory.existing(options["run"])
    for name in export_formats(run, options["format"]):
        print(run.path / name)


def _bench_latency(options: dict[str, Any]) -> None:

    from sculpt.pipeline.bench import LatencyOptions, bench_latency
    from sculpt.pipeline.progress import watching
    from sculpt.report import RunDirectory, latency_table

    _require_device()
    run = RunDirectory.existing(options["run"])
    given = {"batches" if name == "batch" else name: options[name] for name in set(options) - {"run", "what"}}
    asked = LatencyOptions(**given)
    console = _console()
    with watching(console) as watcher:
        watcher.start("latency")
        rows = bench_latency(
            run, asked, lambda done, total, what: watcher.progress(done, total, "comparisons", what)
        )
    console.print(latency_table(rows))


def _info(options: dict[str, Any]) -> None:
    console = _console()
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
    _require_device()
    if options:
        if "model" not in options:
            raise ValueError("info about a network needs its name: sculpt info MODEL")
        if "dataset" not in options and (others := sorted({"data_dir", "stream"} & set(options))):
            raise ValueError(f"--{others[0].replace('_', '-')} goes with --dataset")
        _info_model(console, options)
    else:
        from rich.table import Table

        from sculpt import nets
        from sculpt.deploy import device_name, versions
        from sculpt.pruning import FAMILIES

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
    from sculpt.pruning import FAMILIES
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


if __name__ == "__main__":
    sys.exit(main())
