"""Streamed splits: the same examples, order and weights as in memory; bounded memory; errors that end cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.data.splits import Splits, from_arrays, from_sources
from sculpt.data.stream import StreamedImages
from sculpt.training import run as run_module
from sculpt.training.finetuning import finetune, train
from sculpt.training.policies import finetune_policies
from sculpt.training.step import run_step
from tests.training.tiny import BASE, KEY, largest_masked, same_bits, tiny_masks, tiny_model, tiny_splits

DIGITS = tiny_splits(240, 70)
TRAIN = np.asarray(DIGITS.train.images), DIGITS.train.labels
TEST = np.asarray(DIGITS.test.images), DIGITS.test.labels


class Rows:
    """A source over arrays that notes what is asked of it, and how many of its images are still held."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.reads: list[int] = []
        self.held = self.most_held = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self.images[row].copy()
        with self._lock:
            self.reads.append(row)
            self.held += 1
            self.most_held = max(self.most_held, self.held)
        weakref.finalize(image, self._let_go)
        return {"image": image, "label": self.labels[row]}

    def _let_go(self) -> None:
        with self._lock:
            self.held -= 1


class Failing(Rows):
    """One whose rows fail from the moment that `how` is set."""

    how: Callable[[int], Any] | None = None

    def __getitem__(self, row: int) -> dict[str, Any]:
        return super().__getitem__(row) if self.how is None else self.how(row)


def in_memory(**about: Any) -> Splits:
    return from_arrays(*TRAIN, *TEST, name="rows", validation=40, **about)


def streamed(source: Rows | None = None, **about: Any) -> Splits:
    return from_sources(
        Rows(*TRAIN) if source is None else source,
        Rows(*TEST),
        name="rows",
        validation=40,
        **{"workers": 3, **about},
    )


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sculpt-reader")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    assert threads() == []


# The same examples.


def test_a_stream_holds_the_examples_that_arrays_would() -> None:
    arrays, stream = in_memory(seed=3), streamed(seed=3)
    assert isinstance(stream.train.images, StreamedImages)
    assert stream.train.images.shape == arrays.train.images.shape == (200, 8, 8, 1)
    assert (stream.train.images.dtype, stream.train.images.ndim) == (np.uint8, 4)
    for one, other in zip(
        (stream.train, stream.validation, stream.test), (arrays.train, arrays.validation, arrays.test)
    ):
        np.testing.assert_array_equal(one.images[:], other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert (stream.mean, stream.std, stream.num_classes) == (arrays.mean, arrays.std, arrays.num_classes)


def test_rows_are_read_when_they_are_asked_for_and_not_before() -> None:
    source = Rows(*TRAIN)
    labels = TRAIN[1]
    splits = streamed(source, train_labels=labels, mean=(0.3,), std=(0.4,))
    images = splits.train.images
    assert len(source.reads) == 1 + 40  # for the shape, and validation
    source.reads.clear()
    expected = in_memory().train.images
    rows = np.array([5, 2, 199])
    np.testing.assert_array_equal(images[:7], expected[:7])
    np.testing.assert_array_equal(images[rows], expected[rows])
    np.testing.assert_array_equal(images[-1], expected[-1])
    np.testing.assert_array_equal(images[splits.train.labels == 1], expected[splits.train.labels == 1])
    assert images[:0].shape == (0, 8, 8, 1)
    assert len(source.reads) == 7 + 3 + 1 + (splits.train.labels == 1).sum()
    with pytest.raises(IndexError):
        images[200]


def test_a_stream_is_never_read_whole_by_accident() -> None:
    splits = streamed()
    for use in (np.asarray, jnp.asarray, splits.normalise):
        with pytest.raises(
            ValueError, match=r"the train split of rows are streamed, not in memory: take the"
        ):
            use(splits.train.images)


@pytest.mark.slow
def test_a_search_reads_what_it_scores_on() -> None:
    source = Rows(*TRAIN)
    stream, arrays = streamed(source), in_memory()
    source.reads.clear()
    model = tiny_model()
    space = sculpt.make_space(sculpt.trace(model, arrays.normalise(TEST[0][:1])), ("channels",))
    config = sculpt.SearchConfig(
        method="random", evaluations=16, score_images=64, calibration_images=64, rerank=0
    )
    found, expected = (sculpt.search(model, space, splits, config, KEY) for splits in (stream, arrays))
    np.testing.assert_array_equal(found.policy, expected.policy)
    assert len(source.reads) == 64 + 64


def test_a_bounded_number_is_set_aside_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sculpt.data.splits._MOST_VALIDATION", 11)
    monkeypatch.setattr("sculpt.data.splits._MEASURED", 50)
    source = Rows(*TRAIN)
    stream = from_sources(source, Rows(*TEST), train_labels=TRAIN[1])
    assert len(stream.validation.labels) == 11
    assert len(source.reads) == 1 + 11 + 50
    arrays = from_arrays(*TRAIN, *TEST)
    assert (stream.mean, stream.std) == (arrays.mean, arrays.std)


# The same weights.


VARIED = {
    "augment": "shift",
    "mixup": 0.2,
    "optimizer": "adamw",
    "ema": 0.5,
    "accumulate": 2,
    "max_steps": 8,
}


@pytest.mark.parametrize("changes", [{}, VARIED], ids=["plain", "varied"])
@pytest.mark.slow
def test_training_on_a_stream_gives_the_same_weights(changes: dict[str, Any]) -> None:
    model, config = tiny_model(), dataclasses.replace(BASE, **changes)
    masks = tiny_masks(model)
    rows: list[list[dict[str, float]]] = [[], []]
    one, other = (
        finetune(model, masks, splits, config, KEY, on_metrics=seen.append)
        for splits, seen in zip((in_memory(), streamed()), rows)
    )
    assert same_bits(one, other)
    for seen in rows:
        for row in seen:
            del row["images_per_second"]
    assert rows[0] == rows[1]
    assert largest_masked(other.params, masks) == 0.0


class Unlabelled(Rows):
    """One whose labels are not in its rows."""

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": super().__getitem__(row)["image"]}


@pytest.mark.parametrize("source", [Rows(TRAIN[0], np.full(240, 99)), Unlabelled(*TRAIN)], ids=["99", "none"])
@pytest.mark.slow
def test_training_on_a_stream_is_by_the_labels_of_the_split(source: Rows) -> None:
    labels = (TRAIN[1] + 1) % 10
    arrays = from_arrays(TRAIN[0], labels, *TEST, name="rows", validation=40)
    stream = streamed(source, train_labels=labels)
    expected = train(tiny_model(), arrays, BASE, KEY)
    assert same_bits(train(tiny_model(), stream, BASE, KEY), expected)
    replaced = dataclasses.replace(stream.train, labels=9 - stream.train.labels)
    arrays = dataclasses.replace(
        arrays, train=dataclasses.replace(arrays.train, labels=9 - arrays.train.labels)
    )
    other = train(tiny_model(), arrays, BASE, KEY)
    assert not same_bits(other, expected)
    assert same_bits(train(tiny_model(), dataclasses.replace(stream, train=replaced), BASE, KEY), other)


@pytest.mark.slow
def test_devices_share_the_batches_of_a_stream() -> None:
    model = tiny_model()
    one, other = (finetune(model, None, splits, BASE, KEY, devices=2) for splits in (in_memory(), streamed()))
    assert same_bits(one, other)


@pytest.mark.slow
def test_many_policies_are_fine_tuned_on_a_stream() -> None:
    model, config = tiny_model(), dataclasses.replace(BASE, epochs=1)
    space = sculpt.make_space(sculpt.trace(model, np.zeros((1, 8, 8, 1), np.float32)), ("channels",))
    policies = sculpt.random_policies(space, KEY, 2, budget=0.7)
    one, other = (
        finetune_policies(model, space, policies, splits, config, KEY, policies_per_chunk=2)
        for splits in (in_memory(), streamed())
    )
    assert same_bits(one, other)


def test_each_epoch_reads_its_own_images_once_in_the_order_of_the_key() -> None:
    source = Rows(*TRAIN)
    splits = streamed(source, workers=1)
    source.reads.clear()
    train(tiny_model(), splits, BASE, KEY)
    epochs = np.asarray(source.reads).reshape(3, 6 * 32)
    assert all(len(set(epoch.tolist())) == 6 * 32 for epoch in epochs)
    again = Rows(*TRAIN)
    splits = streamed(again, workers=1)
    again.reads.clear()
    model = tiny_model()
    train(model.replace(params=jax.tree.map(lambda w: w / 2, model.params)), splits, BASE, KEY)
    assert again.reads == source.reads
    assert not np.array_equal(np.sort(epochs[0]), np.sort(epochs[1]))  # another remainder is left out


def test_a_second_run_compiles_nothing() -> None:
    train(tiny_model(), streamed(), BASE, KEY)
    before = run_step._cache_size()  # type: ignore[attr-defined]
    train(tiny_model(), streamed(), dataclasses.replace(BASE, checkpoint_every=4), jax.random.key(9))
    assert run_step._cache_size() == before  # type: ignore[attr-defined]


def test_many_steps_in_a_call_are_refused() -> None:
    with pytest.raises(ValueError, match="steps_per_call is 3, but a stream brings the batch of one step"):
        train(tiny_model(), streamed(), dataclasses.replace(BASE, steps_per_call=3), KEY)


# Bounded memory.


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (3, 2), (4, 5)])
def test_so_many_images_are_in_memory_and_no_more(workers: int, ahead: int) -> None:
    source = Rows(*TRAIN)
    images = StreamedImages.of(source, "rows", workers, ahead)
    source.reads.clear()
    chosen = [np.arange(10 * i, 10 * i + 10) for i in range(20)]
    with contextlib.closing(images.batches(iter(chosen))) as batches:
        for number, pixels in enumerate(batches):
            np.testing.assert_array_equal(pixels, TRAIN[0][chosen[number]])
            expected = min(200, 10 * (number + 1 + ahead))
            deadline = time.monotonic() + 20
            while len(source.reads) < expected:  # they are read while this batch is in use
                assert time.monotonic() < deadline
                time.sleep(0.001)
            if number < 5:
                time.sleep(0.02)
            assert len(source.reads) == expected
    assert source.most_held <= workers + 1  # those being copied into their batch


def test_training_holds_a_bounded_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Rows(*TRAIN)
    splits = streamed(source, ahead=2)
    source.reads.clear()
    unused: list[float] = []

    def counted(*arguments: Any) -> Any:
        time.sleep(0.01)  # the readers could run far ahead
        unused.append(len(source.reads) / 32 - len(unused))
        return run_step(*arguments)

    monkeypatch.setattr(run_module, "run_step", counted)
    train(tiny_model(), splits, BASE, KEY)
    assert len(unused) == 18
    assert max(unused) <= 2 + 1 + 1  # ahead, the one that was sent to the device, and the one in use


# Errors.


def undecodable(row: int) -> Any:
    raise OSError("truncated")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (undecodable, r"the train split of rows, row \d+: truncated"),
        (lambda row: {"label": 0}, r"row \d+: expected image, there is no 'image'"),
        (
            lambda row: {"image": TRAIN[0][row, :4], "label": 0},
            r"row \d+: the image is uint8\[4, 8, 1\], others are uint8\[8, 8, 1\]: bring all to one",
        ),
        (
            lambda row: {"image": TRAIN[0][row] * 1.0, "label": 0},
            r"row \d+: the image is float32\[8, 8, 1\], others are uint8",
        ),
        (
            lambda row: {"image": TRAIN[0][row, :, :, 0], "label": 0},
            r"row \d+: expected an image .*got uint8\[8, 8\]",
        ),
        (lambda row: {"image": TRAIN[0][row] * np.nan, "label": 0}, r"row \d+: the image holds NaN"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_error_that_names_it(
    how: Callable[[int], Any], message: str
) -> None:
    source = Failing(*TRAIN)
    splits = streamed(source, train_labels=TRAIN[1])
    source.how = how
    with pytest.raises(ValueError, match=message):
        train(tiny_model(), splits, BASE, KEY)
    assert threads() == []
    with pytest.raises(ValueError, match=message):
        splits.train.images[:3]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda row: {"image": TRAIN[0][row]}, r"row 0: expected (image and )?label, there is no 'label'"),
        (lambda row: {"image": TRAIN[0][row], "label": 0.5}, "row 0: 'float' object cannot be interpreted"),
    ],
)
def test_rows_without_a_label_are_refused_where_one_is_needed(
    how: Callable[[int], Any], message: str
) -> None:
    source = Failing(*TRAIN)
    source.how = how
    with pytest.raises(ValueError, match=f"the train split of rows, {message}"):
        streamed(source)
    with pytest.raises(ValueError, match=f"the test split of sources, {message}"):
        from_sources(Rows(*TRAIN), source, train_labels=TRAIN[1])


def test_the_first_bad_row_of_a_batch_is_the_one_that_is_named() -> None:
    source = Failing(*TRAIN)
    images = StreamedImages.of(source, "rows", workers=4)
    source.how = lambda row: undecodable(row) if row in (90, 190) else {"image": TRAIN[0][row], "label": 1}
    for _ in range(5):
        with pytest.raises(ValueError, match="rows, row 90: truncated"):
            images.read_all()
        with pytest.raises(ValueError, match="rows, row 90: truncated"):
            images.read_labels()


class Stop(BaseException):
    """What no `except Exception` catches, as KeyboardInterrupt."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt, RuntimeError])
@pytest.mark.fast("KeyboardInterrupt", "RuntimeError")
def test_no_thread_outlives_an_exception_of_the_caller(kind: type[BaseException]) -> None:
    def stop(*_: Any) -> None:
        assert threads() != []
        raise kind

    with pytest.raises(kind):
        train(tiny_model(), streamed(), BASE, KEY, on_metrics=stop)
    assert threads() == []


INTERRUPTED = """
import os, threading, time
from tests.training.test_stream import Failing, TRAIN, streamed
from tests.training.tiny import BASE, KEY, tiny_model
from sculpt.training.finetuning import train
source = Failing(*TRAIN)
splits = streamed(source, train_labels=TRAIN[1])
def slow(row):
    os.write(1, b"reading\\n")
    time.sleep(0.05)
    return {"image": TRAIN[0][row], "label": 0}
source.how = slow
try:
    train(tiny_model(), splits, BASE, KEY)
except KeyboardInterrupt:
    print(f"stopped, {threading.active_count()} thread", flush=True)
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_an_interrupt_while_batches_are_awaited_ends_at_once() -> None:
    process = child(INTERRUPTED)
    assert process.stdout is not None
    for _ in range(12):  # by then all threads run, and the main one waits
        assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "stopped, 1 thread"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"workers": "two"}, "workers must be a whole number of at least 1, got 'two'"),
        ({"ahead": 0}, "ahead must be a whole number of at least 1, got 0"),
        ({"ahead": 1.5}, "ahead must be a whole number of at least 1, got 1.5"),
        ({"ahead": True}, "ahead must be a whole number of at least 1, got True"),
        ({"train_labels": TRAIN[1][:9]}, r"train labels must be integers \[240\], .*got int32\[9\]"),
        ({"train_labels": TRAIN[1] - 10}, "train labels must be 0 or more"),
        ({"num_classes": 4}, "labels go up to 9, which does not fit num_classes=4"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(**changes)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="the train split of rows has no rows"):
        streamed(Rows(TRAIN[0][:0], TRAIN[1][:0]))


# Going on.


@pytest.mark.slow
def test_a_run_on_a_stream_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    model, config = tiny_model(), dataclasses.replace(BASE, checkpoint_every=4)
    expected = train(model, in_memory(), config, KEY)

    def stop(step: int, total: int) -> None:
        if step == 12:  # the last checkpoint is that of step 8, two steps into the second epoch of six
            raise Stop

    with pytest.raises(Stop):
        train(model, streamed(), config, KEY, directory=tmp_path, on_progress=stop)
    assert (tmp_path / "steps" / "8").exists()
    source = Rows(*TRAIN)
    splits = streamed(source)
    source.reads.clear()
    assert same_bits(train(model, splits, config, KEY, directory=tmp_path), expected)
    told_apart = 16  # images that the stream is recognised by
    assert len(source.reads) == 10 * 32 + told_apart


def test_another_stream_is_another_run(tmp_path: Path) -> None:
    model = tiny_model()
    done = train(model, streamed(), BASE, KEY, directory=tmp_path)
    assert same_bits(train(model, streamed(), BASE, KEY, directory=tmp_path), done)
    for other in (Rows(255 - TRAIN[0], TRAIN[1]), Rows(TRAIN[0], np.roll(TRAIN[1], 1))):
        splits = streamed(other, mean=streamed().mean, std=streamed().std)
        with pytest.raises(ValueError, match="holds checkpoints of another run"):
            train(model, splits, BASE, KEY, directory=tmp_path)


KILLED = """
import dataclasses, sys, time
from tests.training.test_stream import Rows, TRAIN, streamed
from tests.training.tiny import BASE, KEY, tiny_masks, tiny_model
from sculpt.training.finetuning import finetune
class Slow(Rows):
    def __getitem__(self, row):
        time.sleep(0.01)
        return super().__getitem__(row)
model = tiny_model()
finetune(
    model, tiny_masks(model), streamed(Slow(*TRAIN), train_labels=TRAIN[1]),
    dataclasses.replace(BASE, checkpoint_every=4), KEY, directory=sys.argv[1],
)
"""


@pytest.mark.slow
def test_a_killed_run_on_a_stream_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model, config = tiny_model(), dataclasses.replace(BASE, checkpoint_every=4)
    masks = tiny_masks(model)
    process = child(KILLED, tmp_path)
    deadline = time.monotonic() + 120
    while process.poll() is None and not (tmp_path / "records" / "8.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "records" / "18.json").exists()
    tuned = finetune(model, masks, streamed(), config, KEY, directory=tmp_path)
    assert same_bits(tuned, finetune(model, masks, in_memory(), config, KEY))
    assert largest_masked(tuned.params, masks) == 0.0
