#!/bin/bash
# Brings up Slurm on this machine and runs README's job in it: to its time limit, requeued and
# preempted; then compares the weights with those of a run outside Slurm. Needs root and Debian's
# slurm-wlm and munge; takes some minutes on two cores. By hand:
#
#   bash tests/slurm/try_slurm.sh FOLDER       FOLDER: where all of it goes, new or empty
set -euo pipefail
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
FOLDER=$(mkdir -p "$1" && CDPATH='' cd "$1" && pwd)
PYTHON=${PYTHON:-python}
STEPS=${STEPS:-400}
HOST=$(hostname -s)
export SLURM_CONF=$FOLDER/slurm.conf OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
cd "$FOLDER"

# ------------------------------------------------------------------------------ munge and Slurm
mkdir -p state spool logs munge
chmod 711 . && chmod 700 munge
dd if=/dev/urandom of=munge/key bs=128 count=1 status=none
chmod 400 munge/key
cat >slurm.conf <<CONF
ClusterName=alone
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/logs/slurmctld
SlurmdLogFile=$FOLDER/logs/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=2
PartitionName=low Nodes=$HOST Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=$HOST MaxTime=60 PriorityTier=9 PreemptMode=OFF
CONF
munged --foreground --force --key-file=munge/key --socket=munge.socket --pid-file=munge/pid \
    --log-file=munge/log --seed-file=munge/seed &
MUNGED=$!
slurmctld -D 2>/dev/null &
SLURMCTLD=$!
slurmd -D 2>/dev/null &
SLURMD=$!
trap 'kill $SLURMD $SLURMCTLD; wait $SLURMD $SLURMCTLD || true; kill $MUNGED' EXIT
for _ in $(seq 60); do
    if sinfo --noheader --format=%t 2>/dev/null | grep -q idle; then break; fi
    sleep 1
done
sinfo

# ------------------------------------------------------------------------------------- helpers
state_of() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p'; }

minutes_of() { # JOB: how many whole minutes it has run
    scontrol show job "$1" | sed -n 's/.*RunTime=00:0*\([0-9]*\):.*/\1/p' | sed 's/^$/0/'
}

wait_for() { # JOB STATES...: until the job is in one of them
    local job=$1 state
    shift
    for _ in $(seq 900); do
        state=$(state_of "$job")
        case " $* " in *" $state "*) break ;; esac
        sleep 1
    done
    echo "job $job: $state"
}

steps_in() { # FOLDER: how many steps its journal has
    "$PYTHON" -c '
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from training.journal import read_journal
found = read_journal(Path(sys.argv[2]) / "journal.jsonl")
print(found.steps if found else 0)' "$ROOT" "$1"
}

wait_for_steps() { # FOLDER NUMBER
    for _ in $(seq 900); do
        if [ "$(steps_in "$1")" -ge "$2" ]; then break; fi
        sleep 2
    done
    echo "$(steps_in "$1") steps in its journal"
}

same_weights() { # FOLDER FOLDER
    cmp "$1/checkpoint-$STEPS/model.safetensors" "$2/checkpoint-$STEPS/model.safetensors" &&
        echo "same weights, bit for bit"
}

# README's job, with the bundled model and a place of its own.
cat >job.sh <<JOB
#!/bin/bash
#SBATCH --requeue --signal=USR1@60 --open-mode=append
export HF_HUB_OFFLINE=1 PATH="$(dirname "$(command -v "$PYTHON")"):\$PATH"
STEPS=$STEPS EVAL_STEPS=$STEPS EVAL=20 srun bash $ROOT/HiZOO.sh --output_dir "\$1" \
    --result_file "\$1.json" --overwrite_output_dir
JOB

echo "--- without Slurm"
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" STEPS=$STEPS EVAL_STEPS=$STEPS EVAL=20 \
    bash "$ROOT/HiZOO.sh" --output_dir "$FOLDER/outside" --result_file "$FOLDER/outside.json" |
    tail -n 4

echo "--- the time limit: SIGUSR1 before its end"
JOB=$(sbatch --parsable --time=30 --output=limit.out job.sh "$FOLDER/inside")
wait_for_steps "$FOLDER/inside" 20
# The signal comes a minute before the end of a job, or up to a minute earlier.
scontrol update "JobId=$JOB" TimeLimit=$(($(minutes_of "$JOB") + 2))
wait_for "$JOB" FAILED TIMEOUT COMPLETED CANCELLED
tail -n 2 limit.out

echo "--- requeued, and then preempted by a job of a partition above"
DONE=$(steps_in "$FOLDER/inside")
scontrol requeue "$JOB"
scontrol update "JobId=$JOB" TimeLimit=30
wait_for "$JOB" RUNNING
wait_for_steps "$FOLDER/inside" $((DONE + 20))
OTHER=$(sbatch --parsable --partition=high --ntasks=2 --output=other.out --wrap "sleep 5")
wait_for "$OTHER" RUNNING COMPLETED
wait_for "$JOB" PENDING
wait_for "$JOB" RUNNING
wait_for "$JOB" COMPLETED FAILED TIMEOUT CANCELLED
grep "resuming from\|interrupted\|accuracy" limit.out
same_weights outside inside
