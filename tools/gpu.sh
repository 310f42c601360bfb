#!/usr/bin/env bash
# All that needs a GPU: its tests, compute-sanitizer, benchmark. Records go to $OUT (results/ by default).
# Stages can be named: bash tools/gpu.sh tests sanitize bench models
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-results}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
stages=${*:-tests sanitize bench models}
failed=0

for stage in $stages; do
    case $stage in
    tests)
        # Kernels first, then all else: a run that is cut leaves a record of what it had done.
        kernels=$(echo tests/test_kernels_*.py tests/test_roles_gpu.py tests/test_overlap_gpu.py)
        for part in kernels others; do
            files=$kernels
            [ $part = kernels ] || files="tests $(printf -- '--ignore=%s ' $kernels)"
            $python -m pytest -q -m gpu -n "${JOBS:-8}" $files --junitxml "$out/tests-$part.xml" || failed=1
            $python -m tools.summary tests "$out"/tests-*.xml "$out/tests-gpu.json" || failed=1
        done
        rm -f "$out"/tests-*.xml
        ;;
    sanitize)
        jobs=${JOBS:-8}
        for tool in memcheck racecheck; do
            for shard in $(seq 0 $((jobs - 1))); do
                compute-sanitizer --tool "$tool" $python -m tools.sanitize "$shard" "$jobs" \
                    >"$out/$tool-$shard.log" 2>&1 &
            done
            wait
        done
        $python -m tools.summary sanitize "$out"/memcheck-*.log "$out"/racecheck-*.log \
            "$out/sanitizer-gpu.json" || failed=1
        rm -f "$out"/memcheck-*.log "$out"/racecheck-*.log
        ;;
    bench)
        jobs=${JOBS:-8}
        for shard in $(seq 0 $((jobs - 1))); do
            $python -m tools.compile_peers "$shard" "$jobs" >/dev/null 2>&1 &
        done
        wait
        $python -m flash_decoding bench --out "$out" || failed=1
        $python -m flash_decoding bench --suite serving --out "$out" || failed=1
        ;;
    models)
        # compiling takes a minute a context, so the compiled column has one
        suite="$python -m flash_decoding bench --suite model --out $out"
        $suite --model CodeLlama-34B --steps 16 --compiled-contexts 65536 || failed=1
        $suite --model Llama-3.1-8B --steps 24 --batch 16 --contexts 16384 --ragged \
            --columns "eager,FlashAttention unsplit,one block per head (FasterTransformer's scheme),ours" || failed=1
        ;;
    *)
        echo "no stage '$stage'; there are: tests, sanitize, bench, models" >&2
        failed=1
        ;;
    esac
done
exit $failed
