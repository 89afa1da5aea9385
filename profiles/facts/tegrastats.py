"""Lines that NVIDIA's ``tegrastats`` prints, of every format from JetPack 4 to 7.

Formats: the appendix "tegrastats Utility" of the Jetson Linux Developer Guide; Thor's clocks have no load before ``@``
and its rails and temperatures have a peak. "MB" and "kB" there are binary. Text that is not understood is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from edgeq.record import Record

__all__ = ["CpuLoad", "EngineLoad", "PowerRail", "TegraStats", "ThermalZone", "parse_tegrastats"]

_N = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
_CLOCK = rf"\[[^\]]{{0,200}}\]|{_N}"
_TIME = re.compile(r"[0-9]{2}-[0-9]{2}-[0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2}(?=\s|$)")
_RAM = re.compile(r"RAM ([0-9]{1,9})/([0-9]{1,9})MB(?: ?\(lfb ([0-9]{1,9})x([0-9]{1,9})(MB|kB)\))?(?=\s|$)")
_SWAP = re.compile(r"SWAP ([0-9]{1,9})/([0-9]{1,9})MB(?: ?\(cached ([0-9]{1,9})MB\))?(?=\s|$)")
_IRAM = re.compile(r"IRAM ([0-9]{1,9})/([0-9]{1,9})kB(?: ?\(lfb [0-9]{1,9}kB\))?(?=\s|$)")
_CPU = re.compile(rf"(?:CPU|cpu) \[([^\]]{{0,4000}})\](?:@({_N}))?(?=\s|$)")
_MTS = re.compile(rf"MTS fg ({_N})% bg ({_N})%(?=\s|$)")
_TEMPERATURE = re.compile(rf"([A-Za-z][\w.-]{{0,63}})@(-?{_N})C(?:/(-?{_N})C)?(?=\s|$)")
_ENGINE = re.compile(rf"([A-Z][A-Z0-9_]{{0,63}}) (?:(off)|({_N})%(?:@({_CLOCK}))?|@({_CLOCK}))(?=\s|$)")
# A bare number is a clock only where it is documented as one; after any other name it could mean anything.
_BARE = re.compile(rf"(APE|MSENC|OFA|VIC_FREQ|(?:NVENC|NVDEC|NVJPG|NVDLA)[0-9]?|PVA[0-9]?_FREQ) ({_N})(?=\s|$)")
_RAIL = re.compile(
    rf"([A-Z][A-Z0-9_]{{0,63}}) (?:(-?{_N})mW(?:/(-?{_N})mW)?(?:/(-?{_N})mW)?"
    r"|(-?[0-9]{1,9})/(-?[0-9]{1,9}))(?=\s|$)"
)
_CPU_ITEM = re.compile(rf"({_N})%(?:@({_N}))?")
_WORD = re.compile(r"\S+")
# Written by tegrastats for a sensor of a part that is switched off.
_NO_READING_C = -256.0


class CpuLoad(Record, frozen=True, kw_only=True):
    """One CPU.

    Attributes:
        online: None if the text was of no known form.
        load_percent: of the time, relative to the current frequency.
        frequency_mhz: now.
    """

    online: bool | None
    load_percent: float | None = None
    frequency_mhz: float | None = None


class EngineLoad(Record, frozen=True, kw_only=True):
    """An engine or clock: GPU, memory controller, video, deep learning accelerator.

    Attributes:
        name: as it was printed: ``"GR3D_FREQ"``, ``"EMC_FREQ"``, ``"NVENC"``.
        on: False if it was printed as "off".
        load_percent: None if it was not printed, as on Thor.
        frequencies_mhz: one for each cluster; None for one that is no number.
    """

    name: str
    on: bool = True
    load_percent: float | None = None
    frequencies_mhz: tuple[float | None, ...] = ()


class ThermalZone(Record, frozen=True, kw_only=True):
    """One temperature.

    Attributes:
        name: as it was printed: ``"tj"``, ``"GPU"``.
        now_c: None if the part is switched off.
        peak_c: since tegrastats was started; only newer ones print it.
    """

    name: str
    now_c: float | None
    peak_c: float | None = None


class PowerRail(Record, frozen=True, kw_only=True):
    """One supply rail. Names can be repeated ("NC").

    Attributes:
        name: as it was printed: ``"VDD_IN"``, ``"POM_5V_IN"``.
        now_mw: at this moment.
        average_mw: since tegrastats was started.
        peak_mw: since tegrastats was started; only newer ones print it.
    """

    name: str
    now_mw: float
    average_mw: float | None = None
    peak_mw: float | None = None


class TegraStats(Record, frozen=True, kw_only=True):
    """One line. None or empty stands for what it does not hold.

    Attributes:
        time: of the board's clock, ``"MM-DD-YYYY HH:MM:SS"``.
        ram_used_bytes: without what the kernel can drop.
        ram_total_bytes: MemTotal.
        largest_free_blocks: how many free blocks of the largest size there are.
        largest_free_block_bytes: that size; contiguous.
        swap_used_bytes: of all swap.
        swap_total_bytes: all swap.
        swap_cached_bytes: of it, also in memory.
        iram_used_bytes: memory of the video engine.
        iram_total_bytes: memory of the video engine.
        cpus: in their order.
        mts_foreground_percent: code translation of NVIDIA's own cores (TX2, Xavier).
        mts_background_percent: as above.
        engines: in the order of the line.
        temperatures: in the order of the line.
        rails: in the order of the line.
        unknown: what was not understood, word by word.
    """

    time: str | None = None
    ram_used_bytes: int | None = None
    ram_total_bytes: int | None = None
    largest_free_blocks: int | None = None
    largest_free_block_bytes: int | None = None
    swap_used_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_cached_bytes: int | None = None
    iram_used_bytes: int | None = None
    iram_total_bytes: int | None = None
    cpus: tuple[CpuLoad, ...] = ()
    mts_foreground_percent: float | None = None
    mts_background_percent: float | None = None
    engines: tuple[EngineLoad, ...] = ()
    temperatures: tuple[ThermalZone, ...] = ()
    rails: tuple[PowerRail, ...] = ()
    unknown: tuple[str, ...] = ()

    def engine(self, *names: str) -> EngineLoad | None:
        """The first engine of one of these names."""
        return next((engine for engine in self.engines if engine.name in names), None)

    @property
    def gpu(self) -> EngineLoad | None:
        """Load and clocks of the GPU."""
        return self.engine("GR3D_FREQ", "GR3D")

    @property
    def emc(self) -> EngineLoad | None:
        """Load and clock of the memory controller."""
        return self.engine("EMC_FREQ", "EMC")

    def temperature_c(self, name: str) -> float | None:
        """Of a zone, in any case of letters: releases write both "GPU" and "gpu"."""
        return next((zone.now_c for zone in self.temperatures if zone.name.lower() == name.lower()), None)

    def rail(self, name: str) -> PowerRail | None:
        """The first rail of that name."""
        return next((rail for rail in self.rails if rail.name == name), None)


class _Found:
    """What a line gave so far; lists grow, so that a long line costs no more than its length."""

    def __init__(self) -> None:
        self.single = TegraStats()
        self.engines: list[EngineLoad] = []
        self.zones: list[ThermalZone] = []
        self.rails: list[PowerRail] = []

    def time(self, match: re.Match[str]) -> None:
        self.single = replace(self.single, time=match[0])

    def ram(self, match: re.Match[str]) -> None:
        unit = 1 << (20 if match[5] == "MB" else 10)
        self.single = replace(
            self.single,
            ram_used_bytes=int(match[1]) << 20,
            ram_total_bytes=int(match[2]) << 20,
            largest_free_blocks=int(match[3]) if match[3] else None,
            largest_free_block_bytes=int(match[4]) * unit if match[4] else None,
        )

    def swap(self, match: re.Match[str]) -> None:
        self.single = replace(
            self.single,
            swap_used_bytes=int(match[1]) << 20,
            swap_total_bytes=int(match[2]) << 20,
            swap_cached_bytes=int(match[3]) << 20 if match[3] else None,
        )

    def iram(self, match: re.Match[str]) -> None:
        used, total = int(match[1]) << 10, int(match[2]) << 10
        self.single = replace(self.single, iram_used_bytes=used, iram_total_bytes=total)

    def cpu(self, match: re.Match[str]) -> None:
        cpus = tuple(_cpu(item.strip(), _float(match[2])) for item in match[1].split(","))
        self.single = replace(self.single, cpus=cpus)

    def mts(self, match: re.Match[str]) -> None:
        self.single = replace(
            self.single, mts_foreground_percent=float(match[1]), mts_background_percent=float(match[2])
        )

    def temperature(self, match: re.Match[str]) -> None:
        now = float(match[2])
        self.zones.append(
            ThermalZone(name=match[1], now_c=None if now == _NO_READING_C else now, peak_c=_float(match[3]))
        )

    def engine(self, match: re.Match[str]) -> None:
        clocks = _clocks(match[4] or match[5])
        self.engines.append(
            EngineLoad(name=match[1], on=match[2] is None, load_percent=_float(match[3]), frequencies_mhz=clocks)
        )

    def bare(self, match: re.Match[str]) -> None:
        self.engines.append(EngineLoad(name=match[1], frequencies_mhz=(float(match[2]),)))

    def rail(self, match: re.Match[str]) -> None:
        # JetPack 4 prints the rails of some boards without their unit; they are milliwatts there too.
        now, average = float(match[2] or match[5]), _float(match[3] or match[6])
        self.rails.append(PowerRail(name=match[1], now_mw=now, average_mw=average, peak_mw=_float(match[4])))


# The exact forms come before the general ones that would match them too.
_FORMS: tuple[tuple[re.Pattern[str], Callable[[_Found, re.Match[str]], None]], ...] = (
    (_TIME, _Found.time),
    (_RAM, _Found.ram),
    (_SWAP, _Found.swap),
    (_IRAM, _Found.iram),
    (_CPU, _Found.cpu),
    (_MTS, _Found.mts),
    (_TEMPERATURE, _Found.temperature),
    (_ENGINE, _Found.engine),
    (_BARE, _Found.bare),
    (_RAIL, _Found.rail),
)


def parse_tegrastats(line: str) -> TegraStats:
    """Understand what is of a known form, keep the other words in ``unknown``; never raises, whatever the text."""
    found = _Found()
    unknown = tuple(_other_words(line, found))
    return replace(
        found.single,
        engines=tuple(found.engines),
        temperatures=tuple(found.zones),
        rails=tuple(found.rails),
        unknown=unknown,
    )


def _other_words(line: str, found: _Found) -> Iterator[str]:
    """Hand every known form to ``found``; yield the words that belong to none."""
    word = _WORD.search(line)
    while word is not None:
        at, end = word.span()
        for pattern, take in _FORMS:
            match = pattern.match(line, at)
            if match is not None:
                take(found, match)
                end = match.end()
                break
        else:
            yield line[at:end]
        word = _WORD.search(line, end)


def _cpu(item: str, common_mhz: float | None) -> CpuLoad:
    if item == "off":
        return CpuLoad(online=False)
    match = _CPU_ITEM.fullmatch(item)
    if match is None:
        return CpuLoad(online=None)
    return CpuLoad(online=True, load_percent=float(match[1]), frequency_mhz=_float(match[2]) or common_mhz)


def _clocks(text: str | None) -> tuple[float | None, ...]:
    if text is None:
        return ()
    items = [item.strip() for item in text.strip("[]").split(",")]
    return tuple(float(item) if re.fullmatch(_N, item) else None for item in items)


def _float(text: str | None) -> float | None:
    return float(text) if text else None
