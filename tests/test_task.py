"""Networks that classify no images: pixels, tokens, and outputs with a loss of their own, through scoring, search and training."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sculpt
from sculpt.agents.config import AgentConfig
from sculpt.inputs import rows
from sculpt.task import correctness, cross_entropy

KEY = jax.random.key(0)
BRIEF = sculpt.FinetuneConfig(epochs=2, batch_size=16, learning_rate=0.05, clip_norm=1.0)


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32) for name, shape in shapes.items()}


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def segmenter(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return conv(jax.nn.relu(conv(jax.nn.relu(conv(x, params["a"])), params["b"])), params["c"])


def tagger(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    h = params["embed"][tokens]
    return (h + jax.nn.relu(h @ params["up"]) @ params["down"]) @ params["head"]


def masked_bag(params: dict[str, jax.Array], x: dict[str, jax.Array]) -> jax.Array:
    h = params["embed"][x["tokens"]]
    h = h + jax.nn.relu(h @ params["up"]) @ params["down"]
    return (h * x["mask"][..., None]).sum(axis=1) @ params["head"]


def two_headed(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    h = jax.nn.relu(x @ params["a"])
    return {"mean": h @ params["mean"], "scale": h @ params["scale"]}


def negative_log_likelihood(outputs: dict[str, jax.Array], targets: jax.Array) -> jax.Array:
    log_scale = outputs["scale"]
    return (0.5 * jnp.square((targets - outputs["mean"]) * jnp.exp(-log_scale)) + log_scale).sum(axis=1)


def near(outputs: dict[str, jax.Array], targets: jax.Array) -> jax.Array:
    return (jnp.abs(outputs["mean"] - targets) < 0.5).astype(jnp.float32).mean(axis=1)


LIKELIHOOD = sculpt.Task(negative_log_likelihood, near)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    model: sculpt.Model
    splits: sculpt.Splits
    families: tuple[str, ...] = ("channels",)

    @functools.cached_property
    def space(self) -> sculpt.Space:
        return sculpt.make_space(sculpt.trace(self.model, self.splits.input(1)), families=self.families)


@functools.cache
def pixels() -> Case:
    """A class for each pixel, some of which have none."""
    images = np.random.default_rng(1).normal(size=(100, 6, 6, 1)).astype(np.float32)
    labels = np.digitize(images[..., 0] + np.roll(images[..., 0], 1, axis=1), [-0.7, 0.7]).astype(np.int32)
    labels[np.random.default_rng(2).random(labels.shape) < 0.2] = -1
    params = drawn(3, a=(3, 3, 1, 8), b=(3, 3, 8, 8), c=(3, 3, 8, 3))
    splits = sculpt.from_examples(images[:80], labels[:80], images[80:], labels[80:])
    return Case(sculpt.from_function(segmenter, params), splits, ("channels", "rect"))


@functools.cache
def tokens() -> Case:
    """A class for each token."""
    words = np.random.default_rng(4).integers(0, 7, (100, 5))
    labels = (words**2 + 1) % 7
    params = drawn(5, embed=(7, 8), up=(8, 16), down=(16, 8), head=(8, 7))
    splits = sculpt.from_examples(words[:80], labels[:80], words[80:], labels[80:])
    return Case(sculpt.from_function(tagger, params), splits)


@functools.cache
def numbers() -> Case:
    """Two outputs, floating-point targets, a loss and a score of their own."""
    inputs = np.random.default_rng(6).normal(size=(100, 4))
    targets = np.stack([np.abs(inputs).sum(1), inputs[:, 0] * 2], axis=1)
    params = drawn(7, a=(4, 16), mean=(16, 2), scale=(16, 2))
    splits = sculpt.from_examples(inputs[:80], targets[:80], inputs[80:], targets[80:])
    return Case(sculpt.from_function(two_headed, params, task=LIKELIHOOD), splits)


@functools.cache
def pairs() -> Case:
    """Two inputs by name, a class for each example."""
    rng = np.random.default_rng(8)
    inputs = {"tokens": rng.integers(0, 7, (100, 5)), "mask": (rng.random((100, 5)) < 0.7).astype(np.float32)}
    labels = ((inputs["tokens"] > 3) * inputs["mask"]).sum(1) > 1.5
    params = drawn(9, embed=(7, 8), up=(8, 16), down=(16, 8), head=(8, 2))
    parts = [
        rows(inputs, slice(80)),
        labels[:80].astype(int),
        rows(inputs, slice(80, 100)),
        labels[80:].astype(int),
    ]
    return Case(sculpt.from_function(masked_bag, params), sculpt.from_examples(*parts))


CASES = {"pixels": pixels, "tokens": tokens, "numbers": numbers, "pairs": pairs}


brief = pytest.mark.parametrize(
    "case",
    [
        name if name not in ("tokens", "pairs") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
    indirect=True,
)
"""Two cases are enough by default where each takes half a minute."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def by_hand(model: sculpt.Model, images: Any, labels: np.ndarray) -> tuple[float, float]:
    """Score and loss, example by example, in NumPy."""
    outputs = jax.device_get(model(jax.tree.map(jnp.asarray, images)))
    scores, losses = [], []
    for i, wanted in enumerate(labels):
        if isinstance(outputs, dict):
            mean, log_scale = outputs["mean"][i], outputs["scale"][i]
            losses.append((((wanted - mean) / np.exp(log_scale)) ** 2 / 2 + log_scale).sum())
            scores.append(np.mean(np.abs(mean - wanted) < 0.5))
            continue
        real = wanted >= 0
        logits, classes = np.asarray(outputs[i], np.float64)[real], wanted[real]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-log_p[np.arange(len(classes)), classes].mean())
        scores.append((logits.argmax(-1) == classes).mean())
    return float(np.mean(scores)), float(np.mean(losses))


def test_a_model_is_scored_as_by_hand(case: Case) -> None:
    test = case.splits.test
    found = sculpt.evaluate(case.model, test.images, test.labels, images_per_batch=7)
    score, loss = by_hand(case.model, test.images, test.labels)
    assert float(found.accuracy) == pytest.approx(score, abs=1e-6)
    assert float(found.loss) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "plan",
    [
        sculpt.EvaluationPlan(images_per_batch=8),
        sculpt.EvaluationPlan(images_per_batch=4, policy_shards=2, image_shards=2),
    ],
    ids=["one device", "four devices"],
)
@pytest.mark.fast("numbers-four devices")
def test_policies_are_scored_as_their_masked_networks(case: Case, plan: sculpt.EvaluationPlan) -> None:
    test, space = case.splits.test, case.space
    policies = sculpt.random_policies(space, KEY, 3, budget=0.6)
    images, labels = rows(test.images, slice(19)), test.labels[:19]
    found = sculpt.evaluate_policies(case.model, space, policies, images, labels, plan=plan)
    for i, policy in enumerate(policies):
        masked = sculpt.apply_masks(case.model, sculpt.make_masks(space, case.model.params, policy))
        score, loss = by_hand(masked, images, labels)
        assert float(found.accuracy[i]) == pytest.approx(score, abs=1e-6)
        assert float(found.loss[i]) == pytest.approx(loss, rel=1e-4)


@brief
@pytest.mark.slow
def test_search_finetune_compact(case: Case) -> None:
    """The whole way, and the compact network is as good as the masked one."""
    dense = sculpt.train(case.model, case.splits, BRIEF, KEY)
    validation = case.splits.validation
    before, after = (
        sculpt.evaluate(m, validation.images, validation.labels).loss for m in (case.model, dense)
    )
    assert float(after) < float(before)
    config = sculpt.SearchConfig(
        budget=0.6,
        evaluations=16,
        batch_size=8,
        score_images=32,
        calibration_images=16,
        rerank=1,
        rerank_finetune=dataclasses.replace(BRIEF, epochs=1),
        agent=AgentConfig(hidden=16, layers=1, heads=2),
    )
    found = sculpt.search(dense, case.space, case.splits, config, KEY)
    assert 0 <= found.validation_accuracy <= 1
    masks = sculpt.make_masks(case.space, dense.params, found.policy)
    tuned = sculpt.finetune(dense, masks, case.splits, BRIEF, KEY)
    small = sculpt.compact(tuned, case.space, found.policy, masks=masks)
    assert small.task == case.model.task
    test = case.splits.test
    one, other = (sculpt.evaluate(m, test.images, test.labels) for m in (tuned, small))
    assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-4)
    assert sculpt.count_cost(small, case.splits.input(1))[0] <= 0.6 * case.space.trace.macs


@brief
@pytest.mark.slow
def test_races_and_many_fine_tunings_go_by_the_task(case: Case) -> None:
    train, space = case.splits.train, case.space
    policies = sculpt.random_policies(space, KEY, 4, budget=0.6)
    images, labels = rows(train.images, slice(24)), train.labels[:24]
    race = sculpt.race_policies(case.model, space, policies, images, labels, KEY, first_images=8, factor=2)
    winner = race.order[0]
    full = sculpt.evaluate_policies(case.model, space, policies, images, labels)
    assert race.loss[winner] == pytest.approx(float(full.loss[winner]), rel=1e-5)

    tuned = sculpt.finetune_policies(
        case.model, space, policies[:2], case.splits, BRIEF, KEY, policies_per_chunk=2
    )
    validation = case.splits.validation
    for i, policy in enumerate(policies[:2]):
        masks = sculpt.make_masks(space, case.model.params, policy)
        alone = sculpt.finetune(case.model, masks, case.splits, BRIEF, KEY)
        expected = sculpt.evaluate(alone, validation.images, validation.labels)
        assert float(tuned.validation_accuracy[i]) == pytest.approx(float(expected.accuracy), abs=0.02)


@pytest.mark.slow
def test_importance_reads_the_loss_of_the_task() -> None:
    case = numbers()
    train = case.splits.train
    other = case.model.replace(task=sculpt.Task(lambda outputs, targets: outputs["mean"][:, 0]))

    def scores(model: sculpt.Model) -> np.ndarray:
        found = sculpt.importance(
            model, case.space.trace, "taylor", images=train.images, labels=train.labels, images_per_batch=80
        )
        return found.scores[0]

    def loss(params: Any) -> jax.Array:
        return negative_log_likelihood(
            two_headed(params, jnp.asarray(train.images)), jnp.asarray(train.labels)
        ).mean()

    params = case.model.params
    change = jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss)(params))
    expected = change["a"].sum(0) + change["mean"].sum(1) + change["scale"].sum(1)
    np.testing.assert_allclose(scores(case.model), expected, rtol=1e-4)
    assert not np.allclose(scores(other), expected, rtol=0.1)


@pytest.mark.parametrize("places", [(), (3,), (2, 3)], ids=str)
@given(seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0]))
@settings(max_examples=20, deadline=None)
@pytest.mark.fast("(2, 3)")
def test_classes_of_every_position_are_measured_as_optax_does(
    places: tuple[int, ...], seed: int, scale: float
) -> None:
    n, classes = 4, 5
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (n, *places, classes)).astype(np.float32)
    labels = rng.integers(0, classes, (n, *places)).astype(np.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    right = np.asarray(logits.argmax(-1) == labels).reshape(n, -1).mean(1)
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(logits), jnp.asarray(labels)),
        losses.reshape(n, -1).mean(1),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(correctness(jnp.asarray(logits), jnp.asarray(labels)), right, rtol=1e-6)


def test_without_a_score_it_is_the_likelihood() -> None:
    task = sculpt.Task(lambda outputs, targets: jnp.square(outputs - targets))
    scores, losses = task.measure(jnp.asarray([1.0, 3.0]), jnp.asarray([1.0, 1.0]))
    np.testing.assert_allclose(losses, [0, 4])
    np.testing.assert_allclose(scores, np.exp([0.0, -4.0]), rtol=1e-6)


def test_a_task_of_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Task\.loss must be a function"):
        sculpt.Task("mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Task\.score must be a function"):
        sculpt.Task(near, 0.5)  # type: ignore[arg-type]


def test_a_task_that_the_outputs_or_labels_do_not_fit_is_refused() -> None:
    case = numbers()
    test = case.splits.test
    with pytest.raises(
        ValueError, match=r"task does not take outputs \[20, 2\], \[20, 2\] and labels float32\[20, 3\]"
    ):
        sculpt.evaluate(case.model, test.images, np.zeros((20, 3), np.float32))
    with pytest.raises(ValueError, match=r"expected labels \[20, ...\], one for each image, got \[19, 2\]"):
        sculpt.evaluate(case.model, test.images, test.labels[:19])
    whole = case.model.replace(
        task=sculpt.Task(lambda outputs, targets: jnp.square(outputs["mean"] - targets))
    )
    with pytest.raises(
        ValueError, match=r"score of the model's task must be one number for each example, \[20\]"
    ):
        sculpt.evaluate(whole, test.images, test.labels)
    with pytest.raises(ValueError, match=r"or a task of its own \(sculpt.Task\)"):
        sculpt.evaluate(case.model.replace(task=sculpt.CLASSIFICATION), test.images, test.labels)


def test_whole_numbers_are_for_networks_that_take_them() -> None:
    images, labels = np.zeros((4, 6, 6, 1), np.int32), np.zeros((4, 6, 6), np.int32)
    with pytest.raises(ValueError, match="expected normalised floating-point images, got int32"):
        sculpt.evaluate(pixels().model, images, labels)
    with pytest.raises(ValueError, match="expected inputs of whole numbers, as the network was traced with"):
        sculpt.evaluate_policies(
            tokens().model,
            tokens().space,
            np.zeros((1, tokens().space.num_sites), int),
            np.zeros((4, 5), np.float32),
            np.zeros((4, 5), np.int32),
        )


def test_examples_without_any_label_are_refused() -> None:
    case = pixels()
    labels = np.array(case.splits.test.labels)
    labels[3] = -1
    with pytest.raises(ValueError, match="at least one label of 0 or more in every example"):
        sculpt.evaluate(case.model, case.splits.test.images, labels)


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        (pixels, {"augment": "crop_flip"}, "augment is 'crop_flip', but what examples holds is no images of one class"),
        (tokens, {"mixup": 0.2}, "mixup is 0.2, but what examples holds"),
        (numbers, {"label_smoothing": 0.1}, "label_smoothing is 0.1, but the model has a task of its own"),
        (numbers, {"distillation": 0.5}, "distillation is 0.5, but the model has a task of its own"),
    ],
)  # fmt: skip
def test_settings_for_classes_of_images_are_refused(
    case: Any, settings: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(BRIEF, **settings)
    with pytest.raises(ValueError, match=message):
        sculpt.finetune(case().model, None, case().splits, config, KEY, teacher=case().model)


@pytest.mark.slow
def test_distillation_follows_the_classes_of_every_pixel() -> None:
    case = pixels()
    teacher = sculpt.train(case.model, case.splits, BRIEF, KEY)
    config = dataclasses.replace(BRIEF, distillation=1.0, label_smoothing=0.0)
    tuned = sculpt.finetune(case.model, None, case.splits, config, KEY, teacher=teacher)
    images = jnp.asarray(case.splits.test.images)

    def apart(model: sculpt.Model) -> float:
        wanted, found = (jax.nn.log_softmax(m(images)) for m in (teacher, model))
        return float((jnp.exp(wanted) * (wanted - found)).sum(-1).mean())

    assert apart(tuned) < 0.5 * apart(case.model)


def test_runs_of_another_task_are_not_resumed(tmp_path: Path) -> None:
    case = numbers()
    other = case.model.replace(task=sculpt.Task(negative_log_likelihood))
    sculpt.train(case.model, case.splits, BRIEF, KEY, directory=tmp_path / "train")
    with pytest.raises(ValueError, match="checkpoints of another run"):
        sculpt.train(other, case.splits, BRIEF, KEY, directory=tmp_path / "train")
    policies = np.zeros((2, case.space.num_sites), np.int32)
    np.save(tmp_path / "policies.npy", policies)
    test = case.splits.test
    arguments = (case.space, tmp_path / "policies.npy", tmp_path / "scores.jsonl", test.images, test.labels)
    sculpt.evaluate_file(case.model, *arguments)
    with pytest.raises(ValueError, match=r"belongs to another task \(other task sha256"):
        sculpt.evaluate_file(other, *arguments)


def test_examples_of_any_kind_are_split() -> None:
    splits = tokens().splits
    assert (splits.train.images.dtype, splits.train.labels.dtype) == (np.int32, np.int32)
    assert (len(splits.train.labels), len(splits.validation.labels), len(splits.test.labels)) == (72, 8, 20)
    assert splits.normalise(splits.test.images) is splits.test.images
    maps = (np.zeros((4, 2, 2)), np.full((4, 2, 2), 200, np.uint8)) * 2
    assert sculpt.from_examples(*maps).test.labels.dtype == np.int32
    for arrays, message in (
        ((np.zeros((4, 2)), np.zeros(3), np.zeros((4, 2)), np.zeros(4)), "train has 4 inputs and 3 labels"),
        ((np.zeros((4, 2)), np.zeros(4), np.zeros((4, 3)), np.zeros(4)), r"train inputs are float32\[4, 2\], test"),
        ((np.zeros((4, 2)), np.zeros(4), np.zeros((4, 2)), np.zeros(4, int)), "only the first axis may differ"),
        ((np.zeros((4, 2), np.uint8), np.zeros(4)) * 2, "pixels normalised, got uint8"),
        ((np.zeros((4, 2)), np.array(["a"] * 4)) * 2, r"train labels must be floating-point or whole numbers \[n, \.\.\.\], got"),
        (({"a": np.zeros((4, 2))}, np.zeros(4), {"b": np.zeros((4, 2))}, np.zeros(4)), "expected the same arrays"),
        (({"a": np.zeros((4, 2)), "b": np.zeros((3, 2))}, np.zeros(4)) * 2, "every array with the same n"),
        ((np.full((4, 2), np.nan), np.zeros(4)) * 2, "train inputs hold NaN or infinite values"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sculpt.from_examples(*arrays)
