"""What a model says to rows that have no answer: ``--predict_file``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from command_line.arguments import Arguments
from experiment.folders import locked
from experiment.preparation import load_pretrained, prepare_encoder
from language_model.prediction import Prediction, predict
from task_data.own_tasks import OwnTask, own_file
from task_data.sampling import draw_example_sets
from tasks import Sample, Task, load_questions, load_samples
from utils import InputError, write_json_lines


def predict_rows(arguments: Arguments) -> None:
    """Answer every row of a file, and write the answers in its order.

    Raises:
        InputError: the model or the data do not fit, or the answers' file is there already.
    """
    path = Path(arguments.predictions_file)
    if path.is_file() and not arguments.overwrite_output_dir:
        raise InputError(
            f"--predictions_file {path}: it is there already; give another name, or "
            "--overwrite_output_dir to replace it"
        )
    transformers.set_seed(arguments.seed)
    encoder, generation = prepare_encoder(arguments)
    questions = load_questions(encoder.task, own_file("--predict_file", arguments.predict_file))
    shown = _demonstrations(arguments, questions)
    with locked("--predictions_file", path):
        predictions = predict(
            *(load_pretrained(arguments), encoder, questions, shown),
            *(arguments.per_device_eval_batch_size, arguments.calibration, generation),
            progress=None if arguments.quiet else "prediction",
        )
        if arguments.process_index == 0:
            write_json_lines(path, answer_rows(encoder.task, questions, predictions))
            print(f"predictions: {path} ({len(questions)} rows)")


def _demonstrations(arguments: Arguments, questions: Sequence[Sample]) -> list[list[Sample]]:
    """Return what is shown before each question, drawn as before eval examples."""
    train: list[Sample] = []
    task = arguments.task
    if arguments.num_train:
        if isinstance(task, OwnTask) and not task.train_file:
            raise InputError(
                f"--num_train {arguments.num_train} needs --train_file: give examples to draw from"
            )
        train, _ = load_samples(task, arguments.data_dir, with_validation=False)
    (drawn,) = draw_example_sets(
        train,
        list(questions),
        num_train=arguments.num_train,
        num_dev=0,
        num_eval=None,
        num_train_sets=None,
        train_set_seed=arguments.train_set_seed,
        in_context=True,
    )
    by_id = {
        sample.id: shown
        for sample, shown in zip(drawn.evaluation, drawn.demonstrations, strict=True)
    }
    return [by_id[question.id] for question in questions]


def answer_rows(
    task: Task, questions: Sequence[Sample], predictions: Sequence[Prediction]
) -> list[dict[str, Any]]:
    """Return a row for each question: the option's text or the generated one, and all scores."""
    rows = []
    for question, prediction in zip(questions, predictions, strict=True):
        row: dict[str, Any] = {"id": question.id, "prediction": prediction.answer}
        if prediction.scores is not None:
            options = [task.option(question, choice).strip() for choice in question.candidates]
            chosen = question.candidates.index(prediction.answer)
            row |= {"prediction": options[chosen], "options": options}
            row["scores"] = list(prediction.scores)
        rows.append(row)
    return rows
