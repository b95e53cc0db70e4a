//! What does a perf map say, and what has been added to it?
//!
//! Compilers append a line for each function (`tools/perf/Documentation/jit-interface.txt` of the kernel's source), and
//! a later line for the same addresses holds from then on. A line counts when its line feed is there. Anyone who can run
//! code can write anything into such a file, so each reading has a bound, and so has the file.

use windlass_schema::perf_map::{clean_name, parse_line};

use crate::code_records::{CodeEvent, Progress, ReadAt, Record, RecordsError};

/// Most bytes taken in one reading: ten milliseconds of work, and more than a compiler adds in a second.
const READING_BYTES: u64 = 4 << 20;
/// Bytes read at once, and so the longest line that counts; names are cut to less.
const CHUNK_BYTES: usize = 64 << 10;
/// Largest perf map in bytes: one without end is not waited for. Of long lines, 200 bytes each, those of a million
/// functions.
pub const MAX_MAP_BYTES: u64 = 256 << 20;

/// How many bytes before a position are kept, to tell whether the map was written anew: some lines, with addresses.
const KEPT_BYTES: usize = 128;

/// A position in a perf map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerfMapReader {
    /// Where the next line starts, in bytes.
    offset: u64,
    /// Whether that is inside a line too long to count.
    inside_line: bool,
    /// The last bytes before `offset`.
    before: Vec<u8>,
}

impl PerfMapReader {
    /// Hands the lines that were added to `sink`.
    pub fn read_new(
        &mut self,
        map: &(impl ReadAt + ?Sized),
        sink: &mut dyn FnMut(Record) -> Result<(), RecordsError>,
    ) -> Result<Progress, RecordsError> {
        if map.size()? < self.offset || !self.follows(map)? {
            return Err(RecordsError::Cut);
        }
        let end = self.offset.saturating_add(READING_BYTES);
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.offset < end {
            if self.offset > MAX_MAP_BYTES {
                return Err(RecordsError::TooMuch { what: "bytes", limit: MAX_MAP_BYTES });
            }
            let read = map.read_at(&mut chunk, self.offset)?;
            let whole = chunk[..read].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if whole == 0 && read < CHUNK_BYTES {
                return Ok(Progress::CaughtUp);
            }
            if whole == 0 {
                self.inside_line = true;
                self.advance(&chunk[..read]);
                continue;
            }
            let mut at = self.offset;
            for line in chunk[..whole - 1].split(|byte| *byte == b'\n') {
                if !std::mem::take(&mut self.inside_line)
                    && let Some(parsed) = parse_line(line)
                {
                    let event = CodeEvent::Made { record_at: at };
                    sink(Record { start: parsed.start, end: parsed.end, time_ns: None, event })?;
                }
                at += line.len() as u64 + 1;
            }
            self.advance(&chunk[..whole]);
        }
        Ok(Progress::More)
    }

    /// Whether the map still has what was read last. Java asked for its map again writes it from the start, into the same
    /// file.
    fn follows(&self, map: &(impl ReadAt + ?Sized)) -> Result<bool, RecordsError> {
        let mut before = [0; KEPT_BYTES];
        let before = &mut before[..self.before.len()];
        let read = map.read_at(before, self.offset - self.before.len() as u64)?;
        Ok(before[..read] == self.before[..])
    }

    fn advance(&mut self, read: &[u8]) {
        self.offset += read.len() as u64;
        self.before.extend_from_slice(&read[read.len().saturating_sub(KEPT_BYTES)..]);
        self.before.drain(..self.before.len().saturating_sub(KEPT_BYTES));
    }
}

/// The name in the line at `record_at`, if it still is that of code from `start` to `end`.
pub fn name(map: &(impl ReadAt + ?Sized), record_at: u64, start: u64, end: u64) -> Option<String> {
    // Far more than what is kept of a name, and the numbers before it.
    let mut bytes = [0; 2048];
    let read = map.read_at(&mut bytes, record_at).ok()?;
    let line = bytes[..read].split(|byte| *byte == b'\n').next()?;
    let parsed = parse_line(line).filter(|parsed| (parsed.start, parsed.end) == (start, end))?;
    clean_name(parsed.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(reader: &mut PerfMapReader, map: &[u8]) -> Vec<(u64, u64, String)> {
        let mut records = Vec::new();
        while reader
            .read_new(map, &mut |record| {
                records.push(record);
                Ok(())
            })
            .unwrap()
            == Progress::More
        {}
        let named = records.into_iter().map(|record| {
            let CodeEvent::Made { record_at } = record.event else { panic!("{record:?}") };
            let name = name(map, record_at, record.start, record.end);
            (record.start, record.end, name.unwrap_or_default())
        });
        named.collect()
    }

    fn line(start: u64, end: u64, name: &str) -> (u64, u64, String) {
        (start, end, name.to_owned())
    }

    #[test]
    fn lines_count_when_they_are_whole() {
        let mut reader = PerfMapReader::default();
        assert_eq!(read(&mut reader, b""), []);
        assert_eq!(read(&mut reader, b"1000 20 f"), []);
        assert_eq!(read(&mut reader, b"1000 20 first\n2000"), [line(0x1000, 0x1020, "first")]);
        let grown = b"1000 20 first\n2000 8 se\x07cond\nno line\n\n3000 0 none\n1000 20 again\n";
        assert_eq!(
            read(&mut reader, grown),
            [line(0x2000, 0x2008, "se\u{fffd}cond"), line(0x1000, 0x1020, "again")]
        );
        assert_eq!(read(&mut reader, grown), []);
        let cut = reader.read_new(&b"1000"[..], &mut |_| Ok(()));
        assert!(matches!(cut, Err(RecordsError::Cut)), "{cut:?}");
    }

    #[test]
    fn a_map_that_is_written_anew_is_noticed_whatever_its_size() {
        let mut reader = PerfMapReader::default();
        read(&mut reader, b"1000 20 first\n2000 8 second\n");
        for anew in ["1000 20 first\n3000 9 second\n", "1000 20 first\n3000 8 third\n4000 10 fourth\n"] {
            let cut = reader.clone().read_new(anew.as_bytes(), &mut |_| Ok(()));
            assert!(matches!(cut, Err(RecordsError::Cut)), "{cut:?}");
        }
        assert_eq!(read(&mut reader, b"1000 20 first\n2000 8 second\n3 1 f\n"), [line(3, 4, "f")]);
    }

    #[test]
    fn lines_without_end_are_passed_over() {
        let mut map = b"1000 20 f\n1 1 ".to_vec();
        map.resize(map.len() + 3 * CHUNK_BYTES, b'x');
        let mut reader = PerfMapReader::default();
        assert_eq!(read(&mut reader, &map), [line(0x1000, 0x1020, "f")]);
        map.extend_from_slice(b"\n2000 1 g\n");
        assert_eq!(read(&mut reader, &map), [line(0x2000, 0x2001, "g")]);
    }

    /// A file without end.
    struct Endless;

    impl ReadAt for Endless {
        fn read_at(&self, bytes: &mut [u8], _: u64) -> std::io::Result<usize> {
            bytes.fill(b'\n');
            Ok(bytes.len())
        }

        fn size(&self) -> std::io::Result<u64> {
            Ok(u64::MAX)
        }
    }

    #[test]
    fn a_map_without_end_is_given_up() {
        let mut reader = PerfMapReader::default();
        let mut readings = 0;
        let error = loop {
            match reader.read_new(&Endless, &mut |_| Ok(())) {
                Ok(Progress::More) => readings += 1,
                Ok(Progress::CaughtUp) => panic!("it has no end"),
                Err(error) => break error,
            }
        };
        assert_eq!(readings, MAX_MAP_BYTES / READING_BYTES);
        assert!(matches!(error, RecordsError::TooMuch { .. }), "{error:?}");
    }

    #[test]
    fn names_are_of_the_code_they_were_read_for() {
        let map: &[u8] = b"1000 20 f\n";
        assert_eq!(name(map, 0, 0x1000, 0x1020).as_deref(), Some("f"));
        assert_eq!(name(map, 0, 0x1000, 0x1021), None);
        assert_eq!(name(map, 1, 0x1000, 0x1020), None);
        assert_eq!(name(map, 100, 0x1000, 0x1020), None);
    }
}
