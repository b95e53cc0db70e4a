//! `windlassd audit`: who wrote what, and from where.

use windlass_debuginfod::administration::Administration;
use windlass_debuginfod::catalog::AuditRecord;

use super::token::date;
use crate::Store;

pub(crate) fn run(store: Store, limit: usize, json: bool) -> anyhow::Result<()> {
    let records = Administration::open(&store.config())?.audit(limit)?;
    match json {
        true => println!("{}", serde_json::to_string(&records)?),
        false => records.iter().for_each(print),
    }
    Ok(())
}

fn print(record: &AuditRecord) {
    let entry = &record.entry;
    let (writer, subject) = (&entry.writer, &entry.subject);
    let mut words = vec![date(entry.at_s), writer.token.clone(), entry.action.to_string()];
    words.extend(subject.build_id.map(|id| id.to_string()));
    words.extend(subject.kind.map(|kind| kind.to_string()));
    // What others chose is quoted, so that it cannot pass for more lines or for commands to the terminal.
    words.extend((!subject.path.is_empty()).then(|| format!("{:?}", subject.path)));
    words.extend(subject.namespace.as_ref().map(|namespace| format!("in {namespace}")));
    words.extend(subject.sha256.map(|hash| format!("sha256 {hash}")));
    words.extend(subject.size_bytes.map(|size| format!("{size} bytes")));
    words.extend((!writer.peer.is_empty()).then(|| format!("from {}", writer.peer)));
    println!("{}: {}", words.join(" "), entry.result.escape_debug());
}
