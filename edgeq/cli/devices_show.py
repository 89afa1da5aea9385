"""``edgeq devices show``: one device, with the source of each number."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeq.profiles.device import DeviceProfile

EXAMPLES = """\
edgeq devices show jetson-orin
edgeq devices show jetson-agx-orin --power-mode maxn
edgeq devices show my-robot.yaml --json | jq .memory
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's arguments."""
    parser.add_argument("device", metavar="NAME|FILE", help="a device's name or alias, or a profile's YAML file")
    parser.add_argument("--power-mode", metavar="NAME", help="nvpmodel's name for it; default: the profile's own")
    # The list of devices has the same option; its default must not undo what stands before "show".
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the profile as JSON on stdout"
    )


def run(args: argparse.Namespace) -> int:
    """Show the profile."""
    from edgeq.cli.output import show, show_lines
    from edgeq.profiles.device import power_mode_of
    from edgeq.profiles.loader import load_profile
    from edgeq.types import to_json

    profile = load_profile(args.device)
    if args.power_mode is not None:
        profile = power_mode_of(profile, args.power_mode)
    if args.json:
        show(to_json(profile).decode())
    else:
        show_lines(profile_lines(profile))
    return 0


def profile_lines(profile: DeviceProfile) -> list[str]:
    """A whole profile for people: facts, tables, and a numbered list of sources."""
    from edgeq.cli.describe import sections
    from edgeq.cli.profile_text import ProfileText

    text = ProfileText(profile)
    body = sections(
        text.head(),
        text.facts(),
        text.power_modes(),
        text.backends(),
        text.budgets(),
        text.software(),
        text.measured(),
    )
    return sections(body, text.sources())
