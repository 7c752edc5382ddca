#!/usr/bin/env bash
# Installs the Debian packages that building, the demo and the tests use, if any is missing. Nothing is removed or
# upgraded.
# Usage: tools/setup.sh build|demo|test|lab
set -euo pipefail

# A program, or a file by its path, that has to be there, and the package that brings it: what is there already is kept,
# whatever its version.
DEMO=(mke2fs:e2fsprogs debugfs:e2fsprogs e2fsck:e2fsprogs nbdcopy:libnbd-bin fio:fio)
TEST=("${DEMO[@]}" losetup:mount nbdinfo:libnbd-bin qemu-io:qemu-utils qemu-img:qemu-utils nbdkit:nbdkit)
# The linker, which cargo needs, and what it links with.
BUILD=(cc:gcc cc:libc6-dev)
# RDMA: the libraries' headers and names for the linker, and what reads headers for rdma-sys: its generator fails with
# libclang 16 and later. The programs that are built start without any of this.
BUILD+=(pkg-config:pkg-config /usr/include/infiniband/verbs.h:libibverbs-dev /usr/include/rdma/rdma_cma.h:librdmacm-dev)
BUILD+=('/usr/lib/llvm-1[0-5]/lib/libclang*.so*:libclang-14-dev')

case "${1:-}" in
  build) wanted=("${BUILD[@]}") ;;
  demo) wanted=("${BUILD[@]}" "${DEMO[@]}") ;;
  test) wanted=("${BUILD[@]}" "${TEST[@]}") ;;
  lab) wanted=("${BUILD[@]}" mmdebstrap:mmdebstrap python3:python3) ;;
  *) echo "usage: tools/setup.sh build|demo|test|lab" >&2; exit 2 ;;
esac

if ! command -v cargo >/dev/null; then
  echo "setup: cargo is missing: install Rust 1.95 or newer, see https://rustup.rs" >&2
  exit 1
fi

if [[ $1 == test ]]; then
  for component in rustfmt clippy; do
    if ! cargo "${component/rust/}" --version >/dev/null 2>&1 && ! rustup component add "$component"; then
      echo "setup: cargo ${component/rust/} is missing: install the toolchain's component $component" >&2
      exit 1
    fi
  done
fi

# mke2fs and its kin lie where only root's PATH looks.
PATH="$PATH:/usr/sbin:/sbin"
is_there() {
  if [[ $1 == /* ]]; then compgen -G "$1" >/dev/null; else command -v "$1" >/dev/null; fi
}
missing=()
for pair in "${wanted[@]}"; do
  package=${pair#*:}
  if ! is_there "${pair%%:*}" && [[ " ${missing[*]-} " != *" $package "* ]]; then
    missing+=("$package")
  fi
done
if [[ ${#missing[@]} -eq 0 ]]; then
  exit 0
fi

if [[ $(id -u) -ne 0 ]]; then
  echo "setup: missing: ${missing[*]}; as root: apt-get install --no-remove ${missing[*]}" >&2
  exit 1
fi
if ! command -v apt-get >/dev/null; then
  echo "setup: missing, and there is no apt-get: ${missing[*]}" >&2
  exit 1
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  apt-get install -y --no-remove --no-upgrade --no-install-recommends "${missing[@]}" </dev/null >"$log" 2>&1
}
if ! { apt-get update </dev/null >"$log" 2>&1 && install; }; then
  tail -n 15 "$log" >&2
  echo "setup: could not install ${missing[*]}; the end of apt-get's output is above" >&2
  exit 1
fi
