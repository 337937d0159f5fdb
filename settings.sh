# Sourced by the other scripts, which set HERE, this folder, before.
# Their variables and defaults are read by command_line/scripts.py.

# Runs run.py as a script; --help prints the comment at the script's top.
run_script() { # SCRIPT ARGUMENTS...
    local script=$1 argument
    shift
    for argument in "$@"; do
        case $argument in
            --help | -h)
                sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
                exit 0
                ;;
        esac
    done
    choose_python
    exec "$PYTHON" "$HERE/run.py" --script "${script##*/}" "$@"
}

# -> PYTHON: that of the shell's environment, that of make demo, or the system's.
choose_python() {
    local needs='import sys
from importlib.util import find_spec
sys.exit(not (find_spec("torch") and find_spec("transformers")))'
    for PYTHON in python "$HERE/.venv/bin/python" python3; do
        if "$PYTHON" -c "$needs" >/dev/null 2>&1; then return; fi
    done
    echo "error: no Python with torch and transformers found: activate an environment that has" \
        "requirements.txt, or let make demo install one into .venv" >&2
    exit 2
}
