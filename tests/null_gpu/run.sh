#!/bin/bash -e
# run.sh PYTHON SCRIPT ...: with the stand-in in place of the driver. NULLGPU_GIB is the memory of its card.
here=$(cd "$(dirname "$0")" && pwd)
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
"$here/build.sh" "$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" "$there"
unset TRITON_INTERPRET
export LD_LIBRARY_PATH=$there TRITON_LIBCUDA_PATH=$there OMP_NUM_THREADS=1 PYTHONPATH=$here/../..
python=$1 script=$2
shift 2
LD_PRELOAD=$there/nullgpu.so "$python" "$here/$script" "$@"
