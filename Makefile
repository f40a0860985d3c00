# What people type. Everything that is needed beyond Rust and Python is
# installed by the targets themselves, into target/ (what .ci/cargo-tool builds,
# once for all checkouts) or (Debian packages, as root) onto the host.

SHELL := /bin/sh
TOOLS := $(CURDIR)/target/tools
CARGO_FUZZ := $(TOOLS)/bin/cargo-fuzz
CARGO_DENY := $(TOOLS)/bin/cargo-deny
MDBOOK := $(TOOLS)/bin/mdbook
CARGO_DEB := $(TOOLS)/bin/cargo-deb
CARGO_GENERATE_RPM := $(TOOLS)/bin/cargo-generate-rpm
CARGO_CYCLONEDX := $(TOOLS)/bin/cargo-cyclonedx
# Each test binary is run by what ends it when a test runs for too long.
LIMITED := target."cfg(all())".runner = "$(CURDIR)/.ci/limited"

# Where `make install` puts what, below DESTDIR.
PREFIX ?= /usr/local
DESTDIR ?=

# Seconds that each fuzz target runs for in `make test`.
FUZZ_SECONDS ?= 10

# One binary for packages and images, which needs no library and runs on any distribution.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
STATIC = target/$(HOST)/release/ppv2-proxy

# The library of `wrap`, which any glibc from 2.28 on can load, whatever this host has.
PRELOAD = target/$(HOST)/preload/libppv2_preload.so
GLIBC := 2.28

# The same for programs that use musl, such as those of Alpine.
MUSL = $(firstword $(subst -, ,$(HOST)))-unknown-linux-musl
PRELOAD_MUSL = target/$(MUSL)/preload/libppv2_preload.so

# What `make image` calls the image.
IMAGE ?= ppv2-proxy:$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

.PHONY: help build demo test tests lint unit python fuzz audit packages static preload install dist image docs book screenshot bench bench-sdk bench-upgrade bench-preload

help:
	@echo 'make demo    a server, the proxy and a client on loopback, and what each saw'
	@echo 'make test    every test: unit, lint, python, fuzz, demo'
	@echo 'make build   the optimised binary and its library, in target/release'
	@echo 'make install these, man pages, completions and unit, below DESTDIR and PREFIX=$(PREFIX)'
	@echo 'make dist    packages of a release, target/dist'
	@echo 'make image   a container image of a static binary, by podman or docker'
	@echo 'make lint    formatting, lints, docs, licences'
	@echo 'make unit    tests of all Rust crates, with DNS servers and quinn'
	@echo 'make python  tests of the Python package'
	@echo 'make fuzz    the fuzz targets, FUZZ_SECONDS=$(FUZZ_SECONDS) each'
	@echo 'make docs    the pages of docs/ that are made from the program'
	@echo 'make book    docs/ as a book, target/book/index.html'
	@echo 'make bench   ppv2-proxy beside nginx, Envoy, sozu and others; QUICK=1 for two to three minutes'
	@echo 'make bench-upgrade  takeovers and restarts of ppv2-proxy under load, ten in a row each: nothing may be lost'
	@echo 'make bench-sdk  what the SDKs cost a server, and what their batches save it'
	@echo 'make bench-preload  what the preload library costs a server, NSD, for each query'
	@echo 'make audit   known vulnerabilities of dependencies (fetches the RustSec database)'

# `wrap` looks for the libraries beside the proxy.
build:
	cargo build --locked --release -p ppv2-proxy
	cargo build --locked --profile preload -p ppv2-preload
	install -m 644 target/preload/libppv2_preload.so target/release
	@rm -f target/release/libppv2_preload_musl.so
	@if [ -d "$$(rustc --print target-libdir --target $(MUSL))" ]; then \
		sdk-rust/preload/for-musl --locked --profile preload && \
		install -m 644 $(PRELOAD_MUSL) target/release/libppv2_preload_musl.so; \
	else \
		echo 'without the library for programs that use musl: `rustup target add $(MUSL)` has it built' >&2; \
	fi

static: export RUSTFLAGS := -C target-feature=+crt-static
static: export CARGO_PROFILE_RELEASE_STRIP := symbols
static:
	cargo build --locked --release --target $(HOST) -p ppv2-proxy

# zig links against the glibc that the target names. It would bring an unwinder of its own, but a
# program that cancels a thread unwinds the library's frames by GCC's.
preload: export RUSTFLAGS := -C link-arg=$(shell $(CC) -print-file-name=libgcc_s.so.1)
preload:
	.ci/python-tools $(TOOLS)/dist-python proxy/packaging/python-tools.txt
	PATH="$(TOOLS)/dist-python/bin:$$PATH" \
		cargo zigbuild --locked --profile preload --target $(HOST).$(GLIBC) -p ppv2-preload
	sdk-rust/preload/for-musl --locked --profile preload

image: static preload
	proxy/packaging/container/build $(STATIC) $(PRELOAD) $(PRELOAD_MUSL) $(IMAGE)

# Not built here: root, who installs, needs no Rust.
install:
	@[ -x target/release/ppv2-proxy ] && [ -f target/release/libppv2_preload.so ] || \
		{ echo 'run `make build` first' >&2; exit 1; }
	proxy/packaging/install target/release/ppv2-proxy target/release/libppv2_preload.so \
		'$(wildcard target/release/libppv2_preload_musl.so)' '$(DESTDIR)' '$(PREFIX)'

dist: static preload $(CARGO_DEB) $(CARGO_GENERATE_RPM) $(CARGO_CYCLONEDX)
	proxy/packaging/dist $(STATIC) $(PRELOAD) $(PRELOAD_MUSL) target/dist $(TOOLS)

# The proxy needs nothing of root, so root has it run as nobody.
demo:
	@cargo build --locked $(or $(PROXY_OF),-p ppv2-proxy)
	@if [ "$$(id -u)" = 0 ]; then \
		folder=$$(mktemp -d) && trap 'rm -r "$$folder"' EXIT && chmod 755 "$$folder" && \
		install -m 755 target/debug/ppv2-proxy "$$folder" && \
		setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all --no-new-privs \
			"$$folder/ppv2-proxy" demo; \
	else \
		target/debug/ppv2-proxy demo; \
	fi

# The parts run side by side, since tests wait for most of their time, and each prints
# its output when it is done. Builds and lints run at the lowest priority.
test: export PROXY_OF := --workspace --tests
test:
	@$(MAKE) --no-print-directory --jobs=5 --keep-going --output-sync=target \
		NEEDED=packages unit lint python fuzz demo

# What can't be installed is named by the test that needs it.
packages:
	@.ci/debian-packages
	@proxy/bench/peers.sh target/peers nginx
	@.ci/python-tools $(TOOLS)/python

lint: $(CARGO_DENY)
	cargo fmt --all --check
	cd fuzz && cargo fmt --check
	nice -n 19 cargo clippy --locked --workspace --all-targets -- -D warnings
	# The examples turn on all features of the SDK.
	RUSTDOCFLAGS='-D warnings' nice -n 19 cargo doc --locked --workspace --no-deps --quiet
	$(CARGO_DENY) check --hide-inclusion-graph licenses bans sources

# Most tests wait for most of their time. One that waits for three minutes fails, and
# whatever escapes that ends with the last limit. `tests` has built the libraries: a build by a
# test would wait for that of `lint`.
unit: export RUST_TEST_THREADS := 8
unit: export PPV2_PRELOAD := $(CURDIR)/target/debug/libppv2_preload.so
unit: export PPV2_PRELOAD_MUSL = $(CURDIR)/target/$(MUSL)/debug/libppv2_preload.so
unit: packages tests $(CARGO_DEB)
	timeout --foreground --kill-after=60 3600 \
		cargo test --locked --workspace --no-fail-fast --config '$(LIMITED)'

# Builds them, which needs none of the packages. A library that no crate links is built by
# itself.
tests:
	cargo test --locked --workspace --no-run --quiet
	cargo build --locked --quiet -p ppv2-preload
	sdk-rust/preload/for-musl --locked --quiet

# In `make test`, the packages come first.
python: $(NEEDED)
	sdk-python/run-tests

# Nightly flags on the one toolchain that there is; see fuzz/README.md.
fuzz: $(CARGO_FUZZ)
	nice -n 19 fuzz/run $(FUZZ_SECONDS)

audit: $(CARGO_DENY)
	$(CARGO_DENY) check advisories

# `make unit` fails when one of these pages is out of date.
docs:
	PPV2_WRITE_DOCS=1 cargo test --locked --quiet -p ppv2-proxy --test documentation generated

# The picture of the page at / of the admin API.
screenshot:
	.ci/debian-packages chromium
	PPV2_SCREENSHOT=$(CURDIR)/docs/guides/admin-page.webp cargo test --locked --quiet -p ppv2-proxy --test it page::the_page_shows_live

book: $(MDBOOK)
	$(MDBOOK) build docs

$(CARGO_FUZZ):
	nice -n 19 .ci/cargo-tool $(TOOLS) cargo-fuzz@0.13.2

$(CARGO_DENY):
	nice -n 19 .ci/cargo-tool $(TOOLS) cargo-deny@0.20.2

# Without a library for xz: it runs the program. `unit` waits for it.
$(CARGO_DEB):
	.ci/cargo-tool $(TOOLS) cargo-deb@3.8.0 --no-default-features --features gzip

$(CARGO_GENERATE_RPM):
	nice -n 19 .ci/cargo-tool $(TOOLS) cargo-generate-rpm@0.21.1

$(CARGO_CYCLONEDX):
	nice -n 19 .ci/cargo-tool $(TOOLS) cargo-cyclonedx@0.5.9

$(MDBOOK):
	.ci/cargo-tool $(TOOLS) mdbook@0.5.4 --no-default-features --features search

# Everything that is measured against is installed where it is missing; QUICK=1
# measures nginx and the bare loop alone, in two to three minutes; REALTIME=1, as
# root, keeps the noise of other programs out, and the other programs waiting;
# REFERENCE=FILE compares with another build of the proxy.
bench: build
	@proxy/bench/peers.sh target/peers tools nginx $(if $(QUICK),,envoy udppp dnsdist sozu)
	cargo build --locked --release -p ppv2-bench
	target/release/ppv2-bench run $(if $(REALTIME),--real-time) \
		$(if $(REFERENCE),--reference $(REFERENCE)) \
		$(if $(QUICK),--quick,--svg proxy/bench/result.svg)

# One process after the other takes over under load, and then the proxy is restarted by a service
# manager that stores its sockets and sessions; it fails if a datagram is lost. SYSTEMD=1, as root,
# has systemd restart it, too. REFERENCE=FILE begins with another build of the proxy.
bench-upgrade: build
	cargo build --locked --release -p ppv2-bench
	target/release/ppv2-bench upgrade $(if $(REFERENCE),--from $(REFERENCE))
	target/release/ppv2-bench upgrade --by store
	$(if $(SYSTEMD),target/release/ppv2-bench upgrade --by systemd)

# NSD with the library and without, in turn, as fast as it answers and at a fixed rate; it fails
# above 1.10 times the CPU.
bench-preload: build
	@.ci/debian-packages nsd
	cargo build --locked --profile preload -p ppv2-preload
	cargo build --locked --release -p ppv2-bench
	target/release/ppv2-bench preload

# A line for each language; all of them run, and any shortfall fails in the end.
bench-sdk:
	@status=0; \
	cargo bench --locked --quiet -p ppv2-sdk --features quinn --bench sdk || status=1; \
	sdk-python/bench/run || status=1; \
	exit $$status
