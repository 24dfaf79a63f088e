# An array of workers. The first task has the driver too, which needs little: an answer per trial,
# and a fit per stage.
if [ "${SLURM_ARRAY_TASK_ID:-0}" -ne 0 ]; then
  begin "${worker[@]}"
  await "$begun"
  finish $?
fi
begin "${run[@]}"
driver=$begun
begin "${worker[@]}"
await "$driver"
code=$?
# When the sweep is finished the worker ends by itself; otherwise it would wait for a driver.
[ "$code" -eq 0 ] || stop
await "$begun"
finish "$code"
