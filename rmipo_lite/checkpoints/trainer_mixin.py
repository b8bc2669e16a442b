"""`SafeCheckpointing`: checkpoints of a transformers Trainer that survive a kill at any moment.

The stock Trainer writes files one by one into the folder it will later resume from, takes the
highest number without looking inside, starts with a fresh optimizer when that file is missing, and
pickles half of its state. This mixin replaces those hooks: `class T(SafeCheckpointing, Trainer)`.
A checkpoint is whole or absent (sealed_folder.py), its state is safetensors and JSON
(state.py), and a resumed run repeats the uninterrupted one bit for bit on the CPU.

`training_args.bin` is neither written nor read; `training_config.json` holds the same for people,
without tokens and keys. Of several processes the first writes, and what came of it is known to all.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from rmipo_lite.adapters.saved import AdapterError, load_adapter_weights
from rmipo_lite.checkpoints.optimizer_state import load_optimizer, load_schedule
from rmipo_lite.checkpoints.random_state import random_state, set_random_state
from rmipo_lite.checkpoints.sealed_folder import (
    CheckpointError,
    files_put_in_place,
    newest_valid_checkpoint,
    read_manifest,
    rotate,
    staged_checkpoint,
    verify_checkpoint,
)
from rmipo_lite.checkpoints.state import load_state, save_state
from rmipo_lite.checkpoints.weights import (
    non_finite_weight,
    rehearse_save,
    save_run,
)
from rmipo_lite.output.console import say
from rmipo_lite.output.redaction import without_paths
from rmipo_lite.parallel.group import Group
from rmipo_lite.parallel.sharded import full_state, share_state, whole

STATE_FILE = "trainer_state.json"


class TrainerBeside:
    """What the mixins find of the Trainer beside them, for type checkers."""

    if TYPE_CHECKING:
        model: Any
        args: Any
        state: Any
        control: Any
        lr_scheduler: Any
        accelerator: Any
        callback_handler: Any
        processing_class: Any
        hp_search_backend: Any
        push_in_progress: Any
        hub_model_id: Any
        save_model: Any
        store_flos: Any
        _get_output_dir: Any
        optimizer: Any
        pair_step: Any
        evaluate: Any
        train_dataset: Any
        _tokenizer: Any


class SafeCheckpointing(TrainerBeside):
    """Mixin for `transformers.Trainer`; put it before Trainer in the bases.

    A subclass adds its own state with `extra_state` and takes it back with `load_extra_state`.

    A save that fails (a full disk) is told and noted in `failed_saves`, and training goes on: the
    weights are in memory, the earlier checkpoints are untouched, and the next save may succeed.
    """

    _run_id: str = ""
    _random_states: list[Any]  # of a checkpoint to be written, as are these two
    _extra_state: dict[str, Any]
    _optimizer_state: dict[str, Any]
    failed_saves: list[str]
    changed: Mapping[str, Any]  # options that are others than the checkpoint's

    def extra_state(self) -> dict[str, Any]:
        """What a subclass wants in the checkpoint, as JSON-like values."""
        return {}

    def begin_run(self) -> None:
        """A run is about to begin, or to go on; called before anything of it is read."""

    def check_resume(self, folder: Path) -> dict[str, Any]:
        """The extra state of a checkpoint; a subclass refuses one of another run here."""
        state: dict[str, Any] = load_state(folder, "extra_state")
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave; called before the training loop is set up."""

    def before_training(self) -> None:
        """What a subclass does ahead of the loop, with Ctrl-C and the display at work already."""

    # -- resuming ---------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` takes the newest checkpoint that verifies.

        Raises CheckpointError when the given path doesn't verify, or with True when nothing in
        `output_dir` does; FloatingPointError rather than save weights that aren't finite. A
        `GracefulInterrupt` among the callbacks is active during the call.
        """
        self.failed_saves = []
        self.begin_run()
        group = Group.current()
        with self._whole_weights():
            group.from_first(
                lambda: rehearse_save(self._bare_model(), self.processing_class, self.args)
            )
        folder = self.resolve_resume(resume_from_checkpoint)
        self.changed = {}
        if folder is None:
            self._run_id = group.from_first(lambda: uuid.uuid4().hex)
        else:
            self._run_id = read_manifest(folder)["run_id"]
            self.load_extra_state(self.check_resume(folder))
        with contextlib.ExitStack() as stack:
            for callback in self.callback_handler.callbacks:
                # GracefulInterrupt and ProgressDisplay: what they hold ends with the call
                if isinstance(callback, contextlib.AbstractContextManager):
                    stack.enter_context(callback)
            self.before_training()
            return super().train(  # type: ignore[misc]
                resume_from_checkpoint=None if folder is None else str(folder),
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )

    def resolve_resume(self, resume: str | Path | bool | None) -> Path | None:
        """The checkpoint that is meant, verified; None for a new run. Errors as of `train`."""
        if resume is None or resume is False:
            return None
        wanted = resume
        return Group.current().from_first(lambda: self._verified(wanted))

    def _verified(self, resume: str | Path | Literal[True]) -> Path:
        if resume is not True:
            folder = Path(resume)
            verify_checkpoint(folder)
            if not read_manifest(folder)["resumable"]:
                raise CheckpointError(f"{folder.name} holds only weights (save_only_model=True)")
            return folder
        found, skipped = newest_valid_checkpoint(self.args.output_dir)
        reasons = "; ".join(reason for _, reason in skipped)
        if found is None:
            detail = f": {reasons}" if reasons else ""
            raise CheckpointError(
                f"no valid checkpoint in {self.args.output_dir}{detail}; resume=False "
                "(resume_from_checkpoint=None) starts anew"
            )
        say(f"Resuming from {found}" + (f", skipped: {reasons}" if reasons else ""))
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        target = self.model if model is None else model
        with whole(target, everything=not isinstance(target, PeftModel), changed=True):
            self._load_weights(folder, target)

    def _load_weights(self, folder: Path, target: Any) -> None:
        if isinstance(target, PeftModel):
            try:
                load_adapter_weights(target, folder)
            except AdapterError as error:
                raise CheckpointError(f"{folder.name}: {error}") from error
            return
        if not list(folder.glob("model*.safetensors")):
            raise CheckpointError(f"{folder.name} holds no model*.safetensors; pickle isn't read")
        super()._load_from_checkpoint(str(folder), target)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        verify_checkpoint(best)
        self._load_from_checkpoint(str(best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        load_optimizer(self.optimizer, load_state(folder, "optimizer"), self.changed)
        share_state(getattr(self.optimizer, "optimizer", self.optimizer))
        load_schedule(
            self.lr_scheduler, load_state(folder, "scheduler"), self.changed,
            int(self.state.global_step),
        )  # fmt: skip

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stored = load_state(Path(checkpoint), "scaler")
        scaler = getattr(self.accelerator, "scaler", None)
        if (stored is None) != (scaler is None):
            raise CheckpointError(
                f"{Path(checkpoint).name} was saved {'without' if stored is None else 'with'} a "
                "gradient scaler and this run is the other way round: use the same fp16 setting"
            )
        if scaler is not None:
            scaler.load_state_dict(stored)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = load_state(Path(checkpoint), "rng_state")
            if isinstance(states, list):  # of more or fewer processes: the first's for new ones
                rank = Group.current().rank
                states = states[rank if rank < len(states) else 0]
            set_random_state(states)

    # -- saving -----------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._refuse_to_save_bad_weights()
        group = Group.current()
        self._random_states = group.gather(random_state())
        try:
            self._extra_state = self.extra_state()
            self._optimizer_state = full_state(self.optimizer.state_dict())
            if self.hp_search_backend is None and trial is None:
                self.store_flos()
            with self._whole_weights():
                best = group.from_first(lambda: self._write_checkpoint(trial))
            self.state.best_model_checkpoint = best
        except Exception as error:  # CheckpointError, or what another package raises
            self.failed_saves.append(str(error))
            reason = str(error).rstrip(".")
            say(f"WARNING: {reason}. Training goes on and tries again at the next save")
        finally:
            self._optimizer_state = {}  # of a sharded model a copy

    def _refuse_to_save_bad_weights(self) -> None:
        """A checkpoint of NaN would push the good ones out."""
        found = Group.current().gather(non_finite_weight(self.model, trained_only=True))
        name = next(filter(None, found), None)
        if name is not None:
            raise FloatingPointError(
                f"stopped at step {self.state.global_step}: the trained weight {name} holds NaN or "
                "inf and is not saved; earlier checkpoints are untouched. Resume from the last "
                "one, with a lower learning_rate"
            )

    def _write_checkpoint(self, trial: Any) -> str | None:
        """Write it; the path of the best one so far."""
        run_dir = Path(self._get_output_dir(trial=trial))
        step = int(self.state.global_step)
        target = run_dir / f"checkpoint-{step}"
        resumable = not self.args.save_only_model
        self._run_id = self._run_id or uuid.uuid4().hex
        with staged_checkpoint(
            target, step=step, run_id=self._run_id, resumable=resumable
        ) as folder:
            save_run(self._bare_model(), self.processing_class, self.args, folder)
            self._note_best_checkpoint(run_dir, target)
            if resumable:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
                save_state(folder, "extra_state", self._extra_state)
            self._export_callback_states()
            self.state.save_to_json(str(folder / STATE_FILE))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        best = self.state.best_model_checkpoint
        keep = {target} if best is None else {target, Path(best)}
        rotate(run_dir, run_id=self._run_id, limit=self.args.save_total_limit, keep=keep)
        return best

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Finish without the stock clean-up, which deletes the newest checkpoint for the best.

        With `save_total_limit=1` that would throw away what an interrupted run resumes from.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit

    def _note_best_checkpoint(self, run_dir: Path, target: Path) -> None:
        if not self.state.best_global_step:
            return
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best == target or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _export_callback_states(self) -> None:
        exported: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name, state = type(callback).__name__, callback.state()
            if callback is self.control:
                # a run stopped by Ctrl-C must not stop again as soon as it is resumed
                state["args"]["should_training_stop"] = False
            if name in exported:
                earlier = exported[name]
                exported[name] = [*(earlier if isinstance(earlier, list) else [earlier]), state]
            else:
                exported[name] = state
        self.state.stateful_callbacks = exported

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with self._whole_weights():
            if not Group.current().is_first:
                return
            with files_put_in_place(folder) as staged:
                save_run(self._bare_model(), self.processing_class, self.args, staged, state_dict)

    def _whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """As `save_run` wants them; every process enters it."""
        return whole(self.model, everything=not isinstance(self.model, PeftModel))

    def _bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(Path(output_dir), "optimizer", self._optimizer_state)
        save_state(Path(output_dir), "scheduler", self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        save_state(Path(output_dir), "scaler", None if scaler is None else scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        states = self._random_states
        save_state(Path(output_dir), "rng_state", states if len(states) > 1 else states[0])

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the saved weights; the stock method pickles the arguments, token included."""
        if str(self.args.hub_strategy) in ("HubStrategy.END", "end"):
            return
        from huggingface_hub import HfApi
        from transformers.utils.hub import PushInProgress

        # A copy: weights, tokenizer and readme. Optimizer and random state stay at home, and so do
        # this machine's paths.
        staged = Path(tempfile.mkdtemp(prefix="rmipo-lite-"))
        at_home = shutil.ignore_patterns("optimizer.*", "rng_state.*", "scheduler.*", "scaler.*")
        shutil.copytree(checkpoint_folder, staged, ignore=at_home, dirs_exist_ok=True)
        without_paths(staged)
        job = HfApi(token=self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=str(staged),
            commit_message=f"Training in progress, step {self.state.global_step}",
            run_as_future=True,
            revision=self.args.hub_revision,
        )
        job.add_done_callback(lambda _: shutil.rmtree(staged, ignore_errors=True))
        running = getattr(self, "push_in_progress", None)
        if running is None or running.is_done():
            # its annotation says one future, its code wants a list
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]
        else:
            running.jobs.append(job)
