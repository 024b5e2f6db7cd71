"""Checkpoints: atomic, checked, and tied to the run that wrote them."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.files import named_disk_full, written_whole
from sculpt.interrupts import defers_interrupts

_FORMAT = 1
_OWNER = "run.json"


class Checkpoints:
    """The checkpoints of one run in one directory, written by Orbax.

    A step is written under a temporary name and renamed when complete, so a kill in mid-save leaves the last complete
    step readable. Any pytree of arrays will do, typed keys included; `finetune` and `search` both keep theirs here.

    Args:
      directory: made if it is not there.
      fingerprint: tells this run from others: the same text is needed to come back.
      keep: how many of the latest steps stay.

    Raises:
      ValueError: if the directory holds another run, or something that is no run of checkpoints.
    """

    def __init__(self, directory: str | Path, fingerprint: str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._manager: Any = None
        self._claim(fingerprint)

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._directory

    def latest(self) -> Path | None:
        """Folder of the last complete step, if there is any."""
        step = self._last(self._open())
        return None if step is None else self._folder(step)

    def save(self, step: int, tree: Any) -> None:
        """Writes a pytree of arrays; returns when it is safely on disk.

        Raises:
          ValueError: unless `step` is above the last one saved.
        """
        import orbax.checkpoint as ocp

        manager = self._open()
        last = self._last(manager)
        if last is not None and step <= last:
            raise ValueError(
                f"checkpoints in {self._directory}: step {step} is not above the last one, {last}"
            )
        leaves = _to_host(tree)
        with _interrupted_afterwards():
            with _quiet(), named_disk_full(self._folder(step)):
                manager.save(step, args=ocp.args.PyTreeSave(_named(leaves)))
                manager.wait_until_finished()
            _write(self._record(step), {"leaves": _kinds(leaves), "files": _sums(self._folder(step))})
        for record in self._records() - set(manager.all_steps()):
            self._record(record).unlink()

    def restore_latest(self, template: Any) -> tuple[int, Any] | None:
        """Reads the last complete step.

        Args:
          template: a pytree of the structure, shapes and dtypes that were saved. Its jax arrays come back as jax arrays,
            sharded alike; its numpy arrays as numpy arrays.

        Returns:
          (step, tree), or None if nothing was saved yet.

        Raises:
          ValueError: if the step is damaged, or does not fit the template.
        """
        import orbax.checkpoint as ocp

        manager = self._open()
        step = self._last(manager)
        if step is None:
            return None
        expected = _to_host(template)
        # Before Orbax looks: what it raises on damaged files says little, and its event loop complains afterwards.
        self._verify(step, _kinds(expected))
        arguments = jax.tree.map(
            lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), _named(expected)
        )
        try:
            with _quiet():
                found = manager.restore(
                    step, args=ocp.args.PyTreeRestore(_named(expected), restore_args=arguments)
                )
        except Exception as error:  # whatever Orbax and TensorStore may raise
            raise ValueError(self._damaged(step, f"{type(error).__name__}: {str(error)[:200]}")) from error
        like = jax.tree.leaves(template)
        leaves = [found.get(name, x) for name, x in zip(_names(expected), expected)]
        return step, jax.tree.unflatten(
            jax.tree.structure(template), [_as(x, y) for x, y in zip(like, leaves)]
        )

    def close(self) -> None:
        """Ends Orbax's threads; the object opens itself again when it is used again."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
            )
            with _quiet():
                self._manager = ocp.CheckpointManager(self._directory / "steps", options=options)
                # A kill between a step's last file and its record: as if it had not been saved.
                for step in set(self._manager.all_steps()) - self._records():
                    self._manager.delete(step)
        return self._manager

    def _last(self, manager: Any) -> int | None:
        return max(self._records() & set(manager.all_steps()), default=None)

    def _folder(self, step: int) -> Path:
        return self._directory / "steps" / str(step)

    def _record(self, step: int) -> Path:
        return self._directory / "records" / f"{step}.json"

    def _records(self) -> set[int]:
        names = (path.stem for path in (self._directory / "records").glob("*.json"))
        return {int(name) for name in names if name.isascii() and name.isdecimal()}

    def _verify(self, step: int, kinds: list[str]) -> None:
        """Compares a step with the record that was made of it."""
        try:
            record = json.loads(self._record(step).read_text())
            saved, files = record["leaves"], record["files"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(self._damaged(step, f"its record {self._record(step)} is damaged")) from error
        if _sums(self._folder(step)) != files:
            raise ValueError(self._damaged(step, "its files are not as they were written"))
        if saved != kinds:
            wrong = next(((a, b) for a, b in zip(saved, kinds) if a != b), (len(saved), len(kinds)))
            raise ValueError(self._damaged(step, f"its arrays are others: {wrong[0]}, expected {wrong[1]}"))

    def _claim(self, fingerprint: str) -> None:
        """Writes who owns the directory, or checks it."""
        file = self._directory / _OWNER
        self._directory.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(path.suffix != ".tmp" for path in self._directory.iterdir()):
                raise ValueError(
                    f"{self._directory} is not empty and holds no checkpoints: name an empty directory"
                )
            _write(file, {"format": _FORMAT, "fingerprint": fingerprint})
            return
        try:
            owner = json.loads(file.read_text())
            found = owner["format"], owner["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: delete {self._directory} to start again") from error
        if found != (_FORMAT, fingerprint):
            raise ValueError(
                f"{self._directory} holds checkpoints of another run (other settings, weights, data, key or version): "
                "name another directory, or delete it to start again"
            )

    def _damaged(self, step: int, why: str) -> str:
        folder = self._folder(step)
        return (
            f"the checkpoint {folder} cannot be read ({why}): delete that folder to go back to the step before, or "
            f"{self._directory} to start again"
        )


def _to_host(tree: Any) -> list[np.ndarray]:
    """The leaves as numpy arrays of their own; keys as their data."""
    return [np.array(jax.random.key_data(x) if _is_key(x) else x) for x in jax.tree.leaves(tree)]


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as(like: Any, leaf: np.ndarray) -> Any:
    """A leaf read back, as the kind of thing that the template has in its place."""
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array):
        # A copy by jax itself: a buffer that numpy shares could not be given away to the next step.
        return jax.device_put(jnp.array(leaf, copy=True), like.sharding)
    return leaf if isinstance(like, np.ndarray) else type(like)(leaf.item())


def _names(leaves: list[np.ndarray]) -> list[str]:
    return [f"{index:05d}" for index in range(len(leaves))]


def _named(leaves: list[np.ndarray]) -> dict[str, np.ndarray]:
    # Orbax does not store empty arrays; they come back from the template.
    return {name: leaf for name, leaf in zip(_names(leaves), leaves) if leaf.size}


def _kinds(leaves: list[np.ndarray]) -> list[str]:
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]


def _sums(folder: Path) -> dict[str, int]:
    """Checksum of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}


def _write(file: Path, content: dict[str, Any]) -> None:
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(content))


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C waits for what is under way: Orbax's threads would complain for a page."""
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if defers_interrupts() or not main or not callable(before):
        yield
        return
    caught: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports every step it takes through absl, and logs what it raises too."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
