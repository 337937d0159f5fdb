# What HiZOO.sh, icl.sh, finetune.sh and finetune_fsdp.sh share: sourced by them, not run.
# They set HERE, this folder, before. Arrays that may be empty are read as ${A[@]+"${A[@]}"}, since
# bash 3.2 (macOS) calls an empty one unbound.
BUNDLED_MODEL=$HERE/data/tiny-opt
# Threads that wait give up their core: beside other work a run is several times faster.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

refuse() { # MESSAGE
    echo "error: $1" >&2
    exit 2
}

# Sets PYTHON: that of the active environment, of `make demo` or of the system, the first with torch.
find_python() {
    local candidate
    for candidate in python "$HERE/.venv/bin/python" python3; do
        if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "
import importlib.util, sys
sys.exit(importlib.util.find_spec('torch') is None)" >/dev/null 2>&1; then
            PYTHON=$candidate
            return
        fi
    done
    refuse "no Python with torch found: activate an environment with requirements.txt, or run \
make demo once"
}

# Points out variables whose names are near those that a script reads.
point_out_unknown_variables() { # NAMES...
    local name near
    for name in "$@"; do
        for near in "${name}S" "${name%S}" $(other_names "$name"); do
            if [ "$near" != "$name" ] && [ "${!near+set}" ]; then
                case " $* " in *" $near "*) ;; *)
                    echo "warning: $near is not read, do you mean $name?" >&2
                    ;;
                esac
            fi
        done
    done
}

# What other packages call a variable.
other_names() { # NAME
    case $1 in
        MODEL) echo MODEL_NAME MODEL_PATH MODEL_NAME_OR_PATH ;;
        TASK) echo TASK_NAME ;;
        DATA_DIR) echo DATA DATA_PATH ;;
        BS) echo BATCH_SIZE BATCHSIZE ;;
        LR) echo LEARNING_RATE ;;
        EPS) echo EPSILON ZO_EPS ;;
        HESSIAN_SMOOTH_TYPE) echo HESSIAN_SMOOTH HESSIAN_SMOOTHING SMOOTHING ;;
        STEPS) echo MAX_STEPS NUM_STEPS ;;
        EVAL_STEPS) echo EVAL_STEP ;;
        TRAIN) echo NUM_TRAIN ;;
        DEV) echo NUM_DEV ;;
        EVAL) echo NUM_EVAL ;;
        EPOCH) echo NUM_EPOCHS NUM_TRAIN_EPOCHS ;;
        ZO_LR_SCHEDULER_TYPE) echo LR_SCHEDULER LR_SCHEDULER_TYPE ;;
        NUM_GPU) echo N_GPU NGPU NUM_PROC ;;
    esac
}

# Takes the bundled model and data if MODEL is not set, or is the bundled one by any path; then the
# script's own defaults for them hold.
wants_bundled_model() {
    [ -z "${MODEL:-}" ] ||
        { [ -d "$MODEL" ] && [ "$(cd "$MODEL" && pwd -P)" = "$(cd "$BUNDLED_MODEL" && pwd -P)" ]; }
}

use_bundled_model() {
    MODEL=$BUNDLED_MODEL
    DATA_DIR=${DATA_DIR:-$HERE/data/samples}
    # A model this small gains nothing from a second thread, and loses much beside another process.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# Whether one of the names is among the arguments: given "--fp16 --bf16" "$@"
given() { # NAMES ARGUMENTS...
    local names=" $1 " argument
    shift
    for argument in "$@"; do
        case $names in *" ${argument%%=*} "*) return 0 ;; esac
    done
    return 1
}

# Prints what the arguments give to one of the names; the last one wins, as in run.py.
value_given() { # NAMES ARGUMENTS...
    local names=" $1 " value="" is_value="" argument
    shift
    for argument in "$@"; do
        if [ "$is_value" ]; then
            value=$argument is_value=""
            continue
        fi
        case $names in *" ${argument%%=*} "*)
            case $argument in
                *=*) value=${argument#*=} ;;
                *) is_value=1 ;;
            esac
            ;;
        esac
    done
    printf %s "$value"
}

# MODE -> MODE_ARGS
choose_mode() {
    case $MODE in
        ft) MODE_ARGS=() ;;
        prefix)
            MODE_ARGS=(--prefix_tuning --num_prefix 5 --no_reparam --prefix_init_by_real_act)
            ;;
        lora) MODE_ARGS=(--lora) ;;
        *) refuse "MODE=$MODE: give ft, prefix or lora" ;;
    esac
}

# TASK, DATA_DIR and the further arguments -> DATA
choose_data() { # ARGUMENTS...
    DATA=(--task_name "$TASK")
    if given "--train_file --validation_file" "$@"; then # They are the task.
        DATA=()
        TASK=""
    elif [ -n "$DATA_DIR" ]; then
        DATA+=(--data_dir "$DATA_DIR")
    fi
}

# Whether the rows of a user's own file bring options along. What is wrong with it, run.py says.
has_options() { # FILE
    case $1 in
        *.parquet) parquet_file schema_arrow.names "$1" ;;
        *) grep -m 1 . "$1" 2>/dev/null ;;
    esac | grep -qw options
}

number_of_rows() { # FILE
    case $1 in
        *.parquet) parquet_file metadata.num_rows "$1" ;;
        *) grep -c . "$1" 2>/dev/null ;;
    esac || true
}

parquet_file() { # PROPERTY FILE
    "$PYTHON" -c "
import sys
from pyarrow.parquet import ParquetFile
print(ParquetFile(sys.argv[1]).$1)" "$2" 2>/dev/null
}

# TASK, MODEL and the further arguments -> OBJECTIVE, DEFAULT_DEV
choose_objective() { # ARGUMENTS...
    DEFAULT_DEV=500
    if [ "$MODEL" = "$BUNDLED_MODEL" ]; then
        DEFAULT_DEV=200
    fi
    OBJECTIVE=(--train_as_classification)
    case $(printf %s "$TASK" | tr '[:upper:]' '[:lower:]') in
        cb) DEFAULT_DEV=100 ;; # CB and Copa have fewer than 500 training examples.
        copa) DEFAULT_DEV=100 OBJECTIVE=() ;;
        record | squad | drop) OBJECTIVE=() ;;
        "") # The user's own files: a fifth of the training examples, if there are no more.
            local file rows
            file=$(value_given --train_file "$@")
            rows=$(number_of_rows "$file")
            if [ $((rows / 5)) -lt $DEFAULT_DEV ]; then DEFAULT_DEV=$((rows / 5)); fi
            has_options "$file" || OBJECTIVE=()
            ;;
    esac
    if given --non_diff "$@"; then # It is another objective; run.py refuses the two together.
        OBJECTIVE=()
    fi
}

# DEV and the further arguments -> BEST: the best checkpoint needs dev losses and checkpoints.
choose_best() { # ARGUMENTS...
    BEST=(--load_best_model_at_end)
    if [ "$DEV" = 0 ] || [ "$(value_given "--eval_strategy --evaluation_strategy" "$@")" = no ] ||
        [ "$(value_given --save_strategy "$@")" = no ]; then
        BEST=()
    fi
}

# Half precision on a GPU, as the model was saved: float16 overflows where bfloat16 was meant.
# MODEL -> WEIGHTS
choose_weights() { # ARGUMENTS...
    WEIGHTS=()
    if given "--load_float16 --load_bfloat16 --load_int8 --load_int4" "$@" || ! has_gpu; then
        return
    fi
    case $("$PYTHON" -c "
import sys
from transformers import AutoConfig
print(AutoConfig.from_pretrained(sys.argv[1]).dtype)" "$MODEL" 2>/dev/null) in
        *bfloat16) if gpu_has_bfloat16; then WEIGHTS=(--load_bfloat16); fi ;;
        *float16) WEIGHTS=(--load_float16) ;;
    esac
}

# From compute capability 8 on, all of them.
gpu_has_bfloat16() {
    local capabilities
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
    [ "$capabilities" ] && ! printf '%s\n' "$capabilities" | grep -qv '^[89]\.\|^[1-9][0-9]\.'
}

has_gpu() {
    [ "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi >/dev/null &&
        nvidia-smi -L >/dev/null 2>&1
}
