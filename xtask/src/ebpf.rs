//! Builds the BPF program, and proves that the committed object is what the sources give.
//!
//! Projects that build their BPF object on each user's machine ask every user for a nightly compiler
//! and LLVM; projects that commit it ask for trust. Here it is committed, and the same bytes come
//! out of any checkout with the same compiler: CI compares them.
//!
//! The compiler needs the sources of `core` beside it. Debian has both as packages, with the LLVM
//! that bpf-linker opens at run time; elsewhere a rustup nightly with `rust-src` serves, though its
//! bytes differ and so can only be built, not compared.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::checkout::{cargo, command, output, root, run};
use crate::programs::{can_install, cargo_home, find, install};

/// An object for agents of one instruction set.
struct Object {
    path: &'static str,
    /// For which the bindings of the kernel's types are.
    architecture: &'static str,
    /// What else cargo is told.
    options: &'static [&'static str],
}

/// The committed objects.
const OBJECTS: [Object; 2] = [
    Object { path: "agent/bpf/windlass.bpf.o", architecture: "x86_64", options: &[] },
    Object {
        path: "agent/bpf/windlass-aarch64.bpf.o",
        architecture: "aarch64",
        options: &["--features", "aarch64"],
    },
];
/// That with the programs that time the walk; not committed.
const TIMING: Object =
    Object { path: "target/bpf/timing.bpf.o", architecture: "x86_64", options: &["--features", "timing"] };
/// The last bpf-linker that opens LLVM 22 at run time on Debian 12.
const LINKER_VERSION: &str = "0.10.1";
/// Debian packages of the compiler, and of the sources of `core`.
const PACKAGES: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];
/// What precedes the compiler's version in the debug information of an object.
const PRODUCER: &[u8] = b"(rustc version ";

/// Nothing here can build for BPF.
#[derive(Debug)]
pub(crate) struct NoToolchain;

impl std::fmt::Display for NoToolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "no compiler for BPF: install Debian's {} and bpf-linker {LINKER_VERSION} \
             (cargo install bpf-linker --version {LINKER_VERSION} --locked), or a rustup nightly with rust-src",
            PACKAGES.join(" ")
        )
    }
}

impl std::error::Error for NoToolchain {}

/// A compiler with the sources of `core`, and the linker.
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    linker: PathBuf,
    /// The LLVM library that belongs to the compiler.
    llvm: PathBuf,
    /// Root of the sources of the standard library.
    sources: PathBuf,
}

/// Builds, and puts the objects in their places.
pub(crate) fn update() -> Result<()> {
    let toolchain = Toolchain::ensure()?;
    for object in &OBJECTS {
        let bytes = put(&toolchain, object)?;
        println!("{}: {bytes} bytes", object.path);
    }
    Ok(())
}

/// Builds the object with the programs that time the walk; where it lies.
pub(crate) fn build_timing() -> Result<PathBuf> {
    put(&Toolchain::ensure()?, &TIMING)?;
    Ok(root().join(TIMING.path))
}

/// Builds an object and puts it in its place; its size.
fn put(toolchain: &Toolchain, object: &Object) -> Result<usize> {
    let built = build(toolchain, object)?;
    let path = root().join(object.path);
    std::fs::create_dir_all(path.parent().expect("objects lie in folders"))?;
    std::fs::write(&path, &built).with_context(|| format!("write {}", path.display()))?;
    Ok(built.len())
}

/// Builds, and compares with the objects that are there. Returns why the bytes could not be compared, if so.
pub(crate) fn check() -> Result<Option<String>> {
    let toolchain = Toolchain::ensure()?;
    let mut not_compared = None;
    for object in &OBJECTS {
        not_compared = check_one(&build(&toolchain, object)?, object.path)?.or(not_compared);
    }
    Ok(not_compared)
}

fn check_one(built: &[u8], path: &str) -> Result<Option<String>> {
    let committed = std::fs::read(root().join(path)).with_context(|| format!("read {path}"))?;
    if built == committed {
        println!("{path} is what the sources give: {} bytes", built.len());
        return Ok(None);
    }
    let (ours, theirs) = (compiler_of(built), compiler_of(&committed));
    if ours != theirs {
        // An update of the distribution's compiler must not stop everyone's work; it must be seen.
        return Ok(Some(format!(
            "{path} was built by rustc {theirs}, here is {ours}: it builds, but its bytes were not compared; \
             bring it up to date with: cargo xtask build-ebpf"
        )));
    }
    bail!(
        "{path} ({} bytes) is not what the sources give ({} bytes); update it with: cargo xtask build-ebpf",
        committed.len(),
        built.len()
    )
}

/// The version of the compiler in an object's debug information.
fn compiler_of(object: &[u8]) -> String {
    let Some(at) = object.windows(PRODUCER.len()).position(|window| window == PRODUCER) else {
        return "unknown".to_owned();
    };
    let version = object[at + PRODUCER.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(version).into_owned()
}

/// Compiles and links; the object's bytes depend on the sources and the toolchain only.
fn build(toolchain: &Toolchain, object: &Object) -> Result<Vec<u8>> {
    let target_folder = root().join("target/bpf");
    // bpf-linker searches a folder for a file whose name starts with libLLVM; a folder of its own
    // keeps it from another LLVM beside the right one.
    let llvm_folder = tempfile::tempdir()?;
    let name = toolchain.llvm.file_name().context("the LLVM library has no name")?;
    std::os::unix::fs::symlink(&toolchain.llvm, llvm_folder.path().join(name))?;
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut flags = vec![
        format!("-Clinker={}", toolchain.linker.display()),
        "-Clink-arg=--btf".to_owned(),
        "-Cdebuginfo=2".to_owned(),
    ];
    // Crates lie in a folder named after their registry, which is nobody's business; it must be there
    // before the build to be mapped.
    run(command(&toolchain.cargo).args(["fetch", "--quiet", "--locked"]).env("RUSTC", &toolchain.rustc))
        .context("fetch the sources of the BPF program's dependencies")?;
    for registry in std::fs::read_dir(cargo_home().join("registry/src")).into_iter().flatten().flatten() {
        flags.push(remap(&registry.path(), "registry"));
    }
    // The last one that matches wins, so the wider ones come first.
    flags.push(remap(&root(), "windlass"));
    flags.push(remap(&toolchain.sources, "rust"));
    let mut compile = command(&toolchain.cargo);
    compile
        .args(["build", "--quiet", "--release", "--locked", "--package", "windlass-bpf"])
        .args(["--target", "bpfel-unknown-none", "-Zbuild-std=core", "--target-dir"])
        .arg(&target_folder)
        .args(object.options)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        // Whose registers aya's bindings are for; without it, of the machine that compiles.
        .env("AYA_BPF_TARGET_ARCH", object.architecture)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "full")
        .env("LD_LIBRARY_PATH", llvm_folder.path());
    // Variables with which the calling cargo directs its own compiler.
    for variable in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTC_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        compile.env_remove(variable);
    }
    run(&mut compile).context("build the BPF program")?;
    let built = target_folder.join("bpfel-unknown-none/release/windlass-bpf");
    std::fs::read(&built).with_context(|| format!("read {}", built.display()))
}

impl Toolchain {
    /// What is there, or what can be installed.
    fn ensure() -> Result<Self> {
        if find("bpf-linker").is_none() && (can_install() || crate::checkout::is_ci()) {
            run(&mut cargo(&format!("install bpf-linker --version {LINKER_VERSION} --locked")))?;
        }
        // Debian's compiler first, also where it has to be installed: only its bytes can be compared.
        if Self::find_debian().is_none()
            && can_install()
            && let Err(error) = install(PACKAGES)
        {
            println!("{error:#}");
        }
        Self::find().ok_or_else(|| NoToolchain.into())
    }

    fn find_debian() -> Option<Self> {
        Self::at(Path::new("/usr"), &find("bpf-linker")?)
    }

    fn find() -> Option<Self> {
        let nightly = || {
            let sysroot = output(Command::new("rustup").args(["run", "nightly", "rustc", "--print=sysroot"]));
            Some(PathBuf::from(sysroot.ok()?.trim()))
        };
        Self::find_debian().or_else(|| Self::at(&nightly()?, &find("bpf-linker")?))
    }

    /// The toolchain whose sysroot this is.
    fn at(sysroot: &Path, linker: &Path) -> Option<Self> {
        let (rustc, cargo) = (sysroot.join("bin/rustc"), sysroot.join("bin/cargo"));
        let sources = sysroot.join("lib/rustlib/src/rust");
        if !(rustc.is_file() && cargo.is_file() && sources.join("library/core").is_dir()) {
            return None;
        }
        let version = output(Command::new(&rustc).arg("-vV")).ok()?;
        let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
        let name = format!("libLLVM.so.{}", llvm.rsplit_once('.')?.0);
        let multiarch = format!("lib/{}-linux-gnu", std::env::consts::ARCH);
        let llvm = [sysroot.join(multiarch), sysroot.join("lib")].iter().find_map(|folder| {
            let mut files = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
            files.find(|file| file.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&name)))
        })?;
        Some(Self { cargo, rustc, linker: linker.to_owned(), llvm, sources })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_of_an_object_is_read_from_its_debug_information() {
        assert_eq!(compiler_of(b"..clang LLVM (rustc version 1.96.0 (x))\0.."), "1.96.0 (x))");
        assert_eq!(compiler_of(b"nothing"), "unknown");
    }
}
