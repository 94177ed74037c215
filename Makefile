# Shifter in Python. `make demo` shows it; `make install` installs it; `make test` tests it (all as root).
PREFIX        ?= /opt/shifter
SYSCONFDIR    ?= /etc/shifter
LOCALSTATEDIR ?= /var
DESTDIR       ?=
PYTHON        ?= /usr/bin/python3
# 0: no OpenSSH for containers; everything else works, and one that is installed already stays.
WITH_SSHD     ?= 1
# 0: no plugin for Slurm; 1: it must be built. By default it is built where Slurm's headers are (libslurm-dev).
WITH_SLURM    ?= $(if $(wildcard /usr/include/slurm/spank.h),1,0)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := build
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONSAFEPATH VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER
export LC_ALL := C.UTF-8

# Symlinks resolved now: after an upgrade of the interpreter the installed byte code must not meet another one.
PYREAL      = $(shell readlink -f $(PYTHON) 2>/dev/null)
LIBEXEC    := $(PREFIX)/libexec/shifter/python
UDIIMAGE   := $(PREFIX)/libexec/shifter/opt/udiImage
CONF       := $(SYSCONFDIR)/udiRoot.conf
VENV       := build/venv
VPY        := $(VENV)/bin/python
DOOR_SRC   := $(sort $(wildcard shifter/door/*.c))
# What only parses: no file, no system call. The comparing tests and the fuzzer are linked with it.
PARSE_SRC  := $(addprefix shifter/door/,fields.c parse.c environment.c)
DOOR_HDR   := $(sort $(wildcard shifter/door/*.h)) build/config.h build/options.h
PY_SRC      = $(shell find shifter -name '*.py')

# --- packages --------------------------------------------------------------------------------------------------------
# Running: Python, and what makes and mounts images.  Building: a C compiler and musl.  The rest is for tests and lint.
RUN_PACKAGES   := python3 ca-certificates squashfs-tools erofs-utils skopeo umoci tar gzip bzip2 xz-utils zstd \
                  util-linux mount procps passwd
BUILD_PACKAGES := gcc libc6-dev linux-libc-dev musl-tools binutils python3-venv python3-dev findutils coreutils
# For the OpenSSH of containers: its source package is unpacked by dpkg-source, which patches it.
ifneq ($(WITH_SSHD),0)
BUILD_PACKAGES += dpkg-dev patch make libssl-dev zlib1g-dev libsodium-dev
endif
DEMO_PACKAGES  := mmdebstrap debian-archive-keyring iproute2
TEST_PACKAGES  := busybox-static strace fuse3 man-db bash-completion zsh fish clang libclang-rt-dev llvm clang-tidy cppcheck iproute2 libcap2-bin \
                  keyutils openssh-client openssh-server rsync screen tmux slurmctld slurmd slurm-client libslurm-dev munge \
                  mpich libmpich-dev openmpi-bin libopenmpi-dev python3-mpi4py
BENCH_PACKAGES := bubblewrap crun runc charliecloud squashfuse podman uidmap fuse-overlayfs slirp4netns \
                  openssh-server dropbear-bin

# apt-get runs only when something is missing.
define apt-install
	@missing=(); for p in $(1); do \
	  [[ $$(dpkg-query -W -f='$${db:Status-Status}' "$$p" 2>/dev/null) == installed ]] || missing+=("$$p"); done; \
	if (( $${#missing[@]} )); then \
	  command -v apt-get >/dev/null || { echo "deps: this needs Debian's apt-get; please install: $${missing[*]}" >&2; exit 1; }; \
	  [[ $$(id -u) == 0 ]] || { echo "deps: as root, please; missing: $${missing[*]}" >&2; exit 1; }; \
	  echo "deps: installing $${missing[*]}"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get -qq update; apt-get -qq install -y --no-install-recommends "$${missing[@]}" </dev/null >/dev/null; \
	fi
endef

# The virtual environment is made again when it belongs to another interpreter; pip runs only after a change.
define pip-install
	@umask 022; mkdir -p build; \
	if ! [[ -x $(VPY) && $$(readlink -f $(VPY)) == "$(PYREAL)" ]]; then rm -rf $(VENV); $(PYREAL) -m venv $(VENV); fi; \
	stamp=$(VENV)/.$(1); \
	if ! [[ $$stamp -nt pyproject.toml ]]; then \
	  echo "deps: Python packages ($(1))"; \
	  $(VPY) -I tools/requirements.py $(1) > build/requirements-$(1).txt; \
	  $(VPY) -I -m pip install -qq --disable-pip-version-check --no-input -r build/requirements-$(1).txt; \
	  touch $$stamp; \
	fi
endef

.PHONY: deps deps-build deps-demo deps-bench
deps: ## everything that building, running and testing needs
	$(call apt-install,$(RUN_PACKAGES) $(BUILD_PACKAGES) $(TEST_PACKAGES))
	$(call pip-install,runtime)
	$(call pip-install,dev)
	@$(MAKE) -s build/python-deps/.stamp
deps-build: ## what `make install` needs
	$(call apt-install,$(RUN_PACKAGES) $(BUILD_PACKAGES))
	$(call pip-install,runtime)
	@$(MAKE) -s build/python-deps/.stamp
deps-demo: deps-build
	$(call apt-install,$(DEMO_PACKAGES))
deps-bench: deps deps-demo
	$(call apt-install,$(BENCH_PACKAGES))
	$(call pip-install,bench)

$(VPY):
	$(call pip-install,runtime)

# The run-time dependencies, as they are installed beside the package.
build/python-deps/.stamp: pyproject.toml tools/requirements.py | $(VPY)
	@umask 022; rm -rf build/python-deps; mkdir -p build/python-deps; \
	$(VPY) -I tools/requirements.py runtime > build/requirements-runtime.txt; \
	$(VPY) -I -m pip install -qq --disable-pip-version-check --no-input --no-compile --target build/python-deps \
	  -r build/requirements-runtime.txt; \
	rm -rf build/python-deps/bin; touch $@

# --- build -----------------------------------------------------------------------------------------------------------
.PHONY: build FORCE
build: build/shifter build/udi-client build/udi-shell build/python/.stamp $(if $(filter-out 0,$(WITH_SSHD)),udiImage) \
  $(if $(filter-out 0,$(WITH_SLURM)),build/shifter_slurm.so)

FORCE:
# Both are written only when their content changes.
build/config.h build/_build.py: build/.stamp-config ;
build/.stamp-config: FORCE
	@umask 022; mkdir -p build; [[ -n "$(PYREAL)" ]] || { echo "no $(PYTHON): run make deps" >&2; exit 1; }
	@$(PYREAL) -I -B tools/stamp.py --prefix $(PREFIX) --libexec $(LIBEXEC) --conf $(CONF) --python $(PYREAL) build
build/options.h: shifter/options.py | $(VPY)
	@umask 022; $(VPY) -B -m shifter.options --c-header > $@.new && mv -f $@.new $@

# Linux's own headers are not on musl-gcc's path.  Static and not PIE: musl-gcc's -static-pie asks for a loader here.
MULTIARCH    = $(shell gcc -print-multiarch)
WARNINGS    := -std=c11 -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wvla -Werror
DOOR_CFLAGS  = $(WARNINGS) -O2 -fstack-protector-strong -fno-strict-aliasing -fno-delete-null-pointer-checks \
               -ffunction-sections -fdata-sections -Ibuild -Ishifter/door -idirafter /usr/include -idirafter /usr/include/$(MULTIARCH)
DOOR_LDFLAGS = -static -no-pie -Wl,-z,relro,-z,now,-z,noexecstack,-z,separate-code,--gc-sections
build/shifter: $(DOOR_SRC) $(DOOR_HDR) Makefile
	@umask 022; musl-gcc $(DOOR_CFLAGS) $(DOOR_LDFLAGS) -o $@.new $(DOOR_SRC)
	@if readelf -lW $@.new | grep -qE 'INTERP|DYNAMIC'; then echo "$@: not static" >&2; exit 1; fi
	@strip --strip-unneeded $@.new; mv -f $@.new $@
build/door-asan: $(DOOR_SRC) $(DOOR_HDR) Makefile
	@umask 022; gcc $(WARNINGS) -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
	  -Ibuild -Ishifter/door -o $@ $(DOOR_SRC)

# Of udiImage: who does the work of ssh, scp and sftp, and the shell of images that have none. No privilege.
build/udi-client build/udi-shell: build/udi-%: udiImage/%.c Makefile
	@umask 022; musl-gcc $(WARNINGS) -O2 -fstack-protector-strong -static -no-pie -Wl,-z,relro,-z,now,-z,noexecstack -o $@.new $<
	@strip --strip-unneeded $@.new; mv -f $@.new $@

# The SPANK plugin. Not linked with libslurm: its symbols come from the program of Slurm's that loads it.
build/shifter_slurm.so: slurm/shifter_slurm.c build/config.h Makefile
	@umask 022; gcc $(WARNINGS) -O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2 -fPIC -shared -Wl,-z,relro,-z,now,-z,noexecstack -Ibuild -o $@.new $<
	@strip --strip-unneeded $@.new; mv -f $@.new $@

# The door's parsing behind a pipe, for the tests that compare it with its Python specification.
build/door-driver: tests/door/driver.c shifter/door/message.c $(PARSE_SRC) $(DOOR_HDR) Makefile
	@umask 022; gcc $(WARNINGS) -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
	  -Ibuild -Ishifter/door -o $@ tests/door/driver.c shifter/door/message.c $(PARSE_SRC)

# The door's parsing under libFuzzer (tests/fuzz): one program, the name that it is started by says what is fuzzed; and the
# same again for the lines that a corpus reaches.
FUZZ_SRC     := $(sort $(wildcard tests/fuzz/*.c))
FUZZ_TARGETS := options request document reference environment
FUZZ_CFLAGS   = $(WARNINGS) -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all -include tests/fuzz/memory.h \
                -Ibuild -Ishifter/door -Itests/fuzz
FUZZ_DIR     ?= build/fuzz
FUZZ_DEPS     = $(FUZZ_SRC) $(wildcard tests/fuzz/*.h) $(PARSE_SRC) $(DOOR_HDR) Makefile
fuzz-build = mkdir -p $(@D); clang $(FUZZ_CFLAGS) $(1) -o $@ $(FUZZ_SRC) $(PARSE_SRC); for t in $(FUZZ_TARGETS); do ln -sf fuzzer $(@D)/$$t; done
$(FUZZ_DIR)/fuzzer: $(FUZZ_DEPS)
	@umask 022; $(call fuzz-build,-fsanitize=fuzzer -fsanitize=address -fsanitize=undefined)
$(FUZZ_DIR)/coverage/fuzzer: $(FUZZ_DEPS)
	@umask 022; $(call fuzz-build,-fsanitize=fuzzer -fsanitize=address -fprofile-instr-generate -fcoverage-mapping)

# Everything Python, as it will lie below LIBEXEC: root's, byte-compiled, checked against nothing at run time.
build/python/.stamp: $(PY_SRC) build/_build.py build/python-deps/.stamp tools/tree.py tools/bundle.py Makefile
	@umask 022; PYTHONNODEBUGRANGES=1 $(PYREAL) -B tools/tree.py --libexec $(LIBEXEC) --python $(PYREAL) build/python; touch $@

# The OpenSSH of containers. Built once: what is there from the same source package, flags and compiler is kept.
.PHONY: udiImage udiImage-update
udiImage: ## build/udi-image/tree
	@umask 022; $(PYREAL) -B tools/udi_image.py build
udiImage-update: ## the same from the distribution's newest source package
	@umask 022; $(PYREAL) -B tools/udi_image.py fetch
	@$(MAKE) -s udiImage

# --- install ---------------------------------------------------------------------------------------------------------
D = $(DESTDIR)
INSTALL := install -o 0 -g 0
# Into place by rename: whoever runs or opens the old file keeps it.     $(call put,MODE,SOURCE,TARGET)
put = $(INSTALL) -m 0600 $(2) '$(3).new' && chmod $(1) '$(3).new' && mv -fT '$(3).new' '$(3)'
# Directories that are there stay as they are; those that are made are root's.
mkd = for d in $(1); do [ -d "$$d" ] || $(INSTALL) -d -m 0755 "$$d"; done

.PHONY: install uninstall stage
install: build
	@umask 022; set -e; [[ $$(id -u) == 0 ]] || { echo "install: as root, please (shifter is setuid root)" >&2; exit 1; }
	@umask 022; $(call mkd,$(D)$(PREFIX) $(D)$(PREFIX)/bin $(D)$(PREFIX)/sbin $(D)$(PREFIX)/libexec $(D)$(PREFIX)/libexec/shifter $(D)$(PREFIX)/share \
	  $(D)$(PREFIX)/share/man $(D)$(PREFIX)/share/bash-completion $(D)$(PREFIX)/share/bash-completion/completions \
	  $(D)$(PREFIX)/share/zsh $(D)$(PREFIX)/share/zsh/site-functions $(D)$(PREFIX)/share/fish $(D)$(PREFIX)/share/fish/vendor_completions.d \
	  $(D)$(PREFIX)/share/doc $(D)$(PREFIX)/share/doc/shifter $(D)$(PREFIX)/lib $(D)$(PREFIX)/lib/systemd $(D)$(PREFIX)/lib/systemd/system \
	  $(D)$(SYSCONFDIR) $(D)$(LOCALSTATEDIR)/lib/shifter $(D)$(LOCALSTATEDIR)/lib/shifter/images)
	@# 1. Python: a copy beside it, then two renames (one where the kernel can exchange).
	@umask 022; P='$(D)$(LIBEXEC)'; rm -rf "$$P.new" "$$P.old"; cp -R --no-preserve=all build/python "$$P.new"; rm -f "$$P.new/.stamp"; \
	chown -R 0:0 "$$P.new"; chmod -R u=rwX,go=rX "$$P.new"; chmod 0755 "$$P.new"; $(PYREAL) -I -B tools/swap.py "$$P.new" "$$P"
	@# 2. Commands: the door last, so that a new door finds its own Python.
	@umask 022; $(call put,0755,build/launchers/shifterctl,$(D)$(PREFIX)/bin/shifterctl)
	@umask 022; $(call put,0755,build/launchers/shifterimg,$(D)$(PREFIX)/bin/shifterimg)
	@umask 022; $(call put,0755,build/launchers/setupRoot,$(D)$(PREFIX)/sbin/setupRoot)
	@umask 022; $(call put,0755,build/launchers/unsetupRoot,$(D)$(PREFIX)/sbin/unsetupRoot)
	@umask 022; $(call put,0755,build/launchers/shifter-slurm-prolog,$(D)$(PREFIX)/sbin/shifter-slurm-prolog)
	@umask 022; $(call put,0755,build/launchers/shifter-slurm-epilog,$(D)$(PREFIX)/sbin/shifter-slurm-epilog)
	@umask 022; $(call put,4755,build/shifter,$(D)$(PREFIX)/bin/shifter)
	@# 3. Configuration: the example always, the file itself only where there is none.
	@umask 022; if [ -f udiRoot.conf.example ]; then \
	  $(call put,0644,udiRoot.conf.example,$(D)$(SYSCONFDIR)/udiRoot.conf.example); \
	  [ -e '$(D)$(CONF)' ] || { $(call put,0644,udiRoot.conf.example,$(D)$(CONF)); }; fi
	@# 4. Manual pages, completions, units.
	@umask 022; shopt -s nullglob; for f in man/*.[1-8]; do s=$${f##*.}; d='$(D)$(PREFIX)/share/man/man'$$s; $(call mkd,"$$d"); \
	  $(call put,0644,"$$f",'"$$d/$${f##*/}"'); done
	@umask 022; B='$(D)$(PREFIX)/share'; b=$$B/bash-completion/completions; \
	if [ -f completions/shifter.bash ]; then $(call put,0644,completions/shifter.bash,'"$$b/shifter"'); \
	  for c in shifterimg shifterctl setupRoot unsetupRoot; do ln -sfn shifter "$$b/$$c"; done; fi; \
	if [ -f completions/shifter.zsh ]; then $(call put,0644,completions/shifter.zsh,'"$$B/zsh/site-functions/_shifter"'); fi; \
	if [ -f completions/shifter.fish ]; then f=$$B/fish/vendor_completions.d; $(call put,0644,completions/shifter.fish,'"$$f/shifter.fish"'); \
	  for c in shifterimg shifterctl setupRoot unsetupRoot; do ln -sfn shifter.fish "$$f/$$c.fish"; done; fi
	@umask 022; shopt -s nullglob; for f in systemd/*.service systemd/*.timer; do \
	  sed 's|@PREFIX@|$(PREFIX)|g' $$f > build/$${f##*/}; $(call put,0644,build/$${f##*/},'"$(D)$(PREFIX)/lib/systemd/system/$${f##*/}"'); done
	@umask 022; $(call put,0644,LICENSE,$(D)$(PREFIX)/share/doc/shifter/LICENSE)
	@# 5. The OpenSSH of containers.
	@umask 022; [[ "$(WITH_SSHD)" == 0 ]] || $(PYREAL) -B tools/udi_image.py install '$(D)$(UDIIMAGE)'
	@# 6. What Slurm loads.
	@umask 022; $(call put,0644,slurm/job_submit.lua,$(D)$(PREFIX)/share/doc/shifter/job_submit.lua)
	@umask 022; [[ "$(WITH_SLURM)" == 0 ]] || { $(call mkd,$(D)$(PREFIX)/lib/shifter); \
	  $(call put,0755,slurm/slurm-task,$(D)$(PREFIX)/lib/shifter/slurm-task); \
  $(call put,0644,build/shifter_slurm.so,$(D)$(PREFIX)/lib/shifter/shifter_slurm.so); }
	@[[ -n "$(D)" ]] || echo "installed in $(PREFIX), configuration in $(CONF)"

uninstall: ## leaves udiRoot.conf, templates of udiImage that were edited, and the images
	@[[ $$(id -u) == 0 ]] || { echo "uninstall: as root, please" >&2; exit 1; }
	@if [[ -z "$(D)" && -x '$(PREFIX)/bin/shifterctl' ]]; then '$(PREFIX)/bin/shifterctl' gc --all || echo "uninstall: gc failed; going on" >&2; \
	  umount -l /run/shifter/store 2>/dev/null || true; umount -l /run/shifter 2>/dev/null || true; rmdir /run/shifter 2>/dev/null || true; fi
	@$(PYREAL) -B tools/udi_image.py uninstall '$(D)$(UDIIMAGE)'
	@cd '$(D)$(PREFIX)' 2>/dev/null || exit 0; \
	rm -f bin/shifter bin/shifterimg bin/shifterctl sbin/setupRoot sbin/unsetupRoot sbin/shifter-slurm-{prolog,epilog}; \
	rm -rf libexec/shifter/python share/doc/shifter lib/shifter; \
	rm -f share/man/man*/{shifter,shifterimg,shifterctl,setupRoot,unsetupRoot,udiRoot.conf,shifter-*}.[1-8]; \
	rm -f share/bash-completion/completions/{shifter,shifterimg,shifterctl,setupRoot,unsetupRoot} share/zsh/site-functions/_shifter \
	  share/fish/vendor_completions.d/{shifter,shifterimg,shifterctl,setupRoot,unsetupRoot}.fish lib/systemd/system/shifter-gc.{service,timer}; \
	find . -depth -mindepth 1 -type d -empty -delete; cd /; rmdir '$(D)$(PREFIX)' 2>/dev/null || true
	@rm -f '$(D)$(SYSCONFDIR)/udiRoot.conf.example'; rmdir '$(D)$(SYSCONFDIR)' 2>/dev/null || true
	@[[ $$(ls -A '$(D)$(LOCALSTATEDIR)/lib/shifter/images' 2>/dev/null) != .lock ]] || rm '$(D)$(LOCALSTATEDIR)/lib/shifter/images/.lock'
	@rmdir '$(D)$(LOCALSTATEDIR)/lib/shifter/images' '$(D)$(LOCALSTATEDIR)/lib/shifter' 2>/dev/null || true

# The installation that tests mount at /opt/shifter of a virtual node.
stage:
	@$(MAKE) -s install DESTDIR=$(CURDIR)/build/stage PREFIX=/opt/shifter SYSCONFDIR=/etc/shifter LOCALSTATEDIR=/var

# --- test, lint, measure ---------------------------------------------------------------------------------------------
.PHONY: test soak mutants lint fuzz fuzz-merge fuzz-coverage bench demo demo-clean clean help
PYTEST     = $(VPY) -B -m pytest
# Each test has nodes of its own, so several can run at once.
PYTEST_ARGS ?= -n auto --dist worksteal
test: deps
	@$(MAKE) -s stage build/door-asan build/door-driver build/fuzz/fuzzer build/fuzz/coverage/fuzzer
	@$(PYTEST) -q $(PYTEST_ARGS)
soak: deps ## the tests marked soak with large numbers, and a report in docs/soak/
	@$(MAKE) -s stage build/door-driver build/fuzz/fuzzer build/fuzz/coverage/fuzzer
	@status=0; SHIFTER_SOAK=1 $(PYTEST) -q -m soak $(PYTEST_ARGS) || status=$$?; $(VPY) -I -B tools/soak_report.py; exit $$status
MUTANTS ?=
mutants: deps ## each check that docs/security.md names is taken away, one by one: a test must notice (tools/mutants.py)
	@$(VPY) -B tools/mutants.py $(MUTANTS)

LINT_SRC   := $(DOOR_SRC) $(sort $(wildcard udiImage/*.c slurm/*.c))
lint: deps build/options.h build/config.h
	$(VPY) -m ruff format --check --quiet .
	$(VPY) -m ruff check .
	$(VPY) -m mypy
	@if [[ -n "$(DOOR_SRC)" ]]; then set -x; \
	cppcheck --quiet --error-exitcode=1 --std=c11 --enable=warning,performance,portability --inline-suppr \
	  --suppress=missingIncludeSystem '-D_Noreturn=__attribute__((noreturn))' '-DSPANK_PLUGIN(name,version)=' -Ibuild -Ishifter/door $(LINT_SRC); \
	clang-tidy --quiet $(LINT_SRC) -- -std=c11 -Ibuild -Ishifter/door 2>/dev/null; \
	for file in $(LINT_SRC); do gcc $(WARNINGS) -O2 -fanalyzer -Ibuild -Ishifter/door -c -o /dev/null $$file; done; fi

FUZZ_RUNS    ?= 1000000
FUZZ_SECONDS ?= 0
fuzz: deps ## FUZZ_RUNS inputs, or FUZZ_SECONDS for each target; new ones are collected in build/fuzz/new
	@$(MAKE) -s build/fuzz/fuzzer build/fuzz/coverage/fuzzer
	@$(VPY) -B tests/fuzz/run.py fuzz --runs $(FUZZ_RUNS) --seconds $(FUZZ_SECONDS)
fuzz-merge: deps ## tests/fuzz/corpus becomes the smallest set of inputs that reaches all that any of them reaches
	@$(MAKE) -s build/fuzz/fuzzer build/fuzz/coverage/fuzzer
	@$(VPY) -B tests/fuzz/run.py merge
fuzz-coverage: deps ## the lines of the door's parsing that the corpus reaches, and those that it does not
	@$(MAKE) -s build/fuzz/fuzzer build/fuzz/coverage/fuzzer
	@$(VPY) -B tests/fuzz/run.py coverage

bench: deps-bench
	@$(VPY) -B benchmarks/launch.py $(BENCH_ARGS)
	@$(VPY) -B benchmarks/files.py $(BENCH_ARGS)
	@$(VPY) -B benchmarks/ssh.py
	@$(VPY) -B benchmarks/slurm.py

demo: deps-demo
	@$(MAKE) -s install
	@PREFIX=$(PREFIX) CONF=$(CONF) bash docs/demo-first-steps.sh
ifneq ($(WITH_SSHD),0)
	@PREFIX=$(PREFIX) bash docs/demo-ssh.sh
endif
demo-clean:
	@PREFIX=$(PREFIX) CONF=$(CONF) bash docs/demo-first-steps.sh --clean
	@$(MAKE) -s uninstall

clean:
	rm -rf build
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

help:
	@echo 'make demo | install | uninstall | udiImage-update | test | soak | mutants | lint | fuzz | fuzz-coverage | bench | demo-clean | clean'
	@echo 'variables: PREFIX=$(PREFIX) SYSCONFDIR=$(SYSCONFDIR) DESTDIR= PYTHON=$(PYTHON) WITH_SSHD=$(WITH_SSHD) WITH_SLURM=$(WITH_SLURM) PYTEST_ARGS= FUZZ_RUNS=$(FUZZ_RUNS) FUZZ_SECONDS='
