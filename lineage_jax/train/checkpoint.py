"""Checkpoints: the train state on disk, whole or not there, and known to be what was saved.

Orbax writes the arrays, asynchronously and atomically. It does not notice a flipped bit or a
truncated file when it reads them back, so each step has a manifest of SHA-256 digests beside it,
and a step counts as saved once its manifest stands.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lineage_jax.train.metrics import write_json
from lineage_jax.train.processes import first_says


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or trusted."""


class Checkpoints:
    """The checkpoints of one run, in `folder/steps` with manifests in `folder/manifests`.

    One object per folder at a time. Use as a context manager: leaving it waits for the last save.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int | None = 3):
        """Opens (and makes) the folder, and clears away what a killed run left half-written.

        Args:
          folder: of the checkpoints.
          keep: how many of the latest to keep; None keeps all.
        """
        self._folder = epath.Path(folder).expanduser().resolve()  # orbax wants it absolute
        self._steps, self._manifests = self._folder / "steps", self._folder / "manifests"
        self._manifests.mkdir(parents=True, exist_ok=True)
        policy = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=policy.LatestN(keep),
            save_decision_policy=policy.FixedIntervalPolicy(1),
        )
        self._manager = ocp.CheckpointManager(
            self._steps, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )
        self._sealing: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def saved_steps(self) -> list[int]:
        """Steps with a manifest, latest first; whether they are intact shows when restored."""
        manifests = self._manifests.glob("*.json")
        return sorted((int(path.stem) for path in manifests), reverse=True)

    def save(self, step: int, state: Any) -> None:
        """Starts to save `state`; returns once its arrays have been copied.

        Raises:
          CheckpointError: if the save before this one failed.
        """
        self.wait()
        try:
            if step in self._manager.all_steps():  # left without a manifest by a killed run
                self._manager.delete(step)
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            self._clear()
            raise self.failed_to_save(error) from error
        self._sealing = threading.Thread(target=self._seal, args=(step,), daemon=True)
        self._sealing.start()

    def wait(self) -> None:
        """Returns when the last save stands on disk.

        Raises:
          CheckpointError: if it could not be written.
        """
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._error is not None:
            error, self._error = self._error, None
            self._clear()
            raise self.failed_to_save(error) from error

    def close(self) -> None:
        """Waits for the last save and lets the folder go."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it repeats what `wait` has raised already
                self._manager.close()

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`.

        Args:
          step: one of `saved_steps()`.
          like: a pytree of arrays or `ShapeDtypeStruct` with shardings: what is wanted, and where.

        Raises:
          CheckpointError: naming the file that is missing, truncated or changed.
          ValueError: naming an array that is missing, unexpected, or of another shape or type.
        """
        self._verify_for_all(step)
        self._compare(step, like)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._steps / str(step)} cannot be read: {_first_line(error)}"
            ) from error

    def restore_latest(self, like: Any) -> tuple[int, Any, list[str]] | None:
        """The latest intact state: (step, state, what was wrong with later ones), or None.

        Raises:
          CheckpointError: if there are checkpoints and none of them is intact.
        """
        problems: list[str] = []
        for step in self.saved_steps():
            try:
                return step, self.restore(step, like), problems
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"no intact checkpoint in {self._folder}: {problems[0]}; "
                "start anew in another folder, or delete this one"
            )
        return None

    def _seal(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self._steps / str(step)
                manifest = {name: _digest(path) for name, path in _files(folder)}
                write_json(self._manifests / f"{step}.json", manifest)
                alive = {str(step) for step in self._manager.all_steps()}
                for path in self._manifests.glob("*.json"):
                    if path.stem not in alive:
                        path.unlink()
        except BaseException as error:  # handed to the thread that saves next, or waits
            self._error = error

    def _clear(self) -> None:
        """Takes away what a save that failed has left, so that a full disk has room to say so."""
        if jax.process_index() != 0:
            return
        for _ in range(20):  # what fails first may leave others that still write there
            left = list(self._steps.glob("*.orbax-checkpoint-tmp*"))
            if not left:
                return
            for path in left:
                with contextlib.suppress(OSError):
                    path.rmtree()
            time.sleep(0.1)

    def _verify_for_all(self, step: int) -> None:
        """Of several processes the first reads every byte, and the others take its word."""
        if jax.process_count() == 1:
            return self._verify(step)
        problem: CheckpointError | None = None
        if jax.process_index() == 0:
            try:
                self._verify(step)
            except CheckpointError as error:
                problem = error
        if not first_says(problem is None):
            raise problem or CheckpointError(f"checkpoint {self._steps / str(step)} is damaged")

    def _verify(self, step: int) -> None:
        folder, path = self._steps / str(step), self._manifests / f"{step}.json"
        try:
            manifest = json.loads(path.read_text())
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict) or not manifest:
            raise CheckpointError(f"checkpoint manifest {path} is damaged")
        present = dict(_files(folder))
        for name, digest in manifest.items():
            if name not in present:
                raise CheckpointError(f"checkpoint file {folder / name} is missing, says {path}")
            if _digest(present[name]) != digest:
                raise CheckpointError(
                    f"checkpoint file {folder / name} is not what was saved: its digest differs "
                    f"from that in {path}"
                )

    def _compare(self, step: int, like: Any) -> None:
        saved = _leaves(self._manager.item_metadata(step))
        wanted = _leaves(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"checkpoint step {step} does not fit this run: {name} is wanted as "
                    f"{_describe(wanted.get(name))}, was saved as {_describe(saved.get(name))}; "
                    "use the config it was saved with"
                )

    def failed_to_save(self, error: BaseException) -> CheckpointError:
        """One line of what kept a run from writing, and of what is safe."""
        saved = self.saved_steps()
        last = f"the last whole one is step {saved[0]}" if saved else "there is no earlier one"
        return CheckpointError(
            f"cannot save a checkpoint to {self._folder} ({_first_line(error)}); {last}; "
            "free some space or choose another folder, then run again with --resume"
        )


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(x.shape), str(x.dtype))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name, path


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    if "No space left on device" in str(error):  # at the end of a long chain of paths
        return "no space left on device"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
