#!/usr/bin/env bash
# Builds nullgpu.so for the torch of a virtual environment: build.sh SITE_PACKAGES OUTPUT_FOLDER
# What torch's libraries ask of the driver, the runtime and cuBLAS and nullgpu.c has not, becomes a stub.
set -euo pipefail
cd "$(dirname "$0")"
site=$1 out=$2
gcc -c -fPIC -O1 -w -I. -I"$site/nvidia/cu13/include" nullgpu.c -o "$out/nullgpu.o"
for library in libc10_cuda libtorch_cuda libcaffe2_nvrtc libtorch_python libtorch_cuda_linalg; do
  nm -D --undefined-only "$site/torch/lib/$library.so"
done | awk '{print $2}' | sed 's/@.*//' |
  grep -E '^(cuda[A-Z]|__cuda|cublas|cu(Ctx|Device|Func|GetError|Launch|Link|Module|Occup|Pointer|Tensor))' |
  sort -u > "$out/wanted"
nm --defined-only "$out/nullgpu.o" | awk '{print $3}' | sort -u > "$out/defined"
{
  echo 'extern int nullgpu_stub(const char *);'
  comm -23 "$out/wanted" "$out/defined" | awk '{print "int " $1 "() { return nullgpu_stub(\"" $1 "\"); }"}'
} > "$out/rest.c"
gcc -shared -fPIC -O1 -w -Wl,-soname,libcuda.so.1 "$out/nullgpu.o" "$out/rest.c" -o "$out/nullgpu.so" -lpthread
ln -sf nullgpu.so "$out/libcuda.so.1"
ln -sf nullgpu.so "$out/libcuda.so"
