"""The last stages of a run: reads the test split once, writes `result.json`, plots and `report.html`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sculpt.environment import device_name, versions
from sculpt.files import written_whole
from sculpt.latency.measurement import compare_latency
from sculpt.pipeline.budget import budget_sentence, kept_of_budget
from sculpt.pruning.masks import apply_masks
from sculpt.pruning.space import Space
from sculpt.repair.recalibration import images_used, recalibrate
from sculpt.report import (
    Number,
    Report,
    Row,
    RunDirectory,
    graph_plot,
    kept_plot,
    latency_plot,
    pareto_plot,
    reward_plot,
    write_html,
)
from sculpt.report.json_files import read_sealed
from sculpt.scoring.evaluation import evaluate

if TYPE_CHECKING:
    from sculpt.data.splits import Split
    from sculpt.model import Model
    from sculpt.pipeline.stages import Pipeline
    from sculpt.tracing.axes import Atom
    from sculpt.tracing.layers import Monomials

_CALIBRATION = 512
LATENCY = "latency.json"
"""What `sculpt bench latency` measured last in a run."""


def theoretical_macs(space: Space, policy: Any, masks: Any) -> int:
    """Exact multiply-accumulates per image that a policy leaves.

    Single entries are counted in the masks: `cost` takes their fraction for the same in whatever channels leave.
    """
    kept: dict[Atom, int] = {}
    for site in space.sites:
        kept.update(zip(site.atoms, site.options[int(policy[site.index])].counts))

    def value(monomials: Monomials) -> int:
        total = 0
        for coefficient, atoms in monomials:
            for atom in atoms:
                coefficient *= kept.get(atom, space.trace.axes.atom_size(atom))
            total += coefficient
        return total

    trace, leaves = space.trace, jax.tree.leaves(masks)
    total = sum(value(operation.monomials) for operation in (*trace.layers, *trace.products))
    thinned = {site.kernel.leaf for site in space.sites if site.kernel is not None}
    for layer in trace.layers:
        if layer.leaf in thinned:
            entries, macs = value(trace.leaf_monomials[layer.leaf]), value(layer.monomials)
            total -= macs - macs * int(np.count_nonzero(leaves[layer.leaf])) // entries
    return total


def measure(p: Pipeline) -> dict[str, Any]:
    """Everything that the closing table says. The only place of a run that reads the test split, once."""
    test = p.splits.test
    train_images = p.splits.train.images
    calibration = train_images[: images_used(min(_CALIBRATION, len(train_images)))]
    masked = recalibrate(apply_masks(p.dense, p.masks), p.splits.normalise(calibration))
    fitted = p.run.record("finetune").get("reconstruct_images", 0)
    reconstructed = {"reconstructed": p.reconstructed(fitted)} if fitted else {}
    networks = {
        "dense": p.dense,
        "masked": masked,
        **reconstructed,
        "fine-tuned": p.tuned,
        "compact": p.small,
    }
    accuracy = {name: _accuracy(m, test, p.splits.normalise) for name, m in networks.items()}
    timed = {name: networks[name] for name in ("dense", "fine-tuned", "compact")}
    latency = compare_latency(timed, p.example)
    trace, compacted = p.space.trace, p.run.record("compact")
    left = sum(int(np.asarray(m).sum()) for m in jax.tree.leaves(p.masks))
    costs = {
        "dense": (trace.macs, trace.macs, trace.num_params),
        "masked": (theoretical_macs(p.space, p.policy, p.masks), trace.macs, left),
        "compact": (theoretical_macs(p.space, p.policy, p.masks), compacted["macs"], compacted["params"]),
    }
    costs["fine-tuned"] = costs["reconstructed"] = costs["masked"]
    rows = []
    for name in networks:
        seconds = latency.get(name)
        median = None if seconds is None else 1e3 * seconds.median
        spread = None if seconds is None else tuple(1e3 * s for s in seconds.spread)
        rows.append(
            {
                "name": name,
                "accuracy": accuracy[name],
                **_costs(costs[name]),
                "latency_ms": median,
                "spread": spread,
            }
        )
    return {
        "rows": rows,
        "budget": kept_of_budget(p, rows[0], rows[-1]),
        "device": device_name(),
        "versions": versions(),
        "n_test": len(test.labels),
        "n_latency": latency["dense"].n,
        "latency_batch": latency["dense"].batch,
        "n_calibration": len(calibration) if jax.tree.leaves(p.dense.state) else 0,
        "n_reconstruct": fitted,
        "splits": {
            "train": len(train_images),
            "validation": len(p.splits.validation.labels),
            "test": len(test.labels),
        },
    }


def _accuracy(model: Model, split: Split, normalise: Callable[[Any], Any]) -> float | None:
    """A share of whole images, free of float32 rounding; None where outputs are not finite."""
    accuracy = float(evaluate(model, split.images, split.labels, normalise=normalise).accuracy)
    if not math.isfinite(accuracy):
        return None
    return round(accuracy * len(split.labels)) / len(split.labels)


def _costs(values: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("macs_theoretical", "macs_realised", "params"), values))


def result(p: Pipeline, record: dict[str, Any]) -> dict[str, Any]:
    """The contents of `result.json`. Latencies are of one call on `latency_batch` images."""
    rows = {row["name"]: row for row in record["rows"]}
    dense, small, found = rows["dense"], rows["compact"], p.run.record("search")
    return {
        "model": p.train_settings.model,
        "dataset": p.train_settings.dataset,
        "seed": p.train_settings.seed,
        "device": record["device"],
        "versions": record["versions"],
        "splits": record["splits"],
        "dense": {
            "test_accuracy": dense["accuracy"],
            "macs": dense["macs_theoretical"],
            "params": dense["params"],
            "latency_ms": dense["latency_ms"],
        },
        "pruned": {
            "test_accuracy": small["accuracy"],
            "test_accuracy_before_finetune": rows.get("reconstructed", rows["masked"])["accuracy"],
            "macs_theoretical": small["macs_theoretical"],
            "macs_realised": small["macs_realised"],
            "params": small["params"],
            "latency_ms": small["latency_ms"],
        },
        "search": {
            name: found[name]
            for name in (
                "evaluations",
                "unique_evaluations",
                "seconds",
                "rerank_seconds",
                "policies_per_second",
            )
        },
        "budget": record.get("budget"),
        "compact_max_abs_diff": p.run.record("compact")["max_abs_diff"],
        "policy": found["policy"],
    }


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The closing table of a finished `evaluate` stage."""
    return [
        Row(
            name=row["name"],
            accuracy=row["accuracy"],
            macs_theoretical=row["macs_theoretical"],
            macs_realised=row["macs_realised"],
            params=row["params"],
            latency_ms=row["latency_ms"],
            latency_spread_ms=None if row["spread"] is None else tuple(row["spread"]),
        )
        for row in record["rows"]
    ]


def caption_of(record: dict[str, Any], seed: int) -> str:
    """What the closing table was taken over."""
    calibration = record["n_calibration"]
    recalibrated = f"BatchNorm recalibrated on {calibration} train images, " if calibration else ""
    fitted = record.get("n_reconstruct", 0)
    reconstructed = (
        f"; reconstructed: fitted to the dense network on {fitted} train images, likewise" if fitted else ""
    )
    return (
        f"Accuracy: n = {record['n_test']} test images; masked: {recalibrated}not fine-tuned{reconstructed}. Latency: median [quartiles] "
        f"of n = {record['n_latency']} calls of {record['latency_batch']} images. "
        f"Seed {seed}, {record['device']}, jax {record['versions']['jax']}.{budget_sentence(record.get('budget'))}{_slow(record)}"
    )


def _slow(record: dict[str, Any]) -> str:
    """A sentence where the compact network is no faster than the dense one."""
    rows = {row["name"]: row for row in record["rows"]}
    if rows["compact"]["latency_ms"] < rows["dense"]["latency_ms"]:
        return ""
    return (
        " Compact is no faster than dense here: fewer MACs need not be (a budget of --resource latency, widths by --round-to, or larger "
        "batches may help)."
    )


def chosen_point(found: dict[str, Any]) -> tuple[float, float]:
    """Share of the resource and accuracy on the score images of the policy chosen; not a number, hence not drawn, where untold."""
    accuracy = found["accuracy"]
    return found["used"], math.nan if accuracy is None else accuracy


def write_report(p: Pipeline) -> list[str]:
    """Writes plots and `report.html`; returns the names of the plots."""
    found, record = p.run.record("search"), p.run.record("evaluate")
    plots = {
        "reward": (
            ". ".join(filter(None, ("Reward over the policies scored", found.get("doubt")))),
            reward_plot(found["history"]),
        ),
        "pareto": (
            f"Accuracy against {found['resource']}, before fine-tuning",
            pareto_plot(
                found["pareto"],
                chosen_point(found),
                p.search_settings.budget,
                found["n_score"],
                found["resource"],
            ),
        ),
        "kept": ("Theoretical MACs kept in each layer", kept_plot(p.space, p.policy)),
        "graph": ("The network and the pattern chosen at each site", graph_plot(p.space, p.policy)),
    }
    if measured := latency_rows(p.run):
        plots["latency"] = (
            "Latency by engine: medians and quartiles of the table above",
            latency_plot(measured),
        )
    folder = p.run.path / "plots"
    for name, (_, svg) in plots.items():
        with written_whole(folder / f"{name}.svg") as temporary:
            temporary.write_text(svg, encoding="utf-8")
    settings = p.train_settings
    report = Report(
        title=f"{settings.model} on {settings.dataset}, pruned to {p.search_settings.budget:.0%} of its {found['resource']}",
        seed=settings.seed,
        device=record["device"],
        versions=record["versions"],
        rows=rows_of(record),
        caption=caption_of(record, settings.seed),
        numbers=_numbers(p, found, record),
        sites=[(s.name, s.family, s.options[int(p.policy[s.index])].label) for s in p.space.sites],
        arrays=p.run.record("compact")["arrays"],
        config=p.run.config,
        plots=dict(plots.values()),
        engines=measured,
    )
    write_html(report, p.run.path / "report.html")
    return sorted(plots)


def latency_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """What `sculpt bench latency` measured last; none where it has not.

    Raises:
      ValueError: if the file is damaged.
    """
    file = run.path / LATENCY
    return read_sealed(file)["rows"] if file.is_file() else []


def _numbers(p: Pipeline, found: dict[str, Any], record: dict[str, Any]) -> list[Number]:
    numbers = []
    for row in rows_of(record):
        test = f"{record['n_test']} test images"
        accuracy = "not finite" if row.accuracy is None else f"{row.accuracy:.4f}"
        numbers.append(Number(f"accuracy, {row.name}", accuracy, "measured", test))
        numbers.append(
            Number(f"MACs per image, {row.name}", f"{row.macs_theoretical:,}", "theoretical", "closed form")
        )
        numbers.append(
            Number(
                f"MACs per image, {row.name}", f"{row.macs_realised:,}", "realised", "counted in the program"
            )
        )
        numbers.append(Number(f"weights, {row.name}", f"{row.params:,}", "theoretical", "counted"))
        if row.latency_ms is not None:
            calls = f"{record['n_latency']} calls of {record['latency_batch']} images"
            numbers.append(Number(f"latency, {row.name}", f"{row.latency_ms:.3f} ms", "measured", calls))
    compacted, images = p.run.record("compact"), "validation images"
    numbers.append(
        Number(
            "largest difference of masked and compact logits",
            f"{compacted['max_abs_diff']:.2e}",
            "measured",
            f"{compacted['n_images']} {images}",
        )
    )
    for stage in ("train", "search", "finetune"):
        stage_record = p.run.record(stage)
        text = f"{stage_record['n_validation']} {images}"
        value = f"{stage_record['validation_accuracy']:.4f}"
        numbers.append(Number(f"validation accuracy after {stage}", value, "measured", text))
    remembered = 1 - found["unique_evaluations"] / found["evaluations"]
    policies = (
        f"{found['evaluations']} policies, {found['unique_evaluations']} distinct ({remembered:.0%} remembered), "
        f"{found['n_score']} train images each, repair: {found['repair']}"
    )
    numbers.append(Number("policies per second", f"{found['policies_per_second']:.2f}", "measured", policies))
    numbers.append(Number("search", f"{found['seconds']:.1f} s", "measured", policies))
    if seconds := found["rerank_seconds"]:
        numbers.append(Number("re-rank", f"{seconds:.1f} s", "measured", "brief fine-tuning of the best"))
    for row in latency_rows(p.run):
        what = f"latency, {row['network']}, {row['engine']}, threads {row['threads']}, batch {row['batch']}"
        low, high = row["quartiles_ms"]
        value = f"{row['median_ms']:.3f} ms [{low:.3f}, {high:.3f}]"
        numbers.append(Number(what, value, "measured", f"{row['n']} samples"))
    return numbers
