"""``edgeq devices``: the devices that plans can be made for."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeq.cli.arguments import add_json_argument

if TYPE_CHECKING:
    from edgeq.profiles.device import DeviceProfile
    from edgeq.profiles.loader import Known

EXAMPLES = """\
edgeq devices
edgeq devices show jetson-orin
edgeq devices show jetson-agx-orin --power-mode maxn
edgeq devices probe -o my-robot.yaml
edgeq devices show my-robot.yaml --json | jq .memory
edgeq devices --json | jq '.[] | select(.usable_bytes > 16e9) | .name'

Profiles of your own are YAML in ~/.config/edgeq/profiles, or in the folders of
$EDGEQ_PROFILES; docs/devices.md says how to write one.
"""

# What `edgeq devices ACTION` does, and the module that does it.
_ACTIONS = {
    "show": "everything that is known of a device, with its sources",
    "probe": "measure this machine and write its profile",
}


_COLUMNS: tuple[str, ...] = (
    "device",
    "memory",
    "bandwidth",
    "accelerator",
    "power mode",
    "backend",
    "figures",
    "also called",
    "file",
)
_TO_THE_RIGHT = ("memory", "bandwidth")
# What a narrow terminal goes without; the device and its memory always stay.
_LEAST_FIRST = ("figures", "backend", "also called", "file", "power mode", "accelerator", "bandwidth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, and those of its actions."""
    add_json_argument(parser)
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION")
    for name, summary in _ACTIONS.items():
        module = _module(name)
        action = actions.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + textwrap.indent(module.EXAMPLES, "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(action)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"edgeq.cli.devices_{name}")


def run(args: argparse.Namespace) -> int:
    """List every device, or do what the action says."""
    import json

    from edgeq.cli.output import note, show
    from edgeq.profiles.loader import known_profiles

    if args.action is not None:
        code: int = _module(args.action).run(args)
        return code
    found = known_profiles()
    if args.json:
        show(json.dumps([_document(known) for known in found], indent=2) + "\n")
        return 0
    _show_table(found)
    for known in found:
        if known.error is not None:
            note(f"warning: {known.origin}: {known.error}")
    return 0


def _show_table(found: Sequence[Known]) -> None:
    """A row for each device; on a terminal without the columns that it is too narrow for, which a note names."""
    from edgeq.cli.output import note, show_lines
    from edgeq.cli.tables import format_table, terminal_width

    rows: list[dict[str, str]] = [
        dict(zip(_COLUMNS, _row(known, known.profile), strict=True)) for known in found if known.profile is not None
    ]
    own = any(known.origin != "edgeq" for known in found)
    columns = [column for column in _COLUMNS if own or column != "file"]
    width = terminal_width() if sys.stdout.isatty() else None
    dropped: list[str] = []
    while True:
        right = [index for index, column in enumerate(columns) if column in _TO_THE_RIGHT]
        lines = format_table(columns, [[row[column] for column in columns] for row in rows], right=right)
        spare = next((column for column in _LEAST_FIRST if column in columns), None)
        if width is None or spare is None or max(map(len, lines)) <= width:
            break
        columns.remove(spare)
        dropped.append(spare)
    show_lines(lines)
    if dropped:
        note(f"note: no room for the columns {', '.join(dropped)}; a pipe and --json have all")


def _row(known: Known, profile: DeviceProfile) -> list[str]:
    memory = profile.memory
    gib = f"{memory.usable_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.0f} GiB"
    return [
        profile.name,
        gib,
        f"{profile.peak_bandwidth_bytes_per_s / 1e9:.1f} GB/s",
        profile.accelerator,
        profile.power_mode or "-",
        profile.backends[0].name,
        profile.provenance,
        ", ".join(profile.aliases) or "-",
        "-" if known.origin == "edgeq" else known.origin,
    ]


def _document(known: Known) -> dict[str, Any]:
    """One device for machines; of a file that is not valid, its name and why."""
    profile = known.profile
    document: dict[str, Any] = {"name": known.name, "origin": known.origin}
    if profile is None:
        return {**document, "error": str(known.error)}
    return {
        **document,
        "error": None,
        "aliases": list(profile.aliases),
        "summary": profile.summary,
        "arch": profile.arch,
        "accelerator": profile.accelerator,
        "total_bytes": profile.memory.total_bytes,
        "usable_bytes": profile.memory.usable_bytes,
        "bandwidth_bytes_per_s": profile.peak_bandwidth_bytes_per_s,
        "power_mode": profile.power_mode,
        "power_modes": [mode.name for mode in profile.power_modes],
        "backends": [backend.name for backend in profile.backends],
        "provenance": profile.provenance,
    }
