"""Measure the noise of a loss, and g and c over the perturbation scale μ, without training.

    python probe.py --task_name SST2 --model_name MODEL --trainer zo ... --plot probe.png

The arguments are those of run.py, and ``--plot``. ``run.py --zo_eps auto`` measures the same with
fewer forward passes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Before torch is imported: idle threads leave the cores to other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import transformers

import utils
from command_line.arguments import check, parse_arguments
from command_line.settings import name_run, settle_dtype
from experiment.folders import locked
from experiment.options import Options, options_of
from experiment.preparation import choose_trained_weights, load_pretrained, prepare
from experiment.training import make_trainer
from language_model.loading import leave_out_loading_bars
from trainer import ZerothOrderTrainer
from training.scales import PROBE, Scales, choose_scales, kept_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# μ that are measured for the picture.
GRID = tuple(1e-5 * 4.0**power for power in range(7))


def make_probed_trainer(options: Options) -> ZerothOrderTrainer:
    """Return the trainer of a run's first set, with its optimizer, before the first step."""
    transformers.set_seed(options.weights.seed)
    encoder, (examples, *_) = prepare(options)
    pretrained = load_pretrained(options.model)
    model = choose_trained_weights(pretrained, options.weights, encoder.tokenizer, print)
    trainer = make_trainer(options, model, encoder, examples, options.folders[0])
    trainer.create_optimizer()
    return trainer


def draw(found: Scales, figure: Figure) -> None:
    """Draw g and c over μ, and what noise alone would give."""
    scales = np.array(found.scales)
    # The mean of |x| for normal x is √(2/π) of its standard deviation.
    noise_of_c = np.sqrt(2 / np.pi) * np.sqrt(6) * found.noise / (2 * scales**2)
    panels = (
        ("slope g (root mean square)", found.slopes, found.noise / (np.sqrt(2) * scales)),
        ("curvature c (mean)", found.curvatures, noise_of_c),
    )
    chosen = (
        (found.eps, found.error, "tab:orange"),
        (found.curvature_eps, found.curvature_error, "tab:green"),
    )
    for number, ((name, values, noise), (scale, error, colour)) in enumerate(
        zip(panels, chosen, strict=True)
    ):
        axes = figure.add_subplot(1, 2, 1 + number)
        axes.plot(scales, values, color=colour, marker="o", markersize=4, label="measured")
        axes.plot(scales, noise, color="tab:gray", linestyle="--", label="rounding noise alone")
        right = "" if error is None else f", right to {100 * error:.2g}%"
        axes.axvline(scale, color=colour, linestyle=":", label=f"μ = {scale:.2g}{right}")
        axes.set_xscale("log")
        positive = [value for value in values if value > 0]
        if positive:
            lowest = min([*positive, noise.max() or min(positive)])
            axes.set(yscale="log", ylim=(lowest / 5, max(positive) * 5))
        axes.set(xlabel="perturbation scale μ", ylabel=name)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def run_command_line(argv: Sequence[str]) -> None:
    """Read the command line, measure, and write and draw what is found."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = utils.OneLineParser(
        "probe.py", "probe.py [arguments]", __doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--plot", type=Path, help="picture of g and c over μ; default: none")
    own, others = parser.parse_known_args(argv)
    arguments = parse_arguments(others)
    check(arguments)
    if arguments.trainer != "zo":
        raise utils.InputError(f"--trainer {arguments.trainer}: probe.py measures for --trainer zo")
    if own.plot:
        utils.check_writable("--plot", own.plot)
    figure = utils.new_figure(own.plot, (10, 4)) if own.plot else None
    settle_dtype(arguments)
    name_run(arguments)
    file = Path(arguments.output_dir) / PROBE
    with locked("--output_dir", file.parent, is_folder=True):
        trainer = make_probed_trainer(options_of(arguments))
        with kept_weights(trainer.model, trainer.optimizer):
            found = choose_scales(trainer.loss_along, start=GRID)
        utils.write_json(file, asdict(found))
    print("\n".join([*found.lines(), f"result: {file}"]))
    if figure:
        draw(found, figure)
        utils.save_figure(figure, own.plot)
        print(f"picture: {own.plot}")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (``utils.exit_code``)."""
    leave_out_loading_bars()
    return utils.exit_code(lambda: run_command_line(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
