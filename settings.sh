# What HiZOO.sh, icl.sh, finetune.sh and finetune_fsdp.sh share: sourced by them, not run.
# They set HERE, this folder, before. Arrays that may be empty are read as ${A[@]+"${A[@]}"}, since
# bash 3.2 (macOS) calls an empty one unbound.
BUNDLED_MODEL=$HERE/data/tiny-opt
WEIGHTS_ARGUMENTS="--load_float16 --load_bfloat16 --load_int8 --load_int4"

# Threads that wait give up their core: without it a run beside another takes several times longer.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

refuse() { # WORDS...
    echo "error: $*" >&2
    exit 2
}

# ------------------------------------------------------------------------------------- arguments

# Whether one of the names is among the arguments: given "--fp16 --bf16" "$@"
given() { # NAMES ARGUMENTS...
    local names=" ${1//-/_} " argument
    shift
    for argument in "$@"; do
        argument=${argument%%=*} # Names may be written with dashes, as --eval-steps.
        case $names in *" ${argument//-/_} "*) return 0 ;; esac
    done
    return 1
}

# Prints what the arguments give to one of the names; the last one wins, as in run.py.
value_given() { # NAMES ARGUMENTS...
    local names=" ${1//-/_} " value="" is_value="" argument name
    shift
    for argument in "$@"; do
        if [ "$is_value" ]; then
            value=$argument is_value=""
            continue
        fi
        name=${argument%%=*}
        case $names in *" ${name//-/_} "*)
            case $argument in
                *=*) value=${argument#*=} ;;
                *) is_value=1 ;;
            esac
            ;;
        esac
    done
    printf %s "$value"
}

# Sets a variable to what the arguments give to one of the names, if they do: arguments win.
take_given() { # VARIABLE NAMES ARGUMENTS...
    local variable=$1
    shift
    if given "$@"; then
        printf -v "$variable" %s "$(value_given "$@")"
    fi
}

# --------------------------------------------------------------------------------- how they begin

# What every script does first: its help, a word about variables that it does not read, its Python.
begin() { # ARGUMENTS...
    if given "--help -h" "$@"; then
        print_help "$0"
        exit 0
    fi
    point_out_other_variables
    choose_python
}

# Prints the comment at the top of a script.
print_help() { # SCRIPT
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
}

# Prints the names in the tables at the top of scripts.
variables_of() { # SCRIPTS...
    sed -n 's/^# \([A-Z][A-Z_]*\)   *[^ ].*/\1/p' "$@"
}

# Warns of exported variables that look like a mistake: misspelt, or those of another script.
point_out_other_variables() {
    local variables others name
    variables=" $(variables_of "$0" | tr '\n' ' ')"
    others=" $(variables_of "$HERE"/*.sh | tr '\n' ' ')"
    for name in $(compgen -e); do
        case $variables in *" $name "*) continue ;; esac
        find_meant_variable "$name" $variables
        if [ "$MEANT" ]; then
            echo "warning: $name is not read, do you mean $MEANT?" >&2
        else
            case $others in *" $name "*)
                echo "warning: $name is not read by ${0##*/}, see bash ${0##*/} --help" >&2
                ;;
            esac
        fi
    done
}

# A name -> MEANT: the variable that run.py's name for it stands for, or the name but for a slip.
find_meant_variable() { # NAME VARIABLES...
    local name=$1 variable
    shift
    case $name in *[a-z]*) name=$(printf %s "$name" | tr '[:lower:]' '[:upper:]') ;; esac
    case $name in
        NUM_CPU) name="" ;; # It is of the machine, and one letter away from NUM_GPU.
        MODEL_NAME | MODEL_PATH) name=MODEL ;;
        TASK_NAME) name=TASK ;;
        LEARNING_RATE) name=LR ;;
        BATCH_SIZE | PER_DEVICE_TRAIN_BATCH_SIZE) name=BS ;;
        ZO_EPS | EPSILON) name=EPS ;;
        MAX_STEPS | NUM_STEPS) name=STEPS ;;
        NUM_TRAIN_EPOCHS | NUM_EPOCHS) name=EPOCH ;;
        NUM_TRAIN) name=TRAIN ;;
        NUM_DEV) name=DEV ;;
        NUM_EVAL | NUM_TEST) name=EVAL ;;
        LR_SCHEDULER_TYPE) name=ZO_LR_SCHEDULER_TYPE ;;
        HESSIAN_SMOOTH) name=HESSIAN_SMOOTH_TYPE ;;
    esac
    for MEANT in "$@"; do
        if [ "$MEANT" = "$name" ] || is_a_slip_for "$name" "$MEANT"; then return; fi
    done
    MEANT=""
}

# Whether two names that begin alike differ in one letter, or in the order of two neighbours. Names
# of fewer than four letters are too near to those of other programs.
is_a_slip_for() { # NAME NAME
    local first=$1 second=$2
    if [ "${first:0:1}" != "${second:0:1}" ] || [ ${#first} -lt 4 ] || [ ${#second} -lt 4 ]; then
        return 1
    fi
    while [ "$first" ] && [ "${first:0:1}" = "${second:0:1}" ]; do
        first=${first:1} second=${second:1}
    done
    while [ "$first" ] && [ "${first#"${first%?}"}" = "${second#"${second%?}"}" ]; do
        first=${first%?} second=${second%?}
    done
    case ${#first}-${#second} in
        0-1 | 1-0 | 1-1) return 0 ;;
        2-2) [ "$first" = "${second:1}${second:0:1}" ] ;;
        *) return 1 ;;
    esac
}

# -> PYTHON: that of the shell's environment, that of make demo, or the system's.
choose_python() {
    local needs='import sys
from importlib.util import find_spec
sys.exit(not (find_spec("torch") and find_spec("transformers")))'
    for PYTHON in python "$HERE/.venv/bin/python" python3; do
        if "$PYTHON" -c "$needs" >/dev/null 2>&1; then return; fi
    done
    refuse "no Python with torch and transformers found: activate an environment that has" \
        "requirements.txt, or let make demo install one into .venv"
}

# A run without training is icl.sh's: the others would show their training examples.
refuse_no_training() { # ARGUMENTS...
    if [ "$(value_given --trainer "$@")" = none ]; then
        refuse "--trainer none: ${0##*/} trains; bash icl.sh evaluates"
    fi
}

# ----------------------------------------------------------------------------- what they choose

# MODEL, TASK, DATA_DIR and the further arguments -> the same, IS_BUNDLED, DATA; for the user's own
# files TASK is empty. What is not set is the bundled model, with its data.
choose_model_and_data() { # ARGUMENTS...
    take_given MODEL --model_name "$@"
    MODEL=${MODEL:-$BUNDLED_MODEL}
    IS_BUNDLED="" DATA=()
    if [ "$MODEL" = "$BUNDLED_MODEL" ] || [ "$MODEL" -ef "$BUNDLED_MODEL" ]; then
        IS_BUNDLED=1 MODEL=$BUNDLED_MODEL
        # A model this small gains nothing from a second thread, and loses much beside a process.
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
    if given "--train_file --validation_file" "$@"; then
        if [ "${TASK:-}" ] || [ "${DATA_DIR:-}" ]; then
            refuse "${TASK:+TASK=$TASK }${DATA_DIR:+DATA_DIR=$DATA_DIR }and --train_file," \
                "--validation_file exclude each other: give one"
        fi
        TASK=""
        return
    fi
    take_given TASK --task_name "$@"
    take_given DATA_DIR --data_dir "$@"
    TASK=${TASK:-SST2}
    if [ "$IS_BUNDLED" ]; then
        DATA_DIR=${DATA_DIR:-$HERE/data/samples}
    fi
    DATA=(--task_name "$TASK")
    if [ "${DATA_DIR:-}" ]; then
        DATA+=(--data_dir "$DATA_DIR")
    fi
}

# MODE -> MODE_ARGS
choose_mode() {
    case $MODE in
        ft) MODE_ARGS=() ;;
        prefix) MODE_ARGS=(--prefix_tuning) ;;
        lora) MODE_ARGS=(--lora) ;;
        *) refuse "MODE=$MODE: give ft, prefix or lora" ;;
    esac
}

# TASK, IS_BUNDLED and the further arguments -> OBJECTIVE, DEFAULT_TRAIN, DEFAULT_DEV
choose_objective() { # ARGUMENTS...
    OBJECTIVE=(--train_as_classification) DEFAULT_TRAIN=1000 DEFAULT_DEV=500
    if [ "$IS_BUNDLED" ]; then
        DEFAULT_DEV=200
    fi
    case $(printf %s "$TASK" | tr '[:upper:]' '[:lower:]') in
        "") choose_objective_of_own_file "$(value_given --train_file "$@")" ;;
        cb) DEFAULT_DEV=100 ;; # CB and Copa have fewer than 500 training examples.
        copa) DEFAULT_DEV=100 OBJECTIVE=() ;;
        record | squad | drop) OBJECTIVE=() ;;
    esac
    if given "--non_diff --only_train_option" "$@"; then # They are of other objectives.
        OBJECTIVE=()
    fi
}

# A file of the user's own has options or not, and maybe few rows: a fifth of them, at most, is dev.
choose_objective_of_own_file() { # FILE
    local facts
    # A file that cannot be read is run.py's to complain about.
    facts=$("$PYTHON" -c '
import sys
from pathlib import Path
sys.path[0] = sys.argv[1]
from task_data.files import read_rows
rows = [row for place, row in read_rows(Path(sys.argv[2]))]
print("options" if "options" in rows[0] else "text", len(rows))
' "$HERE" "$1" 2>/dev/null) || return 0
    local rows=${facts#* }
    if [ $((rows / 5)) -lt "$DEFAULT_DEV" ]; then
        DEFAULT_DEV=$((rows / 5))
    fi
    if [ $((rows - DEFAULT_DEV)) -lt "$DEFAULT_TRAIN" ]; then
        DEFAULT_TRAIN=$((rows - DEFAULT_DEV))
    fi
    if [ "${facts% *}" = text ]; then
        OBJECTIVE=()
    fi
}

# DEV, EVAL_STEPS, the script's strategy and the further arguments -> COURSE: dev losses, and
# checkpoints with them, of which the best one counts where there are both.
choose_course() { # STRATEGY ARGUMENTS...
    local saving=$1 evaluation=$1
    shift
    take_given DEV --num_dev "$@"
    DEV=${DEV:-$DEFAULT_DEV}
    if [ "$DEV" = 0 ]; then
        evaluation=no
    fi
    take_given evaluation "--eval_strategy --evaluation_strategy" "$@"
    if [ "$evaluation" != no ]; then
        saving=$evaluation
    fi
    take_given saving --save_strategy "$@"
    take_given EVAL_STEPS --save_steps "$@"
    take_given EVAL_STEPS --eval_steps "$@"
    COURSE=(--num_dev "$DEV" --eval_strategy "$evaluation" --save_strategy "$saving")
    COURSE+=(--save_total_limit 1)
    if [ "${EVAL_STEPS:-}" ]; then
        COURSE+=(--eval_steps "$EVAL_STEPS" --save_steps "$EVAL_STEPS")
    fi
    case $evaluation-$saving in
        no-* | *-no) ;;
        steps-steps | epoch-epoch | *-best) COURSE+=(--load_best_model_at_end) ;;
    esac
}

has_gpu() {
    [ "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi >/dev/null &&
        nvidia-smi -L >/dev/null 2>&1
}

# From compute capability 8 on, all of them.
gpu_has_bfloat16() {
    local capabilities
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
    [ "$capabilities" ] && ! printf '%s\n' "$capabilities" | grep -qv '^[89]\.\|^[1-9][0-9]\.'
}

# The further arguments -> WEIGHTS: half precision on a GPU, unless they say something else.
choose_weights() { # ARGUMENTS...
    WEIGHTS=(--load_saved_dtype)
    if given "$WEIGHTS_ARGUMENTS" "$@"; then
        WEIGHTS=()
    fi
}

# SEED and the further arguments -> SEEDS: --num_train_sets has seeds of its own.
choose_seeds() { # ARGUMENTS...
    SEEDS=(--seed "$SEED" --train_set_seed "$SEED")
    if given --num_train_sets "$@"; then
        SEEDS=(--seed "$SEED")
    fi
}
