"""A neutral text that benchmark prompts are cut from."""

from __future__ import annotations

__all__ = ["TEXT"]

TEXT = """\
A small robot leaves its dock at seven in the morning. It has four wheels, one arm with a gripper, two cameras and a
ring of distance sensors. Overnight the floor was cleaned, so the map that it made yesterday no longer shows where every
box stands. It drives slowly along the first aisle, compares what it sees with what it remembers, and marks each
difference. Near the window the light is bright and the left camera needs a moment to adapt. Behind the third shelf a
pallet blocks the way; the planner looks for another route, finds one that is eleven metres longer, and takes it.

Today there are nine orders. The first asks for three bearings of 22 mm and a roll of tape, the second for a torque
wrench, and the third for nothing but an empty crate. Each item has a place, a weight and a date. Heavy things go to the
bottom, glass goes to the top, and whatever was promised for noon goes first. When two orders need the same part, the
older one wins. The robot writes down what it took, when, and from where, because somebody will ask.

At 09:40 a person walks into the aisle. The robot stops, waits, and says good morning. It has learned that people rarely
move in a straight line and that children move in no line at all. After four seconds the way is free again. A little
later its battery falls below one third; it finishes the order in its hands, sends a short message to the others, and
returns to the dock. Charging takes fifty minutes. Meanwhile the second robot, which is older and somewhat louder, does
the work of both.

In the afternoon the temperature rises to 31 degrees. The processor would run hotter than it should, so its clock is
lowered a little, and every answer takes a few milliseconds longer than before. Nobody notices, since the limits were
chosen with this in mind. At the end of the day the log holds 412 entries: 9 orders, 37 detours, 2 warnings, no errors.
The lights go out, the doors close, and the map for tomorrow is saved under a new name.
"""
