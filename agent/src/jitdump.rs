//! What does a jitdump say, and what has been added to it?
//!
//! The format is that of the kernel's `tools/perf/Documentation/jitdump-specification.txt`: a header, then records, each
//! with its size and the time of what happened, in the machine's byte order. Of code that was made, the file holds
//! the bytes too; they are passed over. Times are those of `CLOCK_MONOTONIC`, as samples have them, but for the
//! process's time namespace ([`time_namespace`](crate::time_namespace)); a file
//! with times of another clock cannot say which code a sample met, and is not used.
//!
//! ```text
//! header   u32 magic 0x4A695444, u32 version 1, u32 its size, u32 ELF machine, u32 0, u32 process, u64 time, u64 flags
//! record   u32 kind, u32 its size with this, u64 time, then by kind
//!   0      u32 process, u32 thread, u64 address, u64 code address, u64 code size, u64 number, name, NUL, code
//!   1      u32 process, u32 thread, u64 address, u64 old code address, u64 new code address, u64 code size, u64 number
//! ```
//! Other kinds (lines, unwinding, close) say nothing of names.

use windlass_schema::perf_map::{MAX_NAME_BYTES, clean_name};

use crate::code_records::{CodeEvent, Progress, ReadAt, Record, RecordsError};

/// `JiTD` as the writer's machine stores it.
const MAGIC: u32 = 0x4A69_5444;
const HEADER_BYTES: u64 = 40;
/// The flag of times that are the processor's own.
const ARCH_TIMESTAMP: u64 = 1;
const RECORD_HEAD_BYTES: u64 = 16;
const CODE_LOAD: u32 = 0;
const CODE_MOVE: u32 = 1;
/// Fixed part of both kinds, with the record's head.
const LOAD_BYTES: usize = 56;
const MOVE_BYTES: usize = 64;
/// Most records taken in one reading, of a system call each: fifty milliseconds of work.
const READING_RECORDS: usize = 50_000;
/// Largest jitdump in bytes: it holds all code that was ever made.
pub const MAX_DUMP_BYTES: u64 = 4 << 30;

/// A position in a jitdump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JitdumpReader {
    /// Where the next record starts, in bytes; 0 before the header was read.
    offset: u64,
    /// By how much the process's clock is ahead of that of samples.
    clock_ahead_ns: i64,
}

impl JitdumpReader {
    /// At the start of the file of a process whose clock is ahead of that of samples by so much.
    pub fn of_clock(clock_ahead_ns: i64) -> Self {
        Self { offset: 0, clock_ahead_ns }
    }

    /// Hands the records that were added, and are there as a whole, to `sink`.
    pub fn read_new(
        &mut self,
        dump: &(impl ReadAt + ?Sized),
        sink: &mut dyn FnMut(Record) -> Result<(), RecordsError>,
    ) -> Result<Progress, RecordsError> {
        let size = dump.size()?;
        if size < self.offset {
            return Err(RecordsError::Cut);
        }
        if self.offset == 0 {
            if size < HEADER_BYTES {
                return Ok(Progress::CaughtUp);
            }
            self.offset = header_end(dump)?;
        }
        let mut bytes = [0; MOVE_BYTES];
        for _ in 0..READING_RECORDS {
            if self.offset > MAX_DUMP_BYTES {
                return Err(RecordsError::TooMuch { what: "bytes", limit: MAX_DUMP_BYTES });
            }
            let read = dump.read_at(&mut bytes, self.offset)?;
            if (read as u64) < RECORD_HEAD_BYTES {
                return Ok(Progress::CaughtUp);
            }
            let record_bytes = u64::from(u32_at(&bytes, 4));
            if record_bytes < RECORD_HEAD_BYTES {
                return Err(RecordsError::Jitdump("a record is smaller than its head"));
            }
            let end = self.offset.saturating_add(record_bytes);
            if end > size {
                return Ok(Progress::CaughtUp);
            }
            let bytes = &bytes[..read.min(record_bytes as usize)];
            if let Some(mut record) = record(bytes, self.offset) {
                if let Some(time_ns) = &mut record.time_ns {
                    *time_ns = time_ns
                        .checked_sub_signed(self.clock_ahead_ns)
                        .ok_or(RecordsError::Jitdump("its times are not of its process's clock"))?;
                }
                sink(record)?;
            }
            self.offset = end;
        }
        Ok(Progress::More)
    }
}

/// Where the records begin.
fn header_end(dump: &(impl ReadAt + ?Sized)) -> Result<u64, RecordsError> {
    let mut header = [0; HEADER_BYTES as usize];
    if dump.read_at(&mut header, 0)? < header.len() {
        return Err(RecordsError::Cut);
    }
    let header_bytes = u64::from(u32_at(&header, 8));
    if u32_at(&header, 0) != MAGIC {
        return Err(RecordsError::Jitdump("another magic number, or of a machine of other byte order"));
    }
    if u32_at(&header, 4) != 1 {
        return Err(RecordsError::Jitdump("another version"));
    }
    if u64_at(&header, 32) & ARCH_TIMESTAMP != 0 {
        return Err(RecordsError::Jitdump("its times are of the processor's clock"));
    }
    if header_bytes < HEADER_BYTES {
        return Err(RecordsError::Jitdump("the header is too small"));
    }
    Ok(header_bytes)
}

/// What the record says whose first bytes are `bytes`, if it is of code.
fn record(bytes: &[u8], offset: u64) -> Option<Record> {
    let time_ns = Some(u64_at(bytes, 8));
    let (start, size, event) = match u32_at(bytes, 0) {
        CODE_LOAD if bytes.len() > LOAD_BYTES => {
            (u64_at(bytes, 32), u64_at(bytes, 40), CodeEvent::Made { record_at: offset })
        }
        CODE_MOVE if bytes.len() >= MOVE_BYTES => {
            (u64_at(bytes, 40), u64_at(bytes, 48), CodeEvent::Moved { from: u64_at(bytes, 32) })
        }
        _ => return None,
    };
    let end = start.checked_add(size).filter(|end| *end > start)?;
    Some(Record { start, end, time_ns, event })
}

/// The name in the record at `record_at`, if it still is that of code from `start` on.
pub fn name(dump: &(impl ReadAt + ?Sized), record_at: u64, start: u64) -> Option<String> {
    let mut bytes = [0; LOAD_BYTES + MAX_NAME_BYTES + 1];
    let read = dump.read_at(&mut bytes, record_at).ok()?;
    let bytes = bytes[..read].get(..u32_at(bytes.get(..8)?, 4) as usize).unwrap_or(&bytes[..read]);
    let is_that = bytes.len() > LOAD_BYTES && u32_at(bytes, 0) == CODE_LOAD && u64_at(bytes, 32) == start;
    is_that.then(|| bytes[LOAD_BYTES..].split(|byte| *byte == 0).next()).flatten().and_then(clean_name)
}

/// The number at `offset`, which is at least 4 bytes before the end.
fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_ne_bytes(value)
}

/// The number at `offset`, which is at least 8 bytes before the end.
fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_ne_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u64) -> Vec<u8> {
        let words = [MAGIC, 1, 40, 62, 0, 7].map(u32::to_ne_bytes).concat();
        [words, [1, flags].map(u64::to_ne_bytes).concat()].concat()
    }

    fn load(time: u64, start: u64, code: &[u8], name: &str) -> Vec<u8> {
        let size = LOAD_BYTES + name.len() + 1 + code.len();
        [
            [CODE_LOAD, size as u32].map(u32::to_ne_bytes).concat(),
            time.to_ne_bytes().to_vec(),
            [7_u32, 8].map(u32::to_ne_bytes).concat(),
            [start, start, code.len() as u64, 1].map(u64::to_ne_bytes).concat(),
            name.as_bytes().to_vec(),
            vec![0],
            code.to_vec(),
        ]
        .concat()
    }

    fn moved(time: u64, from: u64, to: u64, size: u64) -> Vec<u8> {
        [
            [CODE_MOVE, MOVE_BYTES as u32].map(u32::to_ne_bytes).concat(),
            time.to_ne_bytes().to_vec(),
            [7_u32, 8].map(u32::to_ne_bytes).concat(),
            [to, from, to, size, 1].map(u64::to_ne_bytes).concat(),
        ]
        .concat()
    }

    fn read(reader: &mut JitdumpReader, dump: &[u8]) -> Result<Vec<Record>, RecordsError> {
        let mut records = Vec::new();
        reader.read_new(dump, &mut |record| {
            records.push(record);
            Ok(())
        })?;
        Ok(records)
    }

    #[test]
    fn records_count_when_they_are_whole() {
        let first = load(10, 0x1000, &[0xc3; 100], "first");
        let lines = [[2, 20].map(u32::to_ne_bytes).concat(), vec![0; 12]].concat();
        let dump = [header(0), first.clone(), lines, moved(20, 0x1000, 0x3000, 100)].concat();
        let expect = [
            Record {
                start: 0x1000,
                end: 0x1064,
                time_ns: Some(10),
                event: CodeEvent::Made { record_at: HEADER_BYTES },
            },
            Record {
                start: 0x3000,
                end: 0x3064,
                time_ns: Some(20),
                event: CodeEvent::Moved { from: 0x1000 },
            },
        ];
        assert_eq!(read(&mut JitdumpReader::default(), &dump).unwrap(), expect);
        let mut reader = JitdumpReader::default();
        let mut records = Vec::new();
        for end in 0..=dump.len() {
            records.extend(read(&mut reader, &dump[..end]).unwrap());
        }
        assert_eq!(records, expect, "byte by byte");
        assert_eq!(name(&dump[..], HEADER_BYTES, 0x1000).as_deref(), Some("first"));
        assert_eq!(name(&dump[..], HEADER_BYTES, 0x1001), None);
        assert_eq!(name(&dump[..], 0, 0x1000), None);
        assert!(matches!(read(&mut reader, &dump[..50]), Err(RecordsError::Cut)));
    }

    #[test]
    fn times_are_those_of_samples() {
        let dump = [header(0), load(100, 0x1000, &[0xc3], "f")].concat();
        for (ahead, expect) in
            [(-40, Some(140)), (60, Some(40)), (101, None), (i64::MIN, Some(100 + (1 << 63)))]
        {
            let records = read(&mut JitdumpReader::of_clock(ahead), &dump);
            let time = records.ok().and_then(|records| records[0].time_ns);
            assert_eq!(time, expect, "{ahead}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        let [mut magic, mut version, mut size] = [header(0), header(0), header(0)];
        magic[..4].reverse();
        version[4] = 2;
        size[8] = 39;
        let broken = [header(0), vec![0; 16]].concat();
        for dump in [magic, version, size, header(ARCH_TIMESTAMP), broken] {
            let refused = read(&mut JitdumpReader::default(), &dump);
            assert!(matches!(refused, Err(RecordsError::Jitdump(_))), "{refused:?}");
        }
    }

    #[test]
    fn names_without_end_are_cut() {
        let dump = [header(0), load(1, 0x1000, &[], &"n".repeat(3000))].concat();
        assert_eq!(read(&mut JitdumpReader::default(), &dump).unwrap(), [], "code of no bytes");
        let dump = [header(0), load(1, 0x1000, &[0xc3], &"n".repeat(3000))].concat();
        assert_eq!(read(&mut JitdumpReader::default(), &dump).unwrap().len(), 1);
        assert_eq!(name(&dump[..], HEADER_BYTES, 0x1000).unwrap().len(), MAX_NAME_BYTES);
    }
}
