# What HiZOO.sh, icl.sh, finetune.sh and finetune_fsdp.sh share: sourced by them, not run.
# They set HERE, this folder, before. Arrays that may be empty are read as ${A[@]+"${A[@]}"}, since
# bash 3.2 (macOS) calls an empty one unbound.
BUNDLED_MODEL=$HERE/data/tiny-opt

refuse() { # MESSAGE
    echo "error: $1" >&2
    exit 2
}

# Takes the bundled model and data if MODEL is not set; then the script's own defaults for them hold.
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
    esac
    if given --non_diff "$@"; then # It is another objective; run.py refuses the two together.
        OBJECTIVE=()
    fi
}

# The further arguments -> BEST: the best checkpoint needs dev losses and checkpoints.
choose_best() { # ARGUMENTS...
    BEST=(--load_best_model_at_end)
    if [ "$(value_given "--eval_strategy --evaluation_strategy" "$@")" = no ] ||
        [ "$(value_given --save_strategy "$@")" = no ]; then
        BEST=()
    fi
}

has_gpu() {
    [ "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi >/dev/null &&
        nvidia-smi -L >/dev/null 2>&1
}
