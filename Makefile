# The commands of this repository. `make` alone lists them.
#
# `make demo` and `make test` need only cargo, and root if a Debian package is missing: they install what they use.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
CARGO ?= cargo
# Flags for the demo, such as DEMO="--keep", and for the benchmark, such as BENCH="--quick".
DEMO ?=
BENCH ?=
# Which scenarios, and flags, such as LAB="mirror --short".
LAB ?= all
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
# Release speed matters to the tests that kill real processes, link-time optimisation does not.
TEST_ENVIRONMENT := CARGO_PROFILE_RELEASE_LTO=off

say = @printf '\n== %s (%s)\n' "$(1)" "$$(date +%H:%M:%S)"

.PHONY: help setup build demo test fmt fmt-check lint unit doc loom asan lab lab-short bench clean
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

build: ## build the release binaries: target/release/twinpoint and its kin
	@tools/setup.sh build
	$(CARGO) build --release --locked

demo: ## two stores, a file system across them, the first node killed, the second one carries on
	@tools/setup.sh demo
	$(call say,building)
	$(CARGO) build --release --locked --package twinpoint-tools
	@"$(TARGET)/release/twinpoint-demo" $(DEMO)

test: setup fmt-check lint unit loom doc lab-short ## everything that has to pass before a commit
	@printf '\n== all tests passed: format, lints, tests, interleavings, documentation, guests if able (%s)\n' "$$(date +%H:%M:%S)"

fmt: ## format the code
	$(CARGO) fmt --all

setup:
	@tools/setup.sh test

fmt-check:
	$(call say,format)
	$(CARGO) fmt --all --check

lint: ## clippy, warnings denied
	$(call say,lints)
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

unit: setup ## the tests of all crates, those over real processes included
	$(call say,tests)
	$(TEST_ENVIRONMENT) $(CARGO) test --release --workspace --locked --no-fail-fast

loom: ## every interleaving of the ring between threads
	$(call say,interleavings of the ring)
	RUSTFLAGS="--cfg loom" $(TEST_ENVIRONMENT) $(CARGO) test --release --locked --target-dir "$(TARGET)/loom" \
	  --package twinpoint-runtime --test ring_model

asan: ## the runtime's tests under AddressSanitizer, leaks included
	$(call say,address sanitizer)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address $(CARGO) test --locked --target-dir "$(TARGET)/asan" \
	  --target x86_64-unknown-linux-gnu --package twinpoint-runtime

.PHONY: planted
planted: ## every planted bug is found by the simulator; see docs/TESTING.md
	$(call say,planted bugs)
	tools/planted.sh

doc: ## the documentation of the code, warnings denied
	$(call say,documentation)
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --document-private-items --locked

lab: ## scenarios in virtual machines: NVMe, SoftRoCE, power cuts; see docs/LAB.md
	@tools/setup.sh lab
	@tools/lab/lab run $(LAB)

lab-short: ## the transports' conformance and a short mirror in two guests, if this machine can boot them
	$(call say,two guests with SoftRoCE and NVMe)
	@tools/lab/if-able conformance mirror

bench: setup ## measure, and write the result under bench/results/
	$(CARGO) run --release --locked --package twinpoint-bench -- run $(BENCH)

clean: ## remove what was built
	$(CARGO) clean
