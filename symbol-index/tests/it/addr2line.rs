//! The oracle: what `addr2line -afiC` of GNU binutils says.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// A function at a line; what is not known is empty, or line 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) function: String,
    /// Without its folders.
    pub(crate) file: String,
    pub(crate) line: u32,
}

/// The frames at each address, innermost first.
pub(crate) fn frames(elf: &Path, addresses: &[u64]) -> Vec<Vec<Line>> {
    ask(Command::new("addr2line").args(["-afiC", "-e"]).arg(elf), addresses)
}

/// The frames at each offset of a section of a file that is not linked.
pub(crate) fn frames_in(elf: &Path, section: &str, offsets: &[u64]) -> Vec<Vec<Line>> {
    ask(Command::new("addr2line").args(["-afiC", "-j", section, "-e"]).arg(elf), offsets)
}

fn ask(addr2line: &mut Command, addresses: &[u64]) -> Vec<Vec<Line>> {
    let mut child = addr2line.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input: String = addresses.iter().map(|address| format!("{address:#x}\n")).collect();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    parse(std::str::from_utf8(&output.stdout).unwrap())
}

fn parse(text: &str) -> Vec<Vec<Line>> {
    let mut answers: Vec<Vec<Line>> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("0x") {
            answers.push(Vec::new());
            continue;
        }
        let place = lines.next().unwrap();
        let place = place.split(" (discriminator").next().unwrap();
        let (path, number) = place.rsplit_once(':').unwrap();
        let file = path.rsplit('/').next().unwrap();
        answers.last_mut().unwrap().push(Line {
            function: if line == "??" { String::new() } else { line.to_owned() },
            file: if file == "??" { String::new() } else { file.to_owned() },
            line: number.parse().unwrap_or(0),
        });
    }
    answers
}
