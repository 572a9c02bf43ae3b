"""A stand-in for nvcc: a script that compiles nothing but writes what it is asked for, and logs each call."""

from pathlib import Path

# Linked by the real host compiler so that ctypes can open it; a launcher returns 0.
SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake"; echo "Build ${FAKE_VERSION:-1}"; exit 0; fi
echo "$*" >> "$FAKE_LOG"
if [ -n "$FAKE_FAIL" ]; then echo "x.cu(3): error: expected a ;" >&2; exit 2; fi
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out=$2; fi; last=$1; shift; done
op=$(basename "$last" | cut -d. -f1)
sleep "${FAKE_SECONDS:-0}"
printf 'int dsv4_%s(void) { return 0; }\\nconst char* dsv4_error(int code) { return "words"; }\\n' "$op" > "$out.c"
cc -shared -fPIC -o "$out" "$out.c" && rm "$out.c"
"""


def install(home: Path) -> Path:
    """home/bin/nvcc; set CUDA_HOME to `home`."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return path
