//! Writes a table; the format is that of [`windlass_schema::table`].

use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::table_writer::{PageEntry, TableHeader, TableWriter};
use windlass_schema::{Architecture, BuildId, ImageAddress};

use crate::dictionary::Dictionary;
use crate::fold::{Folded, fold};
use crate::placement::{Placed, Placement};

/// The table of the image `build_id` with these rows, which `density` has let through.
pub(crate) fn encode(build_id: BuildId, architecture: Architecture, placement: &Placement) -> Vec<u8> {
    let placed = &placement.placed;
    // Runs are of words that x86-64 pushes and pops.
    let folded = fold(&placement.chains, placed, architecture == Architecture::X86_64);
    let (folded, dictionary) = match Dictionary::of(&folded, placed) {
        Some(dictionary) => (folded, dictionary),
        None => {
            let plain = fold(&placement.chains, placed, false);
            let dictionary =
                Dictionary::of(&plain, placed).expect("rows are bounded to what a dictionary holds");
            (plain, dictionary)
        }
    };
    write(build_id, architecture, placement, &folded, &dictionary)
}

fn write(
    build_id: BuildId,
    architecture: Architecture,
    placement: &Placement,
    folded: &Folded,
    dictionary: &Dictionary,
) -> Vec<u8> {
    let placed = &placement.placed[..];
    let page = |placed: &Placed| placed.offset >> PAGE_SHIFT;
    let pages = placed.first().zip(placed.last()).map(|(first, last)| page(first)..=page(last));
    let base = ImageAddress::new(placement.base);
    let header = TableHeader { architecture, build_id, base, rows: placement.rows as u32 };
    let mut writer = TableWriter::new(&header, &dictionary.records, pages, placed.len());
    let mut entries = Vec::new();
    for placed in placed.chunk_by(|a, b| page(a) == page(b)) {
        entries.clear();
        for placed in placed {
            entries.extend(folded.entries(placed.chain).iter().map(|entry| PageEntry {
                offset: (placed.offset + entry.at) as u16,
                record: dictionary.number(entry.record),
            }));
        }
        writer.page(page(&placed[0]), &entries);
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chains::Chains;
    use crate::density::bound;
    use crate::rows::{Row, push};
    use proptest::prelude::*;
    use windlass_schema::page::MAX_BLOCK_ENTRIES;
    use windlass_schema::table::{MAX_PAGES, MAX_RECORDS};
    use windlass_schema::{
        CfaRule, FramePointerRule, Record, Register, ReturnAddressRule, Rule, Table, UnsupportedReason,
    };

    fn encoded(rows: &[Row]) -> Vec<u8> {
        let base = rows.first().map_or(0, |row| row.address >> PAGE_SHIFT << PAGE_SHIFT);
        let mut placement = Placement::new(Chains::default(), base, 0);
        placement.rows(rows);
        assert!(!placement.is_too_dense);
        assert_eq!(placement.rows, rows.len() as u64);
        assert!(placement.all_rows() == rows);
        encode(BuildId::new(&[7; 20]).unwrap(), Architecture::X86_64, &placement)
    }

    fn frame(cfa: CfaRule, frame_pointer: FramePointerRule) -> Record {
        Rule::Frame { cfa, return_address: ReturnAddressRule::AtCfa(-8), frame_pointer }.to_record()
    }

    fn rsp(offset: i32) -> Record {
        frame(CfaRule::Offset(Register::RSP, offset), FramePointerRule::Same)
    }

    /// Encodes rows, reads them back, and looks up each address near a row.
    #[track_caller]
    fn check(rows: &[Row]) {
        let build_id = BuildId::new(&[7; 20]).unwrap();
        let file = encoded(rows);
        let table = Table::parse(&file).unwrap();
        assert_eq!(table.build_id(), build_id);
        assert_eq!(table.row_count() as usize, rows.len());
        let found: Vec<_> =
            table.rows().map(|(address, record)| Row { address: address.get(), record }).collect();
        assert!(found == rows, "\nfound  {found:x?}\nexpect {rows:x?}");
        for (index, row) in rows.iter().enumerate() {
            let before = index.checked_sub(1).map_or(Record::NO_CFI, |index| rows[index].record);
            let next = rows.get(index + 1).map_or(row.address + 0x2_0000, |next| next.address);
            assert_eq!(table.lookup(ImageAddress::new(row.address.wrapping_sub(1))), before);
            for address in (row.address..next).take(40).chain([row.address / 2 + next / 2, next - 1]) {
                assert_eq!(table.lookup(ImageAddress::new(address)), row.record, "at {address:#x}");
            }
        }
    }

    /// Records as compilers make them: mostly steps of the stack pointer.
    fn record() -> impl Strategy<Value = Record> {
        let saved = prop_oneof![
            4 => Just(FramePointerRule::Same),
            3 => (1..6).prop_map(|words| FramePointerRule::AtCfa(-8 * words)),
            1 => any::<i16>().prop_map(FramePointerRule::AtFramePointer),
            1 => Just(FramePointerRule::Undefined),
        ];
        let cfa = prop_oneof![
            8 => (0i32..8).prop_map(|words| CfaRule::Offset(Register::RSP, 8 * words)),
            3 => Just(CfaRule::Offset(Register::RBP, 16)),
            1 => any::<i32>().prop_map(|offset| CfaRule::Offset(Register::RSP, offset)),
            1 => (any::<i16>(), any::<i16>()).prop_map(|(a, b)| CfaRule::Deref(Register::RBP, a, b)),
        ];
        prop_oneof![
            12 => (cfa, saved).prop_map(|(cfa, saved)| frame(cfa, saved)),
            2 => Just(Record::NO_CFI),
            1 => Just(Record::END),
        ]
    }

    proptest! {
        #[test]
        fn a_table_gives_back_the_rows_it_was_made_of(
            base in 0u64..0x3_0000,
            steps in prop::collection::vec((prop_oneof![8 => 1u64..6, 3 => 1u64..300, 1 => 1u64..0x2_0000], record()), 0..400),
            // Bytes from the last address that `Image::reaches` lets end an FDE back to the end of coverage.
            from_reach in prop_oneof![15 => Just(None), 1 => (0u64..0x300).prop_map(Some)],
        ) {
            let mut rows = Vec::new();
            let mut address = base;
            for (step, record) in steps {
                push(&mut rows, address, record);
                address += step;
            }
            if let (Some(bytes), Some(first)) = (from_reach, rows.first()) {
                address = last_end(first.address) - bytes;
            }
            push(&mut rows, address, Record::NO_CFI);
            check(&bound(rows));
        }
    }

    /// Where the last FDE of an image ends at the most, if its first code is at `first`.
    fn last_end(first: u64) -> u64 {
        let first_page = first >> PAGE_SHIFT << PAGE_SHIFT;
        first_page + (u64::from(MAX_PAGES) << PAGE_SHIFT) - 257
    }

    #[test]
    fn the_last_page_that_a_table_reaches() {
        let first = 0x40_0123;
        let start = Row { address: first, record: rsp(8) };
        let end = Row { address: last_end(first), record: Record::NO_CFI };
        check(&[start, end]);
        let pages = |rows: &[Row]| {
            let file = encoded(rows);
            Table::parse(&file).unwrap().page_count()
        };
        assert_eq!(pages(&[start, end]), MAX_PAGES);
        // An overfull block is left at its end.
        let dense = (0..255u64)
            .map(|back| Row { address: end.address - 255 + back, record: rsp(8 * (back as i32 % 3) + 16) });
        let rows = bound([start].into_iter().chain(dense).chain([end]).collect());
        assert_eq!(unsupported(&rows), 1);
        assert_eq!(pages(&rows), MAX_PAGES);
        check(&rows);
    }

    /// On aarch64 rows may look like pushes, and are no run.
    #[test]
    fn other_architectures_have_no_runs() {
        let sp = |words: i32| Record::plain(windlass_schema::record::kind::SP, 0, 0, 0, 0, 8 * words);
        let rows: Vec<Row> = (0..200u64)
            .flat_map(|at| [(0, 1), (4, 2), (8, 3)].map(|(offset, words)| (32 * at + offset, words)))
            .map(|(address, words)| Row { address, record: sp(words) })
            .chain([Row { address: 0x3000, record: Record::NO_CFI }])
            .collect();
        let mut placement = Placement::new(Chains::default(), 0, 0);
        placement.rows(&rows);
        let file = encode(BuildId::new(&[7; 20]).unwrap(), Architecture::Aarch64, &placement);
        let table = Table::parse(&file).unwrap();
        assert!(table.rows().map(|(address, record)| Row { address: address.get(), record }).eq(rows));
    }

    #[test]
    fn no_rows_are_a_table_too() {
        check(&[]);
    }

    #[test]
    fn a_prologue_takes_one_entry_and_few_bytes() {
        let rows = [
            Row { address: 0x1000, record: rsp(8) },
            Row {
                address: 0x1001,
                record: frame(CfaRule::Offset(Register::RSP, 16), FramePointerRule::AtCfa(-16)),
            },
            Row {
                address: 0x1004,
                record: frame(CfaRule::Offset(Register::RBP, 16), FramePointerRule::AtCfa(-16)),
            },
            Row { address: 0x1040, record: Record::NO_CFI },
        ];
        // The same function in each of 64 blocks: what occurs once is not worth a record.
        let rows: Vec<_> = (0..64)
            .flat_map(|block| rows.iter().map(move |row| Row { address: row.address + 256 * block, ..*row }))
            .collect();
        check(&rows);
        let file = encoded(&rows);
        let page = Table::parse(&file).unwrap().page(0).unwrap().len();
        // Header, four groups of counts and starts, two entries of two bytes in each block.
        assert_eq!(page, 8 + 4 * (8 + 2) + 64 * 2 * 2);
    }

    /// `rows`, and behind them the end of coverage that every list of rows has.
    fn ended(mut rows: Vec<Row>) -> Vec<Row> {
        let end = rows[rows.len() - 1].address + 1;
        push(&mut rows, end, Record::NO_CFI);
        rows
    }

    fn unsupported(rows: &[Row]) -> usize {
        let reasons = [UnsupportedReason::DenseBlock, UnsupportedReason::DictionaryFull];
        rows.iter().filter(|row| reasons.map(Record::unsupported).contains(&row.record)).count()
    }

    #[test]
    fn a_page_of_more_records_than_a_byte_tells_apart() {
        let row = |number: u64| Row { address: 0x1_0000 + 7 * number, record: rsp(number as i32) };
        check(&ended((0..2000).map(row).collect()));
    }

    #[test]
    fn as_dense_as_can_be() {
        let dense = |len: u64, kinds: i32| {
            let row =
                |number: u64| Row { address: 0x100 + number, record: rsp(3 * (number as i32 % kinds) - 1) };
            ended((0..len).map(row).collect())
        };
        // A block has 256 addresses and room for 255 entries, one of them for the state that enters a page.
        let rows = bound(dense(MAX_BLOCK_ENTRIES as u64 - 2, 5));
        assert_eq!(unsupported(&rows), 0);
        check(&rows);
        for len in [254, 255, 256, 257, 1000, 0x1_0000, 0x2_8000] {
            let rows = bound(dense(len, 300));
            assert!(unsupported(&rows) > 0, "{len} rows");
            check(&rows);
        }
    }

    #[test]
    fn more_rules_than_a_dictionary_holds() {
        let rows = |records: u32| {
            let row = |number: u64| Row { address: 8 * number, record: rsp(number as i32) };
            // The end of coverage takes a record as well.
            ended((0..u64::from(records) - 1).map(row).collect())
        };
        let bounded = bound(rows(MAX_RECORDS));
        assert_eq!(unsupported(&bounded), 0);
        check(&bounded);
        let bounded = bound(rows(MAX_RECORDS + 500));
        assert!(unsupported(&bounded) > 0);
        check(&bounded);
    }
}
