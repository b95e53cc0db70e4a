//! When is a process's mapping list to be read?
//!
//! When process events do not tell what it maps: at exec, at a new mapping, at a sample that found no mapping; but a JIT maps memory a thousand times
//! a second, and a build starts processes as fast. So a process is read a few milliseconds after the
//! event, when its dynamic linker is done, each time with twice the pause before the next, and all of
//! them share a budget. What scans take beyond their share is a debt of it; those that cannot wait have a reserve meanwhile.
//!
//! ```text
//! exec                       due after SETTLE
//! first mapping or sample    due now
//! next ones                  due at last scan + pause;  pause = 10 ms, 20 ms, ... 2 s
//! mappings withdrawn         due at last scan + 10 ms, before all others
//! none wanted for 10 s       pause = 10 ms
//! ```

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// How long a dynamic linker is given to map its libraries after exec.
const SETTLE: Duration = Duration::from_millis(10);
/// First pause between two scans of a process.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause between two scans of a process. A library loaded meanwhile, where nothing was before,
/// is walked within it.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A process quiet for this long starts from the first pause again.
const QUIET: Duration = Duration::from_secs(10);
/// For how many times as long as a scan worked there is none of that process: it gets a twentieth of a core.
const PAUSE_PER_WORK: u32 = 20;
/// What a scan may work without that: at a process's start each takes some files that are new.
const FREE_WORK: Duration = Duration::from_millis(5);
/// Scans a second over all processes; at some 100 microseconds each, 2% of a CPU but for files that are new.
const SCANS_PER_SECOND: f64 = 200.0;
/// Scans that may come at once.
const BURST: f64 = 50.0;
/// Scans a second, beside those, of processes that cannot be walked until then: a quarter of a core at most, where each takes
/// [`FREE_WORK`], and what takes longer counts for several of these.
const RESERVED_SCANS_PER_SECOND: f64 = 50.0;
/// Of those, how many may come at once.
const RESERVED_BURST: f64 = 10.0;
/// Added to what is waited for a budget: more than numbers are rounded by.
const ROUNDING: Duration = Duration::from_micros(1);

/// When each process is to be read.
#[derive(Clone, Debug)]
pub struct ScanSchedule {
    processes: HashMap<u32, Scan>,
    budget: Budget,
    /// For those that cannot be walked meanwhile, while the other has none.
    reserve: Budget,
}

/// Scans that may be made, so many a second.
#[derive(Clone, Debug)]
struct Budget {
    /// How many now. Below none is what they took too much.
    left: f64,
    now: Instant,
    per_second: f64,
    at_once: f64,
}

impl Budget {
    fn new(now: Instant, per_second: f64, at_once: f64) -> Self {
        Self { left: at_once, now, per_second, at_once }
    }

    fn pass(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.now).as_secs_f64();
        self.left = (self.left + passed * self.per_second).min(self.at_once);
        self.now = now;
    }

    fn take_one(&mut self) -> bool {
        let has_one = self.left >= 1.0;
        self.left -= f64::from(u8::from(has_one));
        has_one
    }

    /// From when on it has one.
    fn has_one_from(&self, now: Instant) -> Instant {
        match self.left >= 1.0 {
            true => now,
            false => self.now + Duration::from_secs_f64((1.0 - self.left) / self.per_second) + ROUNDING,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Scan {
    due: Option<Instant>,
    last: Option<Instant>,
    pause: Duration,
    /// What the last one took is made up for from then on.
    rested: Option<Instant>,
    urgent: bool,
    /// Whether the last one was of the reserve.
    was_reserved: bool,
}

impl Scan {
    fn due(&self) -> Option<Instant> {
        self.due.map(|due| self.rested.map_or(due, |rested| due.max(rested)))
    }
}

const NEVER_SCANNED: Scan =
    Scan { due: None, last: None, pause: FIRST_PAUSE, rested: None, urgent: false, was_reserved: false };

impl ScanSchedule {
    /// Nothing is due.
    pub fn new(now: Instant) -> Self {
        Self {
            processes: HashMap::new(),
            budget: Budget::new(now, SCANS_PER_SECOND, BURST),
            reserve: Budget::new(now, RESERVED_SCANS_PER_SECOND, RESERVED_BURST),
        }
    }

    /// A process's mappings may have changed, or samples found them wanting.
    pub fn want(&mut self, tgid: u32, now: Instant) {
        let scan = self.processes.entry(tgid).or_insert(NEVER_SCANNED);
        if scan.due.is_some() {
            return;
        }
        if scan.last.is_some_and(|last| now.duration_since(last) >= QUIET) {
            scan.pause = FIRST_PAUSE;
        }
        scan.due = Some(scan.last.map_or(now, |last| now.max(last + scan.pause)));
    }

    /// A process cannot be walked until it is read again. The pause neither counts nor grows.
    pub fn want_at_once(&mut self, tgid: u32, now: Instant) {
        let scan = self.processes.entry(tgid).or_insert(NEVER_SCANNED);
        let soonest = scan.last.map_or(now, |last| now.max(last + FIRST_PAUSE));
        scan.due = Some(scan.due.map_or(soonest, |due| due.min(soonest)));
        scan.urgent = true;
    }

    /// A scan of a process took a processor for `work`. The next one is not before that is made up for.
    pub fn worked(&mut self, tgid: u32, work: Duration, now: Instant) {
        if work <= FREE_WORK {
            return;
        }
        let mut budget = &mut self.budget;
        if let Some(scan) = self.processes.get_mut(&tgid) {
            scan.rested = Some(now + work * PAUSE_PER_WORK);
            if scan.was_reserved {
                budget = &mut self.reserve;
            }
        }
        // So that a thousand processes of that kind take a core, and a quarter for those of the reserve, and no more.
        budget.left -= work.div_duration_f64(FREE_WORK);
    }

    /// A process runs another executable.
    pub fn exec(&mut self, tgid: u32, now: Instant) {
        let Scan { rested, was_reserved, .. } = *self.processes.get(&tgid).unwrap_or(&NEVER_SCANNED);
        let due = Some(now + SETTLE);
        self.processes.insert(tgid, Scan { due, rested, was_reserved, ..NEVER_SCANNED });
    }

    /// What was wanted of a process since its exec is known without reading it.
    pub fn settled(&mut self, tgid: u32) {
        if let Some(scan) = self.processes.get_mut(&tgid)
            && scan.last.is_none()
            && !scan.urgent
        {
            scan.due = None;
        }
    }

    /// A process is gone.
    pub fn forget(&mut self, tgid: u32) {
        self.processes.remove(&tgid);
    }

    /// Forgets all processes but those in `running`.
    pub fn retain(&mut self, running: &HashSet<u32>) {
        self.processes.retain(|tgid, _| running.contains(tgid));
    }

    /// The processes to read now, as many as the budget has: those that cannot be walked meanwhile first,
    /// then those that wait longest.
    pub fn take_due(&mut self, now: Instant) -> Vec<u32> {
        self.budget.pass(now);
        self.reserve.pass(now);
        let mut due: Vec<(bool, Instant, u32)> = self
            .processes
            .iter()
            .filter_map(|(tgid, scan)| {
                scan.due().filter(|due| *due <= now).map(|due| (!scan.urgent, due, *tgid))
            })
            .collect();
        due.sort_unstable();
        let mut taken = Vec::new();
        for (_, _, tgid) in due {
            let Some(scan) = self.processes.get_mut(&tgid) else { continue };
            let of_all = self.budget.take_one();
            if !(of_all || scan.urgent && self.reserve.take_one()) {
                // Those behind are no more urgent.
                break;
            }
            let pause = match scan.last {
                None => FIRST_PAUSE,
                Some(_) if scan.urgent => scan.pause,
                Some(_) => (scan.pause * 2).min(LONGEST_PAUSE),
            };
            let (last, rested) = (Some(now), scan.rested);
            *scan = Scan { due: None, last, pause, rested, urgent: false, was_reserved: !of_all };
            taken.push(tgid);
        }
        taken
    }

    /// How long until the next one is due and there is a budget for it.
    pub fn next_due(&self, now: Instant) -> Option<Duration> {
        let budget = self.budget.has_one_from(now);
        let either = budget.min(self.reserve.has_one_from(now));
        let due = self.processes.values().filter_map(|scan| {
            let has_budget = if scan.urgent { either } else { budget };
            Some(scan.due()?.max(has_budget))
        });
        Some(due.min()?.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn first_at_once_then_ever_more_seldom() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        let mut scans = Vec::new();
        for elapsed in 0..10_000 {
            let now = start + elapsed * MS;
            schedule.want(7, now);
            if !schedule.take_due(now).is_empty() {
                scans.push(elapsed);
            }
        }
        assert_eq!(scans, [0, 10, 30, 70, 150, 310, 630, 1270, 2550, 4550, 6550, 8550]);
        let quiet = start + 10_000 * MS + QUIET;
        schedule.take_due(quiet);
        schedule.want(7, quiet + QUIET);
        assert_eq!(schedule.take_due(quiet + QUIET), [7]);
        schedule.want(7, quiet + QUIET);
        assert!(schedule.next_due(quiet + QUIET).unwrap() <= 20 * MS);
    }

    #[test]
    fn exec_waits_for_the_dynamic_linker_and_starts_over() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        for elapsed in [0, 100, 200, 300] {
            schedule.want(7, start + elapsed * MS);
            schedule.take_due(start + elapsed * MS);
        }
        let exec = start + 400 * MS;
        schedule.exec(7, exec);
        schedule.want(7, exec + MS);
        assert_eq!(schedule.next_due(exec), Some(SETTLE));
        assert!(schedule.take_due(exec + MS).is_empty());
        assert_eq!(schedule.take_due(exec + SETTLE), [7]);
        assert_eq!(schedule.next_due(exec), None);
        schedule.exec(7, exec);
        schedule.forget(7);
        assert!(schedule.take_due(exec + SETTLE).is_empty());
    }

    #[test]
    fn what_takes_long_waits_for_long() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        schedule.want(7, start);
        assert_eq!(schedule.take_due(start), [7]);
        schedule.worked(7, 100 * MS, start);
        schedule.want_at_once(7, start);
        assert_eq!(schedule.next_due(start), Some(2000 * MS));
        schedule.exec(7, start);
        schedule.settled(7);
        assert_eq!(schedule.next_due(start), None, "nothing is wanted");
        schedule.exec(7, start);
        assert!(schedule.take_due(start + 1999 * MS).is_empty(), "whatever program it runs");
        assert_eq!(schedule.take_due(start + 2000 * MS), [7]);
        schedule.worked(7, FREE_WORK, start + 2000 * MS);
        schedule.want_at_once(7, start + 2000 * MS);
        assert_eq!(schedule.next_due(start + 2000 * MS), Some(FIRST_PAUSE), "no longer than others");
    }

    #[test]
    fn what_takes_long_counts_for_several() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        let mut worked = Duration::ZERO;
        for elapsed in (0..10_000).step_by(10) {
            let now = start + elapsed * MS;
            let tgid = elapsed;
            schedule.want(tgid, now);
            for tgid in schedule.take_due(now) {
                schedule.worked(tgid, 100 * MS, now);
                worked += 100 * MS;
            }
        }
        // Those of the burst at the start come beside it.
        assert!(worked <= Duration::from_secs(10) + 2 * 50 * 100 * MS, "{worked:?} in 10 s");
        assert!(worked >= Duration::from_secs(5), "{worked:?} in 10 s");
    }

    #[test]
    fn withdrawn_mappings_are_read_at_once_whatever_the_pause() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        for elapsed in 0..3000 {
            schedule.want(7, start + elapsed * MS);
            schedule.take_due(start + elapsed * MS);
        }
        let now = start + 3000 * MS;
        schedule.want(7, now);
        assert!(schedule.next_due(now).unwrap() > 500 * MS, "the pause has grown");
        for other in 100..200 {
            schedule.want(other, start);
        }
        schedule.want_at_once(7, now);
        assert_eq!(schedule.take_due(now).first(), Some(&7), "before those that wait longer");
        schedule.want_at_once(7, now + MS);
        schedule.want_at_once(7, now + 2 * MS);
        assert!(!schedule.take_due(now + 2 * MS).contains(&7), "a hundred times a second");
        assert_eq!(schedule.take_due(now + FIRST_PAUSE).first(), Some(&7));
        schedule.retain(&HashSet::from([7]));
        schedule.want(7, now + FIRST_PAUSE);
        assert!(schedule.next_due(now + FIRST_PAUSE).unwrap() > 500 * MS, "for others the pause stands");
        schedule.retain(&HashSet::new());
        assert_eq!(schedule.next_due(now), None);
    }

    #[test]
    fn all_share_a_budget() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        for tgid in 0..1000 {
            schedule.want(tgid, start);
        }
        let mut scanned = schedule.take_due(start).len();
        assert_eq!(scanned, BURST as usize);
        for elapsed in (0..=1000).step_by(10) {
            scanned += schedule.take_due(start + elapsed * MS).len();
        }
        assert!((200..=260).contains(&scanned), "{scanned}");
    }

    #[test]
    fn in_debt_nothing_is_due_until_the_budget_has_one() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        schedule.want(7, start);
        assert_eq!(schedule.take_due(start), [7]);
        // 50 at once, less one, less 200.
        schedule.worked(7, 200 * FREE_WORK, start);
        schedule.want(8, start);
        let waits = schedule.next_due(start).expect("it is wanted");
        assert!((760 * MS..761 * MS).contains(&waits), "{waits:?} for 152 at 200 a second");
        let half = start + waits / 2;
        assert!(schedule.take_due(half).is_empty());
        assert!(schedule.next_due(half).expect("it is wanted") > 379 * MS, "not at once");
        assert!(schedule.take_due(start + waits - MS).is_empty());
        assert_eq!(schedule.take_due(start + waits), [8]);

        // However many scans there are: whoever wakes up then has one to make.
        (10..200).for_each(|tgid| schedule.want(tgid, start));
        let (mut now, mut scans) = (start + waits, 0);
        while let Some(waits) = schedule.next_due(now) {
            assert!(waits > Duration::ZERO, "there is none left");
            now += waits;
            assert_eq!(schedule.take_due(now).len(), 1);
            scans += 1;
        }
        assert_eq!(scans, 190);
    }

    #[test]
    fn what_cannot_wait_has_a_reserve_which_has_an_end() {
        let start = Instant::now();
        let mut schedule = ScanSchedule::new(start);
        schedule.want(7, start);
        assert_eq!(schedule.take_due(start), [7]);
        schedule.worked(7, 2000 * FREE_WORK, start);
        (100..200).for_each(|tgid| schedule.want(tgid, start));
        (200..300).for_each(|tgid| schedule.want_at_once(tgid, start));
        assert_eq!(schedule.next_due(start), Some(Duration::ZERO));
        let at_once = schedule.take_due(start);
        assert_eq!(at_once.len(), RESERVED_BURST as usize);
        assert!(at_once.iter().all(|tgid| *tgid >= 200), "{at_once:?}");
        let waits = schedule.next_due(start).expect("more are wanted");
        assert!((20 * MS..21 * MS).contains(&waits), "{waits:?} for one at 50 a second");
        // What takes long is a debt of the reserve, and of no other.
        schedule.worked(at_once[0], 100 * MS, start);
        assert!(schedule.take_due(start + waits).is_empty());
        let waits = schedule.next_due(start).expect("more are wanted");
        assert!((420 * MS..421 * MS).contains(&waits), "{waits:?} for 21 at 50 a second");
        assert_eq!(schedule.take_due(start + waits).len(), 1);
        schedule.retain(&(100..200).collect());
        let waits = schedule.next_due(start).expect("others are wanted");
        assert!((9760 * MS..9761 * MS).contains(&waits), "{waits:?} for 1952 at 200 a second");
    }
}
