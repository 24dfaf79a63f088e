# The target run. A trainer of one's own is launched by its own command, which may be srun or
# torchrun itself; telescope's has one torchrun per node.
if [ -z "$folder" ]; then
  begin "${launch[@]}"
  await "$begun"
  finish $?
fi
begin "${launch[@]}" --prepare # goes on with a run of the same settings
await "$begun" || finish $?
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun has not read the other since 22.05
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((30000 + SLURM_JOB_ID % 10000)) # another job's may be on the same machine
begin srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  "${python[@]}" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" \
  --nproc-per-node="$ranks" --max-restarts=3 --rdzv-backend=c10d \
  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$head:$port" \
  -m telescope.target "$folder" "${manner[@]}"
await "$begun"
finish $?
