//! To which service, container and pod does a process belong?
//!
//! What a profile's reader asks for is a service, not a process number. The service's name is the first that
//! there is of: what the process itself was told (`OTEL_SERVICE_NAME`, then `service.name` in
//! `OTEL_RESOURCE_ATTRIBUTES`, as every OpenTelemetry SDK reads them), its systemd unit, the file name of its
//! executable. Of the environment a few named attributes are taken and nothing else, for it holds secrets.
//!
//! When all that is read, and what of it may take its time: [`crate::owners`].

use std::io::Read as _;
use std::path::Path;

use percent_encoding::percent_decode_str;

use crate::cgroup::{self, Cgroup};

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

/// What `/proc` says of a process at once: no lock is needed for it that is held while a file system is asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) cgroup: Option<Cgroup>,
    /// `None` if there is none, as of kernel threads.
    pub(crate) executable: Option<String>,
}

impl Facts {
    pub(crate) fn read(tgid: u32) -> Self {
        let cgroup = std::fs::read_to_string(format!("/proc/{tgid}/cgroup")).ok();
        Self { cgroup: cgroup.map(|contents| cgroup::parse(&contents)), executable: executable(tgid) }
    }

    /// The resource of a process with these facts that was told this.
    pub(crate) fn resource(&self, told: &Stated) -> Resource {
        let cgroup = self.cgroup.as_ref();
        let of_cgroup = |key, value: Option<&String>| value.map(|value| (key, value.clone()));
        let found = [
            of_cgroup(SERVICE_NAME, cgroup.and_then(|cgroup| cgroup.service.as_ref())),
            of_cgroup(SERVICE_NAME, self.executable.as_ref()),
            of_cgroup("container.id", cgroup.and_then(|cgroup| cgroup.container_id.as_ref())),
            of_cgroup("k8s.pod.uid", cgroup.and_then(|cgroup| cgroup.pod_uid.as_ref())),
        ];
        Resource::new(told.0.iter().cloned().chain(found.into_iter().flatten()))
    }
}

/// What a process was told in its environment: attributes, of several with one key the first counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stated(Vec<(&'static str, String)>);

impl Stated {
    /// What this environment says.
    pub(crate) fn of(environment: &[u8]) -> Self {
        let name = variable(environment, b"OTEL_SERVICE_NAME").map(|name| (SERVICE_NAME, name));
        let listed = variable(environment, b"OTEL_RESOURCE_ATTRIBUTES");
        let listed = listed.as_deref().map(stated_attributes).unwrap_or_default();
        // One that is not fit does not stand in for another.
        Self(name.into_iter().chain(listed).filter(|(_, value)| is_fit(value)).collect())
    }
}

/// `/proc/PID/environ` as it was at the exec (proc_pid_environ(5)). It is read out of the process's memory, and so under its
/// `mmap_lock` (`environ_read` in fs/proc/base.c), which others may hold while they wait for a file system.
pub(crate) fn environment(tgid: u32) -> std::io::Result<Vec<u8>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[track_caller]
    fn check(environment: &str, (cgroup, executable): (&str, Option<&str>), expect: &str) {
        let cgroup = Some(cgroup::parse(&format!("0::{cgroup}")));
        let facts = Facts { cgroup, executable: executable.map(str::to_owned) };
        let resource = facts.resource(&Stated::of(environment.as_bytes()));
        let found: Vec<_> = resource.attributes().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(found.join(" "), expect);
    }

    #[test]
    fn the_name_that_the_process_was_told_counts_most() {
        let unit = "/system.slice/shop.service";
        let both = "PATH=/bin\0OTEL_RESOURCE_ATTRIBUTES=service.name=listed,service.version=3\0\
                    OTEL_SERVICE_NAME=told\0";
        check(both, (unit, Some("java")), "service.name=told service.version=3");
        let listed = both.split("\0OTEL_SERVICE").next().unwrap();
        check(listed, (unit, Some("java")), "service.name=listed service.version=3");
        check("OTEL_SERVICE_NAME=\0", (unit, Some("java")), "service.name=shop");
        check("XOTEL_SERVICE_NAME=x", ("/", Some("java")), "service.name=java");
        check("", ("/", None), "");
    }

    #[test]
    fn containers_and_pods_are_told_by_their_groups() {
        let path = format!("/kubepods/pod4f3b8c1e-9d2a-4b6c-8e7f-0a1b2c3d4e5f/{ID}");
        let expect = format!(
            "container.id={ID} k8s.pod.uid=4f3b8c1e-9d2a-4b6c-8e7f-0a1b2c3d4e5f service.name=redis-server"
        );
        check("", (&path, Some("redis-server")), &expect);
    }

    #[test]
    fn of_the_environment_only_named_attributes_are_taken() {
        let list = "password=1,service.namespace=a%20b, deployment.environment.name = prod ,,process.pid=7";
        let environment = format!("SECRET=x\0OTEL_RESOURCE_ATTRIBUTES={list}\0");
        check(
            &environment,
            ("/", Some("app")),
            "deployment.environment.name=prod service.name=app service.namespace=a b",
        );
        for broken in ["service.version=1,nonsense", "service.version=1,service.namespace=%ff"] {
            check(&format!("OTEL_RESOURCE_ATTRIBUTES={broken}"), ("/", Some("app")), "service.name=app");
        }
        let long = format!("OTEL_SERVICE_NAME={}", "x".repeat(MAX_VALUE_BYTES + 1));
        check(&long, ("/", Some("app")), "service.name=app");
    }

    #[test]
    fn an_executable_is_named_by_its_file() {
        let own = std::env::current_exe().ok().and_then(|exe| file_name(&exe));
        assert_eq!(executable(std::process::id()), own);
        assert_eq!(file_name(Path::new("/bin/app (deleted)")).as_deref(), Some("app"));
    }
}
