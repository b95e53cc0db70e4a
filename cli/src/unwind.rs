//! `windlass unwind`: compiles, prints and checks unwind tables, without a service.
//!
//! Whoever has to trust a profiler's tables cannot look into them: peers keep theirs inside the agent, and show
//! counts of rows at best. So a table is a file here that can be made, printed, asked and, against the
//! image it came from, proved; `stats` and `verify` take whole trees and say what they left out.

mod corpus;
mod stats;
mod verify;

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use windlass_schema::table::MAGIC;
use windlass_schema::wire::{self, WIRE_MAGIC};
use windlass_schema::{BuildId, ImageAddress, Rule, Table};
use windlass_unwind_compiler::{Compiled, build_id_of, compile};

use crate::address_input;
use crate::compressed_file;
use crate::mapped_elf::map;

const EXAMPLES: &str = "\
Examples:
  windlass unwind compile target/release/server -o server.wlut
  windlass unwind dump server.wlut
  windlass unwind lookup target/release/server 0x1139 0x1150
  windlass unwind stats /usr/bin --json
  windlass unwind verify /usr/lib /usr/bin

Addresses are image addresses (as nm prints them), hex, and looked up as they are;
for a return address, give the address before it.
Exit status: 0 done, 1 verify found rows that are wrong, 2 could not.";

/// Arguments of `windlass unwind`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct UnwindArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Compile the unwind table of an ELF file
    Compile {
        /// The ELF file: executable, shared library, kernel module, split debug file or skeleton
        elf: PathBuf,
        /// Where to write the table
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Write its wire form, as the service sends it to agents
        #[arg(long)]
        wire: bool,
    },
    /// Print a table: header, then each row
    Dump {
        /// A table, in its wire form too, or an ELF file to compile first
        #[arg(value_name = "FILE|ELF")]
        file: PathBuf,
    },
    /// Print the rule that holds at each address
    Lookup {
        /// A table, in its wire form too, or an ELF file to compile first
        #[arg(value_name = "FILE|ELF")]
        file: PathBuf,
        /// Image addresses
        #[arg(value_name = "ADDRESS", required = true, value_parser = address_input::parse)]
        addresses: Vec<ImageAddress>,
    },
    /// Compile files and trees; print sizes, coverage and what is not covered
    Stats(corpus::CorpusArgs),
    /// Compile files and trees; compare every row with a DWARF interpreter
    Verify(corpus::CorpusArgs),
}

/// Runs `windlass unwind`.
pub(crate) fn run(args: UnwindArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Compile { elf, output, wire } => {
            let bytes = map(&elf)?;
            let compiled = compile_file(&elf, &bytes)?;
            for skipped in &compiled.report.skipped {
                eprintln!(
                    "{}: skipped the FDE at .eh_frame+{:#x}: {}",
                    elf.display(),
                    skipped.offset,
                    skipped.reason.as_str()
                );
            }
            let written = if wire { wire::pack(&compiled.table)? } else { compiled.table };
            fs::write(&output, written).with_context(|| format!("failed to write {}", output.display()))?;
        }
        Command::Dump { file } => with_table(&file, dump)?,
        Command::Lookup { file, addresses } => with_table(&file, |table, out| {
            addresses.iter().try_for_each(|address| writeln!(out, "{address} {}", table.rule(*address)))
        })?,
        Command::Stats(args) => return stats::run(&args),
        Command::Verify(args) => return verify::run(&args),
    }
    Ok(ExitCode::from(crate::DONE))
}

fn compile_file(path: &Path, elf: &[u8]) -> anyhow::Result<Compiled> {
    let failed = || format!("failed to compile the unwind table of {}", path.display());
    compressed_file::refuse(elf).with_context(failed)?;
    let id = identity(elf).with_context(failed)?;
    compile(elf, id).with_context(failed)
}

/// The build-ID note, else the file's hash.
fn identity(elf: &[u8]) -> anyhow::Result<BuildId> {
    match build_id_of(elf) {
        Some(id) => Ok(id),
        None => Ok(windlass_agent::image::identify(elf)?.id.build_id()),
    }
}

/// Compiles a table that is looked at and dropped: an image so damaged that it has no identity still has rows.
fn compile_unnamed(elf: &[u8]) -> anyhow::Result<Compiled> {
    compressed_file::refuse(elf)?;
    let id = identity(elf).or_else(|_| BuildId::new(&[0; 16]))?;
    Ok(compile(elf, id)?)
}

/// Calls `print` with the table in `path`, or that of the ELF file at `path`, and standard output.
fn with_table(
    path: &Path,
    print: impl FnOnce(&Table<'_>, &mut dyn io::Write) -> io::Result<()>,
) -> anyhow::Result<()> {
    let bytes = map(path)?;
    let failed = || format!("failed to read {}", path.display());
    let made;
    let file = if bytes.starts_with(&MAGIC) {
        &bytes[..]
    } else if bytes.starts_with(&WIRE_MAGIC) {
        made = wire::unpack(&bytes).with_context(failed)?;
        &made
    } else {
        made = compile_file(path, &bytes)?.table;
        &made
    };
    let table = Table::parse(file).with_context(failed)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    print(&table, &mut out)?;
    Ok(out.flush()?)
}

/// Header facts, then `ADDRESS RULE` for each row.
fn dump(table: &Table<'_>, out: &mut dyn io::Write) -> io::Result<()> {
    let present = (0..table.page_count()).filter(|page| table.page(*page).is_some()).count();
    writeln!(out, "build_id     {}", table.build_id())?;
    writeln!(out, "architecture {}", table.architecture().as_str())?;
    writeln!(out, "base         {}", table.base())?;
    writeln!(out, "pages        {present} of {}", table.page_count())?;
    writeln!(out, "records      {}", table.dictionary().len() / size_of::<u64>())?;
    writeln!(out, "rows         {}", table.row_count())?;
    writeln!(out)?;
    for (address, record) in table.rows() {
        let rule =
            Rule::of_record(record, table.architecture()).expect("a table that parses holds rules only");
        writeln!(out, "{address} {rule}")?;
    }
    Ok(())
}
