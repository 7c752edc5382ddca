#!/usr/bin/env bash
# The simulator is itself checked: plants one bug after the other into a copy of the sources, and plays seeds until a rule
# breaks. The bugs are patches, which say within how many seeds they are found: engine/sim/planted/*.patch.
# Usage: tools/planted.sh [--check | --quick | NAME...] [--within N]
#   --check     only see that every patch still applies and is in the table of docs/TESTING.md
#   --quick     only those that their patches call quick
#   --within N  in place of what the patches say
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
patches=$root/engine/sim/planted
work=${CARGO_TARGET_DIR:-$root/target}/planted
threads=$(nproc)
# More than any run takes, in time of the processor, so that a busy host changes nothing: a planted bug may also make the
# core spin.
cpu_seconds_max=900
# The copy is not the repository that it lies in.
export GIT_CEILING_DIRECTORIES=$work

# What a patch says of itself: its line that begins with a word.
said() { sed -n "s/^$2: //p; /^---/q" "$patches/$1.patch"; }
bound() { echo "${within:-$(said "$1" 'Found within' | grep -o '^[0-9]\+')}"; }

# The sources without history and what was built.
copy_sources() {
  rm -rf "$1"
  mkdir -p "$1"
  tar -C "$root" --exclude=./target --exclude=./.git -cf - . | tar -C "$1" -xmf -
}

change() { git -C "$work/tree" apply "${@:2}" "$patches/$1.patch"; }

build() {
  CARGO_TARGET_DIR="$work/target" CARGO_INCREMENTAL=1 CARGO_PROFILE_RELEASE_LTO=off RUSTFLAGS=-Awarnings \
    "${CARGO:-cargo}" build --quiet --release --locked --manifest-path "$work/tree/Cargo.toml" \
    --package twinpoint-sim --bin twinpoint-sim || return 1
  cp "$work/target/release/twinpoint-sim" "$work/bin/$1"
}

# Plays seeds until a rule breaks. The result: the seed, and the rule's words; or why there is none.
play() {
  local output status=0
  output=$(ulimit -St $cpu_seconds_max &&
    exec "$work/bin/$1" --seeds "$2" --threads "$threads" --events 0 2>/dev/null) || status=$?
  rm "$work/bin/$1"
  case $status in
    0) echo "- not found within $2 seeds" ;;
    1) sed -En 's/^seed ([0-9]+): BROKEN: (.*)$/\1 \2/p' <<<"$output" | head -n 1 | cut -c -120 ;;
    152) echo "- no end within $cpu_seconds_max s of processor time" ;;
    *) echo "- the simulator ended with code $status" ;;
  esac >"$work/results/$1"
}

# The bugs that were not found, how many were, and the last seed that found one.
fails=() found=0 most=1
# Waits for the bug that is being played, and shows its line.
show() {
  [[ -n ${playing:-} ]] || return 0
  wait "$player"
  local seed words
  read -r seed words <"$work/results/$playing" || true
  printf '%-30s %6s  %s\n' "$playing" "$seed" "$words"
  if [[ $seed =~ ^[0-9]+$ ]]; then
    found=$((found + 1))
    if [[ $seed -gt $most ]]; then most=$seed; fi
  else
    fails+=("$playing")
  fi
  playing=
}

names=() quick='' check='' within=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --check) check=1 ;;
    --quick) quick=1 ;;
    --within) within=${2:?--within needs a number}; shift ;;
    -*) sed -n '4,7s/^# //p' "$0" >&2; exit 2 ;;
    *) names+=("$1") ;;
  esac
  shift
done
if [[ ${#names[@]} -eq 0 ]]; then
  mapfile -t names < <(basename -s .patch "$patches"/*.patch)
fi
for name in "${names[@]}"; do
  [[ -r $patches/$name.patch ]] || { echo "planted: there is no $patches/$name.patch" >&2; exit 2; }
  [[ -n $(said "$name" Bug) && -n $(bound "$name") ]] ||
    { echo "planted: $name.patch does not say what the bug is, or within how many seeds it is found" >&2; exit 1; }
done

if [[ -n $check ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  export GIT_CEILING_DIRECTORIES=$work
  copy_sources "$work/tree"
  for name in "${names[@]}"; do
    change "$name" --check || fails+=("$name")
    grep -q "^| \`$name\` |" "$root/docs/TESTING.md" ||
      { echo "planted: $name is not in the table of docs/TESTING.md" >&2; fails+=("$name"); }
  done
  if [[ ${#fails[@]} -gt 0 ]]; then
    echo "planted: not as said: ${fails[*]}" >&2
    exit 1
  fi
  echo "planted: all ${#names[@]} patches apply"
  exit 0
fi

mkdir -p "$work"
exec 9>"$work/lock"
flock 9
rm -rf "$work/bin" "$work/results"
mkdir -p "$work/bin" "$work/results"
copy_sources "$work/tree"

printf '%-30s %6s  %s\n' 'planted bug' 'seeds' 'what was said'
for name in "${names[@]}"; do
  if [[ -n $quick && -z $(said "$name" Quick) ]]; then
    continue
  fi
  seeds=$(bound "$name")
  if ! change "$name"; then
    fails+=("$name")
    continue
  fi
  # The next one is built while the last one is played.
  build "$name" || { fails+=("$name"); echo "$name: does not build" >&2; }
  change "$name" --reverse
  show
  if [[ -x $work/bin/$name ]]; then
    play "$name" "$seeds" 9>&- &
    player=$! playing=$name
  fi
done

# Without a bug the seeds that found them break nothing.
build none
show
play none "$most"
read -r _ words <"$work/results/none"
printf '%-30s %6s  %s\n' 'none' '-' "$words"
if [[ $words != "not found within"* ]]; then fails+=(none); fi

if [[ ${#fails[@]} -gt 0 ]]; then
  echo "planted: not as said: ${fails[*]}" >&2
  exit 1
fi
# Minutes and seconds of this shell, then of all that it started: in user code, in the kernel.
printf 'planted: all %d bugs were found, in %d s; processor time:\n' "$found" "$SECONDS"
times
