//! The process is killed in the middle of uploads: what was acknowledged is there, and no byte is served that was not sent.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::{Client, StatusCode};
use windlass_schema::http::{
    SHA256_HEADER, UPLOAD_COMPLETE_HEADER, UPLOAD_LENGTH_HEADER, UPLOAD_OFFSET_HEADER,
};

use crate::administered::administered;
use crate::daemon::{Daemon, check};
use crate::server::{build, client, sha256};

/// Rounds in the suite. The figure of 200 is measured by the ignored test.
const ROUNDS: u64 = 20;
/// Senders at once.
const SENDERS: u64 = 6;
/// Longest life of a process in milliseconds: some uploads are done, others under way.
const LIFE_MS: u64 = 150;
const PART: usize = 1 << 20;

/// Numbers that look random, the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// What was sent, by the path under which it would be served.
#[derive(Default)]
struct Sent {
    contents: HashMap<String, Arc<Vec<u8>>>,
    acknowledged: Vec<String>,
}

/// An ELF file of another build: the same with another build-ID note.
fn other_build(number: u64, size: usize) -> (String, Vec<u8>) {
    let id = build().id;
    let mut content = build().stripped.clone();
    let at = content.windows(id.as_bytes().len()).position(|window| window == id.as_bytes());
    let at = at.expect("the note is in the file");
    content[at..at + 8].copy_from_slice(&number.to_be_bytes());
    let note = content[at..at + id.as_bytes().len()].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut dice = Dice(number | 1);
    while content.len() < size {
        content.extend(dice.roll(u64::MAX).to_le_bytes());
    }
    (note, content)
}

/// Sends as a whole; says whether it was acknowledged.
async fn whole(client: &Client, daemon: &str, id: &str, content: &[u8]) -> bool {
    let request = client.put(format!("{daemon}/api/v1/buildid/{id}/executable"));
    let sent = request.header(SHA256_HEADER, sha256(content)).body(content.to_vec()).send().await;
    sent.is_ok_and(|response| response.status().is_success())
}

/// Sends in parts, from where the service says it is.
async fn parts(client: &Client, daemon: &str, id: &str, content: &[u8]) -> bool {
    let url = format!("{daemon}/api/v1/uploads/{id}/executable/{}", sha256(content));
    let Ok(progress) = client.head(&url).send().await else { return false };
    let mut at: usize =
        progress.headers()[UPLOAD_OFFSET_HEADER].to_str().expect("text").parse().expect("a number");
    while at < content.len() {
        let end = content.len().min(at + PART);
        let complete = if end == content.len() { "?1" } else { "?0" };
        let sent = client
            .patch(&url)
            .header(UPLOAD_OFFSET_HEADER, at)
            .header(UPLOAD_LENGTH_HEADER, content.len())
            .header(UPLOAD_COMPLETE_HEADER, complete)
            .body(content[at..end].to_vec())
            .send()
            .await;
        match sent {
            Ok(response) if response.status().is_success() => at = end,
            _ => return false,
        }
    }
    true
}

/// Sends until the process is gone.
async fn sender(client: Client, daemon: String, number: Arc<AtomicU64>, sent: Arc<Mutex<Sent>>) {
    loop {
        let number = number.fetch_add(1, Ordering::Relaxed);
        let size = if number.is_multiple_of(5) { 2 * PART + 77 } else { (number as usize * 7919) % 400_000 };
        let (id, content) = other_build(number, size);
        let path = format!("/buildid/{id}/executable");
        let kept = Arc::new(content);
        sent.lock().expect("no panic").contents.insert(path.clone(), Arc::clone(&kept));
        let done = if kept.len() > 2 * PART {
            parts(&client, &daemon, &id, &kept).await
        } else {
            whole(&client, &daemon, &id, &kept).await
        };
        if !done {
            return;
        }
        sent.lock().expect("no panic").acknowledged.push(path);
    }
}

/// Everything acknowledged is served as it was sent; the rest so, or not at all.
async fn expect_sound(client: &Client, daemon: &Daemon, sent: &Sent) -> usize {
    let mut served = 0;
    for (path, content) in &sent.contents {
        let response = client.get(daemon.url(path)).send().await.expect("an answer");
        let acknowledged = sent.acknowledged.contains(path);
        match response.status() {
            StatusCode::OK => {
                let bytes = response.bytes().await.expect("all of it");
                assert!(bytes == content[..], "{path}: other bytes than were sent");
                served += 1;
            }
            StatusCode::NOT_FOUND => assert!(!acknowledged, "{path} was acknowledged and is gone"),
            other => panic!("{path}: {other}"),
        }
    }
    served
}

async fn rounds(folder: &Path, count: u64) -> (usize, usize) {
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    let number = Arc::new(AtomicU64::new(1));
    let (mut acknowledged, mut served) = (0, 0);
    for _ in 0..count {
        let client = client();
        let daemon = Daemon::start(folder);
        let sent = Arc::new(Mutex::new(Sent::default()));
        let senders: Vec<_> = (0..SENDERS)
            .map(|_| {
                tokio::spawn(sender(client.clone(), daemon.url(""), Arc::clone(&number), Arc::clone(&sent)))
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(dice.roll(LIFE_MS))).await;
        daemon.kill();
        for sender in senders {
            sender.await.expect("no panic");
        }
        let daemon = Daemon::start(folder);
        let sent = std::mem::take(&mut *sent.lock().expect("no panic"));
        served += expect_sound(&client, &daemon, &sent).await;
        acknowledged += sent.acknowledged.len();
        // What was cut off can be sent again, in parts from where it was.
        for (path, content) in
            sent.contents.iter().filter(|(path, _)| !sent.acknowledged.contains(path)).take(2)
        {
            let id = path.split('/').nth(2).expect("/buildid/ID/executable");
            assert!(parts(&client, &daemon.url(""), id, content).await, "{path} is taken after the restart");
        }
        daemon.kill();
    }
    (acknowledged, served)
}

/// Kills so often as `WINDLASS_KILLS` says.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_and_no_wrong_byte_served() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let count = std::env::var("WINDLASS_KILLS").map_or(ROUNDS, |count| count.parse().expect("a number"));
    let (acknowledged, served) = rounds(folder.path(), count).await;
    assert!(acknowledged > 0 && served >= acknowledged, "{acknowledged} acknowledged, {served} served");
    let (sound, text) = check(folder.path());
    println!("{count} kills: {acknowledged} acknowledged, {served} served whole after one; check: {text}");
    assert!(sound, "{text}");
    // Nothing runs now, so nothing that is not on record can be on its way there.
    administered(folder.path(), &["gc", "--grace-hours", "0"]);
    let (sound, text) = check(folder.path());
    assert!(sound && !text.contains("not on record"), "an orphan after the collection: {text}");
}
