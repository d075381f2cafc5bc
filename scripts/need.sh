# shellcheck shell=bash
# For the scripts beside this file, which source it.

# need NAME WHAT: end with one line and status 2 where the variable NAME is not set
need() {
    [ -n "${!1:-}" ] || { echo "error: set $1 to $2" >&2; exit 2; }
}

# need_folder NAME WHAT: the same where it is no folder either
need_folder() {
    need "$1" "$2"
    [ -d "${!1}" ] || { echo "error: $1 is '${!1}', which is no folder: set it to $2" >&2; exit 2; }
}

# need_counts NAME...: end with one line and status 2 where one of these variables is set and no whole number above 0
need_counts() {
    local name
    for name; do
        [[ -z "${!name:-}" || "${!name}" =~ ^[1-9][0-9]*$ ]] ||
            { echo "error: $name is '${!name}': give a whole number of at least 1" >&2; exit 2; }
    done
}

# need_files NAME...: end with one line and status 2 where one of these variables is set and names no file
need_files() {
    local name
    for name; do
        [ -z "${!name:-}" ] || [ -f "${!name}" ] || { echo "error: $name is '${!name}', which is no file" >&2; exit 2; }
    done
}

# link_all FOLDER DONE: make the links "PLACE<tab>TARGET", a line each on stdin, in FOLDER; end with one line and status 2
# where FOLDER has others, or, once the file DONE says that something was made of them, where it lacks some
link_all() {
    local wanted there place target
    wanted=$(LC_ALL=C sort)
    there=$({ find "$1" -type l -printf '%P\t%l\n' 2>/dev/null || true; } | LC_ALL=C sort)
    if [ "$there" = "$wanted" ]; then return; fi
    if [ -e "$2" ] || [ -n "$(LC_ALL=C comm -23 <(echo "$there") <(echo "$wanted") | sed '/^$/d')" ]; then
        echo "error: '$1' links to other files than this call asks for: repeat the earlier call, or set OUT to another folder" >&2
        exit 2
    fi
    while IFS=$'\t' read -r place target; do
        mkdir -p "$1/$(dirname "$place")"
        [ -L "$1/$place" ] || ln -s "$target" "$1/$place"
    done <<<"$wanted"
}
