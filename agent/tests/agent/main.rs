//! The agent against a backend and a service that are made up, over real `/proc` and real HTTP.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake_backend;
mod fake_service;
mod network_faults;
mod service_faults;
mod stack_depth;
mod symbols;
mod table_refresh;

use std::time::{Duration, Instant};

use windlass_agent::backend::Event;
use windlass_agent::choice::Choice;
use windlass_agent::compression::Compression;
use windlass_agent::{Agent, Config, Summary};
use windlass_schema::StopReason;
use windlass_schema::maps::{EXACT_ADDRESS, no_table};

use fake_backend::{FakeBackend, now_ns, sample};
use fake_service::{FakeService, Tables};

/// Waits until `holds`, and says how long it took; fails after ten seconds.
#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

fn config(service: &FakeService, cache: &tempfile::TempDir) -> Config {
    let mut config = Config::new(service.url(), cache.path());
    config.ship_interval = Duration::from_millis(100);
    config
}

fn own_pid() -> u32 {
    std::process::id()
}

/// An address in this binary.
fn own_address() -> u64 {
    own_address as *const () as u64
}

fn stop(agent: Agent) -> Summary {
    agent.stop().unwrap()
}

#[test]
fn an_unknown_image_is_walked_within_two_seconds_of_its_first_sample() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    let image = || view.mapping(own_pid(), own_address()).expect("this binary is mapped").mapping.image;
    assert_eq!(image(), no_table::location(StopReason::TablePending), "planned at the start");
    assert!(service.requests().iter().all(|line| !line.contains("unwind")), "nothing is asked for unsampled");

    view.send(Event::Sample(sample(1, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    let took = eventually("the table is placed", || no_table::reason(image()).is_none());
    assert!(took < Duration::from_secs(2), "{took:?}");
    let id = view.placed_id(image());
    let of_image: Vec<String> =
        service.requests().into_iter().filter(|line| line.contains(&id.to_string())).collect();
    let (get, put) = (format!("GET {id} unwind"), format!("PUT {id} skeleton"));
    assert_eq!(
        of_image,
        [format!("{get} 404"), format!("{put} 201"), format!("{get} 202"), format!("{get} 200")]
    );

    // The sample that came first arrives too, with the address as in the ELF file.
    eventually("the profile arrives", || !service.samples().is_empty());
    let bias = view.mapping(own_pid(), own_address()).unwrap().mapping.bias;
    let expect = format!("{:#x}@{id}", own_address() - bias);
    let summary = stop(agent);
    let shipped = service.samples();
    assert_eq!(shipped.len(), 1);
    assert_eq!((shipped[0].tid, shipped[0].stop.as_str()), (1, "table_pending"));
    assert_eq!(shipped[0].frames, [expect]);
    assert_eq!((summary.samples, summary.complete, summary.dropped_batches), (1, 0, 0));
    assert_eq!(summary.stop_reasons[&StopReason::TablePending], 1);
    assert!(summary.tables_loaded >= 1 && summary.tables_unavailable.is_empty(), "{summary:?}");

    // The next agent has the table on disk.
    let asked = service.requests().iter().filter(|line| **line == format!("{get} 200")).count();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    view.send(Event::Sample(sample(2, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    let image = || view.mapping(own_pid(), own_address()).unwrap().mapping.image;
    eventually("the cached table is placed", || no_table::reason(image()).is_none());
    stop(agent);
    assert_eq!(service.requests().iter().filter(|line| **line == format!("{get} 200")).count(), asked);
}

#[test]
fn images_that_the_process_may_run_into_follow() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    view.send(Event::Sample(sample(1, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    let pending = no_table::location(StopReason::TablePending);
    eventually("every image of the process has a table", || {
        let mappings = view.mappings(own_pid());
        mappings.len() > 2 && mappings.iter().all(|mapping| mapping.mapping.image != pending)
    });
    stop(agent);
}

#[test]
fn what_the_service_refuses_is_unavailable_with_its_reason() {
    let service = FakeService::start(Tables::Refused("no CFI in this image"));
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    view.send(Event::Sample(sample(1, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    let unavailable = no_table::location(StopReason::TableUnavailable);
    eventually("the refusal shows", || {
        view.mapping(own_pid(), own_address()).unwrap().mapping.image == unavailable
    });
    let summary = stop(agent);
    let own = std::env::current_exe().unwrap();
    let own = summary.tables_unavailable.iter().find(|(path, _)| *path == own.to_string_lossy());
    let (_, reason) = own.expect("this binary is named");
    assert!(reason.contains("no CFI in this image") && reason.contains("422"), "{reason}");
}

#[test]
fn an_image_for_which_the_service_fails_holds_no_other_up() {
    const IMAGES: u8 = 20;
    let service = FakeService::start(Tables::Failing);
    let cache = tempfile::tempdir().unwrap();
    // One image under many build-IDs, mapped by this process.
    let elf = std::fs::read("/usr/bin/readelf").unwrap();
    let id = windlass_agent::image::identify(&elf[..]).unwrap().id.build_id();
    let at = elf.windows(id.as_bytes().len()).position(|bytes| bytes == id.as_bytes()).unwrap();
    let images: Vec<_> = (0..IMAGES)
        .map(|number| {
            let mut elf = elf.clone();
            elf[at] ^= number + 1;
            let path = cache.path().join(format!("image{number}"));
            std::fs::write(&path, &elf).unwrap();
            let file = std::fs::File::open(&path).unwrap();
            // SAFETY: nobody writes to the file while the test runs.
            unsafe { memmap2::MmapOptions::new().map_exec(&file) }.unwrap()
        })
        .collect();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    let addresses: Vec<u64> = images.iter().map(|image| image.as_ptr() as u64 | EXACT_ADDRESS).collect();
    view.send(Event::Sample(sample(1, StopReason::TablePending, &addresses)));
    let failed = || {
        let mut requests: Vec<_> =
            service.requests().into_iter().filter(|line| line.ends_with("unwind 500")).collect();
        let all = requests.len();
        requests.sort();
        requests.dedup();
        (requests.len(), all)
    };
    let took = eventually("every image is asked for", || failed().0 >= usize::from(IMAGES));
    assert!(took < Duration::from_secs(2), "{took:?}");
    let begin = failed().1;
    std::thread::sleep(Duration::from_secs(1));
    let more = failed().1 - begin;
    assert!(more > 0, "each is asked for again");
    assert!(more < 8 * usize::from(IMAGES), "{more} requests in a second for {IMAGES} images");
    stop(agent);
}

#[test]
fn profiles_wait_for_a_service_that_is_away_and_arrive_in_order() {
    let service = FakeService::reserve();
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    for tid in 1..=5 {
        view.send(Event::Sample(sample(tid, StopReason::EndOfStack, &[own_address() | EXACT_ADDRESS])));
        // Longer than the ship interval, so that each is a batch of its own.
        std::thread::sleep(Duration::from_millis(250));
    }
    // An agent that stops meanwhile leaves them to the next.
    let summary = stop(agent);
    assert_eq!((summary.sent_batches, summary.dropped_batches), (0, 0));
    assert!(summary.spooled_batches >= 4, "{summary:?}");

    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    view.send(Event::Sample(sample(6, StopReason::EndOfStack, &[own_address() | EXACT_ADDRESS])));
    std::thread::sleep(Duration::from_millis(300));
    let service = service.open(Tables::FromSkeletons);
    eventually("all profiles arrive", || service.samples().len() >= 6);
    view.send(Event::Sample(sample(7, StopReason::EndOfStack, &[own_address() | EXACT_ADDRESS])));
    let summary = stop(agent);
    let tids: Vec<u32> = service.samples().iter().map(|sample| sample.tid).collect();
    assert_eq!(tids, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!((summary.spooled_batches, summary.dropped_batches), (0, 0), "{summary:?}");
}

#[test]
fn a_table_comes_when_the_network_comes_back() {
    let service = FakeService::reserve();
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    view.send(Event::Sample(sample(1, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    std::thread::sleep(Duration::from_secs(1));
    let image = || view.mapping(own_pid(), own_address()).unwrap().mapping.image;
    assert_eq!(image(), no_table::location(StopReason::TablePending));
    let _service = service.open(Tables::FromSkeletons);
    let took = eventually("the table is placed", || no_table::reason(image()).is_none());
    assert!(took < Duration::from_secs(2), "{took:?}");
    stop(agent);
}

/// This process maps code of a file.
fn mapped(start: u64, length: u64) -> Event {
    Event::Mapped { tgid: own_pid(), start, length, of_file: true, image: None, time_ns: now_ns() }
}

#[test]
fn processes_come_change_and_go() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();

    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let tgid = child.id();
    assert!(view.mappings(tgid).is_empty());
    view.send(Event::Exec { tgid, time_ns: now_ns() });
    eventually("the child is read", || view.mappings(tgid).len() > 2);
    // A fork has its parent's mappings, without a look into /proc.
    view.send(Event::Forked { tgid: u32::MAX - 1, parent: tgid, time_ns: now_ns() });
    eventually("the fork is known", || view.mappings(u32::MAX - 1) == view.mappings(tgid));
    child.kill().unwrap();
    child.wait().unwrap();
    view.send(Event::Exited { tgid });
    let took = eventually("the child is forgotten", || view.mappings(tgid).is_empty());
    assert!(took > Duration::from_secs(1), "its last samples may be on their way: {took:?}");

    // A library that this process loads.
    let file = std::fs::File::open("/usr/bin/readelf").unwrap();
    let before = view.mappings(own_pid()).len();
    // SAFETY: nobody writes to the file while the test runs.
    let library = unsafe { memmap2::MmapOptions::new().map_exec(&file) }.unwrap();
    let start = library.as_ptr() as u64;
    assert!(view.mapping(own_pid(), start).is_none());
    let length = library.len() as u64;
    view.send(mapped(start, length));
    eventually("the library is known", || view.mapping(own_pid(), start).is_some());
    drop(library);
    // A sample that found no mapping has the process read again.
    view.send(Event::Sample(sample(1, StopReason::NoMapping, &[start | EXACT_ADDRESS])));
    eventually("the library is gone", || view.mapping(own_pid(), start).is_none());
    assert!(view.mappings(own_pid()).len() <= before + 1);
    stop(agent);
}

/// Maps a page of a program's code: over `at`, or anywhere.
fn map_code(path: &str, at: Option<u64>) -> u64 {
    use object::{Object as _, ObjectSection as _};
    use std::os::fd::AsRawFd as _;
    let bytes = std::fs::read(path).unwrap();
    let elf = object::File::parse(&bytes[..]).unwrap();
    let (text_offset, _) = elf.section_by_name(".text").unwrap().file_range().unwrap();
    let offset = text_offset as i64 & !4095;
    let file = std::fs::File::open(path).unwrap();
    let (hint, fixed) = at.map_or((std::ptr::null_mut(), 0), |at| (at as *mut _, libc::MAP_FIXED));
    let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | fixed);
    // SAFETY: what it may replace is a mapping of this test's own, to which nothing refers.
    let start = unsafe { libc::mmap(hint, 4096, protection, flags, file.as_raw_fd(), offset) };
    assert_ne!(start, libc::MAP_FAILED);
    start as u64
}

#[test]
fn samples_of_replaced_mappings_get_no_names() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let start = map_code("/usr/bin/readelf", None);
    let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    let old = view.generation(own_pid());
    let walked = |tid, generation| {
        let mut sample = sample(tid, StopReason::EndOfStack, &[(start + 0x100) | EXACT_ADDRESS]);
        (sample.time_ns, sample.generation) = (now_ns(), generation);
        Event::Sample(sample)
    };
    view.send(walked(1, old));
    // Many a library comes and goes elsewhere, so that the pauses between scans are long.
    for _ in 0..100 {
        view.send(mapped(0x1000, 4096));
        std::thread::sleep(Duration::from_millis(10));
    }
    // By now with a table, which changes nothing for the sample below.
    let known = view.generation(own_pid());
    map_code("/usr/bin/objdump", Some(start));
    view.send(mapped(start, 4096));
    // Walked before the agent knew.
    view.send(walked(2, old));
    let took = eventually("the mappings are read again", || {
        view.generation(own_pid()) > known && view.mapping(own_pid(), start).is_some()
    });
    assert!(took < Duration::from_millis(300), "{took:?}");
    view.send(walked(3, view.generation(own_pid())));
    eventually("the samples arrive", || service.samples().len() == 3);
    stop(agent);
    let samples = service.samples();
    let of = |tid| samples.iter().find(|sample| sample.tid == tid).unwrap();
    assert!(!of(1).frames[0].ends_with('@'), "{:?}", (of(1).tid, of(1).stop.as_str(), &of(1).frames));
    assert!(!of(3).frames[0].ends_with('@'), "{:?}", (of(3).tid, of(3).stop.as_str(), &of(3).frames));
    assert_ne!(of(1).frames, of(3).frames);
    assert_eq!(of(2).frames, [format!("{:#x}@", start + 0x100)]);
    let stops = [1, 2, 3].map(|tid| of(tid).stop.as_str());
    assert_eq!(stops, ["end_of_stack", "mappings_changed", "end_of_stack"]);
}

#[test]
fn only_the_selected_process_and_its_children_count() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let mut config = config(&service, &cache);
    config.only_pid = Some(child.id());
    let agent = Agent::start_with_backend(config, Box::new(backend)).unwrap();
    assert!(!view.mappings(child.id()).is_empty());
    assert!(view.mappings(own_pid()).is_empty());
    // Its tables are asked for ahead of any sample.
    let pending = no_table::location(StopReason::TablePending);
    eventually("tables come unasked", || {
        view.mappings(child.id()).iter().all(|mapping| mapping.mapping.image != pending)
    });
    view.send(Event::Sample(sample(1, StopReason::EndOfStack, &[own_address() | EXACT_ADDRESS])));
    let mut counted = sample(2, StopReason::EndOfStack, &[]);
    counted.tgid = child.id();
    view.send(Event::Sample(counted));
    let summary = stop(agent);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((summary.samples, summary.complete), (1, 1));
    assert_eq!(service.samples().iter().map(|sample| sample.tid).collect::<Vec<_>>(), [2]);
}

#[test]
fn only_chosen_processes_count() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let start = |argument: &str| std::process::Command::new("sleep").arg(argument).spawn().unwrap();
    let mut children = [start("61"), start("62")];
    for (include, exclude, expect) in [
        (&["command=sleep"] as &[&str], &[] as &[&str], [false, true]),
        (&[], &["command=*/sleep"], [true, false]),
        (&["command=sleep", "cgroup=*"], &["uid=0-4294967295"], [false, false]),
    ] {
        let (backend, view) = FakeBackend::new();
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let mut config = config(&service, &cache);
        config.choice = Choice { include: rules(include), exclude: rules(exclude) };
        let agent = Agent::start_with_backend(config, Box::new(backend)).unwrap();
        let known = [own_pid(), children[0].id()].map(|tgid| !view.mappings(tgid).is_empty());
        assert_eq!(known, expect, "walked");
        view.send(Event::Sample(sample(1, StopReason::EndOfStack, &[])));
        let mut of_child = sample(2, StopReason::EndOfStack, &[]);
        of_child.tgid = children[1].id();
        view.send(Event::Sample(of_child));
        let counted = stop(agent).samples;
        assert_eq!(counted, expect.iter().filter(|counts| **counts).count() as u64, "counted");
    }
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn samples_say_whose_they_are_and_come_in_the_coding_asked_for() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let mut child = std::process::Command::new("sleep");
    let child = child.arg("60").env("OTEL_SERVICE_NAME", "till");
    let mut child = child.env("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=shop").spawn().unwrap();
    let mut config = config(&service, &cache);
    config.compression = Compression::Gzip;
    config.host_name = Some("alpha".to_owned());
    let agent = Agent::start_with_backend(config, Box::new(backend)).unwrap();
    let id = agent.agent_id().to_owned();
    let environment = format!("/proc/{}/environ", child.id());
    eventually("the child's exec is over", || !std::fs::read(&environment).unwrap().is_empty());
    view.send(Event::Sample(sample(1, StopReason::EndOfStack, &[own_address() | EXACT_ADDRESS])));
    let mut of_child = sample(2, StopReason::EndOfStack, &[]);
    (of_child.tgid, of_child.cpu) = (child.id(), 5);
    view.send(Event::Sample(of_child));
    stop(agent);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(service.requests().contains(&"POST profiles gzip 200".to_owned()), "{:?}", service.requests());
    let samples = service.samples();
    let of = |tid| samples.iter().find(|sample| sample.tid == tid).unwrap();
    for sample in &samples {
        for expect in ["host.name=alpha", "os.type=linux", &format!("windlass.agent.id={id}")] {
            assert!(sample.resource.iter().any(|attribute| attribute == expect), "{:?}", sample.resource);
        }
    }
    assert_eq!(of(2).cpu, 5);
    let stated =
        |tid| -> Vec<_> { of(tid).resource.iter().filter(|it| it.starts_with("service.")).collect() };
    assert_eq!(stated(2), ["service.name=till", "service.namespace=shop"]);
    assert_ne!(stated(1), stated(2));
}

#[test]
fn kernel_symbols_are_sent_once() {
    let Ok(kernel) = windlass_agent::kallsyms::KernelImage::read() else {
        eprintln!("skipped: kernel addresses are hidden here");
        return;
    };
    let id = kernel.build_id().unwrap();
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let (backend, _view) = FakeBackend::new();
        let agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
        let symbols = || service.requests().iter().filter(|line| line.contains("kallsyms")).count();
        eventually("the symbols arrive", || symbols() > 0);
        std::thread::sleep(Duration::from_millis(200));
        stop(agent);
    }
    let sent: Vec<_> = service
        .requests()
        .into_iter()
        .filter(|line| line.starts_with("PUT") && line.contains("kallsyms"))
        .collect();
    assert_eq!(sent, [format!("PUT {id} kallsyms 201")]);
    let text = service.artefact(&format!("{id} kallsyms")).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.lines().count() > 1000);
    assert!(text.lines().any(|line| line == "ffffffff81000000 T _text"));
}

#[test]
fn a_start_that_cannot_be_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    let start = |change: &dyn Fn(&mut Config)| {
        let mut config = Config::new("http://127.0.0.1:1", cache.path());
        change(&mut config);
        Agent::start_with_backend(config, Box::new(FakeBackend::new().0)).map(stop).unwrap_err().to_string()
    };
    assert!(start(&|config| config.server = "localhost:8002".to_owned()).contains("localhost:8002"));
    assert!(start(&|config| config.frequency_hz = 0).contains("0 Hz"));
    assert!(start(&|config| config.cache_dir = "/proc/no".into()).contains("/proc/no"));
}

/// A process whose agent has ended would be kept for one that samples.
#[test]
fn the_end_of_its_thread_is_told() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (backend, view) = FakeBackend::new();
    let mut agent = Agent::start_with_backend(config(&service, &cache), Box::new(backend)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut ends =
        |within| runtime.block_on(async { tokio::time::timeout(within, agent.ended()).await.is_ok() });
    assert!(!ends(Duration::from_millis(50)));
    view.break_down();
    assert!(ends(Duration::from_secs(10)));
    assert!(agent.stop().is_err());
}
