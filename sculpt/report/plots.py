"""Plots of a run, as SVG text. No window, no global state; matplotlib is loaded on first use."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sculpt.pruning.costs import layer_macs
from sculpt.pruning.space import Space
from sculpt.tracing.graph import EDGE_KINDS, topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "viridis"


def _figure(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    import matplotlib

    # Fixed ids and no date: the same run gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "sculpt"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def reward_plot(history: Sequence[Mapping[str, Any]]) -> str:
    """Best and mean reward over the policies scored; no mean of updates with single sites, whose policies keep nearly everything.

    Args:
      history: rows of a search with "evaluations", "best", "mean_reward" and "single_sites".

    Raises:
      ValueError: if there is no row.
    """
    if not history:
        raise ValueError("expected at least one row of a search's history, got none")
    figure, axes = _figure()
    evaluations = [row["evaluations"] for row in history]
    means = [np.nan if row.get("single_sites") else row["mean_reward"] for row in history]
    axes.plot(evaluations, [row.get("best", np.nan) for row in history], label="best so far", marker=".")
    axes.plot(evaluations, means, label="mean of the update", marker=".")
    axes.set(xlabel="policies scored", ylabel="reward", title="Search")
    axes.legend()
    return _svg(figure)


def pareto_plot(
    front: Sequence[tuple[float, float]],
    chosen: tuple[float, float],
    budget: float,
    images: int,
    resource: str = "MACs",
) -> str:
    """Accuracy on the score images against what a budget limits, of the policies that no other one beats in both.

    Args:
      front: (share used, accuracy) pairs.
      chosen: the pair of the policy chosen.
      budget: drawn as a line.
      images: number of images that the accuracies are of.
      resource: what it is a budget of.
    """
    figure, axes = _figure()
    ordered = sorted(front)
    axes.step(
        [m for m, _ in ordered], [a for _, a in ordered], where="post", marker="o", label="not dominated"
    )
    axes.plot(*chosen, marker="*", markersize=14, linestyle="none", label="chosen")
    axes.axvline(budget, color="grey", linestyle="--", label="budget")
    axes.set(
        xlabel=f"{resource} / dense",
        ylabel=f"accuracy before fine-tuning (n = {images}, train)",
        title="Pareto front of the search",
    )
    axes.legend()
    return _svg(figure)


def kept_plot(space: Space, policy: Any) -> str:
    """Share of theoretical MACs that each layer keeps under a policy int32 `[sites]`."""
    layers = space.trace.layers
    kept = layer_macs(space, policy) / np.asarray([max(layer.macs, 1) for layer in layers])
    figure, axes = _figure(7.0, max(2.5, 0.22 * len(layers) + 1.0))
    axes.barh(range(len(layers)), kept, color=_coloured(kept))
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="theoretical MACs / dense", title="Kept in each layer")
    return _svg(figure)


def latency_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds per image of the dense and the compact network by batch size, side by side; a panel for each engine.

    Args:
      rows: with "engine", "batch", "network" ("dense" or "compact"), "median_ms" and "quartiles_ms".

    Raises:
      ValueError: if there is no row.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("expected at least one row of latencies, got none")
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure = Figure(figsize=(max(4.0, 3.2 * len(engines)), 3.2), layout="constrained")
    for axes, engine in zip(figure.subplots(1, len(engines), squeeze=False)[0], engines):
        batches = list(dict.fromkeys(row["batch"] for row in rows if row["engine"] == engine))
        for shift, network in ((-0.2, "dense"), (0.2, "compact")):
            found = [row for row in rows if (row["engine"], row["network"]) == (engine, network)]
            medians = np.asarray([row["median_ms"] / row["batch"] for row in found])
            quartiles = np.asarray([np.asarray(row["quartiles_ms"]) / row["batch"] for row in found]).T
            places = np.arange(len(found)) + shift
            axes.bar(places, medians, 0.4, yerr=np.abs(quartiles - medians), label=network, capsize=2)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set(title=engine, xlabel="images per call", ylabel="milliseconds per image")
        axes.legend(fontsize=7)
    return _svg(figure)


def graph_plot(space: Space, policy: Any) -> str:
    """The network's graph: layers and merges in a row by depth, coupled axes below, coloured by what they keep.

    Layers are coloured by their share of MACs kept, coupled axes by their share of units; labels name the option chosen at
    each site.
    """
    found = topology(space.trace)
    kept, labels = _node_choices(space, policy)
    place = _places(space)
    depth = max((node.depth for node in found.nodes), default=0)
    lowest = min(y for _, y in place.values())
    figure, axes = _figure(max(8.0, 0.75 * depth + 2.0), 2.5 + 0.5 * -lowest)
    styles = {
        "flow": ("black", "-", 0.0),
        "skip": ("tab:orange", "-", -0.35),
        "coupling": ("lightgrey", ":", 0.0),
    }
    for sender, receiver, kind in zip(found.senders, found.receivers, found.kinds):
        name = EDGE_KINDS[kind]
        if name in styles:
            colour, style, bend = styles[name]
            axes.annotate(
                "",
                xy=place[int(receiver)],
                xytext=place[int(sender)],
                arrowprops={
                    "arrowstyle": "-" if name == "coupling" else "->",
                    "color": colour,
                    "linestyle": style,
                    "connectionstyle": f"arc3,rad={bend}",
                    "shrinkA": 7,
                    "shrinkB": 7,
                },
            )
    markers = {"conv": "s", "dense": "D", "add": "P", "concat": "X", "axis": "o"}
    for kind, marker in markers.items():
        chosen = [i for i, node in enumerate(found.nodes) if node.kind == kind]
        if chosen:
            axes.scatter(
                [place[i][0] for i in chosen],
                [place[i][1] for i in chosen],
                s=130,
                marker=marker,
                c=_coloured([kept.get(i, 1.0) for i in chosen]),
                edgecolors="black",
                zorder=3,
                label={"axis": "coupled axis"}.get(kind, kind),
            )
    for index, text in labels.items():
        axes.annotate(text, place[index], textcoords="offset points", xytext=(0, 9), ha="center", fontsize=6)
    axes.set(title="Graph of the network, coloured by what is kept (yellow: all)", ylim=(lowest - 0.6, 1.4))
    axes.set_axis_off()
    axes.legend(loc="upper right", fontsize=7, ncols=5, markerscale=0.6)
    return _svg(figure)


def _coloured(kept: Any) -> Any:
    import matplotlib

    return matplotlib.colormaps[_COLOURS](np.asarray(kept, float))


def _node_choices(space: Space, policy: Any) -> tuple[dict[int, float], dict[int, str]]:
    """What every node keeps, in [0, 1], and the options chosen there."""
    choices = np.asarray(policy)
    ratios = layer_macs(space, policy)
    kept: dict[int, float] = {}
    for index, node in enumerate(topology(space.trace).nodes):
        if node.kind in ("conv", "dense"):
            kept[index] = float(ratios[node.owner]) / max(space.trace.layers[node.owner].macs, 1)
    labels: dict[int, str] = {}
    for site in space.sites:
        option = site.options[int(choices[site.index])]
        index = int(space.site_nodes[site.index])
        labels[index] = option.label
        if site.family == "channels":
            kept[index] = option.kept
    return kept, labels


def _places(space: Space) -> dict[int, tuple[float, float]]:
    """Coordinates: data flow at y = 0 and above, coupled axes below, side by side where depths coincide."""
    taken: dict[tuple[int, bool], int] = {}
    place = {}
    for index, node in enumerate(topology(space.trace).nodes):
        below = node.kind == "axis"
        row = taken.get((node.depth, below), 0)
        taken[node.depth, below] = row + 1
        place[index] = (float(node.depth), -1.0 - row if below else 0.6 * row)
    return place
