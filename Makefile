# `make demo` and `make test` do all of the set-up themselves. Nothing is fetched but Debian and Python packages, through the
# machine's own apt and pip settings.

# Debian's own Python: python3-libvirt is built for it.
PYTHON := /usr/bin/python3
VENV := .venv
PACKAGES := python3 python3-venv python3-libvirt mmdebstrap debian-archive-keyring e2fsprogs fdisk iproute2 mount util-linux cpio mtools \
	zstd openssh-client qemu-utils nftables mandoc

.PHONY: demo demo-fleet test soak test-quick bench-peers picture lint format check-golden references man docs dist deb doctor setup clean

DEMO := $(VENV)/bin/nohype demo $(if $(KEEP),--keep) --report build/demo/report.json

# 3: the lab was lost, which says nothing about any proof; once more, in a new one
demo: setup
	@$(DEMO) || { [ $$? = 3 ] && echo "the lab was lost (see above): trying once more in a new lab" \
	  && $(VENV)/bin/nohype lab down demo && $(DEMO); }

DEMO_FLEET := $(VENV)/bin/nohype demo --fleet --report build/demo/fleet.json

# two labs as the hosts of a fleet (docs/lab.md); a lost lab as above
demo-fleet: setup
	@$(DEMO_FLEET) || { [ $$? = 3 ] && echo "a lab was lost (see above): trying once more in new labs" && $(DEMO_FLEET); }

# all tests but the long ones; those of the lab write to build/lab-tests.log meanwhile
test: setup $(VENV)/browser
	@$(PYTHON) tests/run_all.py $(VENV)/bin/pytest $(VENV)/bin/nohype

# the long tests, most of them of the lab, then 200 guests beside other load (2 h)
soak: setup
	$(VENV)/bin/pytest -m soak tests
	$(VENV)/bin/python benchmarks/lab_soak.py 200

# the tests that need neither the lab nor running daemons
test-quick: setup
	$(VENV)/bin/pytest -n 2 -m "not lab and not soak" tests/unit tests/contract

# a guest of the manager next to guests of virt-install, Nova and KubeVirt, in a lab (docs/peers.md; 20 min)
bench-peers: setup
	$(VENV)/bin/pip install -q -e '.[bench]'
	$(VENV)/bin/python benchmarks/peers.py --table build/benchmarks/peers.md --plot build/benchmarks/peers.png

# docs/host.svg, of the fake host of the tests
picture: setup
	$(VENV)/bin/python benchmarks/picture.py

# style, types and spelling; part of `make test` too
lint: setup
	$(VENV)/bin/pytest -q tests/unit/test_linters.py tests/unit/test_architecture.py

format: setup
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

# writes the golden files (tests/data/domains) and the reference pages again and shows what differs from the committed ones
check-golden: setup
	REGENERATE=1 $(VENV)/bin/pytest -q tests/unit/test_domain.py tests/unit/test_references.py
	git diff --exit-code -- tests/data/domains docs

# docs/cli.md, docs/configuration.md and docs/errors.md, from the parser, the models and the error classes
references: setup
	$(VENV)/bin/python -m release.pages

# build/man: nohype(1) and a page for each command, nohyped(8), nohype.toml(5); read one with `man -l`
man: setup
	$(VENV)/bin/python -m release.manpages build/man

# build/docs: searchable pages; a dead link or anchor is an error. Open build/docs/index.html, which needs no server
docs: setup
	$(VENV)/bin/sphinx-build -q -W --keep-going -c docs . build/docs

# build/dist: wheel and sdist of the tracked files
dist: setup
	$(VENV)/bin/python -m release.dist build/dist

# build/deb: a package for Debian 13, with the Python packages that it needs (docs/releasing.md)
deb: setup
	$(VENV)/bin/python -m release.deb build/deb

# the checks of a server as one file, which needs only Python (docs/doctor.md)
doctor:
	$(PYTHON) -m orchestrator.doctor.bundle build/nohype-doctor.pyz

setup: $(VENV)/installed

# for the tests of the web page, which are skipped without it
$(VENV)/browser: | $(VENV)/installed
	@dpkg -s chromium chromium-driver >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; } \
	  || echo "chromium cannot be installed: the tests of the web page are skipped" >&2
	@touch $@

$(VENV)/installed: setup.cfg
	@missing=$$(for package in $(PACKAGES); do dpkg -s $$package >/dev/null 2>&1 || echo $$package; done); \
	if [ -n "$$missing" ]; then \
		echo "installing with apt:" $$missing; \
		[ "$$(id -u)" = 0 ] || { echo "this needs root: run make as root, or install them yourself" >&2; exit 1; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	fi
	@echo "making $(VENV) with the Python packages of setup.cfg"
	@$(PYTHON) -m venv --system-site-packages $(VENV)
	@$(VENV)/bin/pip install -q -e '.[lab,test]'
	@touch $@

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
