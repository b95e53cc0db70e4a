//! Are the packages sound by themselves? Each by its own tools, as far as they are there, and the unit's filter of system calls by the
//! agent under it.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use windlass_tests::program::{checkout, program, run, text, windlass};
use windlass_tests::skip::{may_use_bpf, skip};

use crate::agent_process::AgentProcess;

/// Where the kernel's headers number its system calls.
const SYSTEM_CALLS: &str = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h";
/// What the agent says when it may not ask for short slices.
const REFUSED: &str = "may not ask for short time slices";

fn package(name: &str) -> String {
    std::fs::read_to_string(checkout().join("packaging").join(name)).expect("the package is there")
}

fn unit() -> String {
    package("systemd/windlass-agent.service")
}

#[test]
fn systemd_takes_every_line_of_the_unit() {
    let Some(analyze) = program("package_files::systemd_takes_every_line_of_the_unit", "systemd-analyze")
    else {
        return;
    };
    let folder = tempfile::tempdir().expect("temporary folder");
    let agent = windlass("windlass-agent").get_program().to_string_lossy().into_owned();
    let said_of = |unit: &str| {
        let path = folder.path().join("windlass-agent.service");
        std::fs::write(&path, unit.replace("/usr/local/bin/windlass-agent", &agent)).expect("a new file");
        let output = Command::new(&analyze).args(["verify", "--man=no"]).arg(path).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // It reads the units of the machine as well.
        let of_ours = said.lines().filter(|line| line.contains("windlass-agent.service"));
        of_ours.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(said_of(&unit()), Vec::<String>::new());
    assert!(!said_of(&unit().replace("MemoryMax=", "MemoryMost=")).is_empty(), "it says nothing of anything");
    assert!(!said_of(&unit().replace("@resources", "@resource")).is_empty(), "nor of unknown system calls");
}

/// The names of system calls that `names` stand for, groups with what is in them.
fn expand(analyze: &Path, names: &str, into: &mut BTreeSet<String>) {
    for name in names.split_ascii_whitespace() {
        if name.starts_with('@') {
            let group = text(Command::new(analyze).args(["syscall-filter", name]));
            for line in group.lines().skip(1).map(str::trim).filter(|line| !line.starts_with('#')) {
                expand(analyze, line, into);
            }
        } else {
            into.insert(name.to_owned());
        }
    }
}

/// The system calls that a unit allows: the first line says that it lists what is allowed; later ones add, or take away with `~`
/// (systemd.exec, SystemCallFilter=). `@default` always is.
fn allowed(analyze: &Path, unit: &str) -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    expand(analyze, "@default", &mut allowed);
    for line in unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        let mut named = BTreeSet::new();
        expand(analyze, line.trim_start_matches('~'), &mut named);
        match line.starts_with('~') {
            true => allowed.retain(|name| !named.contains(name)),
            false => allowed.extend(named),
        }
    }
    allowed
}

/// A filter that lets these pass and answers others with EPERM (Documentation/userspace-api/seccomp_filter.rst).
fn filter(allowed: &BTreeSet<String>) -> Vec<libc::sock_filter> {
    let header = std::fs::read_to_string(SYSTEM_CALLS).expect("the kernel's headers are there");
    let statement = |code: u32, k: u32, jf: u8| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for line in header.lines() {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (Some(name), Some(Ok(number))) = (words.next(), words.next().map(str::parse)) else { continue };
        if name.strip_prefix("__NR_").is_some_and(|name| allowed.contains(name)) {
            filter.push(statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, 1));
            filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0));
        }
    }
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    filter.push(statement(libc::BPF_RET | libc::BPF_K, refuse, 0));
    filter
}

/// Has `command` run under a filter.
fn run_under(command: &mut Command, filter: Vec<libc::sock_filter>) {
    let set = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: prctl with numbers alone.
        let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        let mode = libc::SECCOMP_MODE_FILTER;
        // SAFETY: the program is there until the call returns, and has the length that it says.
        let taken = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
        if privileges == 0 && taken == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec only prctl is called, which is safe there.
    unsafe { command.pre_exec(set) };
}

#[tokio::test(flavor = "multi_thread")]
async fn the_filter_of_the_unit_lets_the_agent_have_all_it_asks() {
    const TEST: &str = "package_files::the_filter_of_the_unit_lets_the_agent_have_all_it_asks";
    let (true, Some(analyze)) = (may_use_bpf(TEST), program(TEST, "systemd-analyze")) else { return };
    if !Path::new(SYSTEM_CALLS).is_file() {
        skip(TEST, "needs the kernel's headers");
        return;
    }
    let cache = tempfile::tempdir().expect("temporary folder");
    let all = allowed(&analyze, &unit());
    let without: BTreeSet<_> = all.iter().filter(|name| *name != "sched_setattr").cloned().collect();
    assert!(without.len() < all.len() && !all.contains("setpriority") && !all.contains("chown"));
    for (allowed, is_refused) in [(all, false), (without, true)] {
        let mut command = AgentProcess::command("http://127.0.0.1:1", cache.path());
        run_under(&mut command, filter(&allowed));
        let mut agent = AgentProcess::start(&mut command);
        agent.eventually("it samples", async |agent| agent.log().contains(" sampling")).await;
        if is_refused {
            agent.eventually("it says what it lacks", async |agent| agent.log().contains(REFUSED)).await;
        } else {
            // It asks before it samples, and its readings do when they begin.
            let has_samples = async |agent: &AgentProcess| agent.metrics().await.contains("samples_total");
            agent.eventually("it has samples", has_samples).await;
            assert!(!agent.log().contains(REFUSED), "{}", agent.log());
            assert!(!agent.log().contains("Operation not permitted"), "{}", agent.log());
        }
    }
}

/// The fields that an object of the Kubernetes API may have here, by the path to it with indexes left out (Kubernetes API v1.30:
/// apps/v1 DaemonSet, core/v1 PodTemplateSpec). `*` has names of one's own.
const FIELDS: &[(&str, &str)] = &[
    ("", "apiVersion kind metadata spec"),
    (".metadata", "name namespace labels annotations"),
    (".metadata.labels", "*"),
    (".spec", "selector template updateStrategy minReadySeconds revisionHistoryLimit"),
    (".spec.selector", "matchLabels matchExpressions"),
    (".spec.selector.matchLabels", "*"),
    (".spec.updateStrategy", "type rollingUpdate"),
    (".spec.updateStrategy.rollingUpdate", "maxSurge maxUnavailable"),
    (".spec.template", "metadata spec"),
    (".spec.template.metadata", "name namespace labels annotations"),
    (".spec.template.metadata.labels", "*"),
    (".spec.template.metadata.annotations", "*"),
    (
        ".spec.template.spec",
        "hostPID hostNetwork automountServiceAccountToken serviceAccountName tolerations nodeSelector affinity \
         terminationGracePeriodSeconds priorityClassName containers initContainers volumes securityContext imagePullSecrets",
    ),
    (".spec.template.spec.tolerations", "key operator value effect tolerationSeconds"),
    (".spec.template.spec.nodeSelector", "*"),
    (
        ".spec.template.spec.containers",
        "name image imagePullPolicy command args env envFrom ports livenessProbe readinessProbe startupProbe resources \
         securityContext volumeMounts workingDir",
    ),
    (".spec.template.spec.containers.env", "name value valueFrom"),
    (
        ".spec.template.spec.containers.env.valueFrom",
        "fieldRef resourceFieldRef configMapKeyRef secretKeyRef",
    ),
    (".spec.template.spec.containers.env.valueFrom.fieldRef", "apiVersion fieldPath"),
    (".spec.template.spec.containers.ports", "name containerPort hostPort hostIP protocol"),
    (
        ".spec.template.spec.containers.livenessProbe",
        "httpGet tcpSocket exec grpc initialDelaySeconds periodSeconds timeoutSeconds successThreshold failureThreshold",
    ),
    (".spec.template.spec.containers.livenessProbe.httpGet", "path port host scheme httpHeaders"),
    (".spec.template.spec.containers.resources", "requests limits claims"),
    (".spec.template.spec.containers.resources.requests", "cpu memory ephemeral-storage"),
    (".spec.template.spec.containers.resources.limits", "cpu memory ephemeral-storage"),
    (
        ".spec.template.spec.containers.securityContext",
        "runAsUser runAsGroup runAsNonRoot privileged allowPrivilegeEscalation readOnlyRootFilesystem capabilities \
         seccompProfile appArmorProfile seLinuxOptions procMount",
    ),
    (".spec.template.spec.containers.securityContext.capabilities", "add drop"),
    (".spec.template.spec.containers.securityContext.seccompProfile", "type localhostProfile"),
    (".spec.template.spec.containers.securityContext.appArmorProfile", "type localhostProfile"),
    (".spec.template.spec.containers.volumeMounts", "name mountPath readOnly subPath mountPropagation"),
    (".spec.template.spec.volumes", "name hostPath secret configMap emptyDir projected"),
    (".spec.template.spec.volumes.hostPath", "path type"),
    (".spec.template.spec.volumes.secret", "secretName items defaultMode optional"),
];

/// The fields of `value`, at `path`, that the API does not have.
fn unknown_fields(path: &str, value: &Value, unknown: &mut Vec<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| unknown_fields(path, item, unknown)),
        Value::Object(fields) => {
            let known = FIELDS.iter().find(|(known, _)| *known == path).map_or("", |(_, fields)| fields);
            for (name, value) in fields {
                let inner = format!("{path}.{name}");
                if known != "*" && !known.split_ascii_whitespace().any(|known| known == name) {
                    unknown.push(inner);
                } else {
                    unknown_fields(&inner, value, unknown);
                }
            }
        }
        _ => {}
    }
}

fn unknown(manifest: &Value) -> Vec<String> {
    let mut found = Vec::new();
    unknown_fields("", manifest, &mut found);
    found
}

#[test]
fn kubernetes_knows_every_field_of_the_manifest() {
    let test = "package_files::kubernetes_knows_every_field_of_the_manifest";
    let Some(python) = program(test, "python3") else { return };
    if !Command::new(&python).args(["-c", "import yaml"]).status().is_ok_and(|status| status.success()) {
        skip(test, "Python's package yaml is not installed");
        return;
    }
    let read = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let path = checkout().join("packaging/kubernetes/daemonset.yaml");
    let output = run(Command::new(python).args(["-c", read]).arg(path), &[0]);
    let manifest: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(unknown(&manifest), Vec::<String>::new());
    let mut wrong = manifest.clone();
    wrong["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = Value::Null;
    assert_eq!(unknown(&wrong), [".spec.template.spec.containers.readyProbe"]);

    let labels = &manifest["spec"]["template"]["metadata"]["labels"];
    assert_eq!(&manifest["spec"]["selector"]["matchLabels"], labels, "it would choose other pods");
    let pod = &manifest["spec"]["template"]["spec"];
    let names = |list: &Value| {
        let items = list.as_array().expect("a list").iter();
        items.map(|item| item["name"].as_str().expect("a name").to_owned()).collect::<BTreeSet<_>>()
    };
    let container = &pod["containers"][0];
    assert_eq!(names(&pod["volumes"]), names(&container["volumeMounts"]));
    let variables = names(&container["env"]);
    assert!(["WINDLASS_SERVER", "WINDLASS_TOKEN_FILE"].iter().all(|name| variables.contains(*name)));
    let help = text(windlass("windlass-agent").arg("--help"));
    for variable in variables {
        assert!(help.contains(&variable), "the agent does not know {variable}");
    }
}

#[test]
fn the_container_file_copies_what_is_there() {
    let file = package("container/Containerfile");
    let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<_> = file.lines().filter(|line| !line.starts_with('#')).map(words).collect();
    let of = |instruction: &'static str| {
        lines.iter().filter(move |line| line.first().is_some_and(|first| first == instruction))
    };
    let copied: Vec<_> = of("COPY").collect();
    assert_eq!(copied.len(), 2);
    for copy in copied {
        match &copy[1..] {
            [from, source, to] => {
                assert_eq!(from, "--from=build");
                // What cargo makes of the package that it builds.
                assert_eq!(source, "/source/target/release/windlass-agent");
                assert!(file.contains("cargo build --release --locked -p windlass-agent"));
                assert!(file.contains("WORKDIR /source\n"));
                assert!(checkout().join("Cargo.lock").is_file());
                assert!(of("ENTRYPOINT").any(|line| line[1] == format!("[\"{to}\"]")));
            }
            [source, _] => assert!(checkout().join(source).join("Cargo.toml").is_file()),
            other => panic!("{other:?}"),
        }
    }
    let toolchain = std::fs::read_to_string(checkout().join("rust-toolchain.toml")).expect("a file");
    let image = of("FROM").next().expect("a base")[1].trim_start_matches("rust:").to_owned();
    let version = image.split('-').next().expect("a version").to_owned();
    assert!(toolchain.contains(&format!("\"{version}.")), "{version} does not build it");
}
