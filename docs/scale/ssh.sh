#!/bin/bash
# Two machines by SSH, with the same folder on a disk that both share: docs/scale/ssh.sh node0 node1
set -euo pipefail

HEAD=$1
rank=0
for host in "$@"; do
  ssh "$host" "cd '$PWD' && slimtune train recipe.yaml --output tuned --launch 'torchrun --nnodes $# \
    --node_rank $rank --nproc_per_node 8 --master_addr $HEAD --master_port 29500'" &
  rank=$((rank + 1))
done
wait
