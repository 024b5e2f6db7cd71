"""Prune a network that classifies nothing: a denoiser with a loss of its own, fine-tuned in a training loop of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import sculpt


class Denoiser(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.Conv(16, (3, 3))(x))
        y = nn.relu(nn.Conv(16, (3, 3))(y))
        return x - nn.Conv(1, (3, 3))(y)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.square(outputs - targets).mean((1, 2, 3))


def data(clean: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    clean = clean.astype(np.float32) / 255
    return clean + np.random.default_rng(seed).normal(0, 0.3, clean.shape).astype(np.float32), clean


digits, key = sculpt.load_data("digits"), jax.random.key(0)
splits = sculpt.from_examples(*data(digits.train.images, 0), *data(digits.test.images, 1))
module, example = Denoiser(), jnp.zeros((1, 8, 8, 1))
model = sculpt.from_linen(module, module.init(key, example), task=sculpt.Task(squared_error))
model = sculpt.train(
    model, splits, sculpt.FinetuneConfig(epochs=4, optimizer="adamw", learning_rate=0.01), key
)

space = sculpt.make_space(sculpt.trace(model, example), families=("channels", "rect"))
config = sculpt.SearchConfig(budget=0.5, evaluations=64, objective="loss", score_images=128, rerank=0)
policy = sculpt.search(model, space, splits, config, key).policy
masks = sculpt.make_masks(space, model.params, policy)
pruned = sculpt.apply_masks(model, masks)

optimizer = sculpt.hold_zeros(masks, optax.sgd(0.05, momentum=0.9))
params, state = pruned.params, optimizer.init(pruned.params)


@jax.jit
def step(params, state, noisy, clean):
    def loss(params):
        return squared_error(pruned.apply(params, pruned.state, noisy), clean).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


for start in range(0, len(splits.train.labels) - 63, 64):
    batch = slice(start, start + 64)
    params, state = step(params, state, splits.train.images[batch], splits.train.labels[batch])

small = sculpt.compact(pruned.replace(params=params), space, policy, masks=masks)
for name, network in {"dense": model, "pruned": pruned, "fine-tuned": small}.items():
    error = sculpt.evaluate(network, splits.test.images, splits.test.labels).loss
    print(f"squared error, {name}: {error:.4f}")
print(f"{sculpt.count_cost(model, example)[0]:,} -> {sculpt.count_cost(small, example)[0]:,} MACs")
