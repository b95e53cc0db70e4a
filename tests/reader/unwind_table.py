#!/usr/bin/env python3
"""A second reader of unwind tables (magic `WLUT`, version 2), written from the specification alone.

The specification is the documentation of `schema`'s modules `table`, `page` and `record`; none of their code was
read. Where the Rust reader and this one agree, the specification says what is meant. A combination that it does not
define is refused here, bits that it gives no meaning are not looked at. All of a file is checked before its use.

    unwind_table.py FILE                      START END RULE for each interval, addresses of the image in hexadecimal
    unwind_table.py FILE --lookup ADDRESS...  ADDRESS RULE for each address (hexadecimal), by the search in its page

Intervals leave nothing out from the first page to the end of the last; equal neighbours are one. A RULE is one of

    cfa=CFA ra=RA fp=FP   CFA as in the record's table; the return address in a register, or in memory at cfa+N;
                          the frame pointer `same`, `undefined`, or in memory at cfa+N or (frame pointer)+N
    signal rsp+N          all registers from the saved context there
    end, no_cfi           no caller; nothing covers the address
    unsupported N         N is the code of the reason
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import calcsize, unpack_from
from typing import Any

from xxh3 import xxh3_64

VERSION = 2
MAX_PAGES, MAX_RECORDS, NO_PAGE = 1 << 16, 8192, 0xFFFF_FFFF
"""The text names these without a value, which is from the documented constants of `table`."""
HEADER_SIZE = 112
"""Bytes before the dictionary."""
PAGE_SIZE = 1 << 16
"""Bytes of code of a page."""
BLOCK_SIZE, BLOCKS = 256, 16
"""Bytes of code of a block; blocks of a group."""
WIDE_COUNTS, WIDE_RECORDS, NINTH_BITS = 1, 2, 4
PAST_RUN = 1 << 16
"""A distance in bytes behind every change of a run."""
REASONS = range(1, 14)

X86_64, AARCH64 = 1, 2
STACK_POINTER = {X86_64: "rsp", AARCH64: "sp"}
FRAME_POINTER = {X86_64: "rbp", AARCH64: "x29"}
REGISTERS = {
    X86_64: "rax rdx rcx rbx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15".split(),
    AARCH64: [f"x{number}" for number in range(31)] + ["sp"],
}
"""Names by DWARF number: psABI x86-64, figure 3.36; DWARF for the Arm 64-bit architecture, 4.1."""

(SP, FP, REGISTER, DEREF, DEREF_INDEXED, PLT, SIGNAL, PUSH_RUN, POP_RUN, END, NO_CFI, UNSUPPORTED, GO_STACK,
 OTHER_STACK, FAR_CFA) = range(15)
X86_64_ALONE = {DEREF_INDEXED, PLT, PUSH_RUN, POP_RUN, GO_STACK, OTHER_STACK}

States = list[tuple[int, str]]
"""What a record says: (distance in bytes, rule from there on), ascending, from distance 0. One for a plain record."""


class TableError(Exception):
    """What is wrong with a table: the field, and why."""


def require(holds: bool, field: str, problem: str) -> None:
    """Refuses the table unless `holds`."""
    if not holds:
        raise TableError(f"{field}: {problem}")


def fields(data: bytes, offset: int, layout: str, field: str) -> tuple[Any, ...]:
    """Little-endian values at a byte offset, which must lie in `data`."""
    size = calcsize(f"<{layout}")
    require(offset + size <= len(data), field, f"ends at {offset + size}, behind the end at {len(data)}")
    return unpack_from(f"<{layout}", data, offset)


# Records


def states_of(record: bytes, architecture: int, field: str) -> States:
    """What an 8-byte record says at each distance from its entry."""
    kind = record[0] & 15
    require(kind <= FAR_CFA, field, f"no kind {kind}")
    require(architecture == X86_64 or kind not in X86_64_ALONE, field, f"kind {kind} is for x86-64 alone")
    require(architecture == AARCH64 or kind != FAR_CFA, field, f"kind {kind} is for aarch64 alone")
    if kind in (PUSH_RUN, POP_RUN):
        return run_states(record, field)
    return [(0, plain_rule(record, architecture, field))]


def plain_rule(record: bytes, architecture: int, field: str) -> str:
    """The rule of a record of one row."""
    kind, byte1 = record[0] & 15, record[1]
    (offset,), (a, b) = unpack_from("<i", record, 4), unpack_from("<hh", record, 4)
    sp, fp = STACK_POINTER[architecture], FRAME_POINTER[architecture]
    if kind == END:
        return "end"
    if kind == NO_CFI:
        return "no_cfi"
    if kind == UNSUPPORTED:
        require(byte1 in REASONS, field, f"no reason {byte1}")
        return f"unsupported {byte1}"
    if kind == SIGNAL:
        return f"signal {sp}{a:+}"
    if kind == FAR_CFA:
        return far_rule(record, field)
    if kind in (REGISTER, DEREF):
        register = name_of(byte1 & 15 if architecture == X86_64 else byte1, architecture, field)
        cfa = f"{register}{offset:+}" if kind == REGISTER else f"*({register}{a:+}){b:+}"
    else:
        cfa = {
            SP: f"{sp}{offset:+}",
            FP: f"{fp}{offset:+}",
            DEREF_INDEXED: f"*(rsp+8*r9{a:+}){b:+}",
            PLT: f"rsp{b:+}+8*((rip&15)>={a})",
            GO_STACK: f"*(*(rsp{a:+})+8)-*(rsp{b:+}){8 * signed(byte1):+}",
            OTHER_STACK: f"other_stack(rbp{offset:+})",
        }[kind]
    return f"cfa={cfa} ra={return_address(record, architecture, field)} fp={frame_pointer(record, fp)}"


def far_rule(record: bytes, field: str) -> str:
    """The rule of a record whose places count from the CFA's register."""
    fp_rule, ra_rule = record[0] >> 4 & 3, record[0] >> 6
    f, offset = unpack_from("<hi", record, 2)
    require(ra_rule == 2 and fp_rule != 2, field, f"kind {FAR_CFA} with rules {fp_rule} and {ra_rule}")
    saved = f - offset
    require(-(2**31) <= saved < 2**31 - 8, field, f"kind {FAR_CFA} with a place at CFA{saved:+}")
    register = name_of(record[1], AARCH64, field)
    fp = ("same", f"cfa{saved:+}", "", "undefined")[fp_rule]
    return f"cfa={register}{offset:+} ra=cfa{saved + 8:+} fp={fp}"


def return_address(record: bytes, architecture: int, field: str) -> str:
    """Where a plain record says that the return address is."""
    kind, rule, byte1 = record[0] & 15, record[0] >> 6, record[1]
    (f,) = unpack_from("<h", record, 2)
    if rule == 0:
        return "cfa-8"
    if rule == 2:
        require(f + 8 != -8, field, "return-address rule 2 at CFA - 8, which is rule 0")
        return f"cfa{f + 8:+}"
    # Byte 1 is taken in these, by the CFA's register (but for half of it on x86-64) or by c.
    require(kind != GO_STACK, field, f"return-address rule {rule} in kind {kind}")
    if rule == 1:
        if architecture == X86_64:
            return name_of(byte1 >> 4, architecture, field)
        return "x30" if kind in (REGISTER, DEREF) else name_of(byte1, architecture, field)
    require(kind not in (REGISTER, DEREF), field, f"return-address rule 3 in kind {kind}")
    words = signed(byte1)
    above = f + 8 if record[0] >> 4 & 3 == 1 else None
    require(8 * words not in (-8, above), field, f"return-address rule 3 where another says CFA{8 * words:+}")
    return f"cfa{8 * words:+}"


def frame_pointer(record: bytes, frame_pointer_name: str) -> str:
    """Where a plain record says that the caller's frame pointer is."""
    (f,) = unpack_from("<h", record, 2)
    return ("same", f"cfa{f:+}", f"{frame_pointer_name}{f:+}", "undefined")[record[0] >> 4 & 3]


def name_of(number: int, architecture: int, field: str) -> str:
    """Name of a register by its DWARF number."""
    require(number < len(REGISTERS[architecture]), field, f"no register {number}")
    return REGISTERS[architecture][number]


def signed(byte: int) -> int:
    """A byte as i8."""
    return byte - 256 if byte >= 128 else byte


def run_states(record: bytes, field: str) -> States:
    """What a run says, from distance 0 and from each of its changes on.

    >>> run_states(bytes.fromhex("4701090080000000"), "push rbp; mov rbp, rsp")[1:]
    [(1, 'cfa=rsp+16 ra=cfa-8 fp=cfa-16'), (4, 'cfa=rbp+16 ra=cfa-8 fp=cfa-16')]
    >>> run_states(bytes.fromhex("580307008100f0ff"), "pop rbx; pop rbp; ret")[1:]
    [(1, 'cfa=rsp+16 ra=cfa-8 fp=cfa-16'), (2, 'cfa=rsp+8 ra=cfa-8 fp=same'), (3, 'no_cfi')]
    """
    byte0, base, mask, event_byte, extra, f = unpack_from("<BBHBBh", record)
    push, last, frame = byte0 & 15 == PUSH_RUN, bool(byte0 & 0x40), bool(byte0 & 0x80)
    form = (last, frame, extra > 0)
    forms = [(0, 0, 0), (0, 0, 1), (1, 0, 0)] if push else [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1)]
    require(byte0 & 0x20 == 0, field, "bit 5 of a run's byte 0 is set")
    require(form in forms, field, f"a run with LAST {int(last)}, FRAME {int(frame)}, e {extra}")
    changes = [bit + 1 for bit in range(16) if mask >> bit & 1]
    # Of no distance where the record has none.
    event = (event_byte & 15) + 1 if event_byte & 0x80 else PAST_RUN
    # From where on the table of special last changes holds: behind the frame-pointer event, if there is one.
    special = changes[-1] if changes and (last or extra) else PAST_RUN
    require(special < PAST_RUN or not (last or extra), field, "a run without the last change that it describes")
    require(event == PAST_RUN or event < special, field, "a run's frame-pointer event not before its last change")
    base_fp = f"cfa{f:+}" if byte0 & 0x10 else "same"
    states: States = []
    for distance in sorted({0, *changes, *([event] if event != PAST_RUN else [])}):
        moved = sum(change <= distance for change in changes)
        words, register, fp = base + moved if push else base - moved, "rsp", base_fp
        if distance >= event:
            saved_at = base + sum(change <= event for change in changes)
            fp = f"cfa{-8 * saved_at:+}" if push else "same"
        if distance >= special:
            if not push and not extra:
                return [*states, (distance, "no_cfi")]
            if push:
                words, register = (words - 1, "rbp") if last else (words + extra, "rsp")
            else:
                words, register, fp = (extra, "rbp", "cfa-16") if frame else (base + extra, "rsp", base_fp)
        require(words > 0, field, "a run whose CFA is not above the stack pointer")
        states.append((distance, f"cfa={register}{8 * words:+} ra=cfa-8 fp={fp}"))
    return states


# Pages


@dataclass(frozen=True)
class Page:
    """The rows of 64 KiB of code: `low` and `numbers` hold an entry's low address byte and dictionary number."""

    first_group: int
    group_starts: tuple[int, ...]
    counts: list[int]
    low: bytes
    numbers: list[int]

    def lookup(self, offset: int) -> tuple[int, int] | None:
        """Dictionary number and distance in bytes for an offset in the page, as the specification searches."""
        group = (offset >> 12) - self.first_group
        if group < 0:
            return None
        if group >= len(self.group_starts):
            return self.numbers[-1], PAST_RUN
        block = (offset >> 8) - BLOCKS * self.first_group
        start = self.group_starts[group] + sum(self.counts[BLOCKS * group : block])
        end = start + self.counts[block]
        at_most = sum(low <= offset & 0xFF for low in self.low[start:end])
        entry = start + at_most - 1
        if entry < 0:
            return None
        return self.numbers[entry], (offset & 0xFF) - self.low[entry] if at_most else PAST_RUN

    def entries(self) -> Iterator[tuple[int, int]]:
        """(offset in the page in bytes, dictionary number) of each entry."""
        blocks = (block for block, count in enumerate(self.counts, BLOCKS * self.first_group) for _ in range(count))
        return ((BLOCK_SIZE * block + low, number) for block, low, number in zip(blocks, self.low, self.numbers))


def parse_page(area: bytes, start: int, records: list[States], field: str) -> tuple[Page, int]:
    """The page at a byte offset of the page area, and the offset of its end, padding included."""
    flags, first, groups, locals_low, entries, common, locals_high = fields(area, start, "BBBBHBB", field)
    at = start + 8
    local_count = locals_low | locals_high << 8
    wide_records = bool(flags & WIDE_RECORDS)
    require(flags < 8 and flags != 6 and flags != 7, f"{field} flags", f"{flags:#x}")
    require(first <= 15, f"{field} first group", f"{first} is above 15")
    require(1 <= groups <= 16 - first, f"{field} G", f"{groups} is not 1 to {16 - first}")
    require(entries >= 1, f"{field} E", "no entry")
    require(not (wide_records and local_count), f"{field} L", f"{local_count} locals with WIDE_RECORDS")

    def take(layout: str, name: str) -> tuple[Any, ...]:
        nonlocal at
        values = fields(area, at, layout, f"{field} {name}")
        at += calcsize(f"<{layout}")
        return values

    if flags & WIDE_COUNTS:
        counts = list(take(f"{BLOCKS * groups}B", "counts"))
    else:
        counts = [word >> 4 * b & 15 for word in take(f"{groups}Q", "counts") for b in range(BLOCKS)]
    group_starts = take(f"{groups}H", "first entries of groups")
    for group, number in enumerate(group_starts):
        expected = sum(counts[: BLOCKS * group])
        require(number == expected, f"{field} first entry of group {first + group}", f"{number}, not {expected}")
    require(sum(counts) == entries, f"{field} E", f"{entries}, but the blocks have {sum(counts)}")
    local_numbers = take(f"{local_count}H", "locals")
    numbers = list(take(f"{entries}H", "dictionary numbers")) if wide_records else []
    (low,) = take(f"{entries}s", "low bytes")
    if not wide_records:
        (short,) = take(f"{entries}s", "record numbers")
        (ninth,) = take(f"{(entries + 7) // 8}s", "ninth bits") if flags & NINTH_BITS else (bytes(entries),)
        full = [n | (ninth[i >> 3] >> (i & 7) & 1) << 8 for i, n in enumerate(short)]
        for n in full:
            require(n < common + local_count, f"{field} record numbers", f"{n}, of {common + local_count}")
        numbers = [n if n < common else local_numbers[n - common] for n in full]
    for n in (*numbers, *local_numbers):
        require(n < len(records), f"{field} dictionary numbers", f"{n}, of {len(records)}")
    end = (at + 7) & ~7
    require(not any(area[at:end]) and end <= len(area), f"{field} padding", "not zero, or behind the page area")
    page = Page(first, group_starts, counts, low, numbers)
    check_entries(page, records, field)
    return page, end


def check_entries(page: Page, records: list[States], field: str) -> None:
    """Addresses ascend, and a run's last change lies in the block of its entry."""
    before = -1
    for offset, number in page.entries():
        require(offset > before, f"{field} low bytes", f"{offset:#x} does not ascend")
        last_change = records[number][-1][0]
        require(offset % BLOCK_SIZE + last_change < BLOCK_SIZE, f"{field} entry {offset:#x}", "leaves its block")
        before = offset


# Tables


@dataclass(frozen=True)
class Table:
    """A table that has been checked. `base` is the image address of page 0."""

    architecture: int
    base: int
    build_id: bytes
    records: list[States]
    pages: list[Page | None]

    def lookup(self, address: int) -> str:
        """The rule of an image address."""
        number = (address - self.base) >> 16
        page = self.pages[number] if 0 <= number < len(self.pages) else None
        found = page.lookup(address & 0xFFFF) if page else None
        if found is None:
            return "no_cfi"
        record, distance = found
        return [rule for at, rule in self.records[record] if at <= distance][-1]

    def changes(self) -> Iterator[tuple[int, str]]:
        """(image address, rule from there on), runs expanded, ascending."""
        for number, page in enumerate(self.pages):
            start = self.base + PAGE_SIZE * number
            entries = list(page.entries()) if page else []
            # The rows of a page stand on their own: before its first entry nothing is covered.
            if not entries or entries[0][0] > 0:
                yield start, "no_cfi"
            for (offset, record), (end, _) in zip(entries, [*entries[1:], (PAGE_SIZE, 0)]):
                yield from ((start + offset + at, rule) for at, rule in self.records[record] if offset + at < end)

    def intervals(self) -> Iterator[tuple[int, int, str]]:
        """(first image address, address behind the last, rule), equal neighbours merged."""
        start, rule = self.base, ""
        for address, next_rule in self.changes():
            if next_rule != rule:
                if rule:
                    yield start, address, rule
                start, rule = address, next_rule
        if rule:
            yield start, self.base + PAGE_SIZE * len(self.pages), rule


def parse(data: bytes) -> Table:
    """Checks the bytes of a file; `TableError` names the field that is wrong."""
    magic, version, architecture, zero, checksum, base, page_count, record_count, area_size, _rows, id_length = fields(
        data, 0, "4sHBBQQIIIIB", "header"
    )
    require(magic == b"WLUT", "magic", f"{magic!r}")
    require(version == VERSION, "version", f"{version}, not {VERSION}")
    require(architecture in (X86_64, AARCH64), "architecture", f"{architecture}")
    require(zero == 0, "byte 7", f"{zero}, not 0")
    require(base % PAGE_SIZE == 0, "base", f"{base:#x} is no multiple of {PAGE_SIZE}")
    require(page_count <= MAX_PAGES, "P", f"{page_count} is above {MAX_PAGES}")
    require(record_count <= MAX_RECORDS, "R", f"{record_count} is above {MAX_RECORDS}")
    require(area_size % 8 == 0, "B", f"{area_size} is no multiple of 8")
    build_id, zeros = fields(data, 41, "64s7s", "header")
    require(id_length <= 64, "length of the build-ID", f"{id_length} is above 64")
    require(not any(build_id[id_length:]), "build-ID", "its padding is not zero")
    require(not any(zeros), "bytes 105 to 111", "not zero")
    directory_at = HEADER_SIZE + 8 * record_count
    area_at = directory_at + 4 * (page_count + page_count % 2)
    size = area_at + area_size
    require(len(data) == size, "file size", f"{len(data)}, but the header says {size}")
    require(xxh3_64(data[16:]) == checksum, "checksum", f"{checksum:#x}, but the bytes have {xxh3_64(data[16:]):#x}")
    records = [
        states_of(data[HEADER_SIZE + 8 * n : HEADER_SIZE + 8 * n + 8], architecture, f"record {n}")
        for n in range(record_count)
    ]
    directory = fields(data, directory_at, f"{page_count}I", "directory")
    require(not any(data[directory_at + 4 * page_count : area_at]), "directory padding", "not zero")
    area, pages, end = data[area_at:], [], 0
    for number, place in enumerate(directory):
        if place == NO_PAGE:
            pages.append(None)
            continue
        require(8 * place >= end, f"directory entry {number}", f"{8 * place} is before the last page's end, {end}")
        page, end = parse_page(area, 8 * place, records, f"page {number}")
        pages.append(page)
    return Table(architecture, base, build_id[:id_length], records, pages)


def main() -> int:
    """The command line. Exit code 1 is a file that is no table."""
    arguments = argparse.ArgumentParser(description="Reads an unwind table by its specification.")
    arguments.add_argument("file", type=Path, metavar="FILE")
    arguments.add_argument("--lookup", nargs="+", type=lambda text: int(text, 16), metavar="ADDRESS")
    options = arguments.parse_args()
    try:
        table = parse(options.file.read_bytes())
    except (OSError, TableError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    if options.lookup:
        lines = (f"{address:#x} {table.lookup(address)}\n" for address in options.lookup)
    else:
        lines = (f"{start:#x} {end:#x} {rule}\n" for start, end, rule in table.intervals())
    sys.stdout.writelines(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
