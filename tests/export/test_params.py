from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sculpt
from sculpt.export.params import load_metadata
from tests.conftest import untrained_digits

TREE = {
    "conv": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.zeros((), jnp.bfloat16)},
    "count": jnp.asarray([1, 2], jnp.uint32),
    "mask": jnp.asarray([[True, False], [False, True]]),
}


def same(a: object, b: object) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_a_tree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    sculpt.save_params(TREE, tmp_path / "new" / "tree.safetensors", {"about": "a test"})
    file = tmp_path / "new" / "tree.safetensors"
    assert same(sculpt.load_params(file), TREE)
    assert same(sculpt.load_params(file, jax.tree.map(jnp.zeros_like, TREE)), TREE)
    assert load_metadata(file) == {"about": "a test"}
    sculpt.save_params(TREE, tmp_path / "again", {"about": "a test"})
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.slow
def test_correctness_02_masks_policy_and_cost_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = untrained_digits()
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 8, 8, 1))))
    policy = sculpt.random_policies(space, jax.random.key(5), 1, budget=0.5)[0]
    masks = sculpt.make_masks(space, model.params, policy)
    sculpt.save_params({"masks": masks, "policy": policy}, tmp_path / "pruned.safetensors")
    back = sculpt.load_params(tmp_path / "pruned.safetensors", {"masks": masks, "policy": policy})
    assert same(back, {"masks": masks, "policy": policy})
    assert all(m.dtype == jnp.bool_ for m in jax.tree.leaves(back["masks"]))
    before, after = sculpt.cost(space, policy), sculpt.cost(space, back["policy"])
    assert all(a == b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_a_whole_model_and_its_random_keys(tmp_path: Path) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.dense(x))

    model = sculpt.from_nnx(Net(nnx.Rngs(0)))
    other = sculpt.from_nnx(Net(nnx.Rngs(1)))
    sculpt.save_params(model, tmp_path / "nnx.safetensors")
    back = sculpt.load_params(tmp_path / "nnx.safetensors", other)
    assert jax.tree.structure(back) == jax.tree.structure(other)
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(model(x), back(x))
    data = [
        jax.random.key_data(k) for k in jax.tree.leaves((model.state, back.state)) if "key" in str(k.dtype)
    ]
    assert len(data) == 2
    np.testing.assert_array_equal(data[0], data[1])
    keys = jax.tree.leaves(sculpt.load_params(tmp_path / "nnx.safetensors")["state"])
    assert any(jnp.issubdtype(k.dtype, jax.dtypes.prng_key) for k in keys)


def test_a_single_array(tmp_path: Path) -> None:
    sculpt.save_params(jnp.arange(3), tmp_path / "one.safetensors")
    assert same(sculpt.load_params(tmp_path / "one.safetensors"), jnp.arange(3))
    assert same(sculpt.load_params(tmp_path / "one.safetensors", jnp.zeros(3, jnp.int32)), jnp.arange(3))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({**TREE, "extra": jnp.zeros(1)}, "extra is missing"),
        ({"count": TREE["count"]}, "conv/bias is not expected"),
        ({**TREE, "mask": jnp.zeros((2, 2))}, r"mask: expected float32\[2, 2\], got bool\[2, 2\]"),
        ({**TREE, "count": jnp.zeros(3, jnp.uint32)}, r"count: expected uint32\[3\], got uint32\[2\]"),
    ],
)
def test_a_mismatch_names_what_differs(tmp_path: Path, template: object, message: str) -> None:
    sculpt.save_params(TREE, tmp_path / "tree.safetensors")
    with pytest.raises(ValueError, match=message):
        sculpt.load_params(tmp_path / "tree.safetensors", template)


def test_only_the_first_mismatches_are_listed(tmp_path: Path) -> None:
    sculpt.save_params({str(i): jnp.zeros(1) for i in range(9)}, tmp_path / "many.safetensors")
    with pytest.raises(ValueError, match=r"and 7 more$"):
        sculpt.load_params(tmp_path / "many.safetensors", {"other": jnp.zeros(1)})


def test_damage_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "tree.safetensors"
    sculpt.save_params(TREE, file)
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-8], "not a readable safetensors file"),
        (b"", "not a readable safetensors file"),
        (b"\xff" * 64, "not a readable safetensors file"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "does not match its checksum"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            sculpt.load_params(file)
    with pytest.raises(ValueError, match="no such file"):
        sculpt.load_params(tmp_path / "absent.safetensors")


def test_what_stands_beside_the_arrays_is_checked_too(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "tree.safetensors"
    sculpt.save_params(TREE, file, {"fixed": "0.687"})
    file.write_bytes(file.read_bytes().replace(b"0.687", b"0.987"))
    with pytest.raises(
        ValueError, match=r"tree.safetensors is damaged: it does not match its checksum; remove it"
    ):
        load_metadata(file)
    for metadata in ("{", "{}", "[]"):
        save_file({"w": np.ones(2, np.float32)}, file, {"sculpt": metadata})
        with pytest.raises(ValueError, match=r"tree.safetensors is damaged: its metadata"):
            sculpt.load_params(file)


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"layer/w": np.ones((2, 2), np.float32)}, tmp_path / "other.safetensors", {"format": "np"})
    assert load_metadata(tmp_path / "other.safetensors") == {"format": "np"}
    assert same(sculpt.load_params(tmp_path / "other.safetensors"), {"layer": {"w": jnp.ones((2, 2))}})


def test_paths_that_collide_and_empty_trees_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name more than one array: a/b"):
        sculpt.save_params({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="empty"):
        sculpt.save_params({}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_dtypes_that_would_not_survive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernel is of float8_e4m3fn, which safetensors does not hold"):
        sculpt.save_params({"kernel": jnp.zeros(3, jnp.float8_e4m3fn)}, tmp_path / "narrow.safetensors")
    assert not list(tmp_path.iterdir())
    sculpt.save_params({"counter": np.arange(3) * 2**40}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"counter \(int64\); switch them on"):
        sculpt.load_params(tmp_path / "wide.safetensors")
