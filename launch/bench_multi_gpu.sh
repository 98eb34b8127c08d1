#!/usr/bin/env bash
# Several GPUs of one machine, one stage each: launch/bench_multi_gpu.sh throughput|time_to_loss [N]
#
# N: 2, 4 or 8; without it, as many as there are. At most 9 minutes. Results in OUT (runs/multi_gpu), whatever happens;
# the exit code is 0 only if every check held, else one line says which did not. DEVICE=cpu rehearses it with gloo, small.
# throughput: links, correctness, schedules side by side, report.md. What the environment says of NCCL stays as it is.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "bench_multi_gpu.sh: $*" >&2; exit 2; }

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
DEVICE="${DEVICE:-cuda}"
OUT="${OUT:-runs/multi_gpu}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[[ $DEVICE == cpu || $DEVICE == cuda ]] || fail "DEVICE is cpu or cuda, got '$DEVICE'"
what="${1:-}"
[[ $what == throughput || $what == time_to_loss ]] || fail "say throughput or time_to_loss, got '$what'"
if [[ -n ${2:-} ]]; then
    n=$2
elif [[ $DEVICE == cpu ]]; then
    n=2
else
    n=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
[[ $n == 2 || $n == 4 || $n == 8 ]] || fail "N must be 2, 4 or 8, got '$n'"
mkdir -p "$OUT"

deadline=525 # seconds from the start; a part that is told to stop has 10 more
failed=()

part() { # part NAME SECONDS COMMAND...: runs it for so long at most; its last line says why it failed
    local name=$1 limit=$2 left=$((deadline - SECONDS)) code
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        failed+=("$name: no time was left")
        return
    fi
    echo "== $name, at most $limit s: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) ;;
        124 | 137) failed+=("$name: not done within $limit s") ;;
        *) failed+=("$name: $(tail -n 1 "$OUT/$name.log")") ;;
    esac
    echo "== $name: exit code $code after $SECONDS s in all"
}

if [[ $what == throughput ]]; then
    rm -rf "$OUT"/{links,check,throughput,machine}.json "$OUT"/throughput-m*.png "$OUT"/{report.md,planned.png,traces}
    # 4, then 3 N first: should time run out, the others are missing
    counts=4,$((3 * n)),8,2,1
    only=GPipe,1F1B,Interleaved1F1B,ZBVZeroBubble
    if [[ $DEVICE == cuda ]]; then
        only+=,DNI:linear,DNI:local_head,DNI:stale,DNI:linear:direct,DNI:local_head:direct,DNI:stale:direct
        # of two stages each has twice the work of one of four
        sizes=(--config launch/configs/gpt_1b.yaml --rounds 3 --steps $((n == 2 ? 2 : 3)))
        links=(--activation-bytes $((4 * 1024 * 2048 * 2)))
    else
        counts=1,4
        only+=,DNI:linear,DNI:local_head,DNI:stale
        sizes=(--width 64 --seq-len 16 --blocks 2 --microbatch-size 1 --rounds 1 --steps 1)
        links=(--activation-bytes 4096 --large-bytes 100000)
    fi
    part links 120 "$PYTHON" -m benchmarks.links --device "$DEVICE" --ranks "$n" "${links[@]}" --json "$OUT/links.json"
    part check 110 "$PYTHON" -m benchmarks.multi_gpu_check --device "$DEVICE" --ranks "$n" --json "$OUT/check.json"
    left=$((deadline - SECONDS - 30)) # the report's
    part throughput "$left" "$PYTHON" -m benchmarks.throughput --device "$DEVICE" --stages "$n" --microbatches "$counts" \
        "${sizes[@]}" --only "$only" --limit-s "$((left - 20))" --traces "$OUT/traces" --json "$OUT/throughput.json"
    part report 30 "$PYTHON" -m benchmarks.multi_gpu_report "$OUT" --microbatches "$counts"
else
    rm -f "$OUT"/time_to_loss.*
    # ---- the arguments of the race: begin -----------------------------------------------------------------------------
    if [[ $DEVICE == cuda ]]; then
        # 160 M parameters in 2 stages of 4 blocks or 4 of 2, 320 M in 8 of 2; microbatches so large that a step is work
        # and not launches. Other schedules of torch have 1F1B's gradients, so they need no run, only their times of a
        # step, which `throughput` measures
        arguments=(--blocks $((n == 2 ? 4 : 2)) --width 1280 --seq-len 512 --batch-size 256 --microbatches 4
            --optimizer Muon --steps $((n == 2 ? 900 : 1150)) --learning-rates 2e-3 --policies stale --schedules ""
            --transports direct --unlock-after-steps 45 --best-microbatches "" --no-equal-time
            --eval-every 115 --eval-sequences 512 --data site-packages --max-mb 120)
    else
        arguments=(--blocks 1 --width 64 --seq-len 32 --batch-size 4 --steps 20 --microbatches 4 --best-microbatches ""
            --policies stale --schedules "" --learning-rates 1e-3 --eval-sequences 4 --max-mb 1 --no-equal-time)
    fi
    # ---- the arguments of the race: end -------------------------------------------------------------------------------
    part time_to_loss 525 "$PYTHON" -m benchmarks.time_to_loss --device "$DEVICE" --stages "$n" "${arguments[@]}" \
        --limit-s 480 --json "$OUT/time_to_loss.json"
    [[ -s $OUT/time_to_loss.json ]] || failed+=("time_to_loss: no rows")
fi

if ((${#failed[@]})); then
    printf 'bench_multi_gpu.sh: FAILED: %s\n' "$(printf '%s; ' "${failed[@]}")" >&2
    exit 1
fi
echo "bench_multi_gpu.sh: every check held; results in $OUT"
