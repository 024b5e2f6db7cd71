"""Prune a plain JAX function of a parameter pytree: layers stacked for `jax.lax.scan`, pruned alike in every step."""

import jax
import jax.numpy as jnp

import sculpt


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return x + jax.nn.gelu(x @ layer["up"]) @ layer["down"], None

    x, _ = jax.lax.scan(block, x @ params["embed"], params["blocks"])
    return x @ params["head"]


shapes = {"embed": (12, 32), "blocks": {"up": (3, 32, 64), "down": (3, 64, 32)}, "head": (32, 10)}
leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
keys = jax.random.split(jax.random.key(0), len(leaves))
params = jax.tree.unflatten(tree, [0.2 * jax.random.normal(k, shape) for k, shape in zip(keys, leaves)])

example, key = jnp.zeros((1, 12)), jax.random.key(0)
model = sculpt.from_function(network, params)
trace = sculpt.trace(model, example)
print("\n".join(f"{group.name}: {group.size} units in {len(group.slots)} places" for group in trace.groups))

space = sculpt.make_space(trace)
policy = sculpt.random_policies(space, key, 1, budget=0.5)[0]
masks = sculpt.make_masks(space, model.params, policy)
small = sculpt.compact(sculpt.apply_masks(model, masks), space, policy)
print("\n".join(small.describe()))
print(f"{sculpt.count_cost(model, example)[0]:,} -> {sculpt.count_cost(small, example)[0]:,} MACs")
