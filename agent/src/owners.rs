//! Whose are a process's samples, and when is that known?
//!
//! A process is read when a sample of it comes, and again after a while, for processes are moved between control
//! groups and numbers are used again. A fork has its parent's resource; an exec keeps the control group
//! alone, so that a process that is gone before it is read still belongs to its container.
//!
//! What may keep its reader waiting is the environment, under the process's `mmap_lock`: that of a process whose page fault waits for
//! a server of files is not to be had until that answers. So it is read on a thread of [`crate::file_threads`]. A sample does not wait: it
//! belongs to an [`Owner`], which has its resource by the time that the batch is shipped, or then the one without the environment.
//! Where that does not come, the rest of the process is read again all the same, and what was last known of its environment counts.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::cgroup::Cgroup;
use crate::file_threads::{FileThreads, Manner};
use crate::processes::EXIT_GRACE;
use crate::resource::{Facts, Resource, Stated, environment, executable};
use crate::visits::Visits;

/// How long what was read of a process counts: three small files a minute each cost a host of a thousand sampled
/// processes a thousandth of a core.
const REREAD_AFTER: Duration = Duration::from_secs(60);
/// How long it counts of a process that shows no environment: an exec sets the executable first and the environment
/// later (`begin_new_exec`, then `create_elf_tables`, in fs/exec.c and fs/binfmt_elf.c). And of one that was not read,
/// as others hang, or an earlier reading of it does.
const REREAD_SOON: Duration = Duration::from_secs(1);
/// How long a batch waits for an environment. One takes some 20 microseconds.
const LONGEST_READING: Duration = Duration::from_secs(2);
/// Most environments that wait to be read, while all threads hang: those of the processes of a busy minute.
const MAX_WAITING: usize = 10_000;
/// How threads read: soon, as processes end.
const MANNER: Manner =
    Manner { name: "windlass-env", hangs_after: Duration::from_millis(100), is_awaited: true };

/// Whom samples belong to: those of a process, from one reading of it to the next. One is equal to itself alone.
#[derive(Clone, Debug)]
pub struct Owner(Arc<Told>);

#[derive(Debug)]
struct Told {
    /// The process that is read for it. Its forks belong to it as well.
    tgid: u32,
    asked: Instant,
    facts: Facts,
    /// What it belongs to as long as its environment is not read.
    otherwise: Described,
    read: OnceLock<Read>,
    /// Whether another program or process has taken its number meanwhile: an environment that comes now may be that one's.
    is_followed: AtomicBool,
}

/// What is known of a process.
#[derive(Clone, Debug, Default)]
struct Described {
    resource: Resource,
    /// What of it came from the environment.
    stated: Stated,
}

/// What came of reading an environment.
#[derive(Debug)]
struct Read {
    described: Described,
    counts_for: Duration,
}

impl Told {
    /// Nobody else sets it.
    fn set(&self, described: Described, counts_for: Duration) {
        let _ = self.read.set(Read { described, counts_for });
    }

    /// It is not read now.
    fn put_off(&self) {
        self.set(self.otherwise.clone(), REREAD_SOON);
    }
}

impl Owner {
    fn new(tgid: u32, facts: Facts, stated: Stated, asked: Instant) -> Self {
        let otherwise = Described { resource: facts.resource(&stated), stated };
        let (read, is_followed) = (OnceLock::new(), AtomicBool::new(false));
        Self(Arc::new(Told { tgid, asked, facts, otherwise, read, is_followed }))
    }

    fn described(&self) -> &Described {
        self.0.read.get().map_or(&self.0.otherwise, |read| &read.described)
    }

    /// Its resource, as far as it is known now.
    pub fn resource(&self) -> &Resource {
        &self.described().resource
    }

    /// Whether that stays, or is not worth waiting for any more.
    pub(crate) fn is_settled(&self, now: Instant) -> bool {
        self.0.read.get().is_some() || now.saturating_duration_since(self.0.asked) >= LONGEST_READING
    }

    /// Another program or process has this number from now on.
    fn followed(&self, tgid: u32) {
        if self.0.tgid == tgid {
            self.0.is_followed.store(true, Ordering::Release);
        }
    }

    /// Whether it is still whom new samples of its process belong to.
    fn counts(&self, now: Instant) -> bool {
        let counts_for = self.0.read.get().map_or(REREAD_AFTER, |read| read.counts_for);
        now.saturating_duration_since(self.0.asked) < counts_for
    }
}

impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Owner {}

impl Hash for Owner {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl From<Resource> for Owner {
    /// One of which all is known.
    fn from(resource: Resource) -> Self {
        let owner = Self::new(0, Facts::default(), Stated::default(), Instant::now());
        owner.0.set(Described { resource, stated: Stated::default() }, REREAD_AFTER);
        owner
    }
}

/// An environment that is to be read.
struct Wanted {
    tgid: u32,
    /// Gone when nobody wants it any more.
    told: Weak<Told>,
    visits: Visits,
}

impl Wanted {
    fn read(self) {
        if self.told.strong_count() == 0 {
            return;
        }
        let Some(visit) = self.visits.begin_memory(self.tgid) else {
            return self.told.upgrade().map_or((), |told| told.put_off());
        };
        let environment = environment(self.tgid);
        drop(visit);
        let executable = executable(self.tgid);
        self.settle(environment, executable);
    }

    /// `executable` is what runs after the environment was read.
    fn settle(&self, environment: io::Result<Vec<u8>>, executable: Option<String>) {
        let Some(told) = self.told.upgrade() else { return };
        let runs_another = told.is_followed.load(Ordering::Acquire)
            || executable.is_some() && executable != told.facts.executable;
        let has_ended = executable.is_none() && told.facts.executable.is_some();
        let described = |stated: Stated| Described { resource: told.facts.resource(&stated), stated };
        match environment {
            // It may be the other's.
            _ if runs_another => told.put_off(),
            Ok(environment) if !environment.is_empty() => {
                told.set(described(Stated::of(&environment)), REREAD_AFTER);
            }
            _ if has_ended => told.set(told.otherwise.clone(), REREAD_AFTER),
            Ok(_) if executable.is_some() => told.set(described(Stated::default()), REREAD_SOON),
            Ok(_) | Err(_) => told.set(described(Stated::default()), REREAD_AFTER),
        }
    }
}

/// Whom samples of the processes that had any belong to.
pub(crate) struct Owners {
    known: HashMap<u32, Known>,
    environments: FileThreads<Wanted, ()>,
    visits: Visits,
}

#[derive(Clone)]
struct Known {
    owner: Owner,
    /// The last one whose environment was asked for: the owner, unless that one's had not come by then.
    asked: Owner,
    cgroup: Option<Cgroup>,
    /// Whether that is of the program before the last exec.
    is_former: bool,
    used: Instant,
    /// When the process ended. Its number may be another's later, of whose fork no event told.
    ended: Option<Instant>,
}

impl Default for Owners {
    fn default() -> Self {
        Self {
            known: HashMap::new(),
            environments: FileThreads::new(MANNER, Wanted::read),
            visits: Visits::default(),
        }
    }
}

impl Owners {
    /// Whom a sample of a process belongs to.
    pub(crate) fn of(&mut self, tgid: u32, now: Instant) -> Owner {
        let (owner, wanted) = self.of_by(tgid, now, Facts::read);
        if let Some(wanted) = wanted {
            if self.environments.waiting() < MAX_WAITING {
                self.environments.submit(wanted);
            } else {
                owner.0.put_off();
            }
        }
        owner
    }

    fn of_by(&mut self, tgid: u32, now: Instant, read: impl FnOnce(u32) -> Facts) -> (Owner, Option<Wanted>) {
        if let Some(known) = self.known.get_mut(&tgid) {
            known.used = now;
            if !known.is_former && known.owner.counts(now) {
                return (known.owner.clone(), None);
            }
        }
        let known = self.known.get(&tgid);
        let same_program = known.filter(|known| !known.is_former);
        let mut facts = read(tgid);
        // The threads of a process whose first one ended run on; of that one the control group is there still, and no more.
        let leads_none = known.is_some_and(|known| known.ended.is_some()) && facts.executable.is_none();
        let is_gone = facts.cgroup.is_none() || leads_none;
        // What was known of it last still holds.
        if let Some(known) = same_program.filter(|_| is_gone) {
            return (known.owner.clone(), None);
        }
        if facts.cgroup.is_none() {
            facts.cgroup = known.and_then(|known| known.cgroup.clone());
        }
        // Another executable is another program, of which no event told yet.
        let same_program = same_program.filter(|known| known.owner.0.facts.executable == facts.executable);
        let stated = same_program.map(|known| known.asked.described().stated.clone()).unwrap_or_default();
        // One that hangs is not read twice at a time. A fork's has not been read, though its parent's may be out.
        let out = same_program.map(|known| &known.asked);
        let out = out.filter(|asked| asked.0.tgid == tgid && asked.0.read.get().is_none()).cloned();
        let ended = known.and_then(|known| known.ended);
        let cgroup = facts.cgroup.clone();
        let owner = Owner::new(tgid, facts, stated, now);
        let is_out = out.is_some();
        let asked = out.unwrap_or_else(|| owner.clone());
        self.known
            .insert(tgid, Known { owner: owner.clone(), asked, cgroup, is_former: false, used: now, ended });
        let wanted = Wanted { tgid, told: Arc::downgrade(&owner.0), visits: self.visits.clone() };
        if is_gone {
            wanted.settle(Ok(Vec::new()), None);
            return (owner, None);
        }
        if is_out {
            owner.0.put_off();
            return (owner, None);
        }
        (owner, Some(wanted))
    }

    /// Has environments read on while some are not to be had.
    pub(crate) fn review(&mut self, now: Instant) {
        while let Some(()) = self.environments.try_result() {}
        self.environments.review(now);
    }

    /// How long until that is to be done again.
    pub(crate) fn next_review(&self) -> Option<Duration> {
        self.environments.is_behind().then_some(MANNER.hangs_after)
    }

    /// A process was forked.
    pub(crate) fn forked(&mut self, tgid: u32, parent: u32, now: Instant) {
        // The number may have been another process's.
        let former = match self.known.get(&parent).cloned() {
            Some(parent) => self.known.insert(tgid, Known { used: now, ended: None, ..parent }),
            None => self.known.remove(&tgid),
        };
        if let Some(former) = former {
            former.asked.followed(tgid);
        }
    }

    /// A process runs another program.
    pub(crate) fn exec(&mut self, tgid: u32) {
        if let Some(known) = self.known.get_mut(&tgid) {
            known.is_former = true;
            known.asked.followed(tgid);
        }
    }

    /// A process ended, or its first thread. Shells that are sampled fork thousands in a minute, each of which would be kept as long as they.
    pub(crate) fn exited(&mut self, tgid: u32, now: Instant) {
        if let Some(known) = self.known.get_mut(&tgid) {
            known.ended.get_or_insert(now);
        }
    }

    /// Process events were lost: any process may run another program by now, and any number be another process's.
    pub(crate) fn lost(&mut self) {
        for (&tgid, known) in &mut self.known {
            known.is_former = true;
            known.cgroup = None;
            known.asked.followed(tgid);
        }
    }

    /// Forgets processes that ended, and those of which no sample came for long.
    pub(crate) fn expire(&mut self, now: Instant) {
        let passed = |since: Instant| now.saturating_duration_since(since);
        self.known.retain(|_, known| {
            passed(known.used) < 2 * REREAD_AFTER
                && known.ended.is_none_or(|ended| passed(ended.max(known.used)) < EXIT_GRACE)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn facts(cgroup: &str, executable: Option<&str>) -> Facts {
        let cgroup = Some(cgroup::parse(&format!("0::{cgroup}")));
        Facts { cgroup, executable: executable.map(str::to_owned) }
    }

    fn print(owner: &Owner) -> String {
        let attributes = owner.resource().attributes().map(|(key, value)| format!("{key}={value}"));
        attributes.collect::<Vec<_>>().join(" ")
    }

    impl Owners {
        /// As [`Self::of`], where an environment is read at once.
        fn read(&mut self, tgid: u32, now: Instant, (environment, facts): (&str, Facts)) -> Owner {
            let executable = facts.executable.clone();
            let (owner, wanted) = self.of_by(tgid, now, |_| facts);
            wanted.expect("it is read").settle(Ok(environment.as_bytes().to_vec()), executable);
            owner
        }

        /// Of a process of which there is nothing to be read any more.
        fn ended(&mut self, tgid: u32, now: Instant) -> Owner {
            let (owner, wanted) = self.of_by(tgid, now, |_| Facts::default());
            assert!(wanted.is_none());
            owner
        }

        #[track_caller]
        fn known(&mut self, tgid: u32, now: Instant) -> Owner {
            self.of_by(tgid, now, |tgid| panic!("{tgid} is read again")).0
        }
    }

    #[test]
    fn what_is_known_follows_forks_execs_and_ends() {
        let start = Instant::now();
        let mut owners = Owners::default();
        let container = format!("/docker/{ID}");
        let shell = owners.read(7, start, ("A=b", facts(&container, Some("sh"))));
        assert_eq!(print(&shell), format!("container.id={ID} service.name=sh"));
        assert_eq!(shell, owners.known(7, start + REREAD_AFTER / 2));
        // A fork has all of it, an exec the container.
        owners.forked(8, 7, start);
        assert_eq!(shell, owners.known(8, start));
        owners.exec(8);
        assert_eq!(print(&owners.ended(8, start)), format!("container.id={ID}"));
        // What was read counts until it is too old, and if there is nothing newer also beyond.
        let late = start + REREAD_AFTER;
        assert_eq!(shell, owners.ended(7, late));
        let moved = owners.read(7, late, ("A=b", facts("/", Some("sh"))));
        assert_eq!(print(&moved), "service.name=sh");
        // A number that comes again is another process's.
        owners.forked(7, 99, late);
        assert_eq!(print(&owners.ended(7, late)), "");
        owners.expire(late + 3 * REREAD_AFTER);
        assert!(owners.known.is_empty());

        // Of what ended the last samples are still to come.
        let app = owners.read(7, late, ("A=b", facts(&container, Some("app"))));
        owners.forked(8, 7, late);
        owners.exited(8, late);
        owners.expire(late + EXIT_GRACE / 2);
        assert_eq!(app, owners.known(8, late + EXIT_GRACE / 2));
        owners.expire(late + 2 * EXIT_GRACE);
        assert_eq!(owners.known.keys().collect::<Vec<_>>(), [&7]);
    }

    #[test]
    fn a_process_whose_first_thread_ended_keeps_its_name() {
        let (mut now, mut owners) = (Instant::now(), Owners::default());
        let app = owners.read(7, now, ("OTEL_SERVICE_NAME=shop", facts("/", Some("app"))));
        owners.exited(7, now);
        for _ in 0..100 {
            now += EXIT_GRACE / 2;
            owners.expire(now);
            assert_eq!(owners.of_by(7, now, |_| facts("/", None)).0, app);
        }
        let other = owners.of_by(7, now + REREAD_AFTER, |_| facts("/", Some("other"))).0;
        assert_ne!(other, app);
    }

    #[test]
    fn an_environment_that_does_not_come_is_waited_for_and_then_left_out() {
        let start = Instant::now();
        let mut owners = Owners::default();
        let (owner, wanted) = owners.of_by(7, start, |_| facts("/", Some("app")));
        let wanted = wanted.expect("it is read");
        assert_eq!((print(&owner).as_str(), owner.is_settled(start)), ("service.name=app", false));
        assert!(owner.is_settled(start + LONGEST_READING));
        // It is not read twice at a time, but for another program.
        let late = start + REREAD_AFTER;
        let (same, none) = owners.of_by(7, late, |_| facts("/", Some("app")));
        assert!(none.is_none() && same.is_settled(late));
        owners.exec(7);
        let other = owners.read(7, start, ("OTEL_SERVICE_NAME=till", facts("/", Some("other"))));
        assert_eq!(print(&other), "service.name=till");
        // What comes now may be of a program of the same name that runs since.
        wanted.settle(Ok(b"OTEL_SERVICE_NAME=till".to_vec()), Some("app".to_owned()));
        assert_eq!((print(&owner).as_str(), owner.is_settled(start)), ("service.name=app", true));
        assert_eq!(owners.known(7, start), other);
    }

    #[test]
    fn a_process_whose_environment_does_not_come_may_move_between_containers() {
        let (start, minute) = (Instant::now(), REREAD_AFTER);
        let mut owners = Owners::default();
        let here = || facts("/", Some("app"));
        let there = || facts(&format!("/docker/{ID}"), Some("app"));
        owners.read(7, start, ("OTEL_SERVICE_NAME=shop", here()));
        let (owner, wanted) = owners.of_by(7, start + minute, |_| here());
        let wanted = wanted.expect("it is too old");
        assert_eq!(owners.known(7, start + 2 * minute - REREAD_SOON), owner, "it is waited for");
        let (moved, none) = owners.of_by(7, start + 2 * minute, |_| there());
        assert!(none.is_none(), "it is not read twice at a time");
        let expect = format!("container.id={ID} service.name=shop");
        assert_eq!((print(&owner).as_str(), print(&moved)), ("service.name=shop", expect));
        // A fork of it waits for nobody.
        owners.forked(8, 7, start + 2 * minute);
        owners.read(8, start + 3 * minute, ("OTEL_SERVICE_NAME=fork", there()));
        // When it has come it counts, and is read again as any other.
        wanted.settle(Ok(b"OTEL_SERVICE_NAME=till".to_vec()), Some("app".to_owned()));
        let (known, wanted) = owners.of_by(7, start + 2 * minute + REREAD_SOON, |_| there());
        assert_eq!(print(&known), format!("container.id={ID} service.name=till"));
        assert!(wanted.is_some());
        // Another program was told nothing of it.
        let (other, _) = owners.of_by(7, start + 4 * minute, |_| facts("/", Some("other")));
        assert_eq!(print(&other), "service.name=other");
    }

    #[test]
    fn an_environment_that_comes_after_an_exec_says_nothing_whoever_waited_for_it_last() {
        let (start, minute) = (Instant::now(), REREAD_AFTER);
        let mut owners = Owners::default();
        let (owner, wanted) = owners.of_by(7, start, |_| facts("/", Some("app")));
        owners.of_by(7, start + minute, |_| facts("/", Some("app")));
        owners.exec(7);
        wanted.expect("it is read").settle(Ok(b"OTEL_SERVICE_NAME=shop".to_vec()), Some("app".to_owned()));
        assert_eq!(print(&owner), "service.name=app");
    }

    #[test]
    fn an_environment_belongs_to_who_was_read() {
        let start = Instant::now();
        let named = || Ok(b"OTEL_SERVICE_NAME=shop".to_vec());
        let app = || Some("app".to_owned());
        let case = |change: &dyn Fn(&mut Owners), expect: &str| {
            let mut owners = Owners::default();
            let (owner, wanted) = owners.of_by(7, start, |_| facts("/", Some("app")));
            change(&mut owners);
            wanted.expect("it is read").settle(named(), app());
            assert_eq!(print(&owner), format!("service.name={expect}"));
        };
        case(&|_| (), "shop");
        case(&|owners| owners.exec(7), "app");
        case(&|owners| owners.forked(7, 99, start), "app");
        case(&|owners| owners.lost(), "app");
        // Its forks run on with it, whatever they run.
        case(&|owners| owners.forked(8, 7, start), "shop");
        let fork_execs = |owners: &mut Owners| {
            owners.forked(8, 7, start);
            owners.exec(8);
        };
        case(&fork_execs, "shop");
    }

    /// Neither the program nor the process may be the one that was known.
    #[test]
    fn nothing_is_inherited_behind_lost_events() {
        let (start, mut owners) = (Instant::now(), Owners::default());
        owners.read(7, start, ("A=b", facts(&format!("/docker/{ID}"), Some("app"))));
        owners.lost();
        assert_eq!(print(&owners.ended(7, start)), "");
    }

    /// What is read of a process is of what it runs then.
    #[test]
    fn an_environment_of_another_program_or_of_none_says_nothing() {
        let start = Instant::now();
        let told = "OTEL_SERVICE_NAME=shop";
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        let named = |environment: &str| Ok(environment.as_bytes().to_vec());
        let (same, soon, late) = (Some("app"), REREAD_SOON, REREAD_AFTER);
        for (environment, executable, expect, counts_for) in [
            (named(told), same, "shop", late),
            (named(told), Some("other"), "before", soon),
            // It has ended since.
            (named(told), None, "shop", late),
            (named(""), None, "before", late),
            (Err(io::ErrorKind::NotFound.into()), None, "before", late),
            // It is within its exec, or nobody may look.
            (named(""), same, "app", soon),
            (denied(), same, "app", late),
        ] {
            let mut owners = Owners::default();
            owners.read(7, start, ("OTEL_SERVICE_NAME=before", facts("/", same)));
            let now = start + REREAD_AFTER;
            let (owner, wanted) = owners.of_by(7, now, |_| facts("/", same));
            assert_eq!(print(&owner), "service.name=before");
            let case = format!("{environment:?} {executable:?}");
            wanted.expect("it is too old").settle(environment, executable.map(str::to_owned));
            assert_eq!(print(&owner), format!("service.name={expect}"), "{case}");
            let at = |passed| owner.counts(now + passed);
            assert_eq!((at(counts_for - REREAD_SOON), at(counts_for)), (true, false), "{case}");
        }
        let mut owners = Owners::default();
        let kernel = owners.read(7, start, ("", facts("/", None)));
        assert!(kernel.counts(start + REREAD_SOON), "kernel threads have none");
    }

    #[test]
    fn a_real_process() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env("OTEL_SERVICE_NAME", "sleeper")
            .env_remove("OTEL_RESOURCE_ATTRIBUTES")
            .spawn()
            .expect("sleep starts");
        while environment(child.id()).expect("it is a child").is_empty() {
            std::thread::yield_now();
        }
        let (mut owners, start) = (Owners::default(), Instant::now());
        let owner = owners.of(child.id(), start);
        while owner.0.read.get().is_none() {
            assert!(start.elapsed() < Duration::from_secs(60), "its environment is not read");
            owners.review(Instant::now());
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert_eq!(
            owner.resource().attributes().find(|(key, _)| *key == "service.name"),
            Some(("service.name", "sleeper"))
        );
    }
}
