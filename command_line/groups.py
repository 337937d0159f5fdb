"""The arguments of run.py beside the Trainer's. The text below each is its help."""

from __future__ import annotations

from command_line import effects as when
from command_line.declarations import AUTO, NOTHING, RESULT, TRAINING, argument, group

# Those of transformers, which is not imported here.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant"),
    *("constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)


@group("data", None, NOTHING)
class TaskAndData:
    """Task and data."""

    task_name: str | None = argument(None)
    """Task, in any case: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, Copa, ReCoRD, SQuAD or DROP."""
    data_dir: str | None = argument(None, path=True)
    """Folder with <task>/train.jsonl and validation.jsonl (or .parquet) in the Hub's columns.
    Default: the Hub."""
    train_file: str | None = argument(None, path=True)
    """Your own training examples or demonstrations: JSON Lines, CSV or Parquet with prompt, answer
    and, to choose from, options."""
    validation_file: str | None = argument(None, path=True)
    """Your own examples to report on, in the columns of --train_file. Default: a tenth of
    --train_file is held out."""
    text_column: str | None = argument(None, effect=when.OWN_COLUMNS, decides=TRAINING)
    """Column of your own files that is the prompt. Default: prompt, or text."""
    label_column: str | None = argument(None, effect=when.OWN_COLUMNS, decides=TRAINING)
    """Column of your own files with classes; its different values in the first file are the
    options. Default: the columns options and answer, or label."""
    label_words: str | None = argument(None, effect=when.OWN_COLUMNS, decides=TRAINING)
    """Words that the model reads for the labels, as in 0=terrible,1=great. Default: the labels."""
    answer_column: str | None = argument(None, effect=when.OWN_COLUMNS, decides=TRAINING)
    """Column of your own files with answers to generate. Default: answer."""
    prompt_template: str | None = argument(None, effect=when.OWN_COLUMNS, decides=TRAINING)
    """Prompt made of columns of your own files, as in '{title}: {review}\\nIt was'. Default: the
    column prompt."""
    predict_file: str | None = argument(None, path=True, effect=when.PREDICTION)
    """Rows without an answer, in the columns of --train_file or of the task; the model's answers go
    to --predictions_file. Default: none."""
    metric: str | None = argument(
        None, effect=when.OWN_FILES, decides=RESULT, choices=("accuracy", "f1", "em")
    )
    """First metric of your own examples: accuracy for options, f1 or em (exact match) for generated
    answers. Default: accuracy, or f1."""
    num_train: int = argument(0, at_least=0, decides=TRAINING)
    """Training examples; with --trainer none the demonstrations before each text. MeZO and HiZOO
    papers: 1000 to train on, 32 demonstrations."""
    num_dev: int | None = argument(None, at_least=0, effect=when.DEV_EXAMPLES, decides=TRAINING)
    """Dev examples for dev loss and dev metric, drawn from the training split together with
    --num_train. Default: none. MeZO and HiZOO papers: 500."""
    num_eval: int | None = argument(
        None, "--num_test", at_least=1, effect=when.EVALUATION, decides=RESULT
    )
    """Examples of the validation split to report on. Default: all. MeZO and HiZOO papers: 1000."""
    num_train_sets: int | None = argument(None, at_least=1, effect=when.SETS, decides=RESULT)
    """Training (demonstration) sets, with seeds 0, 1, …, each a run of its own. Default: one."""
    train_set_seed: int | None = argument(None, at_least=0, below=2**32, decides=TRAINING)
    """Seed of one training (demonstration) set and of the eval draw. Default: training uses 0; in
    context every eval example gets demonstrations of its own."""


@group("model", None, TRAINING)
class Model:
    """Model."""

    model_name: str | None = argument(None, path=True, decides=NOTHING)
    """Causal language model: Hub id, local directory or GGUF file."""
    load_float16: bool = argument(False)
    """Load the weights in float16. Default: float32."""
    load_bfloat16: bool = argument(False)
    """Load the weights in bfloat16. With --trainer zo take --zo_eps 1e-2: losses are rounded by as
    much as 1e-3 changes them. Default: float32."""
    load_saved_dtype: bool = argument(False, decides=RESULT)
    """On a GPU, load the weights in the half precision that the model was saved in: float16, or
    bfloat16 where the GPU has it. Otherwise float32."""
    offload: str = argument(
        "none", choices=("none", "cpu", "disk"), effect=when.OFFLOADED, decides=NOTHING
    )
    """Where the weights of blocks lie while they are not needed: disk, for models larger than
    memory, or cpu, for models larger than the GPU's. A step reads and writes each block once."""
    offload_dir: str | None = argument(None, path=True, effect=when.ON_DISK, decides=NOTHING)
    """Folder for the working file of --offload disk, as large as the blocks and their h. The
    model's own files are only read. Default: output_dir."""
    offload_memory: str = argument("0GB", effect=when.OFFLOAD, decides=NOTHING)
    """Memory for the first blocks, which stay there, as in 8GB."""
    offload_write_every: int | str = argument(
        AUTO, at_least=1, words=(AUTO,), effect=when.WRITES_BLOCKS, decides=NOTHING
    )
    """With --offload disk: updates after which a block is written. Those that the disk lacks are
    computed again at each visit, to the same bits. auto: 1, or more where writing takes longer."""
    max_length: int | None = argument(None, at_least=1)
    """Tokens of a text, cut on the left. Default: 2048, or the model's positions if fewer."""
    apply_chat_template: bool = argument(False)
    """Put prompts, demonstrations and answers through the tokenizer's chat template, for scoring,
    generation and training. For instruct models."""
    system_prompt: str | None = argument(None, effect=when.CONVERSATION)
    """What the system says first. Default: what the chat template says."""
    no_auto_device: bool = argument(False, decides=NOTHING)
    """Do not spread the model over the GPUs (accelerate's device_map auto)."""
    trust_remote_code: bool = argument(False, decides=NOTHING)
    """Run Python code that comes with the model. Only for sources that you trust."""


@group("icl", when.CALIBRATION, RESULT)
class InContextLearning:
    """In-context learning. Both need --trainer none, and exclude each other."""

    sfc: bool = argument(False)
    """Calibrate scores with a content-free prompt (surface form competition, arXiv 2104.08315). Not
    for SQuAD and DROP."""
    icl_sfc: bool = argument(False)
    """As --sfc, with the demonstrations before the content-free prompt."""


@group("rewards", when.REWARD_OBJECTIVE, TRAINING)
class Rewards:
    """Rewards. For SQuAD, DROP and your own examples without options."""

    reward: str | None = argument(None, effect=when.REWARD, decides=NOTHING)
    """FILE.py:function: takes lists of prompts, texts and rows (dictionaries), or what TRL's
    GRPOTrainer gives; returns a number for each. Their mean is the first metric, and the objective
    of --trainer zo. The file's code is run. Default: none."""
    reward_samples: int = argument(1, at_least=1)
    """Texts of a prompt in a step; above 1 they are drawn at random, with the same random numbers
    for both sides of a direction."""


@group("results", None, NOTHING)
class EvaluationAndResults:
    """Evaluation and results."""

    eval_before_training: bool = argument(False, effect=when.TRAINED, decides=RESULT)
    """Report the metric on the eval examples before training too (zero-shot)."""
    no_eval: bool = argument(False, effect=when.TRAINED, decides=RESULT)
    """Do not evaluate after training."""
    result_file: str | None = argument(None, path=True)
    """JSON file for metrics and settings. Default: result/<name>.json (see --tag)."""
    predictions_file: str | None = argument(None, path=True, effect=when.END)
    """JSON Lines or .csv file of each eval example's prediction, scores and correctness. Default:
    none."""
    overwrite_output_dir: bool = argument(False)
    """Start again in place of a finished run, or of one of other settings; an unfinished one of the
    same settings resumes. Default: resume; compute nothing where the result is there."""
    config: str | None = argument(None, path=True)
    """YAML file of arguments, as in learning_rate: 1e-6; the command line wins. Default: none."""
    dry_run: bool = argument(False)
    """Check everything but the weights, print steps, forward passes and memory, and do nothing."""
    tag: str | None = argument(None, path=True)
    """Name of the run and of its files, after task and model. Default: made of the settings."""
    verbose: bool = argument(False, effect=when.END)
    """Show the first prompts, their options and scores."""


@group("generation", when.GENERATES, RESULT)
class Generation:
    """Generation. For SQuAD, DROP and your own examples without options."""

    sampling: bool = argument(False)
    """Sample the generated text. Default: greedy, or beams."""
    temperature: float = argument(1.0, above=0, effect=when.SAMPLES)
    """With --sampling, divides the logits; 1 leaves them."""
    num_beams: int = argument(1, at_least=1)
    """Beams of the search; 1: none."""
    top_k: int | None = argument(None, at_least=1, effect=when.SAMPLES)
    """With --sampling, draw from the k likeliest tokens. Default: from all."""
    top_p: float = argument(0.95, above=0, at_most=1, effect=when.SAMPLES)
    """With --sampling, draw from the likeliest tokens of this probability in all (MeZO: 0.95)."""
    max_new_tokens: int = argument(50, at_least=1)
    """Tokens generated at most (MeZO: 50)."""
    eos_token: str = argument("\\n")
    """Text that ends the generation; \\n is a newline (MeZO: newline)."""


@group("weights", when.TRAINED, TRAINING)
class TrainedWeights:
    """What is trained. Default: all weights; with --trainer broadcast matrices of the blocks."""

    lora: bool = argument(False, effect=when.NOT_BROADCAST)
    """Train only LoRA matrices on the query and value projections (arXiv 2106.09685)."""
    lora_r: int = argument(8, at_least=1, effect=when.LORA)
    """Rank of the LoRA matrices (MeZO paper: 8)."""
    lora_alpha: int = argument(16, at_least=1, effect=when.LORA)
    """Scale of LoRA, divided by its rank (MeZO paper: 16)."""
    prefix_tuning: bool = argument(False, effect=when.NOT_BROADCAST)
    """Train only keys and values that precede every text in every layer (arXiv 2101.00190)."""
    num_prefix: int = argument(5, at_least=1, effect=when.PREFIX)
    """Tokens of the prefix; they count for --max_length (MeZO paper: 5)."""
    no_reparam: bool = argument(True, effect=when.PREFIX)
    """Train the prefix itself (MeZO paper); False: a two-layer network that makes it."""
    prefix_init_by_real_act: bool = argument(True, effect=when.PREFIX)
    """Start the prefix from keys and values of random tokens (MeZO paper); False: from noise."""
    head_tuning: bool = argument(False, effect=when.NOT_BROADCAST)
    """Train the language-model head and nothing else. Tied input embeddings change with it unless
    --untie_emb is given."""
    untie_emb: bool = argument(False, effect=when.HEAD)
    """Give the language-model head weights of its own, where it shares the embeddings'."""
    linear_probing: bool = argument(False)
    """Fit the head's rows of the answers' tokens by logistic regression (scikit-learn) on the
    features before it; the same with every --trainer but none."""
    lp_early_stopping: bool = argument(False, effect=when.PROBING)
    """Stop the regression at a tolerance of 1e-2 (not 1e-4), or 1000 iterations (not 5000)."""


@group("training", when.STEPS, TRAINING)
class Training:
    """Training. What belongs to steps or checkpoints needs a --trainer other than none."""

    trainer: str = argument("none", effect=None, choices=("none", "regular", "zo", "broadcast"))
    """none: zero-shot or in context. regular: backpropagation with --optim. zo: forward passes
    only, MeZO, or HiZOO with a --hessian_smooth_type above 0. broadcast: one forward pass a step,
    error broadcast; for losses with a gradient in the logits."""
    only_train_option: bool = argument(True, effect=when.LANGUAGE_MODEL_LOSS)
    """Language-model loss on the correct option only (MeZO paper); False: on the prompt too."""
    train_as_classification: bool = argument(False)
    """Train with the cross-entropy over the options' mean log-probabilities. Not for SQuAD and
    DROP; published runs leave it out for Copa and ReCoRD too. Your own files with options train
    with it unless --only_train_option, --non_diff or False says otherwise."""
    warmup_steps: float = argument(0, "--warmup_step", "--warmup_ratio", at_least=0, fraction=True)
    """Steps over which the learning rate rises from 0; below 1: a fraction of the run."""
    decay_step: float = argument(0, at_least=0, fraction=True, effect=when.DECAY)
    """Step until which the learning rate stays constant before it takes the scheduler's course to
    the end of the run; below 1: a fraction of the run. 0: it takes it from the start."""
    lr_scheduler_type: str | None = argument(None, "--zo_lr_scheduler_type", choices=SCHEDULES)
    """Learning-rate schedule of transformers, per step; constant with --warmup_steps means
    constant_with_warmup. Default: constant; with --trainer regular and broadcast linear."""
    eval_strategy: str = argument(
        "no", "--evaluation_strategy", choices=("no", "steps", "epoch"), decides=RESULT
    )
    """When the dev loss is computed: no, steps (every --eval_steps) or epoch. Without --num_dev on
    the eval examples, as in MeZO."""
    eval_metric: bool = argument(False, effect=when.DEV_LOSSES, decides=NOTHING)
    """Measure the task's metrics on the dev set with every dev loss: as many forward passes again.
    A metric as --metric_for_best_model does it anyway."""
    logging_steps: float = argument(
        10, above=0, fraction=True, effect=when.LOG_STEPS, decides=NOTHING
    )
    """Steps between two entries of the log; below 1: a fraction of the run."""
    logging_nan_inf_filter: bool = argument(False, decides=NOTHING)
    """Log a loss that is not finite as 0. Default: as it is."""
    save_on_interrupt: bool = argument(True, decides=NOTHING)
    """On Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finish the step, save a checkpoint and stop; the same
    command then resumes."""
    save_model: bool = argument(False, effect=when.TRAINED, decides=NOTHING)
    """Save the final model and tokenizer into output_dir."""
    merge_adapter: bool = argument(False, effect=when.SAVED_LORA, decides=NOTHING)
    """Save the model with the LoRA matrices added to its weights, without an adapter."""


@group("zo", when.FORWARD, TRAINING)
class ZerothOrder:
    """Zeroth order. All of it needs --trainer zo."""

    zo_eps: float | str = argument(1e-3, above=0, words=(AUTO,))
    """Perturbation scale μ in units of the weights (HiZOO and MeZO papers: 1e-3; 1e-1 for prefixes,
    1e-2 for LoRA). auto: by the noise and the curvature of the loss."""
    hessian_smooth_type: str = argument("constant0")
    """Smoothing α of the diagonal Hessian: constant<number>. constant0 is MeZO; HiZOO paper: 1e-10
    to 1e-4."""
    hessian: str = argument("full", effect=when.HESSIAN, choices=("full", "lowrank"))
    """full: an entry of h for each weight. lowrank: HiZOO-L, a row and a column vector for each
    matrix (Adafactor's factorisation, arXiv 1804.04235)."""
    zo_perturbation: str = argument("auto", choices=("auto", "inplace", "layerwise"))
    """inplace: shift the weights and back, which rounds. layerwise: perturb one module at a time in
    scratch memory. auto: layerwise for half precision."""
    zo_num_samples: int = argument(1, "--q", at_least=1)
    """Directions a step, averaged: n-SPSA (arXiv 2305.17333). n directions take 2n forward passes,
    and one more for HiZOO."""
    zo_compile: str = argument("auto", decides=RESULT, choices=("auto", "yes", "no"))
    """Whether torch.compile makes the step's kernels: 10 to 35 seconds in a first run, faster
    steps. Needs a C++ compiler. auto: from 16 million trained weights on."""
    non_diff: bool = argument(False, effect=when.WITHOUT_GRADIENT)
    """Train on a metric without a gradient: minus the mean F1 of the generated text, or minus the
    accuracy of options."""


@group("broadcast", when.BROADCAST, TRAINING)
class ErrorBroadcast:
    """Error broadcast. All of it needs --trainer broadcast."""

    broadcast_rate: float | str = argument(AUTO, at_least=0, words=(AUTO,))
    """κ: how many times the error of a scored token a step takes away; --lr_scheduler_type lowers
    it. auto: 200 / steps, at most 4, so that κ sums up to 100 as it falls to 0."""
    broadcast_damping: float = argument(0.1, above=0)
    """λ: damping of the inputs' second moments, as a share of their mean."""
    broadcast_from: float = argument(0.5, at_least=0, below=1)
    """Share of the blocks, from the bottom, that are not trained."""
    broadcast_matrices: str = argument("o,d", choices=("o,d", "o", "d"))
    """Trained matrices. o: the attention's output projection. d: the MLP's (down_proj, fc2)."""
    broadcast_tokens: int = argument(1024, at_least=1)
    """Scored tokens of a batch that a step takes at most; beyond that they are drawn at random."""
