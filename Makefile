# Ingot. `make` alone lists the words.

# One set of build settings for all words: a build of one is in the cache of the others.
export CGO_ENABLED = 0
export GOFLAGS = -trimpath -buildvcs=false
# What scripts/packages has unpacked for the tests.
export PATH := $(PATH):/usr/sbin:/sbin:/var/cache/ingot/tools/usr/sbin
GO = $(shell scripts/go)
VERSION = $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
REVISION = $(shell git rev-parse HEAD 2>/dev/null)
DATE = $(shell TZ=UTC git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd 2>/dev/null)
# Packages that share memory between goroutines and build quickly with the race detector.
RACE = ./internal/agent ./internal/boot ./internal/dhcp ./internal/dns ./internal/firewalld ./internal/lab ./internal/logfile ./internal/logline ./internal/metadata \
	./internal/nat ./internal/pki ./internal/rpc ./internal/run ./internal/vm ./internal/vpn ./internal/wire
# Without it each process waits for a second before it ends.
RACING = CGO_ENABLED=1 GORACE=atexit_sleep_ms=0
FUZZTIME = 10s

.DEFAULT_GOAL = help
.PHONY: help build up test check bench bench-hub fuzz e2e

help: ## list these words
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

build: guest/bin/init ## build bin/ingot
	@$(GO) build -ldflags '-s -w -X main.version=$(VERSION) -X main.revision=$(REVISION) -X main.date=$(DATE)' -o bin/ingot ./cmd/ingot
	@for name in flintlockd ctr dhcp-lease-list dhcp-leases-list; do ln -sf ingot bin/$$name; done

# The guest's init is built into ingot. It is written only if it has changed.
guest/bin/init: $(wildcard guest/init/*.go internal/agent/*.go) go.mod
	@scripts/go >/dev/null
	@echo "build the guest's init, then ingot: the first time this takes some minutes"
	@$(GO) build -ldflags '-s -w' -o $@ ./guest/init
	@touch $@

up: ## bring the lab up: two hosts, two microVMs, all checked
	@test "$$(id -u)" = 0 || { echo "make up needs root: sudo make up" >&2; exit 1; }
	@scripts/packages run
	@$(MAKE) --no-print-directory build
	@bin/ingot up
	@bin/ingot inspect

test: ## run all tests
	@scripts/packages run test
	@$(MAKE) --no-print-directory build
	$(GO) test -p 1 -timeout 20m ./...
	$(RACING) $(GO) test -race -short -timeout 10m $(RACE)
	$(RACING) $(GO) test -race -short -timeout 10m -run 'TestMachine|TestRestart' ./cmd/ingot

check: ## format, vet, staticcheck, layout, arm64
	@bad=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$bad" || { echo "not gofmt'd: $$bad"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) test -run TestLayout .
	GOARCH=arm64 $(GO) build ./...

bench: build ## measure what docs/benchmarks.md shows
	@scripts/packages run test
	PATH="$$PATH:$$($(GO) env GOROOT)/bin" $(GO) run ./bench
	@$(MAKE) --no-print-directory bench-hub

bench-hub: build ## of it the network hub, beside the programs that it replaces
	@scripts/packages bench
	$(GO) run ./bench/hub

fuzz: ## run every fuzz target for FUZZTIME
	@for target in $$(grep -rl 'func Fuzz' --include='*_test.go' . | xargs -n1 dirname | sort -u); do \
		for name in $$(grep -ho 'func Fuzz[A-Za-z]*' $$target/*_test.go | cut -c6-); do \
			echo "$$target $$name"; $(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) $$target || exit 1; \
		done; \
	done

e2e: build ## bring an environment up, use it, break it, take it down
	@scripts/packages run test
	$(GO) test -run TestE2E -count 1 -timeout 20m -v ./cmd/ingot
