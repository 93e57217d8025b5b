# Run any of these from a fresh clone, as root or as a user who may use sudo.
.PHONY: demo test test-long test-vm sim verify fix bench release

STATIC_BUILD = RUSTFLAGS="-C target-feature=+crt-static" deploy/with-rust.sh cargo build --release \
  --target x86_64-unknown-linux-gnu --target-dir target/release-static
STATIC_DIR = target/release-static/x86_64-unknown-linux-gnu/release

# A swarm of five nodes on this machine: deploy, balance, lose a node, scale, update.
demo:
	deploy/demo.sh

# Builds everything once, and runs every test; those that make namespaces run as root.
test:
	deploy/test.sh

# The same with more seeds, more clients and more time.
test-long:
	SKEP_TEST_LONG=1 deploy/test.sh

# The demonstration in three virtual machines, which QEMU interprets: Debian's kernel and cgroup v2.
# A program without optimisation is too slow there. SKEP_BINARY chooses another than that of `make release`.
test-vm: $(if $(SKEP_BINARY),,release)
	SKEP_BINARY="$${SKEP_BINARY:-$(CURDIR)/target/skep}" deploy/test-vm.sh

# The whole control plane under faults, in virtual time: SEEDS of them (200 unless told otherwise), or one SEED;
# STEPS bounds the phase with faults. PRINT=1 prints each event of one seed. RING=turmoil runs the managers
# themselves, log and gRPC included; there SECONDS is how long things fail, and MISTAKE names one to plant.
ifeq ($(RING),turmoil)
sim:
	deploy/with-rust.sh cargo run --quiet --release --package skep-turmoil --bin skep-turmoil -- \
	  $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(MISTAKE),--mistake $(MISTAKE)) $(if $(PRINT),--print)
else
sim:
	deploy/with-rust.sh cargo run --quiet --release --package skep-simulation --bin skep-sim -- \
	  $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(STEPS),--steps $(STEPS)) $(if $(PRINT),--print)
endif

# What a change must pass; writes nothing.
verify:
	deploy/with-rust.sh cargo fmt --all --check
	deploy/with-rust.sh cargo clippy --workspace --all-targets -- -D warnings
	deploy/test.sh
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" deploy/with-rust.sh cargo doc --workspace --no-deps --document-private-items
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo "skipped: cargo deny is not installed"; fi

fix:
	deploy/with-rust.sh cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged
	deploy/with-rust.sh cargo fmt --all

# Measures the release binary in labs against the targets of docs/benchmarks.md; never a test.
# `make bench SCENARIO="failover mesh"` chooses, QUICK=1 measures less.
bench: release
	$(STATIC_BUILD) --package skep-cli --package skep-worker --package skep-cluster-tests --bin skep \
	  --bin skep-clients --bin skep-workers --example rules
	$(STATIC_BUILD) --package skep-manager-core --features testing --example place
	deploy/with-rust.sh cargo build --package skep-cluster-tests --bin skep-bench
	SKEP_BINARY="$(CURDIR)/target/skep" SKEP_BENCH_RULES="$(CURDIR)/$(STATIC_DIR)/examples/rules" \
	  SKEP_BENCH_PLACE="$(CURDIR)/$(STATIC_DIR)/examples/place" \
	  SKEP_BENCH_CLIENTS="$(CURDIR)/$(STATIC_DIR)/skep-clients" \
	  SKEP_BENCH_WORKERS="$(CURDIR)/$(STATIC_DIR)/skep-workers" deploy/as-root.sh \
	  "$${CARGO_TARGET_DIR:-target}/debug/skep-bench" $(if $(QUICK),--quick) $(SCENARIO)

# The one binary, without shared libraries: target/skep. Its flags are its own, so that the development
# build is left as it is.
release:
	deploy/prerequisites.sh
	$(STATIC_BUILD) --package skep-cli
	install $(STATIC_DIR)/skep target/skep
