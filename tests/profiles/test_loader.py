"""Where profiles are found, and how one stands on another."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from edgeq.errors import ProfileError
from edgeq.profiles.loader import Known, known_profiles, load_profile, parse_profile, profile_names
from edgeq.profiles.profile_files import ProfileFile, profile_folders

# A copy, so that a shipped figure may change.
_LAPTOP = (Path(__file__).parent / "samples" / "laptop-cpu.yaml").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of profiles."""
    path = tmp_path / "profiles"
    path.mkdir()
    monkeypatch.setenv("EDGEQ_PROFILES", str(path))
    return path


def own(name: str, *, extends: str = "laptop-cpu", more: str = "") -> str:
    return f"name: {name}\nextends: {extends}\nsummary: a robot\n{more}"


def known(name: str) -> Known:
    found = [entry for entry in known_profiles() if entry.name == name]
    assert len(found) == 1, found
    return found[0]


def refused(text: str, where: str = "mine.yaml") -> str:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, where)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(ProfileError, match=r"no device 'jetson-orinn'\. Choose one of jetson-orin"):
        load_profile("jetson-orinn")
    with pytest.raises(ProfileError, match="See edgeq devices"):
        load_profile("toaster")
    with pytest.raises(ProfileError, match="no device ''"):
        load_profile("")


# --- files


def test_a_profile_of_the_users_own_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(own("mine"))
    assert load_profile(str(tmp_path / "mine.yaml")).name == "mine"
    monkeypatch.chdir(tmp_path)
    assert load_profile("mine.yaml").name == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_profile("~/mine.yaml").name == "mine"
    (tmp_path / "plain").write_text("﻿" + own("plain").replace("\n", "\r\n"), encoding="utf-8")
    assert load_profile("./plain").name == "plain"


def test_a_file_may_have_the_name_of_what_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laptop-cpu.yaml").write_text(own("laptop-cpu"))
    assert load_profile("laptop-cpu.yaml").summary == "a robot"
    assert load_profile("laptop-cpu").summary != "a robot"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, binary, huge, pipe = (tmp_path / f"{name}.yaml" for name in ("missing", "binary", "huge", "pipe"))
    binary.write_bytes(b"name: \xff\xfe")
    with huge.open("wb") as file:
        file.truncate((4 << 20) + 1)
    os.mkfifo(pipe)
    for path, words in (
        (missing, "No such file"),
        (binary, "not UTF-8"),
        (huge, "larger than any profile"),
        (pipe, "no regular file"),
        (tmp_path / "", "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path / "nul\0.yaml", "null"),
        (tmp_path / ("x" * 300 + ".yaml"), "name too long"),
    ):
        with pytest.raises(ProfileError, match=f"(?i){words}"):
            load_profile(f"{path}/" if path == tmp_path else str(path))


# --- the user's folders


def test_profiles_in_the_users_folders_have_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (folder / "a.yaml").write_text(own("robot-a", more="aliases: [the-a]\n"))
    (other / "b.YML").write_text('"name": robot-b\nextends: robot-a\nsummary: another\naliases:\n- the-b\n')
    (other / "notes.txt").write_text("no profile")
    monkeypatch.setenv("EDGEQ_PROFILES", os.pathsep.join([str(folder), str(other), "", str(folder / ".")]))
    assert profile_folders()[:2] == [folder, other]
    assert load_profile("the-a").name == "robot-a"
    assert load_profile("The-B").memory == load_profile("laptop-cpu").memory
    assert known("robot-b").origin == str(other / "b.YML")
    assert known("laptop-cpu").origin == "edgeq"
    assert profile_names()["the-b"] == "robot-b"
    with pytest.raises(ProfileError, match="Choose one of robot-a"):
        load_profile("robot-aa")


def test_the_default_folder_is_in_the_config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEQ_PROFILES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profile_folders() == [tmp_path / "edgeq" / "profiles"]
    assert all(entry.error is None for entry in known_profiles())
    (tmp_path / "edgeq" / "profiles").mkdir(parents=True)
    (tmp_path / "edgeq" / "profiles" / "mine.yaml").write_text(own("mine"))
    assert load_profile("mine").name == "mine"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert profile_folders() == [tmp_path / "home" / ".config" / "edgeq" / "profiles"]


def test_a_broken_file_breaks_nothing_else_and_is_told(folder: Path) -> None:
    (folder / "good.yaml").write_text(own("good"))
    (folder / "broken.yaml").write_text("name: broken\nmemory: [")
    (folder / "typo.yaml").write_text(own("typo", more="memroy: {}\n"))
    (folder / "nameless.yaml").write_text("extends: laptop-cpu\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    (folder / "dir.yaml").mkdir()
    assert load_profile("good").name == "good"
    assert load_profile("jetson-orin").name == "jetson-orin-nano-8gb"
    errors = {entry.name: str(entry.error) for entry in known_profiles() if entry.error is not None}
    words = {
        "broken": "no valid YAML",
        "typo": "Perhaps memory is meant",
        "nameless.yaml": "has no name",
        "binary.yaml": "not UTF-8",
        "dir.yaml": "no regular file",
    }
    assert errors.keys() == words.keys()
    for name, word in words.items():
        assert word in errors[name]
        assert str(folder) in errors[name]
    with pytest.raises(ProfileError, match="Perhaps memory is meant"):
        load_profile("typo")
    assert known("good").error is None


def test_a_folder_that_is_not_there_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_PROFILES", str(folder / "nowhere"))
    assert load_profile("laptop-cpu").name == "laptop-cpu"
    assert "EDGEQ_PROFILES cannot be read" in str(known("nowhere").error)
    monkeypatch.setenv("EDGEQ_PROFILES", "")
    assert all(entry.origin == "edgeq" for entry in known_profiles())


def test_what_stands_in_place_of_the_default_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEQ_PROFILES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "edgeq").mkdir()
    (tmp_path / "edgeq" / "profiles").write_text("no folder")
    assert load_profile("laptop-cpu").name == "laptop-cpu"
    message = str(known("profiles").error)
    assert f"The folder {tmp_path / 'edgeq' / 'profiles'} of your profiles cannot be read: Not a directory" in message
    assert "\n" not in message


def test_two_profiles_of_one_name_are_refused_by_that_name_alone(folder: Path) -> None:
    (folder / "a.yaml").write_text(own("mine", more="aliases: [robot]\n"))
    (folder / "b.yaml").write_text(own("other", more="aliases: [robot, jetson-orin]\n"))
    for name in ("robot", "jetson-orin"):
        with pytest.raises(ProfileError, match=rf"Two profiles are called '{name}'.*b\.yaml"):
            load_profile(name)
    assert load_profile("mine").name == "mine"
    assert load_profile("jetson-orin-nano-8gb").name == "jetson-orin-nano-8gb"
    assert known("mine").error is None
    assert "Two profiles" in str(known("other").error)


def test_a_file_with_a_shipped_name_breaks_no_other_device(folder: Path) -> None:
    shipped = load_profile("jetson-thor-t4000")
    mine = folder / "thor.yaml"
    mine.write_text(own("jetson-thor", extends="jetson-thor"))
    (folder / "nano.yaml").write_text(own("nano", extends="jetson-orin", more="aliases: [jetson-orin-nano-8gb]\n"))
    assert load_profile("jetson-thor-t4000") == shipped
    assert load_profile("jetson-orin-nano-4gb").name == "jetson-orin-nano-4gb"
    assert {entry.name for entry in known_profiles() if entry.error is not None} == {"jetson-thor", "nano"}
    # Its own name is refused, and the one that can be changed is told.
    for name in ("jetson-thor", "JETSON-THOR"):
        with pytest.raises(ProfileError) as caught:
            load_profile(name)
        assert str(caught.value).endswith(f"Write another name or alias in {mine}.")
    assert "the one that edgeq ships" in str(caught.value)
    assert load_profile(str(mine)).summary == "a robot"
    assert next(entry for entry in known_profiles() if entry.origin == str(mine)).error is not None
    mine.write_text(own("jetson-thor", extends="Jetson-Thor"))
    assert load_profile(str(mine)).memory == load_profile("jetson-thor-t5000").memory


@pytest.mark.parametrize(
    "text",
    [
        "name: a\naliases: [b, c.d]\n",
        "aliases: []\nname: a\n",
        "aliases: [b,]\nname: a  \n",
        "name: 'a'\naliases: ['b']\n",
        "name: a # mine\n",
        '{"name": "a", "aliases": ["b"]}',
        "summary: |\n  text\n  name: z\nname: a\n",
        "? name\n: a\n",
        "name: a\naliases:\n  - b\n",
        "name: a\naliases: b\n",
        "name: a\naliases: [1, [x]]\n",
        "---\nname: a\n",
        "name:\n  a\n",
    ],
)
def test_names_are_the_same_however_they_are_found(text: str) -> None:
    raw = ProfileFile("a.yaml", text).raw
    aliases = raw.get("aliases") if isinstance(raw.get("aliases"), list) else []
    assert ProfileFile("a.yaml", text).names == ("a", *(alias for alias in aliases or [] if isinstance(alias, str)))


def test_no_shipped_figure_stands_on_a_page_that_is_written_anew() -> None:
    """Tables of docs/ change with every measurement; a source says what was measured, or that nothing was."""
    sources = {
        (entry.name, path): text
        for entry in known_profiles()
        for path, text in load_profile(entry.name).sources.items()
    }
    assert sources
    assert [key for key, text in sources.items() if "docs/" in text] == []


# --- extends


def test_what_is_not_said_is_inherited_with_its_source() -> None:
    base = load_profile("jetson-orin")
    text = own(
        "mine",
        extends="jetson-orin",
        more="""memory: {reserved_bytes: 3GiB}
power_modes:
  15W: {gpu_clock_hz: 606MHz}
  7W: null
  OWN: {power_w: 20W}
cpu: {features: [asimd]}
dla: {cores: 1}
sources:
  memory: my robot
  power_modes: my nvpmodel.conf
  dla: a test
""",
    )
    mine = parse_profile(text, "mine.yaml")
    assert mine.aliases == ()
    assert mine.memory.reserved_bytes == 3 * 2**30
    assert mine.memory.total_bytes == base.memory.total_bytes
    inherited = {mode.name: mode for mode in base.power_modes if mode.name != "7W"}
    assert [mode.name for mode in mine.power_modes] == [*inherited, "OWN"]
    mode = mine.power_modes[0]
    assert mode == msgspec.structs.replace(inherited["15W"], gpu_clock_hz=606e6)
    assert mine.cpu.features == ("asimd",)
    assert mine.budgets == base.budgets
    assert [b.name for b in mine.backends] == [b.name for b in base.backends]
    # A source for all of a part is for what this file says of it, not for what it inherits.
    assert mine.source_of("memory.reserved_bytes") == "my robot"
    assert mine.source_of("memory.total_bytes") == base.source_of("memory.total_bytes")
    assert mine.source_of("power_modes.15W.gpu_clock_hz") == "my nvpmodel.conf"
    assert mine.source_of("power_modes.15W.sms") == base.source_of("power_modes.15W.sms")
    assert mine.source_of("power_modes.OWN.power_w") == "my nvpmodel.conf"
    assert mine.source_of("power_modes.7W.sms") is None
    assert mine.source_of("cpu.features") is None
    assert mine.source_of("cpu.cores") == base.source_of("cpu.cores")


def test_null_takes_things_away() -> None:
    gone = (backend.name for backend in load_profile("jetson-orin").backends if backend.on_gpu)
    backends = ", ".join(f"{name}: null" for name in gone)
    more = f"gpu: null\npower_modes: null\npower_mode: null\nbackends: {{{backends}}}\n"
    mine = parse_profile(own("mine", extends="jetson-orin", more=more), "mine.yaml")
    assert (mine.gpu, mine.power_modes, mine.accelerator) == (None, (), "cpu")
    assert not [path for path in mine.sources if path.startswith(("gpu", "power_modes", "backends.tensorrt"))]
    assert "needs a GPU" in refused(own("mine", extends="jetson-orin", more="gpu: null\npower_modes: null\n"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("power_modes: {15w: null}", ["power_modes.15w", "not inherited", "Perhaps 15W is meant"]),
        ("dla: null", ["takes away dla"]),
        ("memory: {measured_bandwith: null}", ["memory.measured_bandwith", "Perhaps"]),
        ("memory: {reserved_bytes: 3GiB}", ["no source for memory.reserved_bytes"]),
        ("sources: {memory: mine}", ["source for memory, which it does not hold"]),
        ("memory: {reserved_bytes: 3Gb}", ["memory.reserved_bytes", "gigabits"]),
        ("power_modes: {15W: {sms: 4}}\nsources: {power_modes: x}", ["power_modes.15W.int8_ops_per_s", "null"]),
        ("memory: null", ["lacks memory"]),
        ("memory: 5", ["no source for memory"]),
        ("memory: text", ["memory"]),
        ("memory: {total_bytes: 1GiB}\nsources: {memory: x}", ["visible_bytes is more than"]),
    ],
)
def test_mistakes_beside_extends(more: str, words: list[str]) -> None:
    message = refused(own("mine", extends="jetson-orin", more=more))
    assert "mine.yaml" in message
    assert all(word in message for word in words), message


def test_what_was_measured_belongs_to_one_profile(folder: Path) -> None:
    measured = _LAPTOP.replace("name: laptop-cpu\naliases: [laptop]", "name: probed").replace(
        "provenance: datasheet",
        "provenance: measured\nmeasured:\n  {taken_utc: x, edgeq: x, threads: 1, host_load: 0.5, doubts: [loaded], "
        "facts: {kind: pc, arch: x86_64, cpu: {}, memory: {}, container: {}}, bandwidth: ["
        "{threads: 1, triad_bytes_per_s: 1.0, read_bytes_per_s: 1.0, spread: 0, buffer_bytes: 9, n: 3}]}",
    )
    (folder / "probed.yaml").write_text(measured)
    # Who keeps more memory free has still the machine that was measured, with what its probe doubts.
    more = "memory: {reserved_bytes: 6GiB}\nbudgets: {planner: {itl_ms: 90ms}}\nsources: {memory: x, budgets: y}"
    kept = parse_profile(own("mine", extends="probed", more=more), "mine.yaml")
    assert kept.provenance == "measured"
    assert kept.measured is not None
    assert kept.measured.doubts == ("loaded",)
    more = "memory: {bandwidth_bytes_per_s: 99GB/s}\nsources: {memory: x}"
    other = parse_profile(own("mine", extends="probed", more=more), "mine.yaml")
    assert (other.provenance, other.measured) == ("datasheet", None)


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("jetson-orinn", ["mine.yaml extends 'jetson-orinn'", "no device", "jetson-orin"]),
        ("nowhere.yaml", ["mine.yaml extends 'nowhere.yaml'", "No such file"]),
        ("[laptop-cpu]", ["extends that is no name", "one name or file"]),
        ("5", ["extends that is no name"]),
        ("''", ["extends ''"]),
    ],
)
def test_a_parent_that_is_not_there(extends: str, words: list[str]) -> None:
    message = refused(own("mine", extends=extends))
    assert all(word in message for word in words), message


def test_a_broken_parent_names_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(own("base", more="memroy: {}\n"))
    (tmp_path / "mine.yaml").write_text(own("mine", extends="./base.yaml"))
    with pytest.raises(ProfileError, match=r"base\.yaml has the unknown key memroy"):
        load_profile(str(tmp_path / "mine.yaml"))
    (tmp_path / "base.yaml").write_text("a: [")
    with pytest.raises(ProfileError, match=r"base\.yaml, line 1"):
        load_profile(str(tmp_path / "mine.yaml"))


def test_paths_start_where_the_file_lies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "base.yaml").write_text(own("base"))
    (tmp_path / "mine.yaml").write_text(own("mine", extends="a/base.yaml"))
    assert load_profile(str(tmp_path / "mine.yaml")).name == "mine"


def test_loops_are_refused(folder: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a"), ("self", "self"), ("path", "./path.yaml")):
        (folder / f"{name}.yaml").write_text(own(name, extends=parent))
    (folder / "turn.yaml").write_text(own("turn", extends=f"../{folder.name}/../{folder.name}/turn.yaml"))
    (folder / "sub").mkdir()
    (folder / "link.yaml").symlink_to(folder / "real.txt")
    (folder / "real.txt").write_text(own("link", extends="./link.yaml"))
    for name in ("a", "b", "c", "self", "path", "turn", "link"):
        with pytest.raises(ProfileError, match="extend each other"):
            load_profile(name)
    with pytest.raises(ProfileError, match=r"a\.yaml extends \S*b\.yaml extends \S*c\.yaml extends \S*a\.yaml"):
        load_profile("a")
    with pytest.raises(ProfileError, match="extend each other"):
        load_profile(str(folder / "sub" / ".." / "a.yaml"))
    assert all("extend each other" in str(entry.error) for entry in known_profiles() if entry.origin != "edgeq")


def test_a_long_chain_is_followed_to_its_limit(folder: Path) -> None:
    (folder / "p0.yaml").write_text(own("p0"))
    for n in range(1, 20):
        (folder / f"p{n}.yaml").write_text(own(f"p{n}", extends=f"p{n - 1}"))
    assert load_profile("p10").name == "p10"
    with pytest.raises(ProfileError, match=r"p19\.yaml extends more than 16"):
        load_profile("p19")
