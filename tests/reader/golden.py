#!/usr/bin/env python3
"""Writes the golden tables that both readers must read alike: every kind of record, every form of a page.

    golden.py FOLDER    writes golden.wlut (x86-64) and golden-aarch64.wlut

They are put together here from the specification and not by the writer of `schema`: that one chooses the smallest
form of a page, so pages with nine-bit or wide record numbers would need hundreds of records.
"""

import sys
from pathlib import Path
from struct import pack

from unwind_table import (
    AARCH64, DEREF, DEREF_INDEXED, END, FAR_CFA, FP, GO_STACK, HEADER_SIZE, NINTH_BITS, NO_CFI, NO_PAGE, OTHER_STACK,
    PLT, POP_RUN, PUSH_RUN, REASONS, REGISTER, SIGNAL, SP, UNSUPPORTED, VERSION, WIDE_COUNTS, WIDE_RECORDS, X86_64,
)
from xxh3 import xxh3_64

LAST, FRAME = 0x40, 0x80
RBX, RDX, RDI, RBP, R10, R11 = 3, 1, 5, 6, 10, 11
Entry = tuple[int, int]
"""Offset in the page in bytes, record number."""


def plain(kind: int, offset: int = 0, *, fp: int = 0, f: int = 0, ra: int = 0, byte1: int = 0) -> bytes:
    """A record with an offset of four bytes; `fp` and `ra` are numbers of rules."""
    return pack("<BBhi", kind | fp << 4 | ra << 6, byte1 & 0xFF, f, offset)


def pair(kind: int, a: int, b: int = 0, **rest: int) -> bytes:
    """A record with two offsets of two bytes."""
    return plain(kind, **rest)[:4] + pack("<hh", a, b)


def run(kind: int, base: int, changes: list[int], event: int = 0, e: int = 0, f: int | None = None) -> bytes:
    """A run; `changes` and `event` are distances in bytes, `f` is that of a base rule AT_CFA."""
    mask = sum(1 << distance - 1 for distance in changes)
    event_byte = 0x80 | event - 1 if event else 0
    return pack("<BBHBBh", kind | (f is not None) << 4, base, mask, event_byte, e, f or 0)


def page(flags: int, entries: list[Entry], common: int, local_numbers: list[int], groups: range) -> bytes:
    """A page over these groups; with WIDE_RECORDS, record numbers are dictionary numbers."""
    blocks = range(16 * groups.start, 16 * groups.stop)
    counts = [sum(offset >> 8 == block for offset, _ in entries) for block in blocks]
    out = pack("<BBBBHBB", flags, groups.start, len(groups), len(local_numbers) & 0xFF, len(entries), common,
               len(local_numbers) >> 8)
    if flags & WIDE_COUNTS:
        out += bytes(counts)
    else:
        words = [sum(count << 4 * b for b, count in enumerate(counts[g : g + 16])) for g in range(0, len(counts), 16)]
        out += pack(f"<{len(words)}Q", *words)
    out += pack(f"<{len(groups)}H", *(sum(counts[: 16 * group]) for group in range(len(groups))))
    out += pack(f"<{len(local_numbers)}H", *local_numbers)
    if flags & WIDE_RECORDS:
        out += pack(f"<{len(entries)}H", *(record for _, record in entries))
    out += bytes(offset & 0xFF for offset, _ in entries)
    if not flags & WIDE_RECORDS:
        out += bytes(record & 0xFF for _, record in entries)
    if flags & NINTH_BITS:
        bits = sum((record >> 8) << i for i, (_, record) in enumerate(entries))
        out += bits.to_bytes((len(entries) + 7) // 8, "little")
    return out + bytes(-len(out) % 8)


def table(architecture: int, base: int, build_id: bytes, records: list[bytes], pages: list[bytes | None]) -> bytes:
    """A file. The number of rows is for information only, and 0."""
    places, area = [], b""
    for content in pages:
        places.append(NO_PAGE if content is None else len(area) // 8)
        area += content or b""
    header = pack("<QIIIIB64s7x", base, len(pages), len(records), len(area), 0, len(build_id), build_id)
    directory = pack(f"<{len(pages)}I", *places) + bytes(len(pages) % 2 * 4)
    rest = header + b"".join(records) + directory + area
    file = pack("<4sHBBQ", b"WLUT", VERSION, architecture, 0, xxh3_64(rest)) + rest
    assert len(file) - len(rest) + len(header) == HEADER_SIZE
    return file


def x86_64() -> bytes:
    """Every kind, every rule, every form of a run and of a page.

    Some runs are cut short by the next entry; entries lie at a page's first and at its last byte.
    """
    records = [
        plain(NO_CFI),
        bytes.fromhex("4701090080000000"),
        bytes.fromhex("580307008100f0ff"),
        plain(SP, 8),
        plain(SP, 16, fp=1, f=-16),
        plain(SP, 2**31 - 1, fp=3, ra=1, byte1=R11 << 4),
        plain(SP, 48, fp=1, f=-32, ra=2),
        plain(SP, 8, ra=3, byte1=-128),
        plain(SP, 64, fp=1, f=-16, ra=3, byte1=127),
        plain(FP, 16, fp=1, f=-16),
        plain(FP, -(2**31), fp=2, f=-(2**15)),
        plain(REGISTER, 0, fp=2, byte1=R10),
        plain(REGISTER, 8, ra=1, byte1=RDX | RDI << 4),
        pair(DEREF, -8, 0, fp=2, byte1=RBP),
        pair(DEREF, 2**15 - 1, -(2**15), fp=1, f=2**15 - 1, ra=1, byte1=RBX | R11 << 4),
        pair(DEREF_INDEXED, -96, 8),
        pair(PLT, 11, 8),
        pair(SIGNAL, 40),
        pair(SIGNAL, -128),
        plain(END),
        pair(GO_STACK, 48, 56, byte1=-2),
        pair(GO_STACK, 48, 56, fp=1, f=-24, ra=2, byte1=3),
        plain(OTHER_STACK, 16, fp=1, f=-16),
        run(PUSH_RUN, 1, [2, 3, 4], event=3),
        run(PUSH_RUN, 2, [1, 16], e=255, f=-16),
        run(PUSH_RUN | LAST, 1, [2, 6], event=2, f=-8),
        run(POP_RUN, 4, [1, 3, 5], event=5, f=-16),
        run(POP_RUN, 3, [1, 2], event=6, f=-16),
        run(POP_RUN | LAST, 2, [1, 2], event=1, f=-16),
        run(POP_RUN | LAST, 3, [1, 3, 4], event=3, e=5, f=-24),
        run(POP_RUN | LAST | FRAME, 1, [1], e=2),
        *(plain(UNSUPPORTED, byte1=reason) for reason in REASONS),
    ]
    count = len(records)
    # One of each, in blocks that are as full as a narrow count says: 15. Every run has room for its last change.
    spread = [(0x1000 + 0x100 * (n // 15) + 0x10 * (n % 15), n) for n in range(count)]
    # 20 in one block, the last groups empty.
    dense = [(0x3400 + 3 * n, n % count) for n in range(20)] + [(0x34F0, count - 1), (0x4000, 24), (0x4020, 4)]
    many_locals = [n % count for n in range(258)]
    nine = [(0x0, 257), (0x7, 3), (0x1FFE, 256), (0x8000, 255), (0x8100, 23), (0x8104, 1), (0xFFFF, 22)]
    pages = [
        page(0, [(0x1000, 1), (0x1005, 0)], 2, [], range(1, 2)),
        page(0, spread, 3, list(range(3, count)), range(1, 2)),
        page(WIDE_COUNTS, dense, count, [], range(3, 6)),
        None,
        page(WIDE_RECORDS, [(0xF000, 2), (0xFFEF, 25)], 0, [], range(15, 16)),
        page(NINTH_BITS, nine, 0, many_locals, range(16)),
        page(WIDE_COUNTS | WIDE_RECORDS, dense, 0, [], range(3, 16)),
        page(WIDE_COUNTS | NINTH_BITS, nine, 0, many_locals, range(16)),
        # What held at the end of a page is stated again at the next one's first byte.
        page(0, [(0x0, nine[-1][1]), (0x20, 0)], count, [], range(1)),
    ]
    return table(X86_64, 0x40_0000, bytes(range(1, 21)), records, pages)


def aarch64() -> bytes:
    """What differs: registers take a whole byte, and the return address beside a CFA register is x30."""
    records = [
        plain(NO_CFI),
        plain(SP, 0, ra=1, byte1=30),
        plain(SP, 32, fp=1, f=-32, ra=2),
        plain(FP, 16, fp=1, f=-16, ra=3, byte1=-3),
        plain(REGISTER, 16, ra=1, byte1=19),
        plain(REGISTER, 0, fp=1, f=-32, ra=2, byte1=9),
        pair(DEREF, 8, -16, fp=3, byte1=28),
        pair(SIGNAL, 304),
        plain(END),
        plain(UNSUPPORTED, byte1=3),
        plain(FAR_CFA, 65632, fp=1, f=0, ra=2, byte1=31),
        plain(FAR_CFA, 16400, f=-8, ra=2, byte1=29),
        plain(FAR_CFA, 2**31 - 1, fp=3, f=-1, ra=2, byte1=9),
        plain(FAR_CFA, -(2**31) + 2**15, fp=1, f=2**15 - 9, ra=2, byte1=9),
    ]
    entries = [(0x10 * n, n) for n in range(1, len(records))]
    return table(AARCH64, 0, b"\x2a" * 64, records, [page(0, [*entries, (0x100, 0)], len(records), [], range(1))])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "golden.wlut").write_bytes(x86_64())
    (folder / "golden-aarch64.wlut").write_bytes(aarch64())
