"""Prune your own Flax Linen network: an inverted residual with squeeze-and-excitation, no annotation needed."""

import jax
import jax.numpy as jnp
from flax import linen as nn

import sculpt


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3))(x)))
        y = nn.relu6(nn.Conv(48, (1, 1))(x))
        y = nn.relu6(nn.Conv(48, (3, 3), feature_group_count=48)(y))
        gate = nn.sigmoid(nn.Dense(48)(nn.relu(nn.Dense(12)(y.mean((1, 2))))))
        x = x + nn.Conv(16, (1, 1))(y * gate[:, None, None, :])
        return nn.Dense(10)(x.mean((1, 2)))


module, example, key = Network(), jnp.zeros((1, 16, 16, 3)), jax.random.key(0)
model = sculpt.from_linen(module, module.init(key, example))
trace = sculpt.trace(model, example)
print("\n".join(f"{group.name}: {group.size} units in {len(group.slots)} places" for group in trace.groups))

space = sculpt.make_space(trace, families=("channels",))
policy = sculpt.random_policies(space, key, 1, budget=0.5)[0]
masks = sculpt.make_masks(space, model.params, policy)
small = sculpt.compact(sculpt.apply_masks(model, masks), space, policy)
print("\n".join(small.describe()))
print(f"{sculpt.count_cost(model, example)[0]:,} -> {sculpt.count_cost(small, example)[0]:,} MACs")
