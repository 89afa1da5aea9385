from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from edgeq.errors import ProfileError
from edgeq.probe.machine_profile import machine_profile, profile_name, shipped_like
from edgeq.probe_points import BandwidthPoint, MatmulPoint
from edgeq.profiles.dump import profile_yaml
from edgeq.profiles.facts.system_facts import MachineKind, SystemFacts, read_facts
from edgeq.profiles.facts.tegra import JetsonFacts, PowerMode
from edgeq.profiles.kernels.cost_table import CostEntry, DecodeCosts
from edgeq.profiles.llm.model_latency import Kernels, speeds_of
from edgeq.profiles.loader import load_profile, parse_profile
from edgeq.profiles.measured import LanguageCosts, Measured

LANGUAGE = LanguageCosts(
    decode=DecodeCosts(
        measured=True,
        machine="m",
        arch="x86_64",
        threads=2,
        llama_cpp="1",
        entries=(CostEntry(type="q8_0", columns=512, rows=1024, ns=40_000.0, spread=0.0, n=5, buffer="CPU"),),
    ),
    matmuls=(
        MatmulPoint(
            type="q8_0", columns=512, rows=512, batch=128, threads=2, flops_per_s=9e10, spread=0.01, n=5, buffer="CPU"
        ),
    ),
    attention=(),
    token_ns=20_000.0,
    layer_ns=0.0,
    layer_ns_per_value=0.1,
    runtime_bytes=51 << 20,
    reference_decode_ns=300_000.0,
    reference_prompt_ns=2_000_000.0,
)


def _measured(facts: SystemFacts, *, language: LanguageCosts | None = LANGUAGE, **changes: object) -> Measured:
    point = BandwidthPoint(
        threads=2, triad_bytes_per_s=17.5e9, read_bytes_per_s=25e9, spread=0.02, buffer_bytes=128 << 20, n=9
    )
    found = Measured(
        taken_utc="2026-11-22T10:00:00+00:00",
        edgeq="0.1.0",
        threads=2,
        host_load=0.01,
        facts=facts,
        bandwidth=(point,),
        language=language,
    )
    return msgspec.structs.replace(found, **changes)


@pytest.fixture(scope="module")
def here() -> SystemFacts:
    return read_facts()


def test_what_is_written_is_read_back_exactly(here: SystemFacts) -> None:
    profile = machine_profile("my-robot", _measured(here, doubts=("host loaded: a lot",)))
    text = profile_yaml(profile, comment="one\ntwo")
    assert text.startswith("# one\n# two\nname: my-robot\n")
    assert parse_profile(text, "my-robot.yaml") == profile


def test_a_plan_for_it_stands_on_what_was_measured(here: SystemFacts) -> None:
    profile = machine_profile("my-robot", _measured(here))
    assert profile.memory.measured_bandwidth_bytes_per_s == 25e9
    assert profile.memory.usable_bytes < (here.usable_memory_bytes or 0)
    assert profile.backend.runtime_bytes == 51 << 20
    speeds = speeds_of(profile)
    assert isinstance(speeds.prompts, Kernels)
    assert speeds.decode == LANGUAGE.decode
    assert profile.backend.decode_efficiency == pytest.approx(1024 * 512 / 32 * 34 / 40_000 / 25)


def _board(model: str, here: SystemFacts) -> SystemFacts:
    memory = msgspec.structs.replace(here.memory, total_bytes=7_990_000_000, available_bytes=6_500_000_000)
    container = msgspec.structs.replace(here.container, memory_limit_bytes=None, memory_used_bytes=None)
    cpu = msgspec.structs.replace(here.cpu, usable_cpus=6, features=("asimd", "asimddp"))
    kind: MachineKind = "jetson" if "NVIDIA" in model else "board"
    return msgspec.structs.replace(
        here, kind=kind, arch="aarch64", model=model, memory=memory, container=container, cpu=cpu
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "jetson-orin-nano-8gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "jetson-orin-nx-8gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "jetson-thor"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "jetson-xavier-nx"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("NVIDIA Orin NX Developer Kit", "jetson-orin-nx-8gb"),  # JetPack 5
        ("Raspberry Pi 4 Model B Rev 1.4", None),
        ("Raspberry Pi 4 Model B Rev 1.5", None),
        ("ThinkPad X1", None),
    ],
)
def test_a_board_that_edgeq_knows(model: str, name: str | None, here: SystemFacts) -> None:
    found = shipped_like(_board(model, here))
    assert (None if found is None else found.name) == name


def test_a_boards_accelerator_stays_as_its_profile_has_it(here: SystemFacts) -> None:
    base = load_profile("jetson-orin-nano-8gb")
    profile = machine_profile("arm-3", _measured(_board("NVIDIA Jetson Orin Nano Developer Kit", here)))
    assert (profile.gpu, profile.power_modes, profile.software) == (base.gpu, base.power_modes, base.software)
    assert profile.backend.name == base.backend.name
    assert {b.name for b in profile.backends} >= {b.name for b in base.backends}
    cpu = next(b for b in profile.backends if b.name == "llama.cpp-cpu")
    assert cpu.runtime_bytes == 51 << 20
    assert profile.memory.visible_bytes == 7_990_000_000
    assert profile.memory.bandwidth_bytes_per_s == base.memory.bandwidth_bytes_per_s
    limit = profile.budgets.planner.peak_memory_bytes
    assert limit is None or limit <= profile.memory.usable_bytes
    assert parse_profile(profile_yaml(profile), "arm-3.yaml") == profile


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a" * 70, "a" * 64),
        ("My Robot!.YAML", "my-robot"),
        ("arm_3.v2", "arm_3.v2"),
        ("../..", "this-machine"),
        ("Ü", "this-machine"),
    ],
)
def test_any_text_becomes_a_name(text: str, name: str) -> None:
    assert profile_name(text) == name


def test_a_machine_that_tells_nothing(here: SystemFacts) -> None:
    memory = msgspec.structs.replace(here.memory, total_bytes=None)
    with pytest.raises(ProfileError, match="does not tell this machine's memory"):
        machine_profile("x", _measured(msgspec.structs.replace(here, memory=memory)))


SAMPLES = Path(__file__).parents[1] / "profiles" / "samples"


@pytest.mark.parametrize("sample", sorted(path.stem for path in SAMPLES.glob("*.txt")))
@pytest.mark.parametrize("cpus_off", [0, 2])
def test_every_recorded_board_gets_a_profile_that_can_be_read(
    sample: str, cpus_off: int, here: SystemFacts, tmp_path: Path
) -> None:
    """Power modes switch cores off: the profile of the board names them all the same."""
    parts = re.split(r"^== (/.*)\n", (SAMPLES / f"{sample}.txt").read_text(), flags=re.MULTILINE)
    for path, text in zip(parts[1::2], parts[2::2], strict=True):
        place = tmp_path / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.replace("\\0", "\0"))
    facts = read_facts(tmp_path)
    cpu = msgspec.structs.replace(facts.cpu, usable_cpus=max(2, (facts.cpu.usable_cpus or 4) - cpus_off))
    memory = here.memory if facts.memory.total_bytes is None else facts.memory
    profile = machine_profile("board", _measured(msgspec.structs.replace(facts, cpu=cpu, memory=memory)))
    assert parse_profile(profile_yaml(profile), "board.yaml") == profile


def test_a_mode_that_the_boards_profile_does_not_know_is_said(here: SystemFacts) -> None:
    facts = _board("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", here)
    jetson = JetsonFacts(power_mode=PowerMode(id=0, name="MAXN"))
    profile = machine_profile("nx", _measured(msgspec.structs.replace(facts, jetson=jetson)))
    assert profile.power_mode == load_profile("jetson-orin-nx-8gb").power_mode
    assert profile.measured is not None
    (said,) = [fact for fact in profile.measured.facts.missing if fact.path == "MAXN"]
    assert profile.power_mode is not None
    assert profile.power_mode in said.why
