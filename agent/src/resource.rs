//! To which service, container and pod does a process belong?
//!
//! What a profile's reader asks for is a service, not a process number. The service's name is the first that
//! there is of: what the process itself was told (`OTEL_SERVICE_NAME`, then `service.name` in
//! `OTEL_RESOURCE_ATTRIBUTES`, as every OpenTelemetry SDK reads them), its systemd unit, the file name of its
//! executable. Of the environment a few named attributes are taken and nothing else, for it holds secrets.
//!
//! A process is read when a sample of it comes, and again after a while, for processes are moved between control
//! groups and numbers are used again. A fork has its parent's resource; an exec keeps the control group
//! alone, so that a process that is gone before it is read still belongs to its container.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use percent_encoding::percent_decode_str;

use crate::cgroup::{self, Cgroup};
use crate::processes::EXIT_GRACE;

/// How long what was read of a process counts: three small files a minute each cost a host of a thousand sampled
/// processes a thousandth of a core.
const REREAD_AFTER: Duration = Duration::from_secs(60);
/// How long it counts of a process that shows no environment: an exec sets the executable first and the environment
/// later (`begin_new_exec`, then `create_elf_tables`, in fs/exec.c and fs/binfmt_elf.c).
const REREAD_EXEC_AFTER: Duration = Duration::from_secs(1);
/// Most bytes of an environment that are looked through: a tenth of what `execve` takes by default.
const MAX_ENVIRONMENT_BYTES: u64 = 256 * 1024;
/// Longest attribute taken, in bytes: twice the longest that Kubernetes gives anything.
const MAX_VALUE_BYTES: usize = 512;
/// What is taken of `OTEL_RESOURCE_ATTRIBUTES`.
const STATED_ATTRIBUTES: [&str; 9] = [
    SERVICE_NAME,
    "service.namespace",
    "service.version",
    "service.instance.id",
    "deployment.environment.name",
    "k8s.namespace.name",
    "k8s.pod.name",
    "k8s.container.name",
    "k8s.cluster.name",
];
const SERVICE_NAME: &str = "service.name";

/// Attributes of a group of processes, sorted by key, each key once; the names are those of OpenTelemetry's
/// semantic conventions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Resource {
    attributes: Vec<(&'static str, String)>,
}

impl Resource {
    /// Of these attributes; of several with one key the first.
    pub fn new(attributes: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        let mut attributes: Vec<_> = attributes.into_iter().filter(|(_, value)| is_fit(value)).collect();
        attributes.sort_by_key(|(key, _)| *key);
        attributes.dedup_by_key(|(key, _)| *key);
        Self { attributes }
    }

    /// The attributes.
    pub fn attributes(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.attributes.iter().map(|(key, value)| (*key, value.as_str()))
    }
}

fn is_fit(value: &str) -> bool {
    !value.is_empty() && value.len() <= MAX_VALUE_BYTES
}

/// What `/proc` says of a process, as far as it may be read.
#[derive(Clone, Debug, Default)]
struct Facts {
    cgroup: Option<Cgroup>,
    /// `None` if it may not be read.
    environment: Option<Vec<u8>>,
    /// `None` if there is none, as of kernel threads.
    executable: Option<String>,
}

impl Facts {
    fn read(tgid: u32) -> Self {
        let cgroup = std::fs::read_to_string(format!("/proc/{tgid}/cgroup")).ok();
        Self {
            cgroup: cgroup.map(|contents| cgroup::parse(&contents)),
            environment: environment(tgid).ok(),
            executable: executable(tgid),
        }
    }

    /// How long they count.
    fn reread_after(&self) -> Duration {
        let is_within_exec =
            self.executable.is_some() && self.environment.as_ref().is_some_and(Vec::is_empty);
        if is_within_exec { REREAD_EXEC_AFTER } else { REREAD_AFTER }
    }

    fn resource(&self) -> Resource {
        let environment = self.environment.as_deref().unwrap_or_default();
        let stated = variable(environment, b"OTEL_SERVICE_NAME").map(|name| (SERVICE_NAME, name));
        let listed = variable(environment, b"OTEL_RESOURCE_ATTRIBUTES");
        let listed: Vec<_> = listed.as_deref().map(stated_attributes).unwrap_or_default();
        let cgroup = self.cgroup.as_ref();
        let of_cgroup = |key, value: Option<&String>| value.map(|value| (key, value.clone()));
        let found = [
            of_cgroup(SERVICE_NAME, cgroup.and_then(|cgroup| cgroup.service.as_ref())),
            of_cgroup(SERVICE_NAME, self.executable.as_ref()),
            of_cgroup("container.id", cgroup.and_then(|cgroup| cgroup.container_id.as_ref())),
            of_cgroup("k8s.pod.uid", cgroup.and_then(|cgroup| cgroup.pod_uid.as_ref())),
        ];
        Resource::new(stated.into_iter().chain(listed).chain(found.into_iter().flatten()))
    }
}

/// `/proc/PID/environ` as it was at the exec (proc_pid_environ(5)).
fn environment(tgid: u32) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(format!("/proc/{tgid}/environ"))?;
    file.take(MAX_ENVIRONMENT_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The file name of a process's executable; the name of its first thread, at first made from that, where the
/// executable is not to be seen. A kernel thread has none.
pub(crate) fn executable(tgid: u32) -> Option<String> {
    let name = match std::fs::read_link(format!("/proc/{tgid}/exe")) {
        Ok(path) => file_name(&path)?,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            std::fs::read_to_string(format!("/proc/{tgid}/comm")).ok()?.trim_end_matches('\n').to_owned()
        }
        Err(_) => return None,
    };
    is_fit(&name).then_some(name)
}

fn file_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_string_lossy();
    // What the kernel adds when the file was deleted (d_path in fs/d_path.c).
    Some(name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned())
}

/// The value of a variable, the first that there is, as getenv(3) finds it.
fn variable(environment: &[u8], name: &[u8]) -> Option<String> {
    let mut entries = environment.split(|byte| *byte == 0);
    let value = entries.find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="))?;
    Some(String::from_utf8_lossy(value).trim().to_owned())
}

/// The attributes of `OTEL_RESOURCE_ATTRIBUTES` that are taken: `key=value,key=value`, percent-encoded
/// (OpenTelemetry specification, Resource SDK, "Specifying resource information via an environment variable").
/// One pair that is not so costs all of them, as the specification has it.
fn stated_attributes(list: &str) -> Vec<(&'static str, String)> {
    let mut attributes = Vec::new();
    for pair in list.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let decoded = |text: &str| percent_decode_str(text.trim()).decode_utf8().ok().map(String::from);
        let pair = pair.split_once('=').and_then(|(key, value)| Some((decoded(key)?, decoded(value)?)));
        let Some((key, value)) = pair else { return Vec::new() };
        if let Some(key) = STATED_ATTRIBUTES.iter().find(|stated| **stated == key) {
            attributes.push((*key, value));
        }
    }
    attributes
}

/// What is known of the processes of which samples came.
#[derive(Default)]
pub struct Resources {
    known: HashMap<u32, Known>,
}

#[derive(Clone)]
struct Known {
    resource: Arc<Resource>,
    cgroup: Option<Cgroup>,
    /// Until when it counts; `None` if it is of the program before the last exec.
    until: Option<Instant>,
    used: Instant,
    /// When the process ended. Its number may be another's later, of whose fork no event told.
    ended: Option<Instant>,
}

impl Resources {
    /// The resource of the process of a sample.
    pub fn of(&mut self, tgid: u32, now: Instant) -> Arc<Resource> {
        self.of_by(tgid, now, Facts::read)
    }

    fn of_by(&mut self, tgid: u32, now: Instant, read: impl FnOnce(u32) -> Facts) -> Arc<Resource> {
        if let Some(known) = self.known.get_mut(&tgid) {
            known.used = now;
            if known.until.is_some_and(|until| now < until) {
                return known.resource.clone();
            }
        }
        let mut facts = read(tgid);
        let known = self.known.get(&tgid);
        if facts.cgroup.is_none() {
            // It has ended since: what was known of it last still holds.
            if let Some(known) = known.filter(|known| known.until.is_some()) {
                return known.resource.clone();
            }
            facts.cgroup = known.and_then(|known| known.cgroup.clone());
        }
        let until = Some(now + facts.reread_after());
        let resource = facts.resource();
        let resource = match known {
            Some(known) if *known.resource == resource => known.resource.clone(),
            _ => Arc::new(resource),
        };
        let ended = known.and_then(|known| known.ended);
        let known = Known { resource: resource.clone(), cgroup: facts.cgroup, until, used: now, ended };
        self.known.insert(tgid, known);
        resource
    }

    /// A process was forked.
    pub fn forked(&mut self, tgid: u32, parent: u32, now: Instant) {
        // The number may have been another process's.
        match self.known.get(&parent).cloned() {
            Some(parent) => self.known.insert(tgid, Known { used: now, ended: None, ..parent }),
            None => self.known.remove(&tgid),
        };
    }

    /// A process runs another program.
    pub fn exec(&mut self, tgid: u32) {
        if let Some(known) = self.known.get_mut(&tgid) {
            known.until = None;
        }
    }

    /// A process ended. Shells that are sampled fork thousands in a minute, each of which would be kept as long as they.
    pub fn exited(&mut self, tgid: u32, now: Instant) {
        if let Some(known) = self.known.get_mut(&tgid) {
            known.ended.get_or_insert(now);
        }
    }

    /// Process events were lost: any process may run another program by now.
    pub fn lost(&mut self) {
        for known in self.known.values_mut() {
            known.until = None;
        }
    }

    /// Forgets processes that ended, and those of which no sample came for long.
    pub fn expire(&mut self, now: Instant) {
        let passed = |since: Instant| now.saturating_duration_since(since);
        self.known.retain(|_, known| {
            passed(known.used) < 2 * REREAD_AFTER
                && known.ended.is_none_or(|ended| passed(ended) < EXIT_GRACE)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn facts(environment: &str, cgroup: &str, executable: Option<&str>) -> Facts {
        Facts {
            cgroup: Some(cgroup::parse(&format!("0::{cgroup}"))),
            environment: Some(environment.as_bytes().to_vec()),
            executable: executable.map(str::to_owned),
        }
    }

    fn print(resource: &Resource) -> String {
        resource.attributes().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    }

    #[track_caller]
    fn check(facts: &Facts, expect: &str) {
        assert_eq!(print(&facts.resource()), expect);
    }

    #[test]
    fn the_name_that_the_process_was_told_counts_most() {
        let unit = "/system.slice/shop.service";
        let both = "PATH=/bin\0OTEL_RESOURCE_ATTRIBUTES=service.name=listed,service.version=3\0\
                    OTEL_SERVICE_NAME=told\0";
        check(&facts(both, unit, Some("java")), "service.name=told service.version=3");
        let listed = both.split("\0OTEL_SERVICE").next().unwrap();
        check(&facts(listed, unit, Some("java")), "service.name=listed service.version=3");
        check(&facts("OTEL_SERVICE_NAME=\0", unit, Some("java")), "service.name=shop");
        check(&facts("XOTEL_SERVICE_NAME=x", "/", Some("java")), "service.name=java");
        check(&facts("", "/", None), "");
    }

    #[test]
    fn containers_and_pods_are_told_by_their_groups() {
        let path = format!("/kubepods/pod4f3b8c1e-9d2a-4b6c-8e7f-0a1b2c3d4e5f/{ID}");
        let expect = format!(
            "container.id={ID} k8s.pod.uid=4f3b8c1e-9d2a-4b6c-8e7f-0a1b2c3d4e5f service.name=redis-server"
        );
        check(&facts("", &path, Some("redis-server")), &expect);
    }

    #[test]
    fn of_the_environment_only_named_attributes_are_taken() {
        let list = "password=1,service.namespace=a%20b, deployment.environment.name = prod ,,process.pid=7";
        let environment = format!("SECRET=x\0OTEL_RESOURCE_ATTRIBUTES={list}\0");
        check(
            &facts(&environment, "/", Some("app")),
            "deployment.environment.name=prod service.name=app service.namespace=a b",
        );
        for broken in ["service.version=1,nonsense", "service.version=1,service.namespace=%ff"] {
            check(
                &facts(&format!("OTEL_RESOURCE_ATTRIBUTES={broken}"), "/", Some("app")),
                "service.name=app",
            );
        }
        let long = format!("OTEL_SERVICE_NAME={}", "x".repeat(MAX_VALUE_BYTES + 1));
        check(&facts(&long, "/", Some("app")), "service.name=app");
    }

    #[test]
    fn what_is_known_follows_forks_execs_and_ends() {
        let start = Instant::now();
        let mut resources = Resources::default();
        let container = format!("/docker/{ID}");
        let gone = |_| Facts::default();
        let never = |tgid: u32| -> Facts { panic!("{tgid} is read again") };
        let shell = resources.of_by(7, start, |_| facts("A=b", &container, Some("sh")));
        assert_eq!(print(&shell), format!("container.id={ID} service.name=sh"));
        assert!(Arc::ptr_eq(&shell, &resources.of_by(7, start + REREAD_AFTER / 2, never)));
        // A fork has all of it, an exec the container.
        resources.forked(8, 7, start);
        assert!(Arc::ptr_eq(&shell, &resources.of_by(8, start, never)));
        resources.exec(8);
        assert_eq!(print(&resources.of_by(8, start, gone)), format!("container.id={ID}"));
        // What was read counts until it is too old, and if there is nothing newer also beyond.
        let late = start + REREAD_AFTER;
        assert!(Arc::ptr_eq(&shell, &resources.of_by(7, late, gone)));
        let moved = resources.of_by(7, late, |_| facts("A=b", "/", Some("sh")));
        assert_eq!(print(&moved), "service.name=sh");
        // A number that comes again is another process's.
        resources.forked(7, 99, late);
        assert_eq!(print(&resources.of_by(7, late, gone)), "");
        resources.expire(late + 3 * REREAD_AFTER);
        assert!(resources.known.is_empty());

        // Of what ended the last samples are still to come.
        let app = resources.of_by(7, late, |_| facts("A=b", &container, Some("app")));
        resources.forked(8, 7, late);
        resources.exited(8, late);
        resources.expire(late + EXIT_GRACE / 2);
        assert!(Arc::ptr_eq(&app, &resources.of_by(8, late + EXIT_GRACE / 2, never)));
        resources.expire(late + EXIT_GRACE);
        assert_eq!(resources.known.keys().collect::<Vec<_>>(), [&7]);
    }

    #[test]
    fn a_process_within_its_exec_is_read_again_soon() {
        let start = Instant::now();
        let mut resources = Resources::default();
        let early = resources.of_by(7, start, |_| facts("", "/", Some("app")));
        assert_eq!(print(&early), "service.name=app");
        let soon = start + REREAD_EXEC_AFTER;
        let told = resources.of_by(7, soon, |_| facts("OTEL_SERVICE_NAME=till", "/", Some("app")));
        assert_eq!(print(&told), "service.name=till");
        // Kernel threads have none, nor may that of every process be read.
        for hidden in [Facts { environment: None, ..facts("", "/", Some("app")) }, facts("", "/", None)] {
            assert_eq!(hidden.reread_after(), REREAD_AFTER);
        }
    }

    #[test]
    fn a_real_process() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env("OTEL_SERVICE_NAME", "sleeper")
            .env_remove("OTEL_RESOURCE_ATTRIBUTES")
            .spawn()
            .unwrap();
        while environment(child.id()).unwrap().is_empty() {
            std::thread::yield_now();
        }
        let resource = Resources::default().of(child.id(), Instant::now());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(resource.attributes().any(|(key, value)| (key, value) == ("service.name", "sleeper")));
        assert_eq!(
            executable(std::process::id()),
            std::env::current_exe().ok().and_then(|exe| file_name(&exe))
        );
    }
}
