# shellcheck shell=bash
# For the scripts that make a table of many runs, which source it and set PYTHON and OUT.

# once RUN SCRIPT OPTIONS...: have "$PYTHON" SCRIPT OPTIONS fill the folder RUN, unless its results are there; end with
# one line and status 2 where it was begun with other options, which "$OUT.commands" keeps: no table is of two settings
once() {
    local run=$1 command known
    shift
    printf -v command '%q ' "$@"
    known=$({ RUN=$run awk -F '\t' '$1 == ENVIRON["RUN"] { print $2 }' "$OUT.commands" 2>/dev/null || true; } | tail -n 1)
    if [ -d "$run" ]; then
        [ -n "$known" ] || echo "note: the options of '$run' were not kept; it is taken for one of this call" >&2
        if [ "${known:-$command}" != "$command" ]; then
            echo "error: '$run' was made with other options (see $OUT.commands): repeat the earlier call, or set OUT to another folder" >&2
            exit 2
        fi
    fi
    if [ "$known" != "$command" ]; then
        mkdir -p "$(dirname "$OUT")"
        printf '%s\t%s\n' "$run" "$command" >>"$OUT.commands"
    fi
    [ -f "$run/results.json" ] || "$PYTHON" "$@" --output "$run"
}
