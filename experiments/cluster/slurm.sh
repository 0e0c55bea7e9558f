#!/bin/bash
# sbatch experiments/cluster/slurm.sh EXPERIMENT [OPTIONS OF autocompress search]
# The first node is the head, the last one the device, all between them builders.
#SBATCH --job-name=autocompress
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
set -euo pipefail
experiment=${1:?"which experiment?"}
shift
port=6379
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
device=${nodes[-1]}
# The resource is called after the profile, which the experiment may name by a file's path.
name=$(python - "$experiment" <<'END'
import sys
from pathlib import Path

from autocompress.config import load_experiment
from autocompress.device import load_profile

path = Path(sys.argv[1])
print(load_profile(load_experiment(path).device, path).name)
END
)

on() { srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" "${@:2}"; }

on "$head" ray start --head --port=$port --num-cpus="$SLURM_CPUS_PER_TASK" --block &
sleep 15
for node in "${nodes[@]:1:${#nodes[@]}-2}"; do
  on "$node" ray start --address="$head:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
done
on "$device" ray start --address="$head:$port" --num-cpus=0 \
  --resources="{\"device:$name\": 1}" --block &
sleep 15
on "$head" autocompress search "$experiment" --engine ray --address "$head:$port" "$@"
