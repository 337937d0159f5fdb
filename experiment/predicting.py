"""A run's model answers samples; ``--predict_file``: rows that have no answer yet."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from experiment.folders import locked_places
from experiment.options import Options
from experiment.preparation import check_conversations, load_pretrained, prepare_encoder
from experiment.results import check_predictions, prediction_rows, write_rows
from experiment.telling import use_in_python
from language_model.encoding import Encoder
from language_model.scoring import Prediction, predict
from task_data.files import own_file, read_rows
from task_data.loading import load_samples, read_samples
from task_data.own_tasks import OwnTask
from tasks import Sample
from utils import InputError, process_index

logger = logging.getLogger(__name__)


def answers(
    options: Options,
    encoder: Encoder,
    model: PreTrainedModel | PeftModel,
    samples: list[Sample],
    shown: list[list[Sample]],
    label: str,
) -> list[Prediction]:
    """Return a model's answers; ``shown`` before each sample, ``label`` beside the bar."""
    arguments = options.arguments
    how = (arguments.per_device_eval_batch_size, arguments.calibration)
    return predict(
        *(model, encoder, samples, shown, *how),
        generation=options.generation,
        progress=label,
    )


def predict_rows(options: Options, file: str) -> None:
    """Answer every row of a file, and write the answers in its order.

    Raises:
        InputError: the model or the data do not fit, or the answers' file is there already.
    """
    check_predictions(options)
    (path,) = options.predictions
    transformers.set_seed(options.weights.seed)
    task = options.task
    encoder = prepare_encoder(options)
    questions = read_samples(task, own_file("--predict_file", file), with_answers=False)
    own = [row for _, row in read_rows(Path(file))]  # with columns that no prompt needs
    if taken := {"prediction", "scores", "correct"} & own[0].keys():
        raise InputError(f"{file}: rename its column {min(taken)!r}: predictions have one")
    if isinstance(task, OwnTask) and task.generation and not options.arguments.train_file:
        logger.warning("answers are generated; --train_file chooses among the labels of its rows")
    train: list[Sample] = []
    if options.arguments.num_train:
        train, _ = load_samples(task, options.arguments.data_dir, with_validation=False)
    # Demonstrations are drawn as before eval examples, in whose order the answers come.
    (drawn,) = options.draw(train, questions)
    check_conversations(encoder, drawn, file)
    with locked_places(options):
        model = load_pretrained(options.model)
        shown = (drawn.evaluation, drawn.demonstrations)
        predictions = answers(options, encoder, model, *shown, "prediction")
        if process_index() == 0:
            rows = prediction_rows(replace(task, reward=None), drawn.evaluation, predictions)
            order = {sample.id: row for sample, row in zip(drawn.evaluation, rows, strict=True)}
            write_rows(path, [row | order[n] for n, row in enumerate(own)])
            print("\n".join(use_in_python(options, encoder, questions[0])))
            print(f"predictions: {path} ({len(questions)} rows)")
