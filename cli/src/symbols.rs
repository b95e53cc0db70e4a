//! `windlass symbols`: builds and queries symbol indexes, without a service.
//!
//! Lookups print what llvm-symbolizer prints, so that scripts and comparisons can change one for the
//! other: an interactive peer that writes one address and waits for the answer works too.

use std::fs;
use std::io::{self, BufRead as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;
use windlass_schema::ImageAddress;
use windlass_symbol_index::{Frame, Index, Input};

use crate::address_input;
use crate::mapped_elf::map;

const EXAMPLES: &str = "\
Examples:
  windlass symbols build target/release/server -o server.symbols
  windlass symbols lookup --obj server.symbols 0x1139 0x1150
  nm -C server | awk '{print $1}' | windlass symbols lookup --obj server --output-style JSON

Addresses are image addresses (as nm prints them), hex; one a line on stdin when none is given.";

/// What is read from stdin at a time.
const INPUT_BUFFER_BYTES: usize = 64 << 10;

/// Arguments of `windlass symbols`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SymbolsArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Build the symbol index of an ELF file
    Build {
        /// The ELF file: DWARF, symbol tables or both
        elf: PathBuf,
        /// Where to write the index
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Print the functions, files and lines of addresses
    #[command(after_help = EXAMPLES)]
    Lookup {
        /// A symbol index, or an ELF file
        #[arg(long, value_name = "FILE")]
        obj: PathBuf,
        /// As llvm-symbolizer's option of this name
        #[arg(long, value_enum, default_value_t = Style::Llvm)]
        output_style: Style,
        /// Addresses; read from stdin, one a line, when none is given
        #[arg(value_name = "ADDRESS", value_parser = address_input::parse)]
        addresses: Vec<ImageAddress>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Style {
    /// Function, then `file:line:column`, for each frame; a blank line ends an address
    #[value(name = "LLVM", alias = "llvm")]
    Llvm,
    /// One JSON object for an address
    #[value(name = "JSON", alias = "json")]
    Json,
}

/// Runs `windlass symbols`.
pub(crate) fn run(args: SymbolsArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Build { elf, output } => {
            let index = build(&elf, &map(&elf)?)?;
            fs::write(&output, index).with_context(|| format!("failed to write {}", output.display()))?;
            Ok(ExitCode::from(crate::DONE))
        }
        Command::Lookup { obj, output_style, addresses } => lookup(&obj, output_style, &addresses),
    }
}

fn build(path: &Path, elf: &[u8]) -> anyhow::Result<Vec<u8>> {
    windlass_symbol_index::build(Input { debug: Some(elf), image: Some(elf), ..Input::default() })
        .with_context(|| format!("failed to build a symbol index of {}", path.display()))
}

fn lookup(obj: &Path, style: Style, addresses: &[ImageAddress]) -> anyhow::Result<ExitCode> {
    let bytes = map(obj)?;
    let built;
    let index = if bytes.starts_with(&object::elf::ELFMAG) {
        built = build(obj, &bytes)?;
        Index::parse(&built)
    } else {
        Index::parse(&bytes)
    };
    let index =
        index.with_context(|| format!("{} is neither an ELF file nor a symbol index", obj.display()))?;
    let printer = Printer { index: &index, module: obj.display().to_string(), style };
    let mut out = io::BufWriter::new(io::stdout().lock());
    if addresses.is_empty() {
        printer.answer_stdin(&mut out)?;
    } else {
        printer.answer_arguments(addresses, &mut out)?;
    }
    out.flush()?;
    Ok(ExitCode::from(crate::DONE))
}

struct Printer<'a> {
    index: &'a Index<'a>,
    module: String,
    style: Style,
}

impl Printer<'_> {
    fn frames(&self, address: ImageAddress) -> Vec<Frame<'_>> {
        self.index.lookup(address).unwrap_or_default()
    }

    /// As llvm-symbolizer: one JSON array over all arguments.
    fn answer_arguments(&self, addresses: &[ImageAddress], out: &mut impl Write) -> io::Result<()> {
        match self.style {
            Style::Llvm => addresses.iter().try_for_each(|&address| print_llvm(&self.frames(address), out)),
            Style::Json => {
                let answers: Vec<_> = addresses.iter().map(|&address| self.json(address)).collect();
                serde_json::to_writer(&mut *out, &answers)?;
                writeln!(out)
            }
        }
    }

    /// As llvm-symbolizer: an answer for each line, and a line that is no address comes back as it is.
    fn answer_stdin(&self, out: &mut impl Write) -> io::Result<()> {
        // Its own buffer, whose fill level is visible, unlike that of `StdinLock`.
        let mut input = io::BufReader::with_capacity(INPUT_BUFFER_BYTES, io::stdin());
        let mut line = Vec::new();
        while input.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            match (address_input::parse(text.trim()), self.style) {
                (Ok(address), Style::Llvm) => print_llvm(&self.frames(address), out)?,
                (Ok(address), Style::Json) => {
                    serde_json::to_writer(&mut *out, &self.json(address))?;
                    writeln!(out)?;
                }
                (Err(_), _) => writeln!(out, "{}", text.trim_end_matches(['\r', '\n']))?,
            }
            line.clear();
            if !input.buffer().contains(&b'\n') {
                // The peer may be waiting for this answer before it writes on.
                out.flush()?;
            }
        }
        Ok(())
    }

    fn json(&self, address: ImageAddress) -> JsonAnswer<'_> {
        let mut symbols: Vec<_> = self.frames(address).iter().map(JsonSymbol::new).collect();
        if symbols.is_empty() {
            symbols.push(JsonSymbol::default());
        }
        JsonAnswer { address: format!("{address}"), module_name: &self.module, symbol: symbols }
    }
}

fn print_llvm(frames: &[Frame<'_>], out: &mut impl Write) -> io::Result<()> {
    for Frame { function, file, line, .. } in frames {
        writeln!(out, "{function}\n{}:{}:0", file.as_deref().unwrap_or("??"), line.unwrap_or(0))?;
    }
    if frames.is_empty() {
        writeln!(out, "??\n??:0:0")?;
    }
    writeln!(out)
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct JsonAnswer<'a> {
    address: String,
    module_name: &'a str,
    symbol: Vec<JsonSymbol>,
}

/// llvm-symbolizer's keys; what the index does not hold is what it prints for unknown.
#[derive(Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct JsonSymbol {
    column: u32,
    discriminator: u32,
    file_name: String,
    function_name: String,
    line: u32,
    start_address: &'static str,
    start_file_name: &'static str,
    start_line: u32,
}

impl JsonSymbol {
    fn new(frame: &Frame<'_>) -> Self {
        Self {
            file_name: frame.file.as_deref().unwrap_or_default().to_owned(),
            function_name: frame.function.clone().into_owned(),
            line: frame.line.unwrap_or(0),
            ..Self::default()
        }
    }
}
