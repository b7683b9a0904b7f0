# Deimos: what can be made. `make` alone lists it.
#
# Builds are reproducible: CGO is off, and paths, VCS state and build ids stay
# out, so that the same sources and the same Go give the same bytes anywhere
# (`make repro` proves it). Everything lands below $(BIN).

VERSION  := 0.1.0
RELEASED := 2026-11-22
GO       := go
BIN      := bin
# The versions of what is offered to a device of this one, in tour and tests: the next
# minor version, which works, and the one after it, which does not. Who offers a
# program asks it for its version.
NEXT     := $(shell echo '$(VERSION)' | awk -F. '{ print $$1 "." $$2 + 1 ".0" }')
BROKEN   := $(shell echo '$(NEXT)' | awk -F. '{ print $$1 "." $$2 + 1 ".0" }')
# What a release is made from: agents for these, by the folders below $(BIN); the
# firmware where it can be made; the commit, unless something was changed after it.
RELEASE          := $(BIN)/release/$(VERSION)
RELEASE_FOR      := amd64 arm64 armv7
RELEASE_FIRMWARE  = $(if $(filter 0,$(FIRMWARE)),,$(shell bash -c '. scripts/have.bash && have_image_tools' && echo 1))
COMMIT           ?= $(shell [ -n "$$(git status --porcelain 2>&1)" ] || git rev-parse HEAD)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

HOST    := $(addprefix $(BIN)/,deimos deimos-agent deimos-launch)
ARM64   := $(addprefix $(BIN)/arm64/,deimos-agent deimos-launch)
ARMV7   := $(addprefix $(BIN)/armv7/,deimos-agent deimos-launch)
GO_GUESTS := $(patsubst jobs/guests/%/main.go,$(BIN)/guests/%.wasm,$(wildcard jobs/guests/*/main.go))
C_GUESTS  := $(patsubst jobs/guests/%/main.c,$(BIN)/guests/%.wasm,$(wildcard jobs/guests/*/main.c))
GUESTS    := $(GO_GUESTS) $(C_GUESTS)
# The two releases that the tour offers: one that works, one that does not.
TOUR    := $(BIN)/tour/agent-next $(BIN)/tour/agent-broken
IMAGE   := $(BIN)/image/deimos-arm64-$(VERSION).img

##@ Use
.PHONY: run
run: $(HOST) $(GUESTS) $(TOUR) ## Build, then the tour of a whole fleet on this machine (ONCE=1 ends after it, FILE=path stores your file)
	@$(BIN)/deimos dev $(if $(filter-out 0 no false,$(ONCE)),--once) $(if $(FILE),--file "$$FILE")
export FILE

.PHONY: build
build: $(HOST) $(ARM64) $(ARMV7) $(GUESTS) $(TOUR) ## Build every program, for this machine, arm64 and armv7, and the guest modules

##@ Image
.PHONY: image image-debug image-lock
image: ## The disk image of a device, arm64, UEFI (CONFIG=file becomes its deimos.toml)
	@$(MAKE_IMAGE)
image-debug: ## The same with a shell and the kernel's messages
	@$(MAKE_IMAGE) -debug
image-lock: ## Take Debian's newest packages for the image from now on
	@$(GO) run ./packaging/image -lock
image image-debug: $(BIN)/arm64/deimos-agent $(BIN)/arm64/deimos-init

.PHONY: qemu qemu-tour
qemu: $(IMAGE) ## A device in this terminal: the image in QEMU (NAME=, NEW=1, COORDINATOR=https://10.0.2.2:8443, TOKEN=)
	@$(GO) run ./packaging/qemu/run -image $(IMAGE) -dir "$(BIN)/qemu/$(or $(NAME),device)" $(if $(filter-out 0 no false,$(NEW)),-new) \
	  -coordinator "$$COORDINATOR" -token "$$TOKEN"
qemu-tour: $(IMAGE) $(HOST) $(GUESTS) $(TOUR) ## The tour with two devices of the image in QEMU beside one process (ONCE=1, FILE=path)
	@$(BIN)/deimos dev --image $(IMAGE) $(if $(filter-out 0 no false,$(ONCE)),--once) $(if $(FILE),--file "$$FILE")
export COORDINATOR TOKEN
export CONFIG

##@ Release
.PHONY: release
release: $(BIN)/deimos $(RELEASE_FOR:%=$(BIN)/%/deimos-agent) $(if $(RELEASE_FIRMWARE),$(IMAGE)) ## The bundle of this version, the same bytes each time: all agents, the firmware, what they are made of, how they were built (FROM=bundles of the releases that devices run, for deltas; FIRMWARE=0 COMMIT= BUILDER= BUILDER_KEY=file)
	@$(if $(RELEASE_FIRMWARE),,echo "left out: the firmware of devices with our image$(if $(filter 0,$(FIRMWARE)),, (no tools to make it with; make setup))")
	@rm -rf $(RELEASE)
	@$(BIN)/deimos release build --version $(VERSION) --created $(RELEASED) $(RELEASE_FOR:%=--agent $(BIN)/%/deimos-agent) \
	  $(if $(RELEASE_FIRMWARE),--firmware $(BIN)/image/deimos_$(VERSION).efi) $(FROM:%=--delta-from %) --commit "$(COMMIT)" --builder "$$BUILDER" $(if $(BUILDER_KEY),--builder-key "$$BUILDER_KEY") --out $(RELEASE)
export BUILDER BUILDER_KEY

##@ Install
.PHONY: deb
deb: ## Debian packages of agent and coordinator, into bin/deb
##@ Check
.PHONY: test
test: ## Everything: set-up, format, vet, lint, unit tests, integration, race detector, the arm64 agent, reproducibility
	@scripts/test

# The stages of `make test`, each runnable alone.
.PHONY: setup check unit device repro-quick integration
setup: ## Install what the tests need and this machine lacks (Debian, Ubuntu)
	@scripts/test setup
check: ## Format, vet for three architectures, lint
	@scripts/test format vet lint
unit: ## Unit tests with the race detector
	@scripts/test unit
device: ## Size, form and a run of the shipped device programs under emulation
	@scripts/test device
integration: ## The real processes together, and the long tests of the rooms
	@scripts/test integration

.PHONY: qemu-test
qemu-test: ## The image as devices in QEMU: soon online, stores, proves, computes, is updated, finds its coordinator (10 minutes)
	@scripts/test setup qemu

.PHONY: qemu-hang
qemu-hang: ## The image with an agent that hangs: the machine's watchdog starts it anew (10 minutes)
	@scripts/test setup hang

.PHONY: fleet kills liars campaign
fleet: $(HOST) $(GUESTS) $(TOUR) ## 12 devices, 2 GiB of files: two destroyed, one whose disk lies, one slow; all comes back (MIB=2048 DEIMOS_TEST_SEED; 6 GiB of disk)
	@FLEET=$(or $(MIB),2048) DEIMOS_BIN=$(abspath $(BIN)) $(GO) test -count=1 -v -timeout=3h -run '^TestEveryFileComesBackFromAFleetThatRots$$' ./test
kills: $(HOST) $(GUESTS) $(TOUR) ## Kill agents in the middle of storing, emptying logs, scrub and drain, and see that nothing signed for is lost (KILLS=200 DEIMOS_TEST_SEED)
	@KILLS=$(or $(KILLS),200) DEIMOS_BIN=$(abspath $(BIN)) $(GO) test -count=1 -v -timeout=0 -run '^TestKilledInTheMiddleAnAgentHasAllThatItSignedFor$$' ./test
liars: $(HOST) $(GUESTS) $(TOUR) ## 10,000 jobs over ten agents, four of which lie: these are found, nobody else is punished, and in the end no wrong result stands (JOBS=10000 DEIMOS_TEST_SEED)
	@JOBS=$(or $(JOBS),10000) DEIMOS_BIN=$(abspath $(BIN)) $(GO) test -count=1 -v -timeout=0 -run '^TestLiarsAreFoundAndNobodyElseIs$$' ./test

campaign: $(HOST) $(GUESTS) $(TOUR) ## Bring releases to simulated devices of which some fail and some fall silent: it stops by itself, strands nobody, and all follow the next (AGENTS=1000 DEIMOS_TEST_SEED; a minute)
	@CAMPAIGN=$(or $(AGENTS),1000) DEIMOS_BIN=$(abspath $(BIN)) $(GO) test -count=1 -v -timeout=30m -run '^TestACampaignStopsByItselfAndStrandsNobody$$' ./test

.PHONY: powercut powercut-device powercut-store
powercut: powercut-store powercut-device ## Cut the power of a chunk store, then of a device in QEMU, at thousands of moments, and see that nothing promised is lost (root)
powercut-device: qemu-images ## The device alone (POINTS=6000 BOOTS=10; PLANT=receipt: a bug must be found; DEIMOS_TEST_SEED)
	@CGO_ENABLED=0 $(GO) run ./test/powercut -bin $(BIN) -points $(or $(POINTS),6000) -boots $(or $(BOOTS),10) -rounds $(or $(ROUNDS),4) $(if $(PLANT),-plant $(PLANT))
powercut-store: ## The store alone (POINTS=10000; PLANT=move: a bug must be found; DEIMOS_TEST_SEED)
	@CGO_ENABLED=0 $(GO) run ./test/storecrash -points $(or $(POINTS),10000) -rounds $(or $(ROUNDS),6) $(if $(PLANT),-plant $(PLANT))

.PHONY: deb-test
deb-test: ## Install, upgrade, remove and purge the Debian packages under a systemd of their own; lintian; same bytes twice (root)
	@scripts/test-deb

.PHONY: versions
versions: # for scripts: ours, when it was released, the next one, one that does not work
	@echo $(VERSION) $(RELEASED) $(NEXT) $(BROKEN)

.PHONY: repro
repro: ## Build the device programs and the bundle of a release twice, from nothing, in two places, and compare (minutes)
	@scripts/repro --from-nothing

.PHONY: bench
bench: $(HOST) $(BIN)/tour/agent-next $(BIN)/guests/textstats.wasm $(if $(STORAGE_ONLY)$(COMPUTE_ONLY)$(UPDATES_ONLY)$(FOLLOW_ONLY),,$(if $(shell command -v qemu-system-aarch64),image)) ## What the line between coordinator and devices bears and how fast storage and jobs are, each against a baseline in the same run, and what an idle device uses (AGENTS=1000 IDLE=2m; IMAGE_ONLY=1 for the device alone, STORAGE_ONLY=all for storage, or puts, reads, growth, memory, objects; COMPUTE_ONLY=1 for jobs, UPDATES_ONLY=1 for updates, FOLLOW_ONLY=1 for devices that follow a release; minutes; leave the machine alone)
	@CGO_ENABLED=0 $(GO) run ./test/bench -bin $(BIN) -agents $(or $(AGENTS),1000) -idle $(or $(IDLE),2m) $(if $(shell command -v qemu-system-aarch64),-image $(IMAGE)) $(if $(IMAGE_ONLY),-image-only) $(if $(STORAGE_ONLY),-storage $(STORAGE_ONLY:1=all)) $(if $(COMPUTE_ONLY),-compute-only) $(if $(UPDATES_ONLY),-updates) $(if $(FOLLOW_ONLY),-follow)

##@ Else
.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BIN) .tools

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# --- How things are built ---------------------------------------------------

# With an empty build id `go build` links anew each time, so make decides: a
# program is stale when a source file, the list of them, the version, the flags
# or the Go release has changed.
SOURCES := $(shell find . -mindepth 1 \( -name '.*' -o -path ./bin -o -path './$(BIN)' -o -path ./dev -o -path ./docs \
             -o -path ./test -o -path ./tools -o -path ./scripts -o -name testdata \) -prune \
             -o -type f ! -name '*_test.go' ! -name '*.md' ! -name '*[ :\#$$]*' -print | LC_ALL=C sort)
FLAGS   := -trimpath -buildvcs=false
LDFLAGS := -s -w -buildid=
INPUTS   = $(VERSION) $(RELEASED) $(shell $(GO) env GOVERSION) $(FLAGS) $(LDFLAGS) $(SOURCES)
STAMP   := $(BIN)/.inputs

.PHONY: FORCE
$(STAMP): FORCE
	$(shell mkdir -p $(@D))$(file >$@.new,$(INPUTS))
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# $(call go-build,platform,version,package)
define go-build
@echo "build  $@"
@mkdir -p $(@D)
@CGO_ENABLED=0 $1 $(GO) build $(FLAGS) -ldflags='$(LDFLAGS) -X main.version=$2 -X main.released=$(RELEASED)' -o $@ ./$3
endef

# The lowest level of each architecture, whatever the builder's environment says.
NATIVE := GOOS=linux GOAMD64=v1 GOARM64=v8.0

$(HOST): $(BIN)/%: $(SOURCES) $(STAMP)
	$(call go-build,$(NATIVE),$(VERSION),cmd/$*)

$(ARM64): $(BIN)/arm64/%: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$(VERSION),cmd/$*)

$(BIN)/arm64/deimos-init: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$(VERSION),packaging/init)

$(ARMV7): $(BIN)/armv7/%: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm GOARM=7,$(VERSION),cmd/$*)

$(GO_GUESTS): $(BIN)/guests/%.wasm: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=wasip1 GOARCH=wasm GOWASM=,$(VERSION),jobs/guests/$*)

# Where no C compiler makes WebAssembly, this is left out: nothing but a job of it needs it.
$(C_GUESTS): $(BIN)/guests/%.wasm: jobs/guests/%/main.c jobs/guests/include/deimos.h scripts/guest-c
	@echo "build  $@"
	@mkdir -p $(@D); rm -f $@
	@scripts/guest-c $@ $< || { [ $$? -eq 3 ] && [ -z "$$CI" ] && echo "       left out"; }

$(BIN)/tour/agent-next: $(SOURCES) $(STAMP)
	$(call go-build,$(NATIVE),$(NEXT),cmd/deimos-agent)

$(BIN)/tour/agent-broken: $(SOURCES) $(STAMP)
	$(call go-build,$(NATIVE),$(BROKEN),packaging/tour/brokenagent)

MAKE_IMAGE = $(GO) run ./packaging/image -version $(VERSION) -agent $(BIN)/arm64/deimos-agent -init $(BIN)/arm64/deimos-init \
               -out $(BIN)/image $(if $(CONFIG),-config "$$CONFIG")

$(IMAGE): $(BIN)/arm64/deimos-agent $(BIN)/arm64/deimos-init $(SOURCES) $(STAMP)
	@$(MAKE_IMAGE)

# What `make qemu-test` runs: the image, and the firmware that its updates bring, one
# that works and one whose agent does not. What `make qemu-hang` runs: one whose agent hangs.
FIRMWARE := $(foreach v,$(NEXT) $(BROKEN),$(BIN)/qemu-test/deimos_$v.efi)
HANGS    := $(BIN)/qemu-hang/deimos_$(BROKEN).efi
.PHONY: qemu-images qemu-hang-image
qemu-images: $(HOST) $(GUESTS) $(TOUR) $(FIRMWARE)
	@$(MAKE) image CONFIG=

qemu-hang-image: qemu-images $(HANGS)

$(FIRMWARE): $(BIN)/qemu-test/deimos_%.efi: $(BIN)/qemu-test/agent-% $(BIN)/qemu-test/init-%
	@$(GO) run ./packaging/image -version $* -agent $(BIN)/qemu-test/agent-$* -init $(BIN)/qemu-test/init-$* -out $(@D)

$(BIN)/qemu-test/agent-$(NEXT): $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$(NEXT),cmd/deimos-agent)

$(BIN)/qemu-test/agent-$(BROKEN): $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$(BROKEN),packaging/tour/brokenagent)

$(HANGS): $(BIN)/qemu-hang/agent $(BIN)/qemu-test/init-$(BROKEN)
	@$(GO) run ./packaging/image -version $(BROKEN) -agent $(@D)/agent -init $(BIN)/qemu-test/init-$(BROKEN) -out $(@D)

$(BIN)/qemu-hang/agent: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$(BROKEN) -X main.mode=hang,packaging/tour/brokenagent)

$(BIN)/qemu-test/init-%: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$*,packaging/init)

# Programs that only packages need: for each architecture of Debian, and the one
# that offers a packaged agent to the slots.
AMD64   := $(addprefix $(BIN)/amd64/,deimos deimos-agent deimos-launch)
DEBS    := deimos-agent_amd64 deimos-agent_arm64 deimos-agent_armhf deimos_amd64 deimos_arm64

$(AMD64): $(BIN)/amd64/%: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=amd64 GOAMD64=v1,$(VERSION),cmd/$*)

$(BIN)/arm64/deimos: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$(VERSION),cmd/deimos)

$(BIN)/amd64/deimos-offer: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=amd64 GOAMD64=v1,$(VERSION),packaging/deb/offer)

$(BIN)/arm64/deimos-offer: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm64 GOARM64=v8.0,$(VERSION),packaging/deb/offer)

$(BIN)/armv7/deimos-offer: $(SOURCES) $(STAMP)
	$(call go-build,GOOS=linux GOARCH=arm GOARM=7,$(VERSION),packaging/deb/offer)

deb: $(DEBS:%=$(BIN)/deb/%)

# $(BIN)/deb/PACKAGE_ARCH stands for the package, whose name has the version too.
.PHONY: $(DEBS:%=$(BIN)/deb/%)
$(BIN)/deb/deimos-agent_amd64: $(addprefix $(BIN)/amd64/,deimos-agent deimos-launch deimos-offer)
$(BIN)/deb/deimos-agent_arm64: $(addprefix $(BIN)/arm64/,deimos-agent deimos-launch deimos-offer)
$(BIN)/deb/deimos-agent_armhf: $(addprefix $(BIN)/armv7/,deimos-agent deimos-launch deimos-offer)
$(BIN)/deb/deimos_amd64: $(BIN)/amd64/deimos
$(BIN)/deb/deimos_arm64: $(BIN)/arm64/deimos
$(DEBS:%=$(BIN)/deb/%): $(BIN)/deb/%:
	@packaging/deb/build $(subst _, ,$*) $(VERSION) $(RELEASED) $(<D) $(BIN)/deb
