"""From what the probe measured to a device profile that plans can be made for."""

from __future__ import annotations

import re

import msgspec

from edgeq.errors import ProfileError
from edgeq.ggml_types import ggml_type
from edgeq.profiles.device import Backend, Cpu, DeviceProfile, Memory
from edgeq.profiles.facts.system_facts import MissingFact, SystemFacts
from edgeq.profiles.loader import known_profiles
from edgeq.profiles.measured import LanguageCosts, Measured
from edgeq.types import Budget
from edgeq.units import format_bytes

__all__ = ["machine_profile", "profile_name", "shipped_like"]

_DECODE_TYPE = "q8_0"  # the type that a plain bandwidth and throughput are told for
_SOURCE = "edgeq devices probe"
_FREE_SHARE = 0.1  # of what is available now stays free for what the others will need later
_PRECISIONS = {"avx512_bf16": "bf16", "bf16": "bf16", "amx_bf16": "bf16"}
_LONGEST_NAME = 64
_VISIBLE_SHARE = 0.75  # the least that firmware leaves of a board's memory


def profile_name(text: str) -> str:
    """A text, such as a file's name, as the name of a profile."""
    name = re.sub(r"[^a-z0-9._-]+", "-", re.sub(r"\.ya?ml$", "", text.lower())).strip("-._")
    return name[:_LONGEST_NAME].rstrip("-._") or "this-machine"


def shipped_like(facts: SystemFacts) -> DeviceProfile | None:
    """The shipped profile of the board that this machine is, if there is one.

    A board's own words for itself hold those of its profile's name, apart from its revision and, since JetPack 5 leaves
    it out, "Jetson"; of profiles that differ in their memory alone, the one with the nearest is it.
    """
    model = re.sub(r"\brev\b.*", "", facts.model or "", flags=re.IGNORECASE)
    words, visible = _words(model), facts.memory.total_bytes or 0
    words |= {"jetson"} if facts.kind == "jetson" else set()
    ranked = []
    for known in known_profiles():
        profile = known.profile
        wanted = {word for word in _words(known.name) if not word.endswith("gb")}
        if known.origin == "edgeq" and profile is not None and profile.arch == facts.arch and wanted <= words:
            ranked.append((len(wanted), -abs(profile.memory.visible_bytes - visible), profile.name, profile))
    return max(ranked)[-1] if ranked else None


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\d+gb|[a-z]+|\d+", text.lower()))


def machine_profile(name: str, measured: Measured) -> DeviceProfile:
    """The profile of the machine that was measured.

    On a board that edgeq ships a profile of, its GPU, power modes, budgets and accelerators' figures stand as they are
    there, with their sources; what was measured takes the place of the rest.

    Args:
        name: of the profile.
        measured: from `edgeq.probe.steps.probe_machine`.

    Raises:
        ProfileError: the machine tells neither its memory nor its cores.
    """
    facts, base = measured.facts, shipped_like(measured.facts)
    source = f"{_SOURCE}, {measured.taken_utc}"
    memory, memory_source = _memory(measured, base)
    own = DeviceProfile(
        name=name,
        summary=_summary(facts, measured),
        arch="aarch64" if facts.arch == "aarch64" else "x86_64" if facts.arch == "x86_64" else "any",
        cpu=Cpu(
            name=facts.cpu.name or "unknown",
            cores=facts.cpu.usable_cpus or facts.cpu.logical_cpus or measured.threads,
            features=facts.cpu.features,
        ),
        threads=measured.threads,
        memory=memory,
        backends=_cpu_backends(measured, memory),
        provenance="measured",
        measured=measured,
        sources={"cpu": source, "threads": source, "backends": source, **memory_source},
    )
    return own if base is None else _over(base, own, source)


def _over(base: DeviceProfile, own: DeviceProfile, source: str) -> DeviceProfile:
    """A board's profile with what was measured on it.

    Cores that the active power mode has switched off are the board's all the same: its other modes name them.
    """
    measured = {backend.name: backend for backend in own.backends}
    backends = tuple(measured.pop(b.name, b) for b in base.backends) + tuple(measured.values())
    kept = {path: text for path, text in base.sources.items() if path.split(".")[0] not in ("cpu", "memory", "threads")}
    sources = {**kept, **{path: text for path, text in own.sources.items() if path != "backends"}}
    for backend in own.backends:
        name = f"backends.{backend.name}"
        sources = {path: text for path, text in sources.items() if not path.startswith(f"{name}.")}
        sources[name] = source
    usable = own.memory.usable_bytes
    return msgspec.structs.replace(
        own,
        cpu=msgspec.structs.replace(base.cpu, cores=max(base.cpu.cores, own.cpu.cores), features=own.cpu.features),
        measured=_with_unknown_mode(own, base),
        gpu=base.gpu,
        dla=base.dla,
        power_modes=base.power_modes,
        power_mode=_power_mode(own, base),
        software=base.software,
        backends=backends,
        budgets=msgspec.structs.replace(
            base.budgets,
            **{field: _within(getattr(base.budgets, field), usable) for field in base.budgets.__struct_fields__},
        ),
        sources=sources,
    )


def _within(budget: Budget, usable_bytes: int) -> Budget:
    limit = budget.peak_memory_bytes
    return budget if limit is None else msgspec.structs.replace(budget, peak_memory_bytes=min(limit, usable_bytes))


def _active_mode(own: DeviceProfile) -> str | None:
    jetson = None if own.measured is None else own.measured.facts.jetson
    return None if jetson is None or jetson.power_mode is None else jetson.power_mode.name


def _power_mode(own: DeviceProfile, base: DeviceProfile) -> str | None:
    """The mode that the board is in, if its profile knows it."""
    active = _active_mode(own)
    return active if active in {mode.name for mode in base.power_modes} else base.power_mode


def _with_unknown_mode(own: DeviceProfile, base: DeviceProfile) -> Measured | None:
    """With the statement that the GPU's figures are for another mode than the board is in, if they are."""
    active, measured = _active_mode(own), own.measured
    if measured is None or active is None or not base.power_modes or _power_mode(own, base) == active:
        return measured
    said = MissingFact(
        fact="figures of the power mode",
        path=active,
        why=f"{base.name} knows {', '.join(mode.name for mode in base.power_modes)}; those of {base.power_mode} stand",
        remedy=f"Add {active} under power_modes, or switch the board with nvpmodel and probe again",
    )
    facts = msgspec.structs.replace(measured.facts, missing=(*measured.facts.missing, said))
    return msgspec.structs.replace(measured, facts=facts)


def _summary(facts: SystemFacts, measured: Measured) -> str:
    total = facts.memory.total_bytes
    parts = [facts.model or facts.cpu.name or facts.arch, f"{measured.threads} threads"]
    parts += [] if total is None else [format_bytes(total)]
    return f"{', '.join(parts)}; measured by edgeq {measured.edgeq} on {measured.taken_utc[:10]}"


def _memory(measured: Measured, base: DeviceProfile | None) -> tuple[Memory, dict[str, str]]:
    facts, source = measured.facts, f"{_SOURCE}, {measured.taken_utc}"
    total, available = facts.memory.total_bytes, facts.usable_memory_bytes
    limit = facts.container.memory_limit_bytes
    if total is None or available is None:
        raise ProfileError("/proc/meminfo does not tell this machine's memory", "Write the profile by hand")
    visible = total if limit is None else min(total, limit)
    reserved = max(visible - round(available * (1 - _FREE_SHARE)), 0)
    best = max(max(p.triad_bytes_per_s, p.read_bytes_per_s) for p in measured.bandwidth)
    peak = best if base is None else max(best, base.memory.bandwidth_bytes_per_s)
    memory = Memory(
        total_bytes=visible if base is None or not _same_size(visible, base) else max(visible, base.memory.total_bytes),
        visible_bytes=visible,
        reserved_bytes=min(reserved, visible - 1),
        unified=facts.kind == "jetson" or (base is not None and base.memory.unified),
        bandwidth_bytes_per_s=peak,
        measured_bandwidth_bytes_per_s=best,
    )
    peak_source = (
        f"{source}, the best of triad and reading" if base is None or peak == best else f"{base.name} of edgeq"
    )
    return memory, {
        "memory": source,
        "memory.reserved_bytes": f"{source}, what was in use, and {_FREE_SHARE:.0%} of what was available",
        "memory.bandwidth_bytes_per_s": peak_source,
    }


def _same_size(visible: int, base: DeviceProfile) -> bool:
    """Whether a board has its profile's memory, some of it held back by firmware, and is no smaller one."""
    return visible >= _VISIBLE_SHARE * base.memory.total_bytes


def _cpu_backends(measured: Measured, memory: Memory) -> tuple[Backend, ...]:
    backends = []
    if measured.language is not None:
        backends.append(_llama_backend(measured.language, memory, measured.facts))
    if measured.onnx is not None:
        backends.append(
            Backend(
                name="onnxruntime-cpu",
                precisions=("fp32", "int8"),
                compute_flops_per_s=measured.onnx.fp32_flops_per_s,
                runtime_bytes=measured.onnx.runtime_bytes,
            )
        )
    if not backends:
        raise ProfileError(
            "Nothing is installed here that runs models, so nothing was measured of them",
            "Install edgeq[cpu] or onnxruntime and probe again",
        )
    return tuple(backends)


def _llama_backend(language: LanguageCosts, memory: Memory, facts: SystemFacts) -> Backend:
    precisions = ["fp32", "fp16", *{_PRECISIONS[f] for f in facts.cpu.features if f in _PRECISIONS}, "int8", "int4"]
    return Backend(
        name="llama.cpp-cpu",
        precisions=tuple(precisions),
        decode_efficiency=min(1.0, _decode_bytes_per_s(language) / memory.bandwidth_bytes_per_s),
        compute_flops_per_s=_prompt_flops_per_s(language),
        token_overhead_ms=language.token_ns / 1e6,
        layer_overhead_ms=language.layer_ns / 1e6,
        runtime_bytes=language.runtime_bytes,
    )


def _decode_bytes_per_s(language: LanguageCosts) -> float:
    """Bytes of weights that the largest matrices of one type pass through a token in a second."""
    kind = ggml_type(_DECODE_TYPE)
    largest = max((e for e in language.decode.entries if e.type == kind.name), key=lambda e: e.columns * e.rows)
    return 1e9 * largest.rows * kind.row_bytes(largest.columns) / largest.ns


def _prompt_flops_per_s(language: LanguageCosts) -> float:
    return max(p.flops_per_s for p in language.matmuls if p.type == _DECODE_TYPE)
