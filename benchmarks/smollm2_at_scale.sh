#!/usr/bin/env bash
# All norms of SmolLM2-135M removed at scale, with the control, in resumable calls of MINUTES each.
#
#     benchmarks/smollm2_at_scale.sh TEXT HELDOUT OUT [OPTION OF lnfree remove]...
#     until benchmarks/smollm2_at_scale.sh train.jsonl heldout.jsonl scale; do [ $? = 75 ] || break; done
#
# A call continues where the last one stopped: the removal, then the control, then the table of
# benchmarks/smollm2_removed.py. Its status is 75 while there is something left to do. TEXT is any
# --data; the defaults below are 200 million tokens, for one GPU. MINUTES=... is another limit.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
  exit 2
fi
text=$1 heldout=$2 out=$3
shift 3
here=$(dirname "$0")
minutes=${MINUTES:-8}
model=$(python -c 'import lnfree_interp as lf; print(lf.smollm2())')
sized=(--steps 3000 --batch 64 --micro-batch 16 --sequence-length 1024 --heldout 32 --prepend-bos)

# The options are those of the first call; later ones read them from run.json.
run() {
  local folder=$1
  shift
  if [ -e "$folder/model" ]; then
    return
  elif [ -e "$folder/run.json" ]; then
    lnfree remove --resume "$folder" --minutes "$minutes"
  else
    lnfree remove "$model" --data "$text" --out "$folder" --minutes "$minutes" "${sized[@]}" "$@"
  fi
}

mkdir -p "$out"
run "$out/lnfree" --rollback "$@"
run "$out/control" --vanilla "$@"
python "$here/smollm2_removed.py" "$heldout" --lnfree "$out/lnfree/model" \
  --control "$out/control/model"
