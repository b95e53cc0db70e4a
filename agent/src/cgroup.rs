//! What do a process's control groups say of it?
//!
//! Container runtimes and systemd name the groups that they make, and that name is all that the kernel
//! tells of a container: there is no container in the kernel. So the paths of `/proc/PID/cgroup` are read
//! by the conventions of those who write them; no runtime is asked, which would take its socket and with it
//! its powers. What fits no convention says nothing: a wrong container is worse than none.
//!
//! | written by | component |
//! |---|---|
//! | runtimes over cgroupfs | `ID`, as in `/docker/ID`; CRI-O `crio-ID` |
//! | runtimes over systemd | `docker-ID.scope`, `cri-containerd-ID.scope`, `crio-ID.scope`, `libpod-ID.scope` |
//! | containerd, its group driver unlike the kubelet's | `kubepods-PODUID.slice:cri-containerd:ID` |
//! | kubelet over cgroupfs | `kubepods/QOS/podUID` |
//! | kubelet over systemd | `kubepods-QOS-podUID.slice`, the UID's dashes as `_`; below another root `ROOT-kubepods-...` |
//! | systemd | `NAME.service` |
//!
//! `ID` has 64 hexadecimal digits (OCI runtimes take any name, all of these make it so); `UID` is a UUID, or for
//! static pods the 32 digits of a hash. The innermost container counts, for containers run in containers.
//! `conmon`, as in `crio-conmon-ID.scope`, watches a container from outside.

/// Hexadecimal digits of a container's ID.
const CONTAINER_ID_DIGITS: usize = 64;
/// Hexadecimal digits of a pod's UID, dashes left out.
const POD_UID_DIGITS: usize = 32;
/// Where a UUID has its dashes.
const UUID_DASHES: [usize; 4] = [8, 13, 18, 23];
/// What runtimes put before the ID where systemd makes the group.
const RUNTIMES: [&str; 5] = ["docker", "cri-containerd", "containerd", "crio", "libpod"];

/// What is known of a process by its control groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cgroup {
    /// The path by which processes are chosen: of version 2, or where that has nothing of version 1's `systemd`
    /// hierarchy, or of any.
    pub path: String,
    /// ID of the container.
    pub container_id: Option<String>,
    /// UID of the Kubernetes pod.
    pub pod_uid: Option<String>,
    /// Name of the systemd service, without its ending.
    pub service: Option<String>,
}

/// Reads the contents of `/proc/PID/cgroup` (cgroups(7)): lines of hierarchy, controllers and path.
pub fn parse(contents: &str) -> Cgroup {
    let mut paths: Vec<(u8, &str)> = contents
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let rank = match controllers {
                "" => 0,
                "name=systemd" => 1,
                _ => 2,
            };
            Some((rank, own_part(path)))
        })
        .collect();
    paths.sort_by_key(|(rank, _)| *rank);
    let path = paths.iter().map(|(_, path)| *path).find(|path| *path != "/").unwrap_or("/");
    let mut cgroup = Cgroup { path: path.to_owned(), ..Cgroup::default() };
    for (_, path) in paths {
        if cgroup.container_id.is_none() {
            cgroup.container_id = container_id(path).map(|(_, id)| id.to_owned());
        }
        cgroup.pod_uid = cgroup.pod_uid.or_else(|| path.split('/').rev().find_map(pod_uid));
        cgroup.service = cgroup.service.or_else(|| service(path));
    }
    cgroup
}

/// `path` from where a reader in a cgroup namespace of its own can see it: what lies outside starts with as
/// many `/..` as lead there (cgroup_namespaces(7)).
fn own_part(path: &str) -> &str {
    let mut own = path;
    while let Some(rest) = own.strip_prefix("/..")
        && (rest.is_empty() || rest.starts_with('/'))
    {
        own = rest;
    }
    if own.is_empty() { "/" } else { own }
}

/// The innermost container of a path, and how many components lead to it.
fn container_id(path: &str) -> Option<(usize, &str)> {
    let components: Vec<&str> = path.split('/').collect();
    components.iter().enumerate().rev().find_map(|(at, component)| Some((at, id_of_container(component)?)))
}

fn id_of_container(component: &str) -> Option<&str> {
    // Of `slice:prefix:name` the name.
    let named = component.strip_suffix(".scope").unwrap_or(component).rsplit(':').next()?;
    let id =
        RUNTIMES.iter().find_map(|runtime| named.strip_prefix(runtime)?.strip_prefix('-')).unwrap_or(named);
    is_hexadecimal(id, CONTAINER_ID_DIGITS).then_some(id)
}

fn pod_uid(component: &str) -> Option<String> {
    // Of `slice:prefix:name` the slice.
    let component = component.split(':').next()?;
    let named = match component.strip_suffix(".slice") {
        // Dashes lead from slice to slice (systemd.slice(5)).
        Some(slice) => {
            let (above, own) = slice.rsplit_once('-')?;
            above.split('-').any(|name| name == "kubepods").then_some(own)?
        }
        None => component,
    };
    let uid = named.strip_prefix("pod")?.replace('_', "-");
    let digits = uid.replace('-', "");
    let dashes: Vec<usize> = uid.match_indices('-').map(|(at, _)| at).collect();
    let is_uid = is_hexadecimal(&digits, POD_UID_DIGITS) && (dashes.is_empty() || dashes == UUID_DASHES);
    is_uid.then_some(uid)
}

fn is_hexadecimal(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The innermost service of a path: inside the container, if there is one, for the service around it is that
/// of the runtime. A user's manager (`user@UID.service`) is none: what it starts has units of its own.
fn service(path: &str) -> Option<String> {
    let container = container_id(path).map(|(at, _)| at + 1);
    path.split('/')
        .skip(container.unwrap_or_default())
        .filter_map(|component| component.strip_suffix(".service"))
        .filter(|name| !name.is_empty() && !name.starts_with("user@"))
        .last()
        .map(unescaped)
}

/// A unit's name with what systemd escapes as `\xNN` (systemd.unit(5), string escaping) put back.
fn unescaped(name: &str) -> String {
    let mut parts = name.split("\\x");
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&part.as_bytes()[2..]);
            }
            None => bytes.extend([b"\\x", part.as_bytes()].concat()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::strategy::Strategy as _;

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const INNER: &str = "ffff456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const UID: &str = "4f3b8c1e-9d2a-4b6c-8e7f-0a1b2c3d4e5f";
    const HASH: &str = "d9c9ae1cbd1b3f6b3f3f1ee2a44ea3f0";

    /// Container, pod and service of a process in the one group `path`.
    #[track_caller]
    fn check(path: &str, container: Option<&str>, pod: Option<&str>, service: Option<&str>) {
        for line in [format!("0::{path}\n"), format!("4:memory:/\n1:name=systemd:{path}\n0::/\n")] {
            let cgroup = parse(&line);
            let found =
                (cgroup.container_id.as_deref(), cgroup.pod_uid.as_deref(), cgroup.service.as_deref());
            assert_eq!(found, (container, pod, service), "{line}");
        }
    }

    #[test]
    fn containers_of_each_runtime() {
        for path in [
            format!("/docker/{ID}"),
            format!("/system.slice/docker-{ID}.scope"),
            format!("/system.slice/containerd.service/cri-containerd-{ID}.scope"),
            format!("/machine.slice/libpod-{ID}.scope/container"),
            format!("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container"),
            format!("/k8s.io/{ID}"),
            format!("/ecs/{HASH}/{ID}"),
            format!("/docker/{INNER}/docker/{ID}/init"),
            format!("/default/{ID}"),
            format!("/kubepods/burstable/crio-{ID}"),
            format!("/system.slice/docker-{INNER}.scope/docker/{ID}"),
        ] {
            check(&path, Some(ID), None, None);
        }
    }

    #[test]
    fn pods_of_each_driver() {
        let underscored = UID.replace('-', "_");
        for path in [
            format!("/kubepods/besteffort/pod{UID}/{ID}"),
            format!("/kubepods/pod{UID}/{ID}"),
            format!("/kubepods.slice/kubepods-pod{underscored}.slice/crio-{ID}.scope"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscored}.slice/cri-containerd-{ID}.scope"
            ),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{underscored}.slice/docker-{ID}.scope"
            ),
            format!(
                "/system.slice/containerd.service/kubepods-burstable-pod{underscored}.slice:cri-containerd:{ID}"
            ),
            format!("/../../kubepods-besteffort-pod{underscored}.slice/cri-containerd-{ID}.scope"),
            format!("/docker/{INNER}/kubelet/kubepods/burstable/pod{UID}/{ID}"),
            // kind: nodes are containers, and their kubelets have a root of their own.
            format!(
                "/system.slice/docker-{INNER}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{underscored}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/kubepods.slice/kubepods-pod{underscored}.slice/crio-{ID}.scope/container"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscored}.slice/cri-containerd-{ID}.scope/init.scope"
            ),
        ] {
            check(&path, Some(ID), Some(UID), None);
        }
        check(&format!("/kubepods/burstable/pod{HASH}/{ID}"), Some(ID), Some(HASH), None);
    }

    #[test]
    fn services_of_systemd() {
        check("/system.slice/nginx.service", None, None, Some("nginx"));
        check("/system.slice/system-getty.slice/getty@tty1.service", None, None, Some("getty@tty1"));
        check(r"/system.slice/my\x2dapp\xq.service/worker", None, None, Some(r"my-app\xq"));
        check(
            "/user.slice/user-0.slice/user@0.service/app.slice/syncthing.service",
            None,
            None,
            Some("syncthing"),
        );
        check("/user.slice/user-0.slice/user@0.service/init.scope", None, None, None);
        check("/system.slice/docker.service", None, None, Some("docker"));
        check(&format!("/docker/{ID}/system.slice/cron.service"), Some(ID), None, Some("cron"));
    }

    #[test]
    fn what_fits_no_convention_says_nothing() {
        for path in [
            "/".to_owned(),
            "/user.slice/user-1000.slice/session-3.scope".to_owned(),
            format!("/docker/{}", &ID[1..]),
            format!("/docker/{}", ID.to_uppercase()),
            format!("/machine.slice/libpod-conmon-{ID}.scope"),
            format!("/kubepods.slice/crio-conmon-{ID}.scope"),
            format!("/kubepods/pod{}", &UID[1..]),
            "/kubepods/podium".to_owned(),
            format!("/myslice-pod{}.slice", UID.replace('-', "_")),
            format!("/kubepods-burstable-pod{}_.slice", UID.replace('-', "_")),
            format!("/notkubepods-pod{}.slice", UID.replace('-', "_")),
            format!("/docker/{ID}{ID}"),
            format!("/docker/{ID}.scope.scope"),
            format!("/docker-docker-{ID}.scope"),
            format!("/docker/{}", "é".repeat(32)),
            "/lxc.payload.web/system.slice".to_owned(),
            format!("/{}", "a/".repeat(2000)),
            "/.service".to_owned(),
        ] {
            check(&path, None, None, None);
        }
        assert_eq!(parse(""), Cgroup { path: "/".to_owned(), ..Cgroup::default() });
        assert_eq!(parse("no colons\n1:x\n").path, "/");
    }

    proptest::proptest! {
        /// Names are given by whoever may make groups; what is told of them has the form that it should have.
        #[test]
        fn nothing_odd_is_told(parts in proptest::collection::vec(
            proptest::prop_oneof![
                proptest::sample::select(&["/", ":", "-", "\\x", ".slice", ".scope", ".service", "kubepods", "pod", "docker-", ID, UID, "/.."][..])
                    .prop_map(str::to_owned),
                "\\PC{0,3}",
            ],
            0..24,
        )) {
            let cgroup = parse(&format!("0::/{}\n", parts.concat()));
            proptest::prop_assert!(cgroup.path.starts_with('/'));
            proptest::prop_assert!(cgroup.container_id.is_none_or(|id| is_hexadecimal(&id, CONTAINER_ID_DIGITS)));
            let digits = cgroup.pod_uid.map(|uid| uid.replace('-', ""));
            proptest::prop_assert!(digits.is_none_or(|digits| is_hexadecimal(&digits, POD_UID_DIGITS)));
            proptest::prop_assert!(cgroup.service.is_none_or(|service| !service.is_empty()));
        }
    }

    #[test]
    fn the_path_is_that_of_the_hierarchy_that_has_one() {
        for (contents, expect) in [
            ("4:memory:/m\n1:name=systemd:/s\n0::/unified\n", "/unified"),
            ("4:memory:/m\n1:name=systemd:/s\n0::/\n", "/s"),
            ("4:memory:/m:with:colons\n0::/\n", "/m:with:colons"),
            ("0::/../../side\n", "/side"),
            ("0::/..\n", "/"),
            ("0::/../..hidden\n", "/..hidden"),
        ] {
            assert_eq!(parse(contents).path, expect, "{contents}");
        }
    }
}
