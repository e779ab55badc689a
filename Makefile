# One command each; CI runs the same ones.
VENV := .venv
PY := $(VENV)/bin/python
PROTOS := $(shell find protos -name '*.proto' | sort)

.PHONY: setup generate check test test-e2e test-engine test-crashes test-images test-registries test-cli test-network test-contracts test-kernel test-shims test-unit test-vm test-vm-drivers test-vm-network test-vm-cgroups test-vm-few test-vm-systemd test-vm-power test-boxed oom-rounds oom-rounds-vm demo bench crash-test clean

# Installs what is needed by name and creates .venv; running it again changes nothing.
setup:
	@./setup.sh

generate: setup
	@$(PY) protos/generate.py
	@$(PY) cli/generate_sync.py

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) protos/generate.py --check
	$(PY) cli/generate_sync.py --check

# In parts, side by side: most tests wait for the kernel, or for a time to pass. The longest come first, so that the last
# ones end together; and soon the one that waits for nothing, which alone would leave all processors but one idle.
PARTS := images cli crashes network contracts unit shims kernel e2e lives registries engine
test: setup
	@$(MAKE) --no-print-directory --keep-going --jobs=$(JOBS) --output-sync=target $(PARTS:%=test-%)
JOBS := 5

COMMANDS := $(wildcard tests/e2e/test_cli_*.py)
CRASHES := tests/e2e/test_failpoints.py tests/e2e/test_engine_recovery.py tests/e2e/test_storm.py
ENGINE := $(filter-out $(CRASHES),$(wildcard tests/e2e/test_engine_*.py))
LIVES := $(wildcard tests/e2e/test_daemon_*.py tests/e2e/test_upgrade*.py tests/e2e/test_s*.py) tests/e2e/test_full_disk.py
LIVES := $(filter-out $(CRASHES),$(LIVES))
test-e2e:
	$(PY) -m pytest $(filter-out $(COMMANDS) $(CRASHES) $(ENGINE) $(LIVES),$(wildcard tests/e2e/test_*.py)) $(PYTEST_ARGS)
test-lives:
	$(PY) -m pytest $(LIVES) $(PYTEST_ARGS)
test-engine:
	$(PY) -m pytest $(ENGINE) $(PYTEST_ARGS)
test-crashes:
	$(PY) -m pytest $(CRASHES) $(PYTEST_ARGS)
test-cli:
	$(PY) -m pytest $(COMMANDS) $(PYTEST_ARGS)
IMAGES := $(wildcard tests/contracts/test_images_*.py)
REGISTRIES := $(wildcard tests/contracts/test_images_registry_*.py tests/contracts/test_images_policy*.py)
NETWORK := $(wildcard tests/contracts/test_network_*.py)
test-images:
	$(PY) -m pytest $(filter-out $(REGISTRIES),$(IMAGES)) $(PYTEST_ARGS)
test-registries:
	$(PY) -m pytest $(REGISTRIES) $(PYTEST_ARGS)
test-network:
	$(PY) -m pytest $(NETWORK) $(PYTEST_ARGS)
test-contracts:
	$(PY) -m pytest $(filter-out $(IMAGES) $(NETWORK),$(wildcard tests/contracts/test_*.py)) $(PYTEST_ARGS)
SHIMS := $(wildcard tests/kernel/test_shim_*.py tests/kernel/test_attack_*.py) tests/kernel/test_zygote.py
test-shims:
	$(PY) -m pytest $(SHIMS) $(PYTEST_ARGS)
test-kernel:
	$(PY) -m pytest $(filter-out $(SHIMS),$(wildcard tests/kernel/test_*.py)) $(PYTEST_ARGS)
test-unit:
	$(PY) -m pytest tests/unit $(PYTEST_ARGS)

# What depends on the kernel, on Debian's own: cgroup v2 alone, device mapper, quotas on every file system. Some minutes
# where there is KVM; emulated, most of an hour. Skipped, with the reason, where there can be no virtual machine.
VM := $(PY) tests/vm/run.py
IN_VM := -- $(PY) -m pytest -p no:cacheprovider --timeout=1200 -o faulthandler_timeout=1100 $(PYTEST_ARGS)
VM_DRIVERS := tests/vm/test_thin_pool.py $(wildcard tests/contracts/test_snapshotter_*.py)
VM_CGROUPS := tests/contracts/test_cgroup_contract.py tests/contracts/test_cgroup_limits.py tests/contracts/test_cgroups_engine_limits.py tests/contracts/test_cgroup_pressure.py tests/e2e/test_oom_reports.py
VM_FEW := more_memory_than or made_is_counted or fork_beyond or only_allowed_devices or rules_can_be_changed or only_on_the_cpus
VM_SYSTEMD := tests/kernel/test_systemd_cgroup.py tests/kernel/test_oci_oom.py tests/e2e/test_systemd_driver.py
test-vm: test-vm-drivers test-vm-network test-vm-cgroups test-vm-systemd test-vm-power
test-vm-drivers: setup
	$(VM) --timeout 7200 $(IN_VM) $(VM_DRIVERS) -k 'thin_pool or devicemapper or projects or quotas' || [ $$? -eq 77 ]
test-vm-network: setup
	$(VM) --timeout 3600 $(IN_VM) tests/contracts/test_network_drivers.py -k vlan || [ $$? -eq 77 ]
test-vm-cgroups: setup
	$(VM) --timeout 3600 $(IN_VM) $(VM_CGROUPS) || [ $$? -eq 77 ]
# The part of it that CI has time for, emulated.
test-vm-few: setup
	$(VM) --timeout 1200 $(IN_VM) tests/contracts/test_cgroup_limits.py -k '$(VM_FEW)' || [ $$? -eq 77 ]
test-vm-systemd: setup
	$(VM) --timeout 3600 --systemd $(IN_VM) $(VM_SYSTEMD) || [ $$? -eq 77 ]
# Under a systemd in namespaces of this host, with its cgroups, which may be v1: a minute or two.
BOXED := $(PY) tests/vm/boxed.py --
test-boxed: setup
	$(BOXED) $(PY) -m pytest -p no:cacheprovider $(PYTEST_ARGS) tests/e2e/test_systemd_driver.py || [ $$? -eq 77 ]
# A hundred times each: who ran out of memory is told right.
oom-rounds: setup
	$(PY) tests/vm/oom_rounds.py
	$(BOXED) $(PY) tests/vm/oom_rounds.py --driver systemd || [ $$? -eq 77 ]
# Likewise on cgroup v2, under the systemd of a virtual machine: emulated, an hour.
oom-rounds-vm: setup
	$(VM) --timeout 7200 --systemd -- $(PY) tests/vm/oom_rounds.py --driver systemd --at-once 2 || [ $$? -eq 77 ]
test-vm-power: setup
	$(PY) tests/vm/power_loss.py || [ $$? -eq 77 ]

demo: setup
	@$(PY) tests/e2e/demo.py

bench: setup
	@$(PY) -m corral.runtime.launcher .venv/bin/corral-oci    # what it reads is out of date once a source was changed
	@$(PY) tests/bench/bench.py

crash-test: setup
	@$(PY) tests/e2e/crash_test.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
