#!/usr/bin/env bash
# Make a small Debian for the tests, with Pythons that are newer than this machine's:
#
#     .ci/debian-python.sh FOLDER 3.14 3.15
#     .ci/debian-python.sh FOLDER run 3.14 -m pytest ...     (in the current folder, as root in it)
#
# It is Debian's unstable, which has several. pytest lies beside it, as pip gives it to this machine's Python.
#
# Exit status 3: there is no way to make one here.
set -eu
folder=$(realpath -m "$1")
shift

if [ "$1" = run ]; then
    python=$2
    shift 2
    exec unshare --mount --propagation private sh -eu -c '
        folder=$1 repository=$2 python=$3
        shift 3
        mount -t proc proc "$folder/proc"
        mount --rbind /dev "$folder/dev"
        mount --bind "$repository" "$folder/repository"
        exec chroot "$folder" env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 \
            PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-}" sh -c "cd /repository && exec \"\$0\" \"\$@\"" "python$python" "$@"
    ' sh "$folder" "$PWD" "$python" "$@"
fi

give_up() {
    echo "$1" >&2
    exit 3
}

[ "$(id -u)" = 0 ] || give_up "that takes root"
unshare --mount --propagation private true || give_up "no file system can be mounted here"
if ! command -v debootstrap >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends debootstrap; } >&2 || give_up "there is no debootstrap"
fi
debootstrap --variant=minbase sid "$folder" >&2 || give_up "Debian could not be had"
mkdir -p "$folder/repository"
cp -L /etc/resolv.conf "$folder/etc/resolv.conf"
packages=()
for version; do packages+=("python$version-venv"); done
inside=(chroot "$folder" env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Check-Valid-Until=false)
{ "${inside[@]}" update && "${inside[@]}" install -y --no-install-recommends procps "${packages[@]}"; } >&2 ||
    give_up "Debian has no ${packages[*]}"
for version; do
    python3 -m pip --quiet --disable-pip-version-check install --only-binary :all: --python-version "$version" \
        --target "$folder/usr/local/lib/python$version/dist-packages" pytest pytest-timeout pytest-xdist hypothesis
done
