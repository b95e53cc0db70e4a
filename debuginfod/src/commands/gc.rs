//! `windlassd gc`: removes what nothing needs, and says why.

use clap::Args;
use windlass_debuginfod::Config;
use windlass_debuginfod::gc::{Amount, Collect, GcReport, Gone, gc};
use windlass_debuginfod::holding::GRACE_S;
use windlass_debuginfod::quota::Quota;
use windlass_debuginfod::retention::{Keep, Retention};

use super::token::date;
use crate::Store;

const HOUR_S: u64 = 3600;

/// What is kept for how long: for `gc`, and for the service that collects by itself.
#[derive(Args)]
pub(crate) struct RetentionArguments {
    /// Remove images that nobody used for longer [default: none]
    #[arg(long, value_name = "N", env = "WINDLASS_UNUSED_DAYS")]
    unused_days: Option<u64>,
    /// Labels that keep an image: NAME, NAME=VALUE or NAME=PREFIX*; repeated or separated by commas
    #[arg(
        long,
        value_name = "LABEL",
        value_delimiter = ',',
        default_value = "release,pin",
        env = "WINDLASS_KEEP"
    )]
    keep: Vec<Keep>,
    /// Remove profiles that ended longer ago [default: none]
    #[arg(long, value_name = "N", env = "WINDLASS_PROFILE_DAYS")]
    profile_days: Option<u64>,
    /// What a namespace may take, in decoded bytes: NAMESPACE=SIZE, as try=50G, or *=SIZE for all others; uploads beyond it
    /// are refused, and what was used longest ago goes. Repeated or separated by commas
    #[arg(long = "quota", value_name = "QUOTA", value_delimiter = ',', env = "WINDLASS_QUOTA")]
    quotas: Vec<Quota>,
}

impl RetentionArguments {
    pub(crate) fn apply(self, config: Config) -> Config {
        let Self { unused_days, keep, profile_days, quotas } = self;
        Config { retention: Retention { unused_days, keep, profile_days }, quotas, ..config }
    }
}

#[derive(Args)]
pub(crate) struct GcArguments {
    #[command(flatten)]
    store: Store,
    #[command(flatten)]
    retention: RetentionArguments,
    /// Only say what would go, and why
    #[arg(long)]
    dry_run: bool,
    /// How long a content that nothing names stays, for uploads under way that are about to; less than 24 is safe only while no
    /// service runs on storage and catalog
    #[arg(long, value_name = "N", default_value_t = GRACE_S / HOUR_S)]
    grace_hours: u64,
    /// Print a JSON object for each image that goes, and at last one with the sums
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(arguments: GcArguments) -> anyhow::Result<()> {
    let GcArguments { store, retention, dry_run, grace_hours, json } = arguments;
    let config = retention.apply(store.config());
    anyhow::ensure!(config.data_dir.is_dir(), "no data folder {:?} (give --data-dir)", config.data_dir);
    let grace_s = grace_hours.saturating_mul(HOUR_S);
    let collect = Collect { retention: config.retention.clone(), dry_run, grace_s };
    let mut tell = |gone: Gone| match json {
        true => println!("{}", serde_json::to_string(&gone).expect("no map, no foreign serializer")),
        false => print(&gone, dry_run),
    };
    let report = gc(&config, collect, &mut tell).await?;
    match json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => summarize(&report, dry_run, grace_hours),
    }
    Ok(())
}

fn print(gone: &Gone, dry_run: bool) {
    let (image, verb) = (&gone.image, if dry_run { "would remove" } else { "removed" });
    println!(
        "{verb} {} {:?} in {}: {} artefacts of {} bytes, last used {}: {}",
        image.build_id,
        image.file_name,
        image.namespace,
        image.artefacts,
        image.bytes,
        date(image.used_s),
        gone.why
    );
}

fn summarize(report: &GcReport, dry_run: bool, grace_hours: u64) {
    let verb = if dry_run { "would remove" } else { "removed" };
    let GcReport {
        unfinished,
        images,
        kept_by_label,
        profiles,
        derived,
        withdrawn,
        contents,
        orphans,
        young_orphans,
        staging,
    } = *report;
    println!("{verb} {} images of {} bytes; labels keep {kept_by_label} more", images.count, images.bytes);
    println!("{verb} {unfinished} uploads that nobody went on with for a week");
    println!("{verb} {profiles} batches of profiles, {derived} tables and indexes of images that are gone");
    let line = |Amount { count, bytes }: Amount, what: &str| {
        println!("{verb} {count} {what} of {bytes} bytes in the store")
    };
    line(contents, "contents that nothing names");
    line(orphans, "objects that were never on record");
    line(staging, "half written files");
    if withdrawn.count > 0 && grace_hours > 0 {
        println!(
            "{} contents of {} bytes are named by nothing since now: they go in {grace_hours} hours, with the next run",
            withdrawn.count, withdrawn.bytes
        );
    }
    if young_orphans > 0 {
        println!(
            "{young_orphans} objects are not on record, but younger than {grace_hours} hours: perhaps of uploads under way"
        );
    }
}
