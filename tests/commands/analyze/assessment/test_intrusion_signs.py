"""Signs of an intrusion on findings as real scanners write them."""

import pytest

from commands.analyze.assessment.intrusion_signs import SIGNS, signs_of
from datamodules.records import Finding

PRELOAD, SUID, PORT, GONE, MODULE = SIGNS


@pytest.mark.parametrize(
    ("title", "category", "metadata", "expected"),
    [
        ("Suspicious LD_PRELOAD", "ioc", {"env": "LD_PRELOAD", "value": "/tmp/inject.so"}, [PRELOAD]),
        ("Entry in /etc/ld.so.preload", "ioc", {}, [PRELOAD]),
        ("SUID/SGID binary", "suid_sgid", {"path": "/var/tmp/.cache/bash"}, [SUID]),
        ("SUID /usr/bin/bash", "suid", {"path": "/usr/bin/bash"}, [SUID]),
        ("Unexpected SUID copy", "ioc", {"path": "/opt/.x/.bash-5", "mode": "4755"}, [SUID]),
        ("SUID/SGID binary", "suid_sgid", {"path": "/usr/bin/passwd"}, []),
        ("SUID /usr/bin/pppd", "suid", {"path": "/usr/bin/pppd", "suid": "true"}, []),
        ("SUID/SGID binary", "suid", {"path": "/usr/bin/ssh-agent"}, []),
        ("SUID/SGID binary", "suid", {"path": "/usr/bin/chsh"}, []),
        ("TCP 4444 listening", "network", {"state": "LISTEN", "port": "4444"}, [PORT]),
        ("Listening TCP service", "network", {"port": 8443, "process": "nc"}, [PORT]),
        ("TCP 22 listening", "network", {"state": "LISTEN", "port": 22, "process": "sshd"}, []),
        ("Open port 443", "network", {"port": 443, "inode": 44441}, []),
        ("Connection", "network", {"state": "ESTABLISHED", "port": 4444}, []),
        ("Deleted binary executing", "ioc", {"deleted": "true", "path": "/tmp/evil"}, [GONE]),
        ("Process IOC Detected", "ioc", {"world_writable_executable": "true"}, [GONE]),
        ("Process", "processes", {"command": "/dev/shm/x -d"}, [GONE]),
        ("Process", "processes", {"command": "/usr/sbin/sshd -D"}, []),
        ("Hidden kernel module", "modules", {"module": "diamorphine"}, [MODULE]),
        ("Module vfio_pci", "modules", {}, []),
    ],
)  # fmt: skip
def test_signs_are_recognised(title, category, metadata, expected):
    assert signs_of(Finding("f1", title, "", category, "high", 70.0, 70.0, metadata)) == expected


def test_an_info_module_is_no_sign():
    assert signs_of(Finding("m", "Hidden kernel module", "", "modules", "info", 1.0, 1.0, {})) == []
