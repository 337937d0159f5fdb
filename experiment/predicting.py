"""Answers to rows that have none: ``--predict_file``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import transformers

from experiment.folders import locked
from experiment.options import DataOptions, Options
from experiment.preparation import load_pretrained, prepare_encoder
from experiment.results import check_predictions, prediction_rows
from language_model.prediction import predict
from task_data.files import own_file
from task_data.loading import load_samples, read_samples
from task_data.sampling import draw_example_sets
from tasks import Sample
from utils import process_index, write_json_lines


def predict_rows(options: Options, file: str) -> None:
    """Answer every row of a file, and write the answers in its order.

    Raises:
        InputError: the model or the data do not fit, or the answers' file is there already.
    """
    check_predictions(options.files)
    (path,) = options.files.predictions
    transformers.set_seed(options.weights.seed)
    data, evaluation = options.data, options.evaluation
    encoder = prepare_encoder(options.model, options.weights, data)
    questions = read_samples(data.task, own_file("--predict_file", file), with_answers=False)
    shown = _demonstrations(data, questions)
    with locked("--predictions_file", path):
        predictions = predict(
            *(load_pretrained(options.model), encoder, questions, shown),
            *(evaluation.batch_size, evaluation.calibration, data.generation),
            progress=None if evaluation.quiet else "prediction",
        )
        if process_index() == 0:
            task = replace(data.task, reward=None)
            write_json_lines(path, prediction_rows(task, questions, predictions))
            print(f"predictions: {path} ({len(questions)} rows)")


def _demonstrations(data: DataOptions, questions: Sequence[Sample]) -> list[list[Sample]]:
    """Return what is shown before each question, drawn as before eval examples."""
    train: list[Sample] = []
    if data.draw.num_train:
        train, _ = load_samples(data.task, data.data_dir, with_validation=False)
    how = replace(data.draw, num_dev=0, num_eval=None)
    (drawn,) = draw_example_sets(train, list(questions), **vars(how))
    shown = zip(drawn.evaluation, drawn.demonstrations, strict=True)
    by_id = {sample.id: demonstrations for sample, demonstrations in shown}
    return [by_id[question.id] for question in questions]
