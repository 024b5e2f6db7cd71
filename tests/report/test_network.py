"""The tables of `sculpt info`: every layer with its MACs, every site, every reason once."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
from rich.console import Console

import sculpt
from sculpt.report import frozen_lines, layers_table, sites_table


def printed(table: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def space_of(name: str, side: int, families: tuple[str, ...], **options: object) -> sculpt.Space:
    module = sculpt.nets.create(name, 10, **options)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    return sculpt.make_space(sculpt.trace(sculpt.from_linen(module, shapes), image), families=families)


def test_layers_and_products_add_up_to_the_macs() -> None:
    space = space_of("vit_tiny_patch4", 32, ("channels",), depth=1)
    rows = [line.split() for line in printed(layers_table(space)).splitlines()[3:] if line.strip()]
    assert len(rows) == len(space.trace.layers) + len(space.trace.products)
    assert sum(int(row[-2].replace(",", "")) for row in rows) == space.trace.macs
    hidden = next(row for row in rows if row[0] == "block01/dense1")
    assert hidden[1:5] == ["dense", "192", "x", "768"]


def test_sites_are_numbered_as_a_policy_is() -> None:
    space = space_of("resnet8", 8, ("channels", "rect"))
    rows = [line.split() for line in printed(sites_table(space)).splitlines()[3:] if line.strip()]
    assert [row[:3] for row in rows] == [[str(s.index), s.name, s.family] for s in space.sites]
    channels = next(row for row in rows if row[1] == "stage1_block01/conv1")
    assert channels[3:5] == ["16", "4"], "16 units in two kernels and the norm's scale and bias"


def test_windows_are_frozen_only_where_no_site_removes_them() -> None:
    both, channels = (space_of("resnet8", 8, families) for families in (("channels", "rect"), ("channels",)))
    assert not any("window" in line for line in frozen_lines(both))
    windows = [line for line in frozen_lines(channels) if "window" in line]
    assert len(windows) == 1
    assert "and 11 more" in windows[0], "seven kernels of two axes each, three told by name"
    assert any(line.startswith("network output: head/bias:0 (10)") for line in frozen_lines(both))
