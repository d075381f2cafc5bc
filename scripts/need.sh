# shellcheck shell=bash
# For the scripts beside this file, which source it.

# need NAME WHAT: end with one line and status 2 where the variable NAME is not set
need() {
    [ -n "${!1:-}" ] || { echo "error: set $1 to $2" >&2; exit 2; }
}
