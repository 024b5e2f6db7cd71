"""Fine-tuning: zeros stay zero, every setting acts, validation alone chooses, and the same seed gives the same bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import sculpt
from sculpt.data.splits import Split, Splits
from sculpt.model import Model
from sculpt.pruning.masks import mask_params
from sculpt.training.batch import smoothed_cross_entropy
from sculpt.training.checkpoint import Checkpoints
from sculpt.training.config import FinetuneConfig
from sculpt.training.finetuning import TrainingDiverged, finetune, train
from sculpt.training.program import TrainProgram, decayed, make_program
from sculpt.training.step import epoch_order, run_step, start
from sculpt.trees import leaf_paths
from tests.training.tiny import (
    BASE,
    KEY,
    OPTIMIZERS,
    Tiny,
    largest_masked,
    same_bits,
    tiny_masks,
    tiny_model,
    tiny_splits,
)


class Plain(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.gelu(nn.Dense(16)(x.reshape(x.shape[0], -1))))


def tuned(config: FinetuneConfig, splits: Splits | None = None, key: jax.Array = KEY) -> Model:
    """The tiny model, fine-tuned under its masks."""
    model = tiny_model()
    return finetune(model, tiny_masks(model), tiny_splits() if splits is None else splits, config, key)


def accuracy(model: Model, split: Split) -> float:
    return float(sculpt.evaluate(model, tiny_splits().normalise(split.images), split.labels).accuracy)


# ---- 1: pruned weights stay pruned


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.fast("adamw")
def test_correctness_01_masked_weights_stay_zero(name: str) -> None:
    model, splits = tiny_model(), tiny_splits()
    masks = tiny_masks(model)
    result = finetune(model, masks, splits, OPTIMIZERS[name], KEY)
    assert largest_masked(result.params, masks) == 0.0
    sparse = result.replace(params=mask_params(result.params, masks))
    assert same_bits(result.params, sparse.params)
    assert accuracy(result, splits.validation) == accuracy(sparse, splits.validation)
    for weight, before, mask in zip(*map(jax.tree.leaves, (result.params, model.params, masks))):
        assert np.asarray((weight != before) & mask).any(), "the others did not learn"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.fast("momentum", "adamw")
def test_correctness_01_moments_stay_zero_where_masked(name: str) -> None:
    model, splits = tiny_model(), tiny_splits()
    masks = tiny_masks(model)
    program = make_program(model, splits, OPTIMIZERS[name])
    state = start(program, model.params, model.state, masks)
    images, labels = jnp.asarray(splits.train.images), jnp.asarray(splits.train.labels)
    order = epoch_order(KEY, len(labels), jnp.int32(0))
    for _ in range(5):
        state, _ = run_step(program, state, masks, None, images, labels, order, KEY)
    worst = [largest_masked(state.params, masks)]
    optax.tree_utils.tree_map_params(
        program.optimizer(), lambda m, mask: worst.append(largest_masked(m, mask)), state.optimizer, masks
    )
    moments = 0 if name == "sgd" else len(jax.tree.leaves(masks)) * (2 if "adamw" in name else 1)
    assert len(worst) == 1 + moments
    if state.average is not None:
        worst.append(largest_masked(state.average[0], masks))
    assert max(worst) == 0.0


@pytest.mark.slow
def test_masks_are_applied_to_the_model_that_comes_in_and_it_is_left_as_it_was() -> None:
    model = tiny_model()
    before = jax.tree.map(np.array, (model.params, model.state))
    finetune(model, tiny_masks(model), tiny_splits(), BASE, KEY)
    train(model, tiny_splits(), BASE, KEY)
    assert same_bits((model.params, model.state), before)


@pytest.mark.slow
def test_train_is_finetune_without_masks() -> None:
    model, splits = tiny_model(), tiny_splits()
    dense = train(model, splits, BASE, KEY)
    assert same_bits(dense, finetune(model, None, splits, BASE, KEY))
    everything = jax.tree.map(lambda w: jnp.ones(w.shape, bool), model.params)
    full = finetune(model, everything, splits, BASE, KEY)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(full)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert accuracy(dense, splits.train) > accuracy(model, splits.train) + 0.2


# ---- 4: every setting acts

CHANGES: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 40,
    "learning_rate": 0.02,
    "warmup": 0.5,
    "optimizer": "adamw",
    "momentum": 0.0,
    "nesterov": True,
    "weight_decay": 0.1,
    "clip_norm": 0.1,
    "label_smoothing": 0.2,
    "augment": "crop_flip",
    "ema": 0.5,
    "max_steps": 7,
    "rand_augment": 1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "accumulate": 2,
    "precision": "bfloat16",
    "gradual": 0.5,
}
ELSEWHERE = {
    "remat",
    "select_best",
    "checkpoint_every",
    "steps_per_call",
    "distillation",
    "temperature",
    "feature_match",
}
"""Fields with a test of their own below, in test_distillation.py or test_features.py."""


@pytest.fixture(scope="module")
def base_result() -> Model:
    return tuned(BASE)


@pytest.mark.parametrize("field", sorted({f.name for f in dataclasses.fields(FinetuneConfig)} - ELSEWHERE))
@pytest.mark.fast("ema", "learning_rate", "nesterov", "optimizer", "weight_decay")
def test_correctness_04_every_field_changes_the_result(field: str, base_result: Model) -> None:
    changed = tuned(dataclasses.replace(BASE, **{field: CHANGES[field]}))
    assert not same_bits(changed, base_result)


@pytest.mark.parametrize(
    "change",
    [{"momentum": 0.5}, {"weight_decay": 0.1}, {"nesterov": True}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.slow
def test_correctness_04_fields_act_with_adamw_too(change: dict[str, Any]) -> None:
    config = OPTIMIZERS["adamw"]
    assert not same_bits(tuned(config), tuned(dataclasses.replace(config, **change)))


@pytest.mark.parametrize("shift", ["none", "shift"])
@pytest.mark.fast("none")
def test_correctness_04_the_other_augmentations(shift: Any, base_result: Model) -> None:
    result = tuned(dataclasses.replace(BASE, augment=shift))
    assert same_bits(result, base_result) == (shift == "none")


@pytest.mark.slow
def test_both_mixtures_take_turns(base_result: Model) -> None:
    both, one = (tuned(dataclasses.replace(BASE, mixup=0.2, cutmix=cut)) for cut in (1.0, 0.0))
    assert not same_bits(both, one) and not same_bits(both, base_result)


def test_accumulated_gradients_are_those_of_the_batch() -> None:
    """Without BatchNorm and dropout, which see the parts."""
    module = Plain()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    whole, parts = (
        train(
            sculpt.from_linen(module, variables),
            tiny_splits(),
            dataclasses.replace(BASE, epochs=1, accumulate=number),
            KEY,
        )
        for number in (1, 4)
    )
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_computing_activations_again_changes_nothing(base_result: Model) -> None:
    again = tuned(dataclasses.replace(BASE, remat=True))
    for a, b in zip(*map(jax.tree.leaves, (again, base_result)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    model = tiny_model()
    program = make_program(model, tiny_splits(), dataclasses.replace(BASE, remat=True))
    images = jnp.zeros((2, 8, 8, 1))
    assert "remat" in str(jax.make_jaxpr(program.forward())(model.params, model.state, images, KEY))


@pytest.mark.slow
def test_half_precision_learns_as_well(base_result: Model) -> None:
    half = tuned(dataclasses.replace(BASE, precision="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    validation = tiny_splits().validation
    assert accuracy(half, validation) > accuracy(base_result, validation) - 0.1


def test_correctness_04_select_best_returns_the_best_epoch_and_else_the_last() -> None:
    splits = tiny_splits()
    # With labels that mean nothing the last epoch is not the best.
    noise = np.random.default_rng(10).integers(0, 10, len(splits.validation.labels)).astype(np.int32)
    splits = dataclasses.replace(splits, validation=Split(splits.validation.images, noise))
    rows: list[dict[str, float]] = []
    best = train(tiny_model(), splits, BASE, KEY, on_metrics=rows.append)
    last = train(tiny_model(), splits, dataclasses.replace(BASE, select_best=False), KEY)
    accuracies = [row["validation_accuracy"] for row in rows]
    assert max(accuracies) > accuracies[-1], "this seed does not try what is to be tried"
    assert accuracy(best, splits.validation) == pytest.approx(max(accuracies))
    assert accuracy(last, splits.validation) == pytest.approx(accuracies[-1])


def test_correctness_04_checkpoint_every_adds_checkpoints(tmp_path: Path) -> None:
    seen = []

    def look(step: int, total: int) -> None:
        seen.append(sorted(int(p.name) for p in (tmp_path / "steps").iterdir()))

    config = dataclasses.replace(BASE, checkpoint_every=4)
    train(tiny_model(), tiny_splits(), config, KEY, directory=tmp_path, on_progress=look)
    assert seen == [[], [4], [4, 6], [6, 8], [8, 12], [12, 16]]


@pytest.mark.parametrize("steps_per_call", [4, 50])
@pytest.mark.fast("50")
def test_correctness_04_steps_per_call_compiles_a_loop_and_changes_no_number(steps_per_call: int) -> None:
    model, splits = tiny_model(), tiny_splits()
    masks = tiny_masks(model)
    config = dataclasses.replace(OPTIMIZERS["ema"], steps_per_call=1)
    rows: list[dict[str, float]] = []
    one = finetune(model, masks, splits, config, KEY, on_metrics=rows.append)
    looped = dataclasses.replace(config, steps_per_call=steps_per_call)
    many = finetune(model, masks, splits, looped, KEY, on_metrics=rows.append)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(rows[:3], rows[3:], strict=True):
        assert a["step"] == b["step"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert largest_masked(many.params, masks) == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", None),
        ("batch_size", 0),
        ("batch_size", True),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", "fast"),
        ("warmup", 1.0),
        ("optimizer", "lamb"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("nesterov", 1),
        ("weight_decay", -1e-4),
        ("clip_norm", 0.0),
        ("label_smoothing", 1.0),
        ("gradual", 1.0),
        ("feature_match", -1.0),
        ("augment", "mixup"),
        ("ema", 1.0),
        ("max_steps", 0),
        ("select_best", "yes"),
        ("checkpoint_every", 0),
        ("steps_per_call", 0),
    ],
)
def test_correctness_04_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^FinetuneConfig\.{field} must be .*, got "):
        FinetuneConfig(**{field: value})


def test_correctness_04_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="nesterov must be False where momentum is 0"):
        FinetuneConfig(nesterov=True, momentum=0.0)


@pytest.mark.slow
def test_weight_decay_spares_norms_and_biases() -> None:
    def constant(params: Any, x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0], 10)) + 0.0 * (params["kernel"].sum() + params["bias"].sum())

    model = sculpt.from_function(constant, {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    for optimizer in ("sgd", "adamw"):
        config = dataclasses.replace(BASE, optimizer=optimizer, weight_decay=0.1)
        params = train(model, tiny_splits(), config, KEY).params
        assert (params["bias"] == 1.0).all()
        assert (params["kernel"] < 1.0).all()


@pytest.mark.parametrize(
    "name", ["resnet20", "mobilenet_v2", "vit_tiny_patch4", "deit_tiny_distilled_patch16"]
)
def test_weight_decay_spares_position_embeddings_tokens_and_biases_of_attention(name: str) -> None:
    module = sculpt.nets.create(name, num_classes=10)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shrinks = dict(zip(leaf_paths(params), jax.tree.leaves(decayed(params)), strict=True))
    # In these networks all that is not spared is named so, convolutions of one pixel [1, 1, in, out] included.
    assert shrinks == {path: path.endswith("/kernel") for path in shrinks}
    if "deit" in name:
        assert {path for path in shrinks if "/" not in path} == {
            "class_token",
            "distillation_token",
            "position",
        }


def test_weight_decay_spares_the_same_of_other_adapters() -> None:
    from flax import nnx

    layer = nnx.MultiHeadAttention(num_heads=2, in_features=4, rngs=nnx.Rngs(0), decode=False)
    model = sculpt.from_nnx(layer)
    shrinks = dict(zip(leaf_paths(model.params), jax.tree.leaves(decayed(model.params)), strict=True))
    assert {path.rpartition("/")[2]: is_decayed for path, is_decayed in shrinks.items()} == {
        "kernel": True,
        "bias": False,
    }
    own = {
        "w": jnp.zeros((3, 4)),
        "cls": jnp.zeros((1, 1, 4)),
        "kernel": jnp.zeros((1, 3, 4)),
        "b": jnp.zeros(4),
    }
    assert decayed(own) == {"w": True, "cls": False, "kernel": True, "b": False}


def test_the_learning_rate_warms_up_then_falls_to_zero() -> None:
    program = TrainProgram(
        tiny_model().apply_train,
        sculpt.CLASSIFICATION,
        dataclasses.replace(BASE, warmup=0.1),
        10,
        100,
        (0.0,),
        (1.0,),
    )
    rates = np.asarray(program.learning_rate(jnp.arange(100)))
    assert np.argmax(rates) == 10
    assert rates.max() == pytest.approx(0.05)
    np.testing.assert_allclose(np.diff(rates[:11]), 0.05 / 11, rtol=1e-4)
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx(0.025)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_agrees_with_optax(smoothing: float) -> None:
    logits = 3 * jax.random.normal(jax.random.key(0), (7, 5))
    labels = jnp.arange(7, dtype=jnp.int32) % 5
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
    expected = optax.softmax_cross_entropy(logits, targets).mean()
    assert float(smoothed_cross_entropy(logits, labels, smoothing)) == pytest.approx(
        float(expected), rel=1e-5
    )


# ---- 5: the test split


class Counting:
    """A split that counts how often it is looked at."""

    def __init__(self, split: Split) -> None:
        self._split, self.reads = split, 0

    def __getattr__(self, name: str) -> Any:
        self.reads += 1
        return getattr(self._split, name)


def test_correctness_05_the_test_split_is_never_read(tmp_path: Path) -> None:
    splits = tiny_splits()
    test, validation = Counting(splits.test), Counting(splits.validation)
    watched: Any = dataclasses.replace(splits, test=test, validation=validation)  # type: ignore[arg-type]
    model = tiny_model()
    finetune(model, tiny_masks(model), watched, BASE, KEY, directory=tmp_path, on_metrics=lambda _: None)
    assert validation.reads > 0
    assert test.reads == 0


def test_correctness_05_permuted_test_labels_leave_the_chosen_checkpoint_unchanged(
    base_result: Model,
) -> None:
    splits = tiny_splits()
    permuted = np.random.default_rng(0).permutation(splits.test.labels)
    other = dataclasses.replace(splits, test=Split(splits.test.images, permuted))
    assert same_bits(tuned(BASE, other), base_result)


# ---- 6: seeds and augmentation


def test_correctness_06_the_same_key_gives_the_same_bits_and_another_key_others(base_result: Model) -> None:
    assert same_bits(tuned(BASE), base_result)
    assert not same_bits(tuned(BASE, key=jax.random.key(4)), base_result)


@pytest.mark.slow
def test_correctness_06_validation_is_not_augmented() -> None:
    splits, rows = tiny_splits(), []
    config = dataclasses.replace(BASE, augment="crop_flip", select_best=False)
    result = train(tiny_model(), splits, config, KEY, on_metrics=rows.append)
    assert rows[-1]["validation_accuracy"] == pytest.approx(accuracy(result, splits.validation), abs=1e-6)


def test_correctness_06_every_epoch_visits_each_image_at_most_once_in_another_order() -> None:
    orders = [np.asarray(epoch_order(KEY, 50, jnp.int32(epoch))) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert not (orders[0] == orders[1]).all()


# ---- compiled code, metrics, divergence, bad input


@pytest.mark.slow
def test_other_masks_keys_and_data_of_the_same_shape_compile_nothing() -> None:
    traces = []

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1) @ params["kernel"] + params["bias"][None]

    def apply_train(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return apply(params, x)

    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    model, splits = sculpt.from_function(apply, params, apply_train=apply_train), tiny_splits()
    other = dataclasses.replace(
        splits, train=Split(255 - np.asarray(splits.train.images), splits.train.labels)
    )
    finetune(model, tiny_masks(model, 1), splits, BASE, KEY)
    first = len(traces)
    assert first > 0
    finetune(model, tiny_masks(model, 2), splits, BASE, jax.random.key(9))
    finetune(model, tiny_masks(model, 3), other, dataclasses.replace(BASE, checkpoint_every=3), KEY)
    again = model.replace(params=jax.tree.map(lambda w: w + 1, params))
    finetune(again, tiny_masks(model, 3), splits, BASE, KEY)
    assert len(traces) == first


def test_metrics_and_progress() -> None:
    rows: list[dict[str, float]] = []
    progress: list[tuple[int, int]] = []
    config = dataclasses.replace(BASE, epochs=3, batch_size=4, max_steps=120)
    train(
        tiny_model(), tiny_splits(), config, KEY,
        on_metrics=rows.append, on_progress=lambda *done: progress.append(done),
    )  # fmt: skip
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 50), (2, 100), (3, 120)]
    assert rows[0]["train_loss"] > rows[1]["train_loss"]
    for row in rows:
        assert 0 <= row["train_accuracy"] <= 1
        assert 0 <= row["validation_accuracy"] <= 1
        assert row["images_per_second"] > 0
    assert rows[-1]["learning_rate"] < 1e-4
    assert progress == [(50, 120), (100, 120), (120, 120)]


def poisoned(limit: int) -> Model:
    """A linear model whose training logits are NaN from the step `limit` (counted from 1) on."""

    def apply(params: Any, state: Any, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1) @ params["kernel"]

    def apply_train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        bad = jnp.where(state["calls"] + 1 >= limit, jnp.nan, 1.0)
        return apply(params, state, x) * bad, {"calls": state["calls"] + 1}

    params, state = {"kernel": jnp.zeros((64, 10))}, {"calls": jnp.int32(0)}
    return sculpt.from_function(apply, params, state, apply_train)


@pytest.mark.parametrize("steps_per_call", [1, 5])
@pytest.mark.fast("1")
def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, steps_per_call: int) -> None:
    model, splits = poisoned(9), tiny_splits()
    config = dataclasses.replace(BASE, epochs=4, steps_per_call=steps_per_call)
    for _ in range(2):  # and again, from that checkpoint
        with pytest.raises(
            TrainingDiverged, match=r"epoch 2, step 9; the last good checkpoint is .*6.* Lower"
        ) as caught:
            train(model, splits, config, KEY, directory=tmp_path)
        error = caught.value
        assert (error.epoch, error.step, error.checkpoint) == (2, 9, tmp_path / "steps" / "6")
    assert isinstance(error, ValueError)
    keeper = Checkpoints(tmp_path, json.loads((tmp_path / "run.json").read_text())["fingerprint"])
    program = make_program(model, splits, config)
    state = start(program, model.params, model.state, None)
    found = keeper.restore_latest(
        {"train": state, "best": state.weights, "best_accuracy": np.zeros((), np.float32)}
    )
    assert found is not None
    assert found[0] == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found[1]["train"].params))


@pytest.mark.slow
def test_divergence_without_a_directory_says_so() -> None:
    config = dataclasses.replace(BASE, learning_rate=1e30)
    with pytest.raises(TrainingDiverged, match="epoch 1, step 2; no checkpoint was kept"):
        train(tiny_model(), tiny_splits(), config, KEY)


def test_what_does_not_fit_together_is_refused() -> None:
    model, splits = tiny_model(), tiny_splits()
    with pytest.raises(ValueError, match="batch_size is 201, more than the 200 images"):
        train(model, splits, dataclasses.replace(BASE, batch_size=201), KEY)
    with pytest.raises(ValueError, match="masks must be a pytree like params"):
        finetune(model, {"kernel": True}, splits, BASE, KEY)
    with pytest.raises(ValueError, match="expected a boolean mask"):
        finetune(model, jax.tree.map(jnp.ones_like, model.params), splits, BASE, KEY)
    with pytest.raises(
        ValueError, match=r"expected logits \[32, 11 or more\] for digits, the model gives \[32, 10\]"
    ):
        train(model, dataclasses.replace(splits, num_classes=11), BASE, KEY)
    unit = Split(splits.train.images.astype(np.float32) / 255.0, splits.train.labels)
    with pytest.raises(
        ValueError, match=r"rand_augment is 2, which takes pixels from 0 to 255; .* go from 0 to 1"
    ):
        train(model, dataclasses.replace(splits, train=unit), dataclasses.replace(BASE, rand_augment=2), KEY)
    small = dataclasses.replace(splits, train=Split(splits.train.images[:, :4], splits.train.labels))
    with pytest.raises(
        ValueError, match=r"the model does not take the images of digits, float32\[32, 4, 8, 1\]"
    ):
        train(model, small, BASE, KEY)


@pytest.mark.slow
def test_nnx_models_train_too(tmp_path: Path) -> None:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(64, 12, rngs=rngs)
            self.norm = nnx.BatchNorm(12, momentum=0.8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.last = nnx.Linear(12, 10, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1))))
            return self.last(self.dropout(x))

    model, splits = sculpt.from_nnx(Net(nnx.Rngs(0))), tiny_splits()
    masks = jax.tree.map(lambda w: jnp.arange(w.size).reshape(w.shape) % 2 == 0, model.params)
    config = dataclasses.replace(BASE, ema=0.5)
    result = finetune(model, masks, splits, config, KEY, directory=tmp_path)
    assert largest_masked(result.params, masks) == 0.0
    assert accuracy(result, splits.train) > accuracy(model, splits.train)
    assert same_bits(finetune(model, masks, splits, config, KEY, directory=tmp_path).params, result.params)


def test_dropout_acts_in_training() -> None:
    module = Tiny(dropout=0.5)
    other = sculpt.from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    splits = tiny_splits()
    assert not same_bits(
        train(other, splits, BASE, KEY).params, train(tiny_model(), splits, BASE, KEY).params
    )
