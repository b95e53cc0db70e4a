//! How large is SFrame for the same code?
//!
//! SFrame is the format that Linux is to unwind user space by. Its sizes are quoted for different code and against
//! different sections. Here one file is compiled once and assembled with both, so that every section is of
//! the very same functions; it knows the stack and frame pointer as bases only, as our tables do in most rows.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSection as _};

use crate::installed::Image;
use crate::measured::Measured;
use crate::wire::{ZSTD_LEVEL, compress, wire_form};

/// The package of the workspace's lock file that carries the source to compile.
const PACKAGE: &str = "libsqlite3-sys";
/// That source in it: one file of 9 MB, known to everyone.
const SOURCE: &str = "sqlite3/sqlite3.c";

/// Runs a program; its standard output.
fn output(program: impl AsRef<OsStr>, arguments: &[&OsStr]) -> Result<Vec<u8>> {
    let program = program.as_ref();
    let output =
        Command::new(program).args(arguments).output().with_context(|| format!("start {program:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program:?} ended with {}: {}", output.status, stderr.trim());
    Ok(output.stdout)
}

/// The source, where cargo has unpacked it.
fn source() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--format-version=1", "--locked", "--offline"].map(OsStr::new);
    let metadata: serde_json::Value = serde_json::from_slice(&output(cargo, &arguments)?)?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let package = packages.iter().find(|package| package["name"] == PACKAGE);
    let manifest = package.and_then(|package| package["manifest_path"].as_str());
    let manifest = Path::new(manifest.with_context(|| format!("cargo metadata lists no {PACKAGE}"))?);
    let source = manifest.with_file_name(SOURCE);
    ensure!(source.exists(), "{} is not there", source.display());
    Ok(source)
}

/// Compiles, assembles and links the source with SFrame and `.eh_frame_hdr`.
fn build(folder: &Path) -> Result<PathBuf> {
    let [assembly, object, linked] =
        ["sqlite3.s", "sqlite3.o", "libsqlite3.so"].map(|name| folder.join(name));
    let (source, word) = (source()?, OsStr::new);
    let files = [assembly.as_os_str(), object.as_os_str(), linked.as_os_str()];
    output(
        "cc",
        &[word("-O2"), word("-fPIC"), word("-w"), word("-S"), source.as_os_str(), word("-o"), files[0]],
    )?;
    output("as", &[word("--gsframe"), files[0], word("-o"), files[1]])?;
    let hash = word("--build-id=sha1");
    output("ld", &[word("-shared"), word("--eh-frame-hdr"), hash, files[1], word("-o"), files[2]])?;
    Ok(linked)
}

/// Whether the assembler knows SFrame.
fn assembler_knows() -> bool {
    let help = output("as", &[OsStr::new("--help")]);
    help.is_ok_and(|help| String::from_utf8_lossy(&help).contains("--gsframe"))
}

pub(crate) fn print() -> Result<()> {
    println!("### SFrame\n");
    if !assembler_knows() {
        println!("Not measured: the assembler has no `--gsframe`.\n");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let image = Image::open(&build(folder.path())?)?.context("the linked library has no .eh_frame")?;
    let sframe = object::File::parse(image.elf())?
        .section_by_name(".sframe")
        .context("the linked library has no .sframe")?
        .data()?
        .to_vec();
    let file = Measured::new(image)?;
    let (sections, rows) = (file.image.sections(), file.compiled.report.rows);
    let eh_frame = sections.eh_frame.data;
    let peer = (eh_frame.len() + sections.eh_frame_hdr.data.len()) as f64;
    println!(
        "| sqlite3.c, {rows} rows | bytes | bytes/row | % of .eh_frame and .eh_frame_hdr |\n|---|---:|---:|---:|"
    );
    let row = |what: &str, bytes: usize| {
        println!(
            "| {what} | {bytes} | {:.2} | {:.1} |",
            bytes as f64 / rows as f64,
            100.0 * bytes as f64 / peer
        );
    };
    row(".eh_frame", eh_frame.len());
    row(".eh_frame_hdr", sections.eh_frame_hdr.data.len());
    row(".sframe", sframe.len());
    row("Windlass in the kernel", file.kernel_bytes()? as usize);
    row(&format!("zstd -{ZSTD_LEVEL} of .eh_frame"), compress(eh_frame)?.len());
    row(&format!("zstd -{ZSTD_LEVEL} of .sframe"), compress(&sframe)?.len());
    row("Windlass on the wire", wire_form(&file.compiled.table)?.len());
    println!(
        "\n`cc -O2 -fPIC -S`, `as --gsframe`, `ld -shared --eh-frame-hdr`; {}, {}.\n",
        version("cc")?,
        version("as")?
    );
    Ok(())
}

/// The first line of what a program says of its version.
fn version(program: &str) -> Result<String> {
    let text = output(program, &[OsStr::new("--version")])?;
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
}
