"""Writes what was drawn for one shard as findings: names, numbers, texts and metadata that show the grounds.

Where which ground shows is told in :mod:`datamodules.synthetic.labeling_rules`; titles and names are drawn apart from
all of them. A free number is used in slices (``row.a``, ``row.a // 64``, ...), so that one draw serves several choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from datamodules.records import CATEGORIES
from datamodules.synthetic.labeling_rules import RATIONALE_FROM, TABLES, WORDS, Grounds, base_score, rationale_of
from datamodules.synthetic.sampling import GROUNDS, TARGETS, Row

Shown = tuple[str, str, dict[str, Any]]  #: title, description without the evidence, metadata
_MODES = ("4755", "2755", "6755", "4711")
_PREFIXES = ("proc", "net", "kernel", "module", "world_writable", "suid", "ioc", "mac", "dns", "endpoint")


def _pick(table: str, number: int) -> Any:
    values = TABLES[table]
    return values[number % len(values)]


def _title(category: str, row: Row) -> str:
    titles: list[str] = TABLES["titles"][category]
    return titles[row.c // 4096 % len(titles)]


def _user(key: str, row: Row, grounds: Grounds) -> str:
    users: list[str] = TABLES["users"][key]
    return "root" if grounds.privileged else users[row.c % len(users)]


def _file(place: int) -> str:
    return f"{_pick('stems', place >> 8)}-{place >> 13 & 0xFFF:x}"


def _path(exposed: int, place: int) -> str:
    """A path for a place, in an open directory or in one that only its owner writes."""
    return f"{_pick('open_directories' if exposed else 'directories', place)}/{_file(place)}"


def _host(pattern: str, row: Row) -> str:
    return pattern.replace("{octet}", str(row.b // 8 % 32)).replace("{number}", str(1 + row.b // 256 % 254))


def _remote(row: Row, grounds: Grounds) -> str:
    return _host(_pick("open_hosts", row.b) if grounds.exposed else "10.0.{octet}.{number}", row)


def _listen(row: Row, grounds: Grounds, port: int) -> str:
    return f"{_host(_pick('open_addresses' if grounds.exposed else 'inner_addresses', row.b), row)}:{port}"


def _arguments(row: Row, name: str) -> str:
    if row.hostile:
        return str(_pick("hostile", row.b))
    text = str(_pick("arguments", row.b)).replace("{name}", name)
    return text.replace("{number}", str(row.b // 16 % 9000)).replace("{few}", str(1 + row.b // 16 % 16))


def _process(row: Row, grounds: Grounds) -> Shown:
    name = _pick("processes", row.a)
    directory = _pick("open_directories" if grounds.exposed else "directories", row.a // 64)
    metadata = {
        "pid": row.pid, "ppid": 1 + row.a // 4096 % 4000,
        "command": f"{directory}/{name} {_arguments(row, name)}".rstrip(), "user": _user("user", row, grounds),
    }  # fmt: skip
    return f"Running process: {name}", f"Process {name} runs with PID {row.pid}", metadata


def _network(row: Row, grounds: Grounds) -> Shown:
    port, name = _pick("ports", row.a), _pick("processes", row.a // 64)
    protocol = "udp" if row.a // 4096 % 5 == 0 else "tcp"
    title = f"Open port {port}" if row.c // 4096 % 3 == 0 else f"Listening {protocol.upper()} service"
    metadata = {
        "port": port, "protocol": protocol, "local_address": _listen(row, grounds, port), "process": name,
        "pid": row.pid, "user": _user("user", row, grounds),
    }  # fmt: skip
    return title, f"Port {port}/{protocol} is open and {name} holds it", metadata


def _protects(row: Row, grounds: Grounds) -> int:
    """What a kernel parameter protects (1..3): its evidence where it is weak, any where it is as desired."""
    return grounds.evidence or 1 + row.c // 64 % 3


def _kernel(row: Row, grounds: Grounds) -> Shown:
    parameters = TABLES["kernel"][_protects(row, grounds)]
    name, desired, weak = parameters[row.a % len(parameters)]
    current = weak[row.a // 64 % len(weak)] if grounds.evidence else desired
    metadata = {
        "current": str(current), "desired": str(desired), "set_by": _user("set_by", row, grounds), "pid": row.pid,
        "path": f"/etc/sysctl.d/{10 + row.place % 90}-{_file(row.place)}.conf", "listen": _listen(row, grounds, 22),
    }  # fmt: skip
    return name, f"Kernel parameter {name} is {current}", metadata


def _module(row: Row, grounds: Grounds) -> Shown:
    name = _pick("modules", row.a)
    kernel = f"/lib/modules/6.{row.b % 16}.{row.b // 16 % 90}"
    metadata = {
        "size": 4096 * (1 + row.a // 64 % 400), "pid": row.pid, "loaded_by": _user("loaded_by", row, grounds),
        "path": f"{_pick('open_directories', row.b) if grounds.exposed else kernel}/{name}.ko",
    }  # fmt: skip
    return f"Module {name}", f"Kernel module {name} is loaded", metadata


def _world_writable(row: Row, grounds: Grounds) -> Shown:
    path = _path(grounds.exposed, row.place)
    metadata = {"path": path, "mode": "0777" if row.a & 1 else "0666", "owner": _user("owner", row, grounds)}
    return _title("world_writable", row), f"Anyone may write {_file(row.place)}", metadata


def _suid(row: Row, grounds: Grounds) -> Shown:
    path = _path(grounds.exposed, row.place)
    metadata = {"path": path, "mode": _MODES[row.a & 3], "owner": _user("owner", row, grounds)}
    return _title("suid", row), f"{_file(row.place)} runs with its owner's rights", metadata


def _ioc(row: Row, grounds: Grounds) -> Shown:
    name = _file(row.place)
    metadata = {
        "path": _path(grounds.exposed, row.place), "arguments": _arguments(row, name),
        "pid": str(row.pid), "user": _user("user", row, grounds),  # a string, as the archive has it here
    }  # fmt: skip
    return _title("ioc", row), f"{name} was checked against the indicators", metadata


def _mac(row: Row, grounds: Grounds) -> Shown:
    name = _file(row.place)
    metadata = {
        "path": _path(0, row.place), "denials": row.a // 64 % 400, "user": _user("user", row, grounds),
        "listen": _listen(row, grounds, _pick("ports", row.a)),
    }  # fmt: skip
    return _title("mac", row), f"The confinement of daemon {name} was checked", metadata


def _dns(row: Row, grounds: Grounds) -> Shown:
    domain = f"{_pick('labels', row.a)}{row.a // 16 % 500}.{_pick('zones', row.a // 8192)}"
    metadata = {
        "domain": domain, "query_type": _pick("query_types", row.c // 64), "resolver": _remote(row, grounds),
        "pid": row.pid, "user": _user("user", row, grounds),
    }  # fmt: skip
    return f"DNS activity: {domain}", f"A client asked for {domain}", metadata


def _endpoint(row: Row, grounds: Grounds) -> Shown:
    account, host = f"user{1000 + row.a % 400}", f"host-{row.a // 65536 % 90}"
    metadata = {
        "account": account, "role": _pick("roles", row.a // 512), "activity": _pick("activities", row.a // 4096),
        "host": host, "user": _user("user", row, grounds), "source": _remote(row, grounds),
    }  # fmt: skip
    return f"Endpoint behavior anomaly for {account}", f"{account} worked on {host}", metadata


_SHOW: tuple[Callable[[Row, Grounds], Shown], ...] = (
    _process, _network, _kernel, _module, _world_writable, _suid, _ioc, _mac, _dns, _endpoint,
)  # fmt: skip  # in the order of CATEGORIES


def write_findings(rows: list[Row], shard: int, *, processed_at: str, whole_numbers: bool) -> Iterator[dict[str, Any]]:
    """The findings of a shard as the archive writes them, in drawn order, null fields left out.

    Args:
        rows: what :func:`datamodules.synthetic.sampling.draw_rows` gave.
        shard: number of the shard, part of each id.
        processed_at: the generator's own time stamp.
        whole_numbers: risk scores as integers (``ground_truth_v1``) instead of floats.
    """
    for row in rows:
        category, grounds, targets = CATEGORIES[row.category], GROUNDS[row.grounds], TARGETS[row.grounds]
        title, intro, metadata = _SHOW[row.category](row, grounds)
        step = _protects(row, grounds) if category == "kernel_params" else grounds.evidence
        sentence = WORDS[category][step][grounds.wording]
        mitigations = TABLES["mitigations"][category]
        metadata["mitigation"] = mitigations[row.c // 32 % len(mitigations)] if grounds.mitigated else "none"
        if row.seen >= 0:
            metadata["seen_scans"] = row.seen
        impact, exposure, anomaly, confidence, probability = row.hundredths
        finding = {
            "id": f"{_PREFIXES[row.category]}_{shard:04x}{row.number:04x}",
            "title": title,
            "severity": targets.severity,
            "risk_score": row.risk if whole_numbers else float(row.risk),
            "base_severity_score": base_score(grounds),
            "description": f"{intro}. {sentence}.",
            "metadata": metadata,
            "operational_error": False,
            "category": category,
            "tags": list(targets.tags),
            "risk_subscores": {
                "impact": impact / 100,
                "exposure": exposure / 100,
                "anomaly": anomaly / 100,
                "confidence": confidence / 100,
            },
            "correlation_refs": [],
            "baseline_status": "unknown" if row.seen < 0 else "existing" if row.seen else "new",
            "severity_source": "raw",
            "probability_actionable": probability / 100,
            "risk_total": row.risk,
            "_processed_at": processed_at,
            "_data_quality": 1.0,
        }
        if targets.score >= RATIONALE_FROM:
            finding["rationale"] = rationale_of(sentence, grounds)
        yield finding
