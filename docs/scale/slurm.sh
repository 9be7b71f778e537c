#!/bin/bash
# Two nodes of eight GPUs under Slurm: sbatch docs/scale/slurm.sh. The output is on a disk that all nodes share.
#SBATCH --job-name=slimtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Five minutes before the end: the step is finished and a checkpoint written.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A job that was requeued goes on with its run.
export RESUME=$([ -d tuned.run ] && echo --resume || true)
srun bash -c 'slimtune train recipe.yaml --output tuned $RESUME --launch "torchrun --nnodes $SLURM_NNODES \
  --node_rank $SLURM_NODEID --nproc_per_node 8 --master_addr $HEAD --master_port 29500"'

# A model that is divided among the GPUs:
# srun bash -c 'slimtune train recipe.yaml --output tuned $RESUME --launch "accelerate launch \
#   --config_file docs/scale/fsdp2-two-nodes.yaml --machine_rank $SLURM_NODEID --main_process_ip $HEAD"'
