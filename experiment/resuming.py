"""Where a run begins: at a checkpoint, in its journal, or with the pre-trained weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from command_line.declarations import AUTO
from experiment.options import Options
from language_model.encoding import Encoder
from task_data.sampling import ExampleSet
from tasks import Sample, Task
from training import checkpoints
from training.callbacks import run_state
from training.journal import JOURNAL, Journal, read_journal
from training.processes import from_first_process
from training.recording import ANOTHER_FOLDER, Recording, checksum_of_weights
from utils import InputError, fingerprint, speaks_for_all
from zeroth_order import noise

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())
# What decides the course of a training beside its settings, compared by content.
CONTENTS = ("examples", "weights", "tokens", "rewards", "noise")
# How the names of schedules begin that do not depend on the length of the run.
ENDLESS = ("constant", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


class Start(NamedTuple):
    """Where a run begins: a checkpoint or the pre-trained weights, then steps of a journal."""

    checkpoint: Path | None
    recording: Recording

    @property
    def source(self) -> str | None:
        """What the run resumes from, by its name; None if it begins anew."""
        journal = self.recording.path if self.recording.replayed_steps else None
        return str(self.checkpoint or journal or "") or None

    def words(self) -> str:
        """Return it in words; none where the run begins anew."""
        parts = [str(self.checkpoint)] if self.checkpoint else []
        if steps := self.recording.replayed_steps:
            parts.append(f"{steps:,} steps of {self.recording.path}")
        return ", and ".join(parts)


def with_contents(
    options: Options, encoder: Encoder, examples: ExampleSet, model: PreTrainedModel | PeftModel
) -> Options:
    """Return options whose course has digests of ``CONTENTS``; ``model`` is the pre-trained one."""

    def digest(value: Any) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()

    def digests() -> dict[str, Any]:
        samples, task = [*examples.train, *examples.dev], encoder.task
        tokens = [encoder.tokenizer.encode(task.prompt(sample)) for sample in samples]
        weights = (p for p in model.parameters() if not p.is_meta)
        template = encoder.chat and encoder.tokenizer.chat_template
        return {
            "examples": digest([_texts(task, sample) for sample in samples]),
            "weights": checksum_of_weights(model, weights),
            "tokens": digest([tokens, template]),
            "rewards": task.reward and fingerprint([task.reward.file]),
            "noise": noise.VERSION,
        }

    # With FSDP other processes may have no weights yet.
    return replace(options, course={**options.course, **from_first_process(digests)})


def _texts(task: Task, sample: Sample) -> list[Any]:
    """Return what a training step sees of a sample."""
    prompt = task.prompt(sample)
    answers = [task.option(sample, each) for each in sample.candidates or sample.correct]
    row = sorted(sample.row.items()) if task.reward else None
    return [prompt, task.messages(prompt, sample), answers, sample.correct, row]


def find_start(options: Options, output_dir: Path, has_result: bool, steps: int) -> Start:
    """Return where a run of so many steps begins; ``options`` are those of ``with_contents``.

    Raises:
        InputError: what is there, or what is asked for, does not belong to this run.
    """
    wanted = options.resume_from
    path = output_dir / JOURNAL if options.arguments.trainer == "zo" else None
    if wanted == "false":
        return Start(None, Recording(path))
    try:
        journal = path and from_first_process(lambda: read_journal(path))
    except InputError as error:
        raise InputError(f"{error}; give another --output_dir, or remove it") from error
    if wanted in (None, "true"):
        checkpoint = checkpoints.last_whole_checkpoint(output_dir)
    else:
        checkpoint = Path(wanted)
        if reason := from_first_process(lambda: checkpoints.damage(checkpoint)):
            raise InputError(
                f"--resume_from_checkpoint {wanted} is damaged: {reason}; give another one, or "
                "leave it out to resume from the newest whole one"
            )
    if wanted == "true" and not checkpoint and not journal:
        raise InputError(f"--resume_from_checkpoint: no whole checkpoint in {output_dir}")
    done = _step_of(options, checkpoint, journal, has_result, steps) if checkpoint else 0
    recording = Recording(path)
    if journal:
        recording = _continued(options, journal, done, has_result, steps)
    return Start(checkpoint if done else None, recording)


def is_resumed(
    options: Options, place: Path, settings: Mapping[str, Any], is_finished: bool
) -> bool:
    """Whether a run resumes from a checkpoint or a journal that is there.

    ``--overwrite_output_dir`` takes only one that the very same run began and did not finish.

    Raises:
        InputError: it belongs to another run: a setting, an example or a weight differs.
    """
    course = options.course
    if options.arguments.overwrite_output_dir and not options.resume_from:
        return not is_finished and settings == options.of_run
    # A setting that is not written down is newer than what is there, and has its default.
    saved = {**{n: now for n, now in course.items() if n not in CONTENTS}, **settings}
    different = {n: now for n, now in course.items() if saved.get(n) != now}
    # Other settings may be the reason for other contents, so name the settings alone.
    words = [f"--{n} {settings[n]}, not {now}" for n, now in different.items() if n not in CONTENTS]
    words = words or [f"other {name}" for name in different]
    if words:
        raise InputError(f"{place} comes from a run with {', '.join(words)}: {ANOTHER_FOLDER}")
    return True


def _warn_of_another_length(options: Options, place: Path, settings: Mapping[str, Any]) -> None:
    """Say that the end is not that of a straight run, where a schedule depends on the length."""
    course, length = options.course, options.length
    schedule = course.get("lr_scheduler_type", "constant")
    names = [] if schedule.startswith(ENDLESS) else ["lr_scheduler_type"]
    names += ["warmup_steps"] if 0 < course.get("warmup_steps", 0) < 1 else []
    names += ["broadcast_rate"] if course.get("broadcast_rate") == AUTO else []
    if names and any(settings.get(name) != now for name, now in length.items()):
        schedules = ", ".join(f"--{name} {course[name]}" for name in names)
        asked = " ".join(f"--{name} {now:g}" for name, now in length.items())
        logger.warning(
            f"{schedules} depend{'s' if len(names) == 1 else ''} on the length of a run, and "
            f"{place} had another: the end is not that of a run with {asked} from its start"
        )


def _step_of(
    options: Options, checkpoint: Path, journal: Journal | None, has_result: bool, steps: int
) -> int:
    """Return how many steps a checkpoint of this run has; 0: the run does not resume from it."""
    state = checkpoints.read_trainer_state(checkpoint)
    kept, step = run_state(state), state["global_step"]
    if not options.arguments.overwrite_output_dir or options.resume_from:
        checkpoints.check_version(checkpoint, kept)
    elif kept.get("version") != checkpoints.CHECKPOINT_VERSION:
        return 0
    is_finished = has_result and step >= state["max_steps"]
    settings = kept.get("settings", {})
    if not is_resumed(options, checkpoint, settings, is_finished):
        return 0
    _check_length(options, checkpoint, step, steps)
    # A finished run is only loaded, and its weights are enough.
    if step < max(steps, state["max_steps"]) and not checkpoints.has_optimizer(checkpoint):
        reason = f"{checkpoint} has no state of an optimizer and a scheduler"
        is_named = options.resume_from not in (None, "true")
        is_in_journal = bool(journal) and journal.header.step == 0
        if is_named or not (is_in_journal or options.arguments.overwrite_output_dir):
            raise InputError(f"{reason}; {checkpoints.ANOTHER}")
        instead = f"with {journal.path}" if is_in_journal else "anew"
        logger.warning(f"{reason}: the run begins {instead}")
        return 0
    _warn_of_another_length(options, checkpoint, settings)
    return step


def _continued(
    options: Options, journal: Journal, step: int, has_result: bool, steps: int
) -> Recording:
    """Return a recording that continues a journal after ``step`` steps, or begins a new one."""
    path, header = journal.path, journal.header
    is_finished = has_result and not step and journal.steps >= header.max_steps
    settings = {**header.settings, "noise": header.noise}
    if not is_resumed(options, path, settings, is_finished):
        return Recording(path)
    if journal.fault:
        logger.warning(
            f"{path} is damaged after step {journal.steps} ({journal.fault}): what follows is "
            "computed again"
        )
    if not header.step <= step <= journal.steps:
        logger.warning(
            f"{path} has steps {header.step} to {journal.steps}, not {step}: it is begun anew"
        )
        return Recording(path)
    if options.resume_from not in (None, "true"):
        # The user named a checkpoint: resume there, not behind the last step of the journal.
        return Recording(path, begins_at=journal.end_of(step))
    if step < journal.steps:
        _check_length(options, path, journal.steps, steps)
        if not step:
            _warn_of_another_length(options, path, settings)
    start = header.start if step == header.step else None
    return Recording(path, journal.after(step), journal.ends[-1], start)


def _check_length(options: Options, place: Path, done: int, steps: int) -> None:
    """Refuse what has more steps than the run."""
    ((name, length),) = options.length.items()
    # Smaller batches make more steps of an epoch.
    is_known = name == "max_steps" or not options.arguments.auto_find_batch_size
    if is_known and done > steps:
        raise InputError(f"{place} has more than --{name} {length:g}: {ANOTHER_FOLDER}")
