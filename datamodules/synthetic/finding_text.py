"""Writes the sampled values of one shard as findings, with names, numbers, texts and metadata that show the features.

:mod:`datamodules.synthetic.labeling_rules` lists the field that shows each feature. Titles and names are chosen
independently of the features. Parts of one random number (``sample.a``, ``sample.a // 64``, ...) make several choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from datamodules.records import CATEGORIES
from datamodules.synthetic.labeling_rules import RATIONALE_FROM, TABLES, WORDS, Features, base_score, rationale_of
from datamodules.synthetic.sampling import FEATURES, LABELS, SampledFinding

FindingText = tuple[str, str, dict[str, Any]]  #: title, description without the evidence, metadata
_MODES = ("4755", "2755", "6755", "4711")
_PREFIXES = ("proc", "net", "kernel", "module", "world_writable", "suid", "ioc", "mac", "dns", "endpoint")


def _pick(table: str, number: int) -> Any:
    values = TABLES[table]
    return values[number % len(values)]


def _title(category: str, sample: SampledFinding) -> str:
    titles: list[str] = TABLES["titles"][category]
    return titles[sample.c // 4096 % len(titles)]


def _user(key: str, sample: SampledFinding, features: Features) -> str:
    users: list[str] = TABLES["users"][key]
    return "root" if features.privileged else users[sample.c % len(users)]


def _file(number: int) -> str:
    """Returns the file name of a path number."""
    return f"{_pick('stems', number >> 8)}-{number >> 13 & 0xFFF:x}"


def _path(exposed: int, number: int) -> str:
    """Returns the path of a path number, in a directory that is open to all users or writable by its owner only."""
    return f"{_pick('open_directories' if exposed else 'directories', number)}/{_file(number)}"


def _host(pattern: str, sample: SampledFinding) -> str:
    return pattern.replace("{octet}", str(sample.b // 8 % 32)).replace("{number}", str(1 + sample.b // 256 % 254))


def _remote(sample: SampledFinding, features: Features) -> str:
    return _host(_pick("open_hosts", sample.b) if features.exposed else "10.0.{octet}.{number}", sample)


def _listen(sample: SampledFinding, features: Features, port: int) -> str:
    return f"{_host(_pick('open_addresses' if features.exposed else 'inner_addresses', sample.b), sample)}:{port}"


def _arguments(sample: SampledFinding, name: str) -> str:
    if sample.prompt_injection:
        return str(_pick("hostile", sample.b))
    text = str(_pick("arguments", sample.b)).replace("{name}", name)
    return text.replace("{number}", str(sample.b // 16 % 9000)).replace("{few}", str(1 + sample.b // 16 % 16))


def _process(sample: SampledFinding, features: Features) -> FindingText:
    name = _pick("processes", sample.a)
    directory = _pick("open_directories" if features.exposed else "directories", sample.a // 64)
    metadata = {
        "pid": sample.pid, "ppid": 1 + sample.a // 4096 % 4000,
        "command": f"{directory}/{name} {_arguments(sample, name)}".rstrip(), "user": _user("user", sample, features),
    }  # fmt: skip
    return f"Running process: {name}", f"Process {name} runs with PID {sample.pid}", metadata


def _network(sample: SampledFinding, features: Features) -> FindingText:
    port, name = _pick("ports", sample.a), _pick("processes", sample.a // 64)
    protocol = "udp" if sample.a // 4096 % 5 == 0 else "tcp"
    title = f"Open port {port}" if sample.c // 4096 % 3 == 0 else f"Listening {protocol.upper()} service"
    metadata = {
        "port": port, "protocol": protocol, "local_address": _listen(sample, features, port), "process": name,
        "pid": sample.pid, "user": _user("user", sample, features),
    }  # fmt: skip
    return title, f"Port {port}/{protocol} is open and {name} holds it", metadata


def _protection(sample: SampledFinding, features: Features) -> int:
    """Returns the kind of protection of a kernel parameter (1 to 3): its evidence if it is weak, else any of them."""
    return features.evidence or 1 + sample.c // 64 % 3


def _kernel(sample: SampledFinding, features: Features) -> FindingText:
    parameters = TABLES["kernel"][_protection(sample, features)]
    name, desired, weak = parameters[sample.a % len(parameters)]
    current = weak[sample.a // 64 % len(weak)] if features.evidence else desired
    metadata = {
        "current": str(current), "desired": str(desired), "set_by": _user("set_by", sample, features), "pid":
        sample.pid, "path": f"/etc/sysctl.d/{10 + sample.path_number % 90}-{_file(sample.path_number)}.conf", "listen":
        _listen(sample, features, 22),
    }  # fmt: skip
    return name, f"Kernel parameter {name} is {current}", metadata


def _module(sample: SampledFinding, features: Features) -> FindingText:
    name = _pick("modules", sample.a)
    kernel = f"/lib/modules/6.{sample.b % 16}.{sample.b // 16 % 90}"
    metadata = {
        "size": 4096 * (1 + sample.a // 64 % 400), "pid": sample.pid, "loaded_by": _user("loaded_by", sample, features),
        "path": f"{_pick('open_directories', sample.b) if features.exposed else kernel}/{name}.ko",
    }  # fmt: skip
    return f"Module {name}", f"Kernel module {name} is loaded", metadata


def _world_writable(sample: SampledFinding, features: Features) -> FindingText:
    path = _path(features.exposed, sample.path_number)
    metadata = {"path": path, "mode": "0777" if sample.a & 1 else "0666", "owner": _user("owner", sample, features)}
    return _title("world_writable", sample), f"Anyone may write {_file(sample.path_number)}", metadata


def _suid(sample: SampledFinding, features: Features) -> FindingText:
    path = _path(features.exposed, sample.path_number)
    metadata = {"path": path, "mode": _MODES[sample.a & 3], "owner": _user("owner", sample, features)}
    return _title("suid", sample), f"{_file(sample.path_number)} runs with its owner's rights", metadata


def _ioc(sample: SampledFinding, features: Features) -> FindingText:
    name = _file(sample.path_number)
    metadata = {
        "path": _path(features.exposed, sample.path_number), "arguments": _arguments(sample, name),
        "pid": str(sample.pid), "user": _user("user", sample, features),  # a string, as in the archive
    }  # fmt: skip
    return _title("ioc", sample), f"{name} was checked against the indicators", metadata


def _mac(sample: SampledFinding, features: Features) -> FindingText:
    name = _file(sample.path_number)
    metadata = {
        "path": _path(0, sample.path_number), "denials": sample.a // 64 % 400, "user": _user("user", sample, features),
        "listen": _listen(sample, features, _pick("ports", sample.a)),
    }  # fmt: skip
    return _title("mac", sample), f"The confinement of daemon {name} was checked", metadata


def _dns(sample: SampledFinding, features: Features) -> FindingText:
    domain = f"{_pick('labels', sample.a)}{sample.a // 16 % 500}.{_pick('zones', sample.a // 8192)}"
    metadata = {
        "domain": domain, "query_type": _pick("query_types", sample.c // 64), "resolver": _remote(sample, features),
        "pid": sample.pid, "user": _user("user", sample, features),
    }  # fmt: skip
    return f"DNS activity: {domain}", f"A client asked for {domain}", metadata


def _endpoint(sample: SampledFinding, features: Features) -> FindingText:
    account, host = f"user{1000 + sample.a % 400}", f"host-{sample.a // 65536 % 90}"
    metadata = {
        "account": account, "role": _pick("roles", sample.a // 512), "activity": _pick("activities", sample.a // 4096),
        "host": host, "user": _user("user", sample, features), "source": _remote(sample, features),
    }  # fmt: skip
    return f"Endpoint behavior anomaly for {account}", f"{account} worked on {host}", metadata


_WRITERS: tuple[Callable[[SampledFinding, Features], FindingText], ...] = (
    _process, _network, _kernel, _module, _world_writable, _suid, _ioc, _mac, _dns, _endpoint,
)  # fmt: skip  # in the order of CATEGORIES


def write_findings(
    samples: list[SampledFinding], shard: int, *, processed_at: str, whole_numbers: bool
) -> Iterator[dict[str, Any]]:
    """Yields the findings of a shard in the format of the archive, without null fields, in the order of the samples.

    Args:
        samples: result of :func:`datamodules.synthetic.sampling.sample_findings`.
        shard: number of the shard, part of each id.
        processed_at: time stamp of the generator.
        whole_numbers: whether risk scores are integers (``ground_truth_v1``) instead of floats.
    """
    for sample in samples:
        category, features, labels = CATEGORIES[sample.category], FEATURES[sample.features], LABELS[sample.features]
        title, intro, metadata = _WRITERS[sample.category](sample, features)
        step = _protection(sample, features) if category == "kernel_params" else features.evidence
        sentence = WORDS[category][step][features.wording]
        mitigations = TABLES["mitigations"][category]
        metadata["mitigation"] = mitigations[sample.c // 32 % len(mitigations)] if features.mitigated else "none"
        if sample.seen_scans >= 0:
            metadata["seen_scans"] = sample.seen_scans
        impact, exposure, anomaly, confidence, probability = sample.hundredths
        finding = {
            "id": f"{_PREFIXES[sample.category]}_{shard:04x}{sample.number:04x}",
            "title": title,
            "severity": labels.severity,
            "risk_score": sample.risk if whole_numbers else float(sample.risk),
            "base_severity_score": base_score(features),
            "description": f"{intro}. {sentence}.",
            "metadata": metadata,
            "operational_error": False,
            "category": category,
            "tags": list(labels.tags),
            "risk_subscores": {
                "impact": impact / 100,
                "exposure": exposure / 100,
                "anomaly": anomaly / 100,
                "confidence": confidence / 100,
            },
            "correlation_refs": [],
            "baseline_status": "unknown" if sample.seen_scans < 0 else "existing" if sample.seen_scans else "new",
            "severity_source": "raw",
            "probability_actionable": probability / 100,
            "risk_total": sample.risk,
            "_processed_at": processed_at,
            "_data_quality": 1.0,
        }
        if labels.score >= RATIONALE_FROM:
            finding["rationale"] = rationale_of(sentence, features)
        yield finding
