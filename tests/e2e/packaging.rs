//! What the packages give the agent, and what it takes for the agent to do all that it does.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object as _, ObjectSection as _};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;
use windlass_tests::program::{checkout, program, run, windlass};
use windlass_tests::service::TestService;
use windlass_tests::skip::may_use_bpf;
use windlass_tests::workload::Workload;
use windlass_unwind_compiler::build_id_of;
use windlass_workload::ELF;

use crate::agent_process::{AgentProcess, may_drop_capabilities, total};

/// A user without a name or files.
const NOBODY: u32 = 65534;
const WHOLE_STACKS: &str = "windlass_agent_samples_total{reason=\"end_of_stack\"}";

/// `command` by way of a program that sets something and then runs it.
fn by(setter: PathBuf, arguments: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(setter);
    wrapped.args(arguments).arg(command.get_program()).args(command.get_args()).env("RUST_LOG", "info");
    wrapped
}

async fn start_service() -> TestService {
    let service = TestService::start().await;
    let build_id = build_id_of(ELF).expect("the workload has a build-ID");
    service.put(build_id, ArtefactKind::Executable, ELF.to_vec()).await;
    service
}

/// The capabilities of the systemd unit, as `setpriv` takes a set that has no others.
fn capabilities_of_the_unit() -> String {
    let unit = checkout().join("packaging/systemd/windlass-agent.service");
    let unit = std::fs::read_to_string(unit).expect("the unit is there");
    let names = unit.lines().find_map(|line| line.strip_prefix("AmbientCapabilities="));
    let names = names.expect("a setting of the unit").split(' ');
    names.fold("-all".to_owned(), |set, name| {
        format!("{set},+{}", name.trim_start_matches("CAP_").to_lowercase())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_unit_grants_suffices_for_processes_of_root() {
    const TEST: &str = "packaging::what_the_unit_grants_suffices_for_processes_of_root";
    let (true, Some(setpriv)) = (may_drop_capabilities(TEST), program(TEST, "setpriv")) else { return };
    let service = start_service().await;
    // In a folder that is root's alone.
    let _workload = Workload::start(service.folder());
    let cache = tempfile::tempdir().expect("temporary folder");
    chown(cache.path(), Some(NOBODY), Some(NOBODY)).expect("root may give folders away");
    let set = capabilities_of_the_unit();
    let nobody = NOBODY.to_string();
    let user = ["--reuid", &nobody, "--regid", &nobody, "--clear-groups", "--no-new-privs"];
    let sets = ["--bounding-set", &set, "--inh-caps", &set, "--ambient-caps", &set];
    let command = AgentProcess::command(&service.url(), cache.path());
    let mut agent = AgentProcess::start(&mut by(setpriv, &[&user[..], &sets].concat(), &command));
    agent.eventually("a whole stack", async |agent| total(&agent.metrics().await, WHOLE_STACKS) > 0).await;
    agent.eventually("it samples", async |agent| agent.log().contains(" sampling")).await;
    assert!(!agent.log().contains("without CAP_"), "{}", agent.log());
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pid_namespace_of_its_own_is_said_to_be_in_the_way() {
    const TEST: &str = "packaging::a_pid_namespace_of_its_own_is_said_to_be_in_the_way";
    let (true, Some(unshare)) = (may_use_bpf(TEST), program(TEST, "unshare")) else { return };
    let cache = tempfile::tempdir().expect("temporary folder");
    let command = AgentProcess::command("http://127.0.0.1:1", cache.path());
    let namespace = ["--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut agent = AgentProcess::start(&mut by(unshare, &namespace, &command));
    let says = |log: &str| log.contains("--pid=host") && log.contains("hostPID");
    agent.eventually("the warning", async |agent| says(&agent.log())).await;
}

/// Bytes of the section that images of [`hostile`] have.
const HOSTILE_BYTES: u64 = 200 << 20;

/// Makes the copy of the workload at `path` one whose `section` has 200 MiB: of noise, or, if `noise` is not wanted, of nothing, which
/// takes no room on disk. Its build-ID becomes another.
fn inflate(path: &Path, section: &str, noise: bool) -> BuildId {
    let elf = object::read::elf::ElfFile64::<object::LittleEndian>::parse(ELF).expect("an ELF file");
    let file = File::options().write(true).open(path).expect("the workload is there");
    let start = (ELF.len() as u64).next_multiple_of(4096);
    file.set_len(start + HOSTILE_BYTES).expect("files may be sparse");
    if noise {
        let mut noise = File::open("/dev/urandom").expect("the kernel has noise").take(HOSTILE_BYTES);
        let mut to = &file;
        to.seek(SeekFrom::Start(start)).expect("it is a file");
        std::io::copy(&mut noise, &mut to).expect("there is room");
    }
    let index = elf.section_by_name(section).expect("the workload has it").index().0 as u64;
    // sh_offset and sh_size of Elf64_Shdr.
    let header = elf.elf_header().e_shoff.get(object::LittleEndian) + index * 64;
    file.write_all_at(&start.to_le_bytes(), header + 24).expect("it is inside");
    file.write_all_at(&HOSTILE_BYTES.to_le_bytes(), header + 32).expect("it is inside");
    let mut id = build_id_of(ELF).expect("the workload has a build-ID").as_bytes().to_vec();
    let at = ELF.windows(id.len()).position(|bytes| bytes == id).expect("it is in its note");
    id[0] ^= 1 + u8::from(noise);
    id[1] ^= section.len() as u8;
    file.write_all_at(&id, at as u64).expect("it is inside");
    BuildId::new(&id).expect("as long as before")
}

/// The most memory that process `pid` had so far, in bytes.
fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the agent runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line of each process");
    peak.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// The memory that the systemd unit gives, in bytes; that of the DaemonSet is the same.
fn memory_of_the_packages() -> u64 {
    let read = |path: &str| std::fs::read_to_string(checkout().join(path)).expect("the package is there");
    let unit = read("packaging/systemd/windlass-agent.service");
    let limit = unit.lines().find_map(|line| line.strip_prefix("MemoryMax=")).expect("a limit");
    assert!(read("packaging/kubernetes/daemonset.yaml").contains(&format!("memory: {limit}i\n")));
    limit.trim_end_matches('M').parse::<u64>().expect("in MiB") << 20
}

/// Whoever may run a program decides what its file says.
#[tokio::test(flavor = "multi_thread")]
async fn images_of_any_size_fit_in_the_memory_of_the_packages() {
    if !may_use_bpf("packaging::images_of_any_size_fit_in_the_memory_of_the_packages") {
        return;
    }
    let service = TestService::start().await;
    let mut workloads = Vec::new();
    let cases =
        [(".strtab", true), (".strtab", false), (".eh_frame", true), (".symtab", true), (".symtab", false)];
    for (number, (section, noise)) in cases.into_iter().enumerate() {
        let folder = service.folder().join(number.to_string());
        std::fs::create_dir(&folder).expect("the folder is new");
        let path = windlass_workload::write_executable(&folder).expect("write the workload");
        let id = inflate(&path, section, noise);
        workloads.push((Workload::run(path), id, section));
    }
    let cache = service.folder().join("cache");
    let mut agent = AgentProcess::start(&mut AgentProcess::command(&service.url(), &cache));
    for (_workload, id, section) in &workloads {
        if *section == ".eh_frame" {
            let refused = async |agent: &AgentProcess| {
                let log = agent.log();
                log.lines().any(|line| line.contains(&id.to_string()) && line.contains("no unwind table"))
            };
            agent.eventually("the reason why there is no table", refused).await;
        } else {
            let table = cache.join("tables").join(format!("{id}.wluw"));
            agent.eventually("a table", async |_| table.exists()).await;
        }
    }
    assert!(agent.log().contains("held in memory"), "{}", agent.log());
    let (peak, limit) = (peak_memory(agent.pid()), memory_of_the_packages());
    assert!(peak < limit, "{peak} bytes of {limit}");
    service.stop().await;
}

/// The command that the DaemonSet says makes a token for agents.
fn printed_token_command() -> Vec<String> {
    let manifest = checkout().join("packaging/kubernetes/daemonset.yaml");
    let manifest = std::fs::read_to_string(manifest).expect("the manifest is there");
    let line = manifest.lines().find_map(|line| line.strip_prefix("#   windlassd ")).expect("a command");
    let command = line.strip_suffix(" > token").expect("the token goes into a file");
    let readme = std::fs::read_to_string(checkout().join("README.md")).expect("README.md");
    assert!(readme.contains(&format!("`windlassd {command}`")), "README says another command");
    command.split(' ').map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_made_as_printed_lets_an_agent_ship() {
    if !may_use_bpf("packaging::a_token_made_as_printed_lets_an_agent_ship") {
        return;
    }
    for (private, more) in [(false, &[][..]), (true, &["--scope", "read"])] {
        let mut token = Vec::new();
        let service = TestService::start_with(|config| {
            let mut create = windlass("windlassd");
            create.args(printed_token_command()).args(more).arg("--data-dir").arg(&config.data_dir);
            token = run(&mut create, &[0]).stdout;
            config.private = private;
        })
        .await;
        let file = service.folder().join("token");
        std::fs::write(&file, &token).expect("the folder is there");
        let _workload = Workload::start(service.folder());
        let cache = service.folder().join("cache");
        // The service knows the workload by its skeleton alone; without a token it takes neither that nor samples.
        let sent = "windlass_agent_batches_sent_total ";
        for with_token in [false, true] {
            let mut command = AgentProcess::command(&service.url(), &cache);
            if with_token {
                command.env("WINDLASS_TOKEN_FILE", &file);
            }
            let mut agent = AgentProcess::start(&mut command);
            if with_token {
                let whole = async |agent: &AgentProcess| total(&agent.metrics().await, WHOLE_STACKS) > 0;
                agent.eventually("a whole stack", whole).await;
                let ships = async |agent: &AgentProcess| total(&agent.metrics().await, sent) > 0;
                agent.eventually("a batch is taken", ships).await;
            } else {
                agent.eventually("it is refused", async |agent| agent.log().contains("401")).await;
                assert_eq!(total(&agent.metrics().await, sent), 0);
            }
        }
        service.stop().await;
    }
}
