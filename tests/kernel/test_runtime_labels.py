"""Labels of security modules: given where the kernel has them, refused by name where not."""

import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import labels
from corral.kernel.namespaces import Kind
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.spec import Hook, Hooks, IdMapping, Namespace, Root

pytestmark = needs("root", "overlayfs", "busybox")

without_apparmor = pytest.mark.skipif(labels.has_apparmor(), reason="needs a kernel without AppArmor")
without_selinux = pytest.mark.skipif(labels.has_selinux(), reason="needs a kernel without SELinux")
LABEL = "system_u:system_r:container_t:s0:c1,c2"
CURRENT = "cat /proc/self/attr/current"


@without_apparmor
def test_a_profile_without_apparmor_is_refused(lab):
    """What was to be confined must not run without."""
    with pytest.raises(ValueError, match=r"^process\.apparmorProfile: this kernel has no AppArmor"):
        lab.create(lab.spec("true", apparmor_profile="docker-default"))
    container = lab.create(lab.spec("sleep", "60"))
    container.start()
    with pytest.raises(ValueError, match=r"^process\.apparmorProfile: "):
        lab.exec(container, "true", apparmor_profile="docker-default")


@without_selinux
def test_a_label_without_selinux_is_refused(lab):
    with pytest.raises(ValueError, match=r"^process\.selinuxLabel: this kernel has no SELinux"):
        lab.create(lab.spec("true", selinux_label=LABEL))
    with pytest.raises(ValueError, match=r"^linux\.mountLabel: this kernel has no SELinux"):
        lab.create(lab.spec("true", linux={"mount_label": LABEL}))


@pytest.fixture
def profile(tmp_path: Path) -> Iterator[str]:
    """A loaded profile that forbids one thing."""
    name = f"corral-test-{secrets.token_hex(4)}"
    file = tmp_path / "profile"
    file.write_text(
        f"profile {name} flags=(attach_disconnected) {{ file, capability, signal, ptrace, deny /tmp/forbidden w, }}\n"
    )
    subprocess.run(["apparmor_parser", "-K", "-r", str(file)], check=True)
    yield name
    subprocess.run(["apparmor_parser", "-R", str(file)], check=True)


@needs("apparmor")
class TestAppArmor:
    @pytest.mark.parametrize("no_new_privileges", [True, False])
    def test_confines_the_program(self, lab, profile, no_new_privileges):
        script = f"{CURRENT}; echo x > /tmp/forbidden; echo x > /tmp/fine && echo fine"
        output = lab.run(script, apparmor_profile=profile, no_new_privileges=no_new_privileges).output
        assert output.startswith(f"{profile} (enforce)")
        assert "/tmp/forbidden: Permission denied" in output
        assert output.endswith("fine\n")

    def test_confines_a_process_that_joins(self, lab, profile):
        container = lab.create(lab.spec("sleep", "60"))
        container.start()
        assert lab.exec(container, CURRENT, apparmor_profile=profile).output.startswith(f"{profile} (enforce)")

    def test_confines_the_program_in_a_user_namespace(self, lab, profile):
        spec = lab.spec(CURRENT, apparmor_profile=profile)
        mapping = (IdMapping(0, 100_000, 65536),)
        kinds = (*spec.linux.namespaces, Namespace(Kind.USER))
        linux = replace(spec.linux, namespaces=kinds, uid_mappings=mapping, gid_mappings=mapping)
        assert lab.run_spec(replace(spec, linux=linux)).output.startswith(f"{profile} (enforce)")

    def test_confines_hooks_of_the_container_and_not_those_of_the_host(self, lab, profile, tmp_path):
        hook = tmp_path / "hook"
        hook.write_text(f"#!/bin/sh\n{CURRENT} > {tmp_path}/label\n")
        hook.chmod(0o755)
        inside = Hook("/bin/busybox", ("busybox", "sh", "-c", f"busybox {CURRENT} > /tmp/label"))
        hooks = Hooks(create_container=(Hook(str(hook)),), start_container=(inside,))
        (lab.directory / "bundle/rootfs").mkdir()
        lab.run_spec(lab.spec("true", apparmor_profile=profile, hooks=hooks, root=Root("rootfs")))
        assert not (tmp_path / "label").read_text().startswith(profile)
        assert (lab.upper / "tmp/label").read_text().startswith(profile)

    def test_without_the_profile_the_container_is_refused(self, lab):
        with pytest.raises(ExecFailed, match=r"^process\.apparmorProfile: .*corral-none") as failed:
            lab.create(lab.spec("true", apparmor_profile="corral-none"))
        assert failed.value.kind == SETUP
