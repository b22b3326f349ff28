#!/usr/bin/env bash
# Attributes SmolLM2-135M-Instruct over MMLU and publishes the selected rows; then asks how cheap an analysis may get
# before the selection changes: fewer prompts, other rules, fewer steps, bfloat16. Every step resumes.
#
#   bash experiments/kva_mmlu.sh DATA_DIR [WORK_DIR]
#
# DATA_DIR holds MMLU as `loki analyse --data-dir` reads it. Takes some two hours on two CPU cores.
set -euo pipefail
data=$1 work=${2:-runs/kva_mmlu} model=embedded
mkdir -p "$work" results

loki analyse $model --dataset mmlu --data-dir "$data" --samples-per-subject 50 --output "$work/kva.h5"
for quota in 5 10 20 30; do
  loki select-nodes --hdf5-path "$work/kva.h5" --quota $quota
done
python benchmarks/overlap.py "$work/kva.h5" --samples-per-subject 5,10,20 --data-dir "$data" \
  | tee "$work/subsets.txt"

dev() { loki analyse $model --dataset mmlu --split dev --data-dir "$data" --output "$work/$1.h5" "${@:2}"; }
dev riemann_left-7
for rule in riemann_right riemann_middle riemann_trapezoid gausslegendre; do dev $rule-7 --rule $rule; done
for steps in 1 3 5 14 28; do dev riemann_left-$steps --steps $steps; done
dev riemann_left-7-bfloat16 --dtype bfloat16
python benchmarks/overlap.py "$work"/riemann_left-7.h5 "$work"/{riemann_right,riemann_middle,riemann_trapezoid,gausslegendre}-7.h5 \
  | tee "$work/rules.txt"
python benchmarks/overlap.py "$work"/riemann_left-7.h5 "$work"/riemann_left-{1,3,5,14,28,7-bfloat16}.h5 \
  | tee "$work/steps.txt"
python benchmarks/overlap.py "$work"/riemann_left-28.h5 "$work"/riemann_left-{1,3,5,7,14}.h5 \
  "$work"/{riemann_right,riemann_middle,riemann_trapezoid,gausslegendre}-7.h5 | tee "$work/fine.txt"
python - "$work" results/kva_mmlu.json <<'PYTHON'
import json, pathlib, sys
work, output = map(pathlib.Path, sys.argv[1:])
tables = {name: json.loads((work / f"{name}.txt").read_text().splitlines()[-1]) for name in ("subsets", "rules", "steps", "fine")}
output.write_text(json.dumps(tables, indent=1) + "\n")
PYTHON
