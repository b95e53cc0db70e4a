//! The table's rows of programs that have no CFI and keep frame pointers.
//!
//! Their frames are those of rows that were worked out from the code, or of a frame pointer that is proved; a frame
//! pointer that is believed too early skips a frame, which no chain allows.

use windlass_schema::StopReason;

use super::super::chain::Part::{In, Is, Some, Times};
use super::super::row::Program::Built;
use super::super::row::{Need, PLAIN, Row, Stop, Why};
use super::{DESCENT, LIBC, MAIN, often, seldom};

const KEEPING: [&str; 3] =
    ["-fno-omit-frame-pointer", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"];

/// Walks that end where nothing is proved. GCC has the frame's address in a register or behind rbp, and says so nowhere.
const UNPROVED: &[Stop] = &[
    Stop { reason: StopReason::FramePointer, most: 0.05, why: Why::Unrecognised },
    Stop { reason: StopReason::NoCfi, most: 1.0, why: Why::Unrecognised },
];

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "kept57",
        exercises: "57 frames by frame pointers alone",
        program: Built("cc", &["deep.c"], &KEEPING),
        arguments: &["26"],
        chains: &[often(&[Is("spin"), Times(DESCENT, 26)], MAIN)],
        ..PLAIN
    },
    Row {
        name: "keptsorted",
        exercises: "the same, called back by libc's qsort",
        program: Built("cc", &["sorted.c"], &KEEPING),
        chains: &[
            often(&[Is("weigh"), Is("compare"), In(LIBC, 2, 12), Is("sort")], MAIN),
            seldom(&[In(LIBC, 0, 12), Is("sort")], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "kepttails",
        exercises: "the same with calls that are jumps, behind a frame's end",
        program: Built("cc", &["tails.c"], &[KEEPING[0], KEEPING[1], KEEPING[2], "-foptimize-sibling-calls"]),
        chains: &[
            often(&[Is("spin"), Is("third")], MAIN),
            often(&[Is("spin"), Is("first")], MAIN),
            seldom(&[Is("second")], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "keptsmall",
        exercises: "the same without alignment, each function right behind the last",
        program: Built("cc", &["tails.c"], &[KEEPING[0], KEEPING[1], KEEPING[2], "-Os"]),
        chains: &[
            often(&[Is("spin"), Is("third"), Is("second"), Is("first")], MAIN),
            often(&[Is("spin"), Is("first")], MAIN),
            seldom(&[Some(&["third"], 0, 1), Some(&["second"], 0, 1), Is("first")], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "keptaligned",
        exercises: "the same with realigned frames, whose callers are not beside rbp",
        program: Built("cc", &["realigned.c"], &[KEEPING[0], KEEPING[1], KEEPING[2], "-mavx2"]),
        needs: &[Need::Cpu("avx2")],
        chains: &[seldom(
            &[
                In(LIBC, 0, 1),
                Some(&["spin"], 0, 1),
                Some(&["aligned_frame"], 0, 1),
                Some(&["variable_frame"], 0, 1),
                Some(&["many_arguments"], 0, 1),
            ],
            MAIN,
        )],
        stops: UNPROVED,
        ..PLAIN
    },
];
