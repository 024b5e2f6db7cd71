"""Prune your own Flax NNX network: a transformer block; heads, head dimensions, hidden and residual widths all shrink."""

import jax
import jax.numpy as jnp
from flax import nnx

import sculpt


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(12, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.query, self.key, self.value = (nnx.LinearGeneral(32, (4, 8), rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral((4, 8), 32, axis=(-2, -1), rngs=rngs)
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        y = self.norm(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", self.query(y), self.key(y)) / 8**0.5
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores), self.value(y)))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(x.mean(1))


example, key = jnp.zeros((1, 16, 12)), jax.random.key(0)
model = sculpt.from_nnx(Network(nnx.Rngs(0)))
trace = sculpt.trace(model, example)
print("\n".join(f"{group.name}: {group.size} units in {len(group.slots)} places" for group in trace.groups))

space = sculpt.make_space(trace, families=("channels",))
policy = sculpt.random_policies(space, key, 1, budget=0.5)[0]
masks = sculpt.make_masks(space, model.params, policy)
small = sculpt.compact(sculpt.apply_masks(model, masks), space, policy)
print("\n".join(small.describe()))
print(f"{sculpt.count_cost(model, example)[0]:,} -> {sculpt.count_cost(small, example)[0]:,} MACs")
