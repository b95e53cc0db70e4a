//! Kernels from the Debian archive: the newest package of a series, unpacked.
//!
//! The archive is the one that this machine's apt uses, asked through a configuration of its own for releases that
//! the machine does not follow; so nothing of the machine changes, and no privilege is needed. A package in
//! the index need not be there any more, so the next older one is tried.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::checkout::{output, run};

/// Releases in which there are kernels, and whether in the security archive: 6.1 and 6.12 of Debian 12, 6.12 of
/// Debian 13, newer ones for it, 5.10 of Debian 11. The security archive holds the newest of each, in a short index.
const RELEASES: [(&str, bool); 4] = [
    ("bookworm-security", true),
    ("trixie-security", true),
    ("trixie-backports", false),
    ("bullseye-security", true),
];
/// What signs them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Older packages to try when the newest cannot be downloaded.
const MAX_ATTEMPTS: usize = 3;
/// What holds the kernel: of the newest series `image` only asks for `binary` and for the modules.
const KINDS: [&str; 2] = ["linux-binary-", "linux-image-"];
/// The archive, as of now.
pub(super) struct Archive {
    folder: PathBuf,
    /// Debian's name of the instruction set.
    architecture: &'static str,
}

/// A package that may hold a kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    version: Vec<u64>,
    package: String,
    /// What `uname -r` says.
    release: String,
}

impl Archive {
    /// Fetches the indexes into `folder`.
    pub(super) fn open(folder: &Path, architecture: &'static str) -> Result<Self> {
        let (main, security) = sites()?;
        let lines = RELEASES.map(|(release, is_security)| {
            let site = if is_security { &security } else { &main };
            format!("deb [signed-by={KEYRING}] {site} {release} main\n")
        });
        for name in ["apt/lists/partial", "apt/cache/archives/partial"] {
            std::fs::create_dir_all(folder.join(name))?;
        }
        std::fs::write(folder.join("apt/sources.list"), lines.concat())?;
        let archive = Self { folder: folder.to_owned(), architecture };
        // An index that cannot be had costs its kernels alone.
        if let Err(error) = run(archive.apt("apt-get").args(["-qq", "update"])) {
            println!("some lists of packages could not be refreshed: {error:#}");
        }
        Ok(archive)
    }

    /// The newest kernel of `series` that can be had.
    pub(super) fn kernel(&self, series: &str) -> Result<PathBuf> {
        let is_series =
            series.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
        ensure!(is_series, "a series is two numbers, as 6.12");
        let pattern = format!("^linux-(image|binary)-{}[.]", series.replace('.', "[.]"));
        let listed = output(self.apt("apt-cache").args(["search", "--names-only", &pattern]))?;
        let candidates = candidates(&listed, self.architecture);
        let mut last = None;
        for candidate in candidates.iter().take(MAX_ATTEMPTS) {
            match self.unpacked(candidate) {
                Ok(kernel) => return Ok(kernel),
                Err(error) => last = Some(error.context(candidate.package.clone())),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("the Debian archive has no such kernel")))
    }

    fn unpacked(&self, candidate: &Candidate) -> Result<PathBuf> {
        let kernel = self.folder.join(format!("vmlinuz-{}", candidate.release));
        if kernel.is_file() {
            return Ok(kernel);
        }
        run(self.apt("apt-get").args(["-qq", "download", &candidate.package]))?;
        let start = format!("{}_", candidate.package);
        let package = std::fs::read_dir(&self.folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start)))
            .context("downloaded, and not there")?;
        // The second is where `binary` packages have it.
        let members = ["boot/vmlinuz-RELEASE", "usr/lib/modules/RELEASE/vmlinuz"]
            .map(|path| format!("./{}", path.replace("RELEASE", &candidate.release)));
        let content = member_of(&package, &members[0]).or_else(|_| member_of(&package, &members[1]));
        std::fs::remove_file(&package)?;
        // Under its name only when it is whole.
        let unfinished = kernel.with_extension("part");
        std::fs::write(&unfinished, content?)?;
        std::fs::rename(unfinished, &kernel)?;
        Ok(kernel)
    }

    /// A program of apt, with the configuration of this archive.
    fn apt(&self, program: &str) -> Command {
        let folder = self.folder.join("apt");
        let mut apt = Command::new(program);
        apt.current_dir(&self.folder);
        // The second replaces a list, which otherwise has this machine's own.
        apt.arg("-o").arg(format!("APT::Architecture={}", self.architecture));
        apt.arg("-o").arg(format!("APT::Architectures={}", self.architecture));
        for (option, value) in [
            ("Dir::Etc::sourcelist", folder.join("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::State::lists", folder.join("lists")),
            ("Dir::Cache", folder.join("cache")),
            ("Acquire::Languages", "none".into()),
            // Descriptions for software centres, larger than the packages' index.
            ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".into()),
            // The folder need not be readable to apt's own user.
            ("APT::Sandbox::User", "root".into()),
        ] {
            apt.arg("-o").arg(format!("{option}={}", value.display()));
        }
        apt
    }
}

/// Addresses of the Debian archive that this machine uses, and of its security archive beside it.
fn sites() -> Result<(String, String)> {
    let listed = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN) $(SITE)",
        "Created-By: Packages",
    ]))?;
    let debian = || listed.lines().filter_map(|line| line.strip_prefix("Debian "));
    let Some(main) = debian().find(|site| !site.ends_with("-security")) else {
        bail!("this machine's apt knows no Debian archive");
    };
    let security = debian().find(|site| site.ends_with("-security"));
    Ok((main.to_owned(), security.map_or_else(|| format!("{main}-security"), str::to_owned)))
}

/// The kernels' packages among those that `apt-cache search` lists, in the order to try them in. Those of the plain
/// variant, as `-amd64`: others are called `-cloud-amd64`, `-rt-amd64`.
fn candidates(listed: &str, architecture: &str) -> Vec<Candidate> {
    let mut candidates: Vec<_> = listed
        .lines()
        .filter_map(|line| {
            let package = line.split_whitespace().next()?;
            let release = KINDS.iter().find_map(|kind| package.strip_prefix(kind))?;
            let version = release.strip_suffix(architecture)?.strip_suffix('-')?;
            // Of other variants a name is left here; `-16k` is with other pages.
            if ["-cloud", "-rt", "-16k"].iter().any(|variant| version.ends_with(variant)) {
                return None;
            }
            let numbers = version.split(|character: char| !character.is_ascii_digit());
            Some(Candidate {
                version: numbers.filter_map(|number| number.parse().ok()).collect(),
                package: package.to_owned(),
                release: release.to_owned(),
            })
        })
        .collect();
    // Newest first; `binary` before `image`.
    candidates.sort_by(|a, b| b.version.cmp(&a.version).then_with(|| a.package.cmp(&b.package)));
    candidates
}

/// The bytes of one file of a package.
fn member_of(package: &Path, member: &str) -> Result<Vec<u8>> {
    let mut unpack =
        Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
    let archive = unpack.stdout.take().context("the archive is piped")?;
    let extracted = Command::new("tar").args(["-xO", member]).stdin(archive).output()?;
    ensure!(unpack.wait()?.success(), "dpkg-deb failed");
    ensure!(extracted.status.success(), "it has no {member}");
    Ok(extracted.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_plain_kernel_is_tried_first() {
        let listed = "linux-image-6.1.0-0.deb11.52-amd64 - Linux 6.1\n\
                      linux-image-6.1.0-9-amd64 - Linux 6.1\n\
                      linux-image-6.1.0-56-amd64 - Linux 6.1\n\
                      linux-image-6.1.0-56-amd64-dbg - Debug symbols\n\
                      linux-image-6.1.0-57-amd64-unsigned - Linux 6.1\n\
                      linux-image-6.1.0-57-cloud-amd64 - Linux 6.1\n\
                      linux-image-6.1.0-57-rt-amd64 - Linux 6.1\n";
        let packages: Vec<_> =
            candidates(listed, "amd64").into_iter().map(|candidate| candidate.release).collect();
        assert_eq!(packages, ["6.1.0-56-amd64", "6.1.0-9-amd64", "6.1.0-0.deb11.52-amd64"]);
        let split = "linux-image-7.2.12+deb13-amd64 - Linux\nlinux-binary-7.2.12+deb13-amd64 - Linux\n";
        assert_eq!(candidates(split, "amd64")[0].package, "linux-binary-7.2.12+deb13-amd64");
    }
}
