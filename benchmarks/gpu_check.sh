#!/bin/sh
# All that is to be known of a GPU, into the folder $1 (default: results/gpu), each part as soon as it is there. The first
# two need neither Ray nor Optuna. PYTHON names the interpreter; PARTS leaves some out ("tests speed sweep").
set -u
to=${1:-results/gpu}
python=${PYTHON:-python}
mkdir -p "$to"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$to/card.csv" 2>&1
for part in ${PARTS:-tests speed sweep}; do
    case $part in
        tests) $python -m pytest -q -m gpu tests/gpu/test_training.py > "$to/tests.txt" 2>&1 ;;
        speed) $python -m benchmarks.gpu --json "$to/speed.json" > "$to/speed.txt" 2>&1 ;;
        sweep) $python -m pytest -q -m gpu tests/gpu/test_sweep.py > "$to/sweep.txt" 2>&1 ;;
        *) echo "no such part: $part" >&2; exit 2 ;;
    esac
    echo "$part: exit status $?" | tee -a "$to/parts.txt"
done
