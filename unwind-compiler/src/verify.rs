//! Proves a table against a DWARF interpreter, row by row.
//!
//! # Why this shape
//! Peers test their encoders with snapshots and spot checks. Here the oracle is gimli: each row of its unwind
//! table, at its first, middle and last address, against what the table answers there. Nothing
//! is shared with the compiler but the list of FDEs; where CFI has an expression, gimli evaluates
//! it over made-up machine states and the rule has to give the same values, however either is written.
//! Between FDEs the table has to say that nothing covers the address. What `.eh_frame` covers is for that alone to
//! say: `.debug_frame` is looked at elsewhere.

use std::collections::BTreeMap;
use std::ops::Range;

use gimli::{
    CfaRule as CfiCfa, EvaluationResult, Location, Register as CfiRegister, RegisterRule, UnwindContext,
    UnwindExpression, UnwindSection, Value,
};
use windlass_schema::record::DWARF_RSP;
use windlass_schema::{
    Architecture, CfaRule, FramePointerRule, ImageAddress, Register, ReturnAddressRule, Rule, Table,
    UnsupportedReason,
};

use crate::compile::uncovered;
use crate::elf::{CompileError, Image, SectionKind};
use crate::expression::ENCODING;
use crate::go_functions::functions;
use crate::oracle::{CfiRow, Fde, Reader, Row, Visitor, for_each_fde};
use crate::report::RecognisedKind;
use crate::uncovered::Uncovered;

/// Most disagreements that a verification describes; all are counted.
pub const MAX_DISAGREEMENTS_LISTED: usize = 20;

/// An address at which the table and the interpreter disagree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disagreement {
    /// The address.
    pub address: ImageAddress,
    /// What the table says.
    pub table: Rule,
    /// What the image says, in the interpreter's terms.
    pub image: String,
}

/// What came of comparing a table with its image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// FDEs compared.
    pub fdes: u64,
    /// Rows of these FDEs.
    pub rows_checked: u64,
    /// Addresses looked up.
    pub addresses_checked: u64,
    /// Addresses at which the table says something that the image does not.
    pub wrong: u64,
    /// The first [`MAX_DISAGREEMENTS_LISTED`] of them.
    pub disagreements: Vec<Disagreement>,
    /// Rows that the table does not claim to know, by reason.
    pub unsupported: BTreeMap<UnsupportedReason, u64>,
    /// Rows of code without CFI, which are none of those checked by the interpreter: only that no FDE covers them,
    /// and that they are in the table as they were recognised.
    pub recognised: BTreeMap<RecognisedKind, u64>,
}

/// Compares `table` with the call frame information of `elf`.
pub fn verify(elf: &[u8], table: &Table<'_>) -> Result<Verification, CompileError> {
    let image = Image::parse(elf)?;
    let go = functions(&image);
    let mut check = Check {
        architecture: image.architecture,
        table,
        verification: Verification::default(),
        context: UnwindContext::new(),
        covered: Vec::new(),
        covered_by_eh_frame: None,
        is_go: go.is_some(),
    };
    for_each_fde(&image, &mut check);
    let Check { mut verification, mut covered, .. } = check;
    let stretches = go.into_iter().flat_map(|go| go.stretches);
    covered.extend(stretches.map(|stretch| stretch.start..stretch.end));
    let mut covered = union(covered);
    let uncovered = uncovered(&image);
    verification.check_recognised(table, &uncovered, &covered);
    covered.extend(uncovered.stretches().into_iter().map(|stretch| stretch.start..stretch.end));
    verification.check_gaps(table, covered);
    Ok(verification)
}

/// A comparison under way.
struct Check<'t> {
    architecture: Architecture,
    table: &'t Table<'t>,
    verification: Verification,
    context: UnwindContext<usize>,
    covered: Vec<Range<u64>>,
    /// What `.eh_frame` covers, sorted and disjoint, once `.debug_frame` has begun: that has a say only elsewhere.
    covered_by_eh_frame: Option<Vec<Range<u64>>>,
    /// Whether the image is Go's. Its `.debug_frame` is made from the same depths as its function table, by another
    /// path, and says nothing of the frame pointer: what it can confirm is the CFA.
    is_go: bool,
}

impl Visitor for Check<'_> {
    fn fde<'a, S: UnwindSection<Reader<'a>>>(&mut self, kind: SectionKind, fde: &Fde<'a, '_, S>) {
        if kind == SectionKind::DebugFrame && self.covered_by_eh_frame.is_none() {
            self.covered_by_eh_frame = Some(union(self.covered.clone()));
        }
        self.verification.fdes += 1;
        self.covered.push(fde.range());
        let covered = self.covered_by_eh_frame.as_deref().unwrap_or_default();
        let is_others = |address: u64| {
            let behind = covered.partition_point(|range| range.start <= address);
            covered[..behind].last().is_some_and(|range| range.contains(&address))
        };
        let is_of_go = self.is_go && kind == SectionKind::DebugFrame;
        let (table, architecture, verification) = (self.table, self.architecture, &mut self.verification);
        let end = fde.rows(&mut self.context, |range, row| {
            verification.check_row(table, range, is_others, |rule, address| {
                let is_stated = if is_of_go {
                    confirms_cfa(rule, row.cfi)
                } else {
                    // Where a walk ends, a CFA has no use.
                    (row.has_cfa || rule == Rule::End) && states(rule, architecture, fde, row.cfi, address)
                };
                if is_stated { Ok(()) } else { Err(describe(architecture, fde, row)) }
            });
        });
        if let Err(unknown_from) = end {
            verification.check_row(table, unknown_from..fde.range().end, is_others, |_, _| {
                Err("malformed instructions".to_owned())
            });
        }
    }
}

/// The addresses of all `ranges`: sorted, disjoint and apart.
fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let touches = next.start <= last.end;
        if touches {
            last.end = last.end.max(next.end);
        }
        touches
    });
    ranges
}

impl Verification {
    fn check_row(
        &mut self,
        table: &Table<'_>,
        range: Range<u64>,
        is_others: impl Fn(u64) -> bool,
        compare: impl Fn(Rule, u64) -> Result<(), String>,
    ) {
        self.rows_checked += 1;
        let mut unsupported = None;
        let mut addresses =
            [range.start, range.start + (range.end - range.start) / 2, range.end - 1].to_vec();
        addresses.dedup();
        addresses.retain(|address| !is_others(*address));
        for address in addresses {
            self.addresses_checked += 1;
            match table.rule(ImageAddress::new(address)) {
                Rule::Unsupported(reason) => unsupported = unsupported.or(Some(reason)),
                rule => {
                    if let Err(image) = compare(rule, address) {
                        self.disagree(address, rule, image);
                    }
                }
            }
        }
        if let Some(reason) = unsupported {
            *self.unsupported.entry(reason).or_default() += 1;
        }
    }

    /// Checks the rows of code without CFI, which no interpreter confirms: that they are as they were recognised, and
    /// outside of what is `covered`, which is sorted and disjoint.
    fn check_recognised(&mut self, table: &Table<'_>, uncovered: &Uncovered, covered: &[Range<u64>]) {
        let by_frame_pointers = Rule::Unsupported(UnsupportedReason::FramePointersOnly);
        let rest = uncovered.frame_pointers_only.iter().map(|range| (range, by_frame_pointers));
        let recognised = uncovered.recognised.iter().map(|one| (&one.range, one.rule));
        for (range, rule) in recognised.chain(rest) {
            let behind = covered.partition_point(|other| other.end <= range.start);
            if covered.get(behind).is_some_and(|other| other.start < range.end) {
                self.disagree(range.start, rule, "an FDE".to_owned());
            }
            self.check_stated(table, range, rule);
        }
        for one in &uncovered.recognised {
            *self.recognised.entry(one.kind).or_default() += 1;
        }
        if !uncovered.frame_pointers_only.is_empty() {
            let rows = uncovered.frame_pointers_only.len() as u64;
            self.unsupported.insert(UnsupportedReason::FramePointersOnly, rows);
        }
    }

    fn check_stated(&mut self, table: &Table<'_>, range: &Range<u64>, expect: Rule) {
        for address in [range.start, range.end - 1] {
            self.addresses_checked += 1;
            let rule = table.rule(ImageAddress::new(address));
            let has_no_room = matches!(
                rule,
                Rule::Unsupported(UnsupportedReason::DenseBlock | UnsupportedReason::DictionaryFull)
            );
            if rule != expect && !has_no_room {
                self.disagree(address, rule, format!("no FDE, recognised as {expect}"));
            }
        }
    }

    /// Checks the bytes at both ends of each range that nothing covers.
    fn check_gaps(&mut self, table: &Table<'_>, covered: Vec<Range<u64>>) {
        let mut gaps = Vec::new();
        let mut end = 0;
        for range in union(covered) {
            if range.start > end {
                gaps.extend([end, range.start - 1]);
            }
            end = range.end;
        }
        gaps.extend([end, u64::MAX]);
        gaps.dedup();
        for address in gaps {
            self.addresses_checked += 1;
            match table.rule(ImageAddress::new(address)) {
                // A block too dense to state is unsupported as a whole, with the gaps in it.
                Rule::NoCfi | Rule::Unsupported(UnsupportedReason::DenseBlock) => {}
                rule => self.disagree(address, rule, "no FDE".to_owned()),
            }
        }
    }

    fn disagree(&mut self, address: u64, table: Rule, image: String) {
        self.wrong += 1;
        if self.disagreements.len() < MAX_DISAGREEMENTS_LISTED {
            self.disagreements.push(Disagreement { address: ImageAddress::new(address), table, image });
        }
    }
}

/// The row as gimli has it, without the registers that no walk needs.
fn describe<'a, S: UnwindSection<Reader<'a>>>(
    architecture: Architecture,
    fde: &Fde<'a, '_, S>,
    row: Row<'_>,
) -> String {
    let Row { cfi: row, has_cfa } = row;
    let cfa = if has_cfa { format!("{:?}", row.cfa()) } else { "undefined".to_owned() };
    let rule = |register: Register| row.register(CfiRegister(register.number().into()));
    format!(
        "cfa={cfa} ra={:?} sp={:?} fp={:?} signal={}",
        row.register(fde.entry.cie().return_address_register()),
        rule(architecture.stack_pointer()),
        rule(architecture.frame_pointer()),
        fde.entry.is_signal_trampoline(),
    )
}

/// Whether `row` does not contradict the CFA of a rule for Go code. It has the depths of a function that switches
/// stacks, or has no caller, as if it did neither.
fn confirms_cfa(rule: Rule, row: &CfiRow) -> bool {
    match (rule, row.cfa()) {
        (Rule::Frame { cfa: CfaRule::Offset(r, k), .. }, CfiCfa::RegisterAndOffset { register, offset }) => {
            u16::from(r.number()) == register.0 && i64::from(k) == *offset
        }
        (rule, _) => rule != Rule::NoCfi,
    }
}

/// Whether `rule`, which is none of the unsupported ones, is what `row` says at `address`.
fn states<'a, S: UnwindSection<Reader<'a>>>(
    rule: Rule,
    architecture: Architecture,
    fde: &Fde<'a, '_, S>,
    row: &CfiRow,
    address: u64,
) -> bool {
    let return_address = row.register(fde.entry.cie().return_address_register());
    match rule {
        Rule::NoCfi | Rule::Unsupported(_) => false,
        Rule::End => return_address == Some(RegisterRule::Undefined),
        Rule::Signal(offset) => {
            architecture == Architecture::X86_64
                && fde.entry.is_signal_trampoline()
                && states_signal(offset, fde, row, address)
        }
        Rule::Frame { cfa, return_address: ra, frame_pointer } => {
            let stack_pointer = row.register(CfiRegister(architecture.stack_pointer().number().into()));
            let column = fde.entry.cie().return_address_register();
            !fde.entry.is_signal_trampoline()
                && states_cfa(cfa, architecture, fde, row, address)
                && match ra {
                    ReturnAddressRule::AtCfa(offset) => {
                        return_address == Some(RegisterRule::Offset(offset.into()))
                    }
                    ReturnAddressRule::Register(register) => {
                        let register = CfiRegister(register.number().into());
                        return_address == Some(RegisterRule::Register(register))
                            || architecture == Architecture::Aarch64
                                && register == column
                                && matches!(return_address, None | Some(RegisterRule::SameValue))
                    }
                }
                && matches!(stack_pointer, None | Some(RegisterRule::ValOffset(0)))
                && states_frame_pointer(frame_pointer, architecture, fde, row, address)
        }
    }
}

fn states_cfa<'a, S: UnwindSection<Reader<'a>>>(
    cfa: CfaRule,
    architecture: Architecture,
    fde: &Fde<'a, '_, S>,
    row: &CfiRow,
    address: u64,
) -> bool {
    match (cfa, row.cfa()) {
        (CfaRule::Offset(r, k), CfiCfa::RegisterAndOffset { register, offset }) => {
            u16::from(r.number()) == register.0 && i64::from(k) == *offset
        }
        (_, CfiCfa::RegisterAndOffset { .. }) => false,
        (cfa, CfiCfa::Expression(expression)) => Machine::states(architecture, address).all(|machine| {
            let register = |number: u8| machine.register(number.into());
            let at = |base: u64, offset: i16| base.wrapping_add_signed(offset.into());
            let expected = match cfa {
                CfaRule::Offset(r, k) => register(r.number()).wrapping_add_signed(k.into()),
                CfaRule::Deref(r, a, b) => at(machine.memory(at(register(r.number()), a)), b),
                CfaRule::DerefIndexed(a, b) => {
                    let indexed = register(DWARF_RSP).wrapping_add(register(9).wrapping_mul(8));
                    at(machine.memory(at(indexed, a)), b)
                }
                CfaRule::Plt { threshold, base } => {
                    let pushed = (machine.rip & 15) as i64 >= i64::from(threshold);
                    at(register(DWARF_RSP), base).wrapping_add(if pushed { 8 } else { 0 })
                }
                CfaRule::GoStack { .. } | CfaRule::OtherStack(_) => return false,
            };
            machine.evaluate(fde, expression) == Some(expected)
        }),
    }
}

fn states_frame_pointer<'a, S: UnwindSection<Reader<'a>>>(
    rule: FramePointerRule,
    architecture: Architecture,
    fde: &Fde<'a, '_, S>,
    row: &CfiRow,
    address: u64,
) -> bool {
    let frame_pointer = architecture.frame_pointer().number();
    let stated = row.register(CfiRegister(frame_pointer.into()));
    match (rule, stated) {
        (FramePointerRule::Same, None | Some(RegisterRule::SameValue)) => true,
        (FramePointerRule::Undefined, Some(RegisterRule::Undefined)) => true,
        (FramePointerRule::AtCfa(f), Some(RegisterRule::Offset(offset))) => i64::from(f) == offset,
        (FramePointerRule::AtFramePointer(f), Some(RegisterRule::Expression(expression))) => {
            Machine::states(architecture, address).all(|machine| {
                let expected = machine.register(frame_pointer.into()).wrapping_add_signed(f.into());
                machine.evaluate(fde, &expression) == Some(expected)
            })
        }
        _ => false,
    }
}

/// Whether every register comes from its place in the `sigcontext` at rsp + `offset`.
fn states_signal<'a, S: UnwindSection<Reader<'a>>>(
    offset: i16,
    fde: &Fde<'a, '_, S>,
    row: &CfiRow,
    address: u64,
) -> bool {
    // struct sigcontext_64: r8 to r15, di, si, bp, bx, dx, ax, cx, sp, ip.
    let places = [13, 12, 14, 11, 9, 8, 10, 15, 0, 1, 2, 3, 4, 5, 6, 7, 16];
    Machine::states(Architecture::X86_64, address).all(|machine| {
        let context = machine.register(DWARF_RSP.into()).wrapping_add_signed(offset.into());
        let place = |register: usize| context.wrapping_add(8 * places[register]);
        let CfiCfa::Expression(cfa) = row.cfa() else { return false };
        let restores = |register: usize| match row.register(CfiRegister(register as u16)) {
            Some(RegisterRule::Expression(at)) => machine.evaluate(fde, &at) == Some(place(register)),
            _ => false,
        };
        machine.evaluate(fde, cfa) == Some(machine.memory(place(DWARF_RSP.into())))
            && (0..places.len()).all(restores)
    })
}

/// A made-up machine state. Registers and memory hold a hash of their number or address.
struct Machine {
    architecture: Architecture,
    seed: u64,
    rip: u64,
}

impl Machine {
    /// States at `address`, one for each place that a PLT entry may stand at.
    fn states(architecture: Architecture, address: u64) -> impl Iterator<Item = Self> {
        (0..16).map(move |low| Self {
            architecture,
            seed: address.wrapping_mul(31).wrapping_add(low),
            rip: address & !15 | low,
        })
    }

    /// The finalizer of SplitMix64: no two inputs give one output.
    fn hash(&self, value: u64) -> u64 {
        let z = value.wrapping_add(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn register(&self, number: u16) -> u64 {
        if Register::new(self.architecture, number).is_some() { self.hash(number.into()) } else { self.rip }
    }

    fn memory(&self, address: u64) -> u64 {
        self.hash(address ^ 0x6d65_6d6f_7279)
    }

    /// The value of an expression, by gimli. `None` if it needs more than registers and memory.
    fn evaluate<'a, S: UnwindSection<Reader<'a>>>(
        &self,
        fde: &Fde<'a, '_, S>,
        expression: &UnwindExpression<usize>,
    ) -> Option<u64> {
        let mut evaluation = expression.get(fde.section).ok()?.evaluation(ENCODING);
        // Loops are possible, none is known.
        evaluation.set_max_iterations(256);
        let mut result = evaluation.evaluate().ok()?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } if register.0 <= 31 => {
                    evaluation.resume_with_register(Value::Generic(self.register(register.0))).ok()?
                }
                EvaluationResult::RequiresMemory { address, size: 8, space: None, .. } => {
                    evaluation.resume_with_memory(Value::Generic(self.memory(address))).ok()?
                }
                _ => return None,
            };
        }
        match evaluation.as_result() {
            [piece] => match piece.location {
                Location::Address { address } => Some(address),
                _ => None,
            },
            _ => None,
        }
    }
}
