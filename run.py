"""Zero-shot and in-context evaluation, fine-tuning, and HiZOO / MeZO: from arguments to a result.

python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo ...
"""

from __future__ import annotations

import gc
import os
import signal
import sys

if __name__ == "__main__":
    # Before torch is imported: idle threads leave the cores to other programs, and Ctrl-C while the
    # libraries load ends the run without a traceback. Garbage collection during imports costs a
    # sixth of the start-up time.
    gc.disable()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from command_line.starting import begin

if __name__ == "__main__":
    # What is wrong is said before torch and transformers are imported, which takes seconds.
    values = begin(sys.argv[1:])

import time
from collections.abc import Sequence

import transformers

from command_line.arguments import Arguments, check, make_arguments
from command_line.reading import Values, read_values
from command_line.settings import name_run, settings_of_all_processes, settle_dtype
from experiment.folders import locked_places
from experiment.options import Options, options_of
from experiment.plan import make_plan
from experiment.preparation import prepare
from experiment.results import earlier_result, is_wanted_again, summarize, write_rows
from experiment.running import Experiment, predict_rows, say
from experiment.telling import result_lines, table
from language_model.loading import leave_out_loading_bars
from training.processes import check_same, in_all_processes, naming_lost_processes
from utils import exit_code, leave_process_group_at_exit, process_index, write_json


def run_experiment(options: Options) -> None:
    """Do every run and write the result, unless it is there already."""
    started = time.perf_counter()
    earlier = earlier_result(options)
    if earlier and not is_wanted_again(options):
        say("these settings have a result already (--overwrite_output_dir makes it anew)")
        say("\n".join(result_lines(options, earlier)))
        return
    transformers.set_seed(options.weights.seed)
    encoder, example_sets = in_all_processes(lambda: prepare(options))
    experiment = Experiment(options, encoder, has_result=earlier is not None)
    runs = zip(example_sets, options.folders, strict=True)
    results, predictions = zip(*(experiment.run(*each) for each in runs), strict=True)
    if process_index() == 0:
        result = summarize(options, encoder, example_sets[0], results, experiment.used)
        result["seconds"] = round(time.perf_counter() - started, 3)
        for path, rows in zip(options.predictions, predictions, strict=False):
            write_rows(path, rows)
        write_json(options.arguments.result_path, result)
        if "steps" in result:
            say("\n".join(table(options.task.metric_name, result)))
        # The metrics of a single run have been printed.
        say("\n".join(result_lines(options, result, with_metrics="runs" in result)))


def run_command_line(values: Values) -> None:
    """Do what a command line says."""
    arguments = make_arguments(values)
    with naming_lost_processes(arguments.ddp_timeout):
        do(arguments)


def do(arguments: Arguments) -> None:
    """Check the arguments, and do what they say."""
    check_same(settings_of_all_processes(arguments))
    in_all_processes(lambda: check(arguments))
    if arguments.warning and process_index() == 0:
        print(arguments.warning, file=sys.stderr)
    settle_dtype(arguments)
    leave_process_group_at_exit()
    if arguments.dry_run:
        options = options_of(arguments)
        say("\n".join(make_plan(options, prepare(options)).lines()))
    elif arguments.predict_file:
        predict_rows(options_of(arguments), arguments.predict_file)
    else:
        name_run(arguments)
        check_same({"the content of the model or of the data": arguments.experiment})
        options = options_of(arguments)
        with locked_places(options):
            run_experiment(options)


def main(argv: Sequence[str], values: Values | None = None) -> int:
    """Run the command line, with its values if they are read; returns ``utils.exit_code``."""
    leave_out_loading_bars()
    return exit_code(lambda: run_command_line(values or read_values(argv)))


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:], values))
