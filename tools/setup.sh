#!/usr/bin/env bash
# Installs the Debian packages that the demo and the tests use, if any is missing. Nothing is removed or upgraded.
# Usage: tools/setup.sh demo|test
set -euo pipefail

# A program that has to be there, and the package that brings it: what is there already is kept, whatever its version.
DEMO=(mke2fs:e2fsprogs debugfs:e2fsprogs e2fsck:e2fsprogs nbdcopy:libnbd-bin fio:fio)
TEST=("${DEMO[@]}" nbdinfo:libnbd-bin qemu-io:qemu-utils qemu-img:qemu-utils nbdkit:nbdkit)
# The linker, which cargo needs, and what it links with.
BUILD=(cc:gcc cc:libc6-dev)

case "${1:-}" in
  demo) wanted=("${BUILD[@]}" "${DEMO[@]}") ;;
  test) wanted=("${BUILD[@]}" "${TEST[@]}") ;;
  *) echo "usage: tools/setup.sh demo|test" >&2; exit 2 ;;
esac

if ! command -v cargo >/dev/null; then
  echo "setup: cargo is missing: install Rust 1.88 or newer, see https://rustup.rs" >&2
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
missing=()
for pair in "${wanted[@]}"; do
  package=${pair#*:}
  if ! command -v "${pair%%:*}" >/dev/null && [[ " ${missing[*]-} " != *" $package "* ]]; then
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
