//! Counts words: a program that brings enough of the standard library along to be wide code, much of which ends in calls
//! that do not return.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

fn main() {
    let mut words: BTreeMap<String, f64> = BTreeMap::new();
    let mut lengths: HashMap<usize, Vec<String>> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        for word in line.expect("text").split_whitespace() {
            *words.entry(word.to_lowercase()).or_default() += 1.5;
            lengths.entry(word.len()).or_default().push(word.parse::<f64>().expect("a number").to_string());
        }
    }
    let mut sorted: Vec<_> = words.into_iter().collect();
    sorted.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    writeln!(std::io::stdout(), "{sorted:?} {lengths:#?}").expect("a place to write to");
    if let Some(address) = std::env::args().nth(1) {
        let child = Command::new(&address).spawn().expect("a program");
        let thread = std::thread::spawn(move || TcpStream::connect(address).expect("a peer"));
        let peer = thread.join().expect("no panic").peer_addr();
        println!("{peer:?} {:?}", child.wait_with_output().expect("its end"));
    }
}
