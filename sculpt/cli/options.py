"""The argument parser of all commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sculpt.arguments import did_you_mean
from sculpt.cli.console import error_line

_STAGES = {
    "train": "train the dense network, or take pretrained weights",
    "search": "search a policy within the budget",
    "finetune": "fine-tune the pruned network, its zeros held",
    "compact": "take the zeros out: smaller arrays, the same function",
    "evaluate": "read the test split, once, and write result.json",
    "export": "write the compact network as StableHLO, as ONNX, or as a model file",
    "report": "write plots and report.html",
}
_COMMANDS = {
    **_STAGES,
    "bench": "measure the compact network beside the dense one in engines",
    "info": "say what a network offers to prune, what a run holds, or what there is",
    "prune": "all of it, into one run directory; run again to resume",
}

_RECIPES = ("residual", "plain", "photographs", "mobile", "transformer", "small_transformer")

_T = TypeVar("_T")
_FIELD = re.compile(r"\b[A-Z]\w*Config\.([a-z_]+)|^([a-z_]+)(?= must be )")
"""A field of a configuration, as messages of the library name it."""
_NAME = re.compile(r"(?<![\w./'\"-])(?:[a-z]+(?:_[a-z]+)+|size(?= must be ))(?![\w/'\"(-]|\.\w)")
"""An argument of the library in a message, such as data_dir; no part of a path, and nothing in quotes."""
_RENAMED = {"size": "image_size"}
"""Argument of the library -> option, where they are called otherwise."""


class Parser(argparse.ArgumentParser):
    """The parser of one command, or of the whole line."""

    def error(self, message: str) -> NoReturn:
        """One line, no usage text."""
        self.exit(2, error_line(f"{message} (see {self.prog} --help)") + "\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Nothing is unknown: that is an error, with a suggestion."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown

    def in_options(self, message: str, given: Collection[str]) -> str:
        """A message of the library with options in place of fields, such as --evaluations for SearchConfig.evaluations.

        Where several options set fields of one name, such as the epochs of training and fine-tuning, those in `given`.
        """
        known = {action.dest for action in self._actions}

        def option(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            of_stages = [dest for dest in given if match[1] and dest.endswith(f"_{name}")]
            options = [name] if name in known else of_stages
            return " or ".join(f"--{dest.replace('_', '-')}" for dest in options) or match[0]

        def renamed(match: re.Match[str]) -> str:
            dest = _RENAMED.get(match[0], match[0])
            # A batch of the library may be one of policies.
            return f"--{dest.replace('_', '-')}" if dest in known - {"batch_size"} else match[0]

        return _NAME.sub(renamed, _FIELD.sub(option, message))


def make_parser() -> Parser:
    """The parser of the whole command line.

    Options that are not given are absent from the result; `parser` in it is that of the command.
    """
    parser = Parser(prog="sculpt", description="Automatic pattern pruning for JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="|".join(_COMMANDS), parser_class=Parser
    )
    for name, text in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        command.set_defaults(parser=command)
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
                "--format", type=_names, help="stablehlo, onnx, model, or several with commas (stablehlo)"
            )
        if name == "report":
            command.add_argument(
                "--tensorboard",
                action="store_true",
                help="write RUN/tensorboard instead, from the metrics so far",
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
    group.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that cannot be decoded, and count them",
    )


def _train_options(command: argparse.ArgumentParser, short: Sequence[str]) -> None:
    group = command.add_argument_group("training")
    group.add_argument(
        "--weights",
        help="file of pretrained weights, .safetensors or Keras' .npz; without it the network is trained",
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
    group.add_argument(
        "--budget", type=float, help="MACs (or what --resource names) kept / dense, at the most (0.5)"
    )
    group.add_argument(
        "--families",
        type=_names,
        help="pattern families, separated by commas (channels,rect); sculpt info lists them",
    )
    group.add_argument(
        "--round-to",
        type=_number_or_name,
        help="widths that are pruned are multiples of it, or of what suits cpu (8), gpu (8) or tpu (128) (1)",
    )
    group.add_argument(
        "--min-keep",
        type=int,
        help="columns that stay of a group at least; 0: branches of residual blocks may go whole (1)",
    )
    group.add_argument(
        "--exclude",
        type=_names,
        help="layers that stay as they are, with commas: paths or patterns such as head or '*/attention/*' (none)",
    )


def _search_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the search")
    group.add_argument(
        "--resource",
        type=_names,
        help="what --budget is of: macs, macs_realised, params or latency (measured here); with commas, of each (macs)",
    )
    group.add_argument(
        "--latency-engine", help="xla, onnxruntime, openvino or litert, for --resource latency (xla)"
    )
    group.add_argument("--latency-batch", type=int, help="images per call, likewise (32)")
    group.add_argument(
        "--latency-threads",
        type=int,
        help="CPU cores of the engine, likewise (all); leave the machine to the measurement",
    )
    group.add_argument(
        "--latency-all-sizes",
        action="store_true",
        help="measure layers at all their sizes together: three to four times as long, in XLA more accurate",
    )
    group.add_argument(
        "--importance",
        help="which channels stay: energy, l1, l2, batch_norm, geometric_median, taylor, activation or random (energy)",
    )
    group.add_argument(
        "--method",
        help="agent, or a control: table, random, evolution, cma_es, greedy, uniform, magnitude, lamp (agent)",
    )
    group.add_argument("--objective", help="what policies are scored by: accuracy or loss (accuracy)")
    group.add_argument(
        "--evaluations",
        type=int,
        help="policies scored, rounded down to whole batches of 32 or so (512); not for uniform, magnitude and lamp, which propose one",
    )
    group.add_argument("--score-images", type=int, help="train images that each is scored on (256)")
    group.add_argument("--calibration-images", type=int, help="train images that it is repaired on (128)")
    _repair_option(group)
    group.add_argument("--rerank", type=int, help="policies fine-tuned briefly for the last choice (4)")
    group.add_argument(
        "--front",
        type=_fractions,
        help="further budgets, with commas, that the agent learns for beside (none)",
    )
    group.add_argument(
        "--agent", help="agent.safetensors of another search, to begin with what was learned there (nothing)"
    )


def _repair_option(group: Any) -> None:
    group.add_argument(
        "--repair",
        help="what is done to each before it is scored: recalibrate (its BatchNorm) or reconstruct (its layers are fitted to the dense ones; "
        "the default without BatchNorm)",
    )


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
    group.add_argument(
        "--reconstruct-images",
        type=int,
        help="train images that what is left of each layer is fitted on before fine-tuning (512 without BatchNorm, else 0)",
    )


def _policies_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("many policies of the dense network, instead of the test split")
    group.add_argument("--policies", type=Path, help="file of policies: .jsonl, .npz or .npy")
    group.add_argument(
        "--out", type=Path, help="file for their scores: .jsonl or .parquet; run again to resume"
    )
    group.add_argument("--images", type=int, help="validation images that each is scored on (512, or all)")
    group.add_argument("--calibration-images", type=int, help="train images that it is repaired on (128)")
    _repair_option(group)
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
    return _parts(int, "1,8,32", text)


def _fractions(text: str) -> tuple[float, ...]:
    return _parts(float, "0.3,0.7", text)


def _parts(kind: Callable[[str], _T], example: str, text: str) -> tuple[_T, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas, such as {example}, got {text!r}"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number_or_name(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _version() -> str:
    from sculpt import __version__

    return f"sculpt {__version__}"
