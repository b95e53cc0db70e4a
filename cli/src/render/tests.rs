//! What every view must get right, on profiles small enough to count by hand, and on hostile ones.

use std::collections::BTreeMap;

use windlass_schema::pprof::{Label, Line, Location, Profile, Sample};

use super::synthetic::{KALLSYMS, MAIN, Random, Thread, Writer, realistic};
use super::*;

const CUT: Thread<'_> = Thread { stop: "no_cfi", ..MAIN };

#[track_caller]
fn check_function(profile: &StackProfile, name: &str, expect: (u64, u64, Option<u32>)) {
    let rows = profile.functions();
    let found: Vec<_> =
        rows.iter().filter(|row| row.function == name).map(|row| (row.own, row.total, row.line)).collect();
    assert_eq!(found, [expect], "{name} in {rows:#?}");
}

/// main calls sort (twice recursive), which has `less` inlined; the kernel below read; one cut stack.
fn small() -> StackProfile {
    let mut writer = Writer::new();
    let main = writer.location("/usr/bin/app", 0x10, &["main@app.rs:5"]);
    let sort = writer.location("/usr/bin/app", 0x20, &["sort@sort.rs:30"]);
    let leaf = writer.location("/usr/bin/app", 0x30, &["less@cmp.rs:9", "sort@sort.rs:33"]);
    let hot = writer.location("/usr/bin/app", 0x40, &["sort@sort.rs:40"]);
    let read = writer.location("/usr/lib/libc.so.6", 0x50, &["read"]);
    let kernel = writer.location(KALLSYMS, 0xffff_ffff_8000_0000, &["vfs_read"]);
    let bare = writer.location("/opt/libx.so", 0x1234, &[]);
    writer.sample(MAIN, &[leaf, sort, sort, main], 6);
    writer.sample(MAIN, &[hot, main], 3);
    writer.sample(MAIN, &[kernel, read, main], 2);
    writer.sample(CUT, &[bare, sort], 1);
    writer.sample(Thread { pid: 200, tid: 201, name: "other", stop: "kernel_thread" }, &[kernel], 4);
    StackProfile::from_pprof(&writer.profile)
}

#[test]
fn recursion_counts_once_and_inlined_frames_count_as_functions() {
    let profile = small();
    check_function(&profile, "sort", (3, 10, Some(40)));
    check_function(&profile, "less", (6, 6, Some(9)));
    check_function(&profile, "main", (0, 11, Some(5)));
    check_function(&profile, "vfs_read", (6, 6, None));
    check_function(&profile, "libx.so+0x1234", (1, 1, None));
    let order: Vec<_> = profile.functions().into_iter().map(|row| row.function).collect();
    assert_eq!(order, ["less", "vfs_read", "sort", "libx.so+0x1234", "main", "read"]);
}

#[test]
fn line_of_a_function_without_own_samples_is_its_hottest() {
    let mut writer = Writer::new();
    let leaf = writer.location("a", 1, &["leaf@l.c:1"]);
    let [first, second] = [7, 9].map(|line| writer.location("a", line, &[&format!("caller@c.c:{line}")]));
    writer.sample(MAIN, &[leaf, first], 2);
    writer.sample(MAIN, &[leaf, second], 5);
    check_function(&StackProfile::from_pprof(&writer.profile), "caller", (0, 7, Some(9)));
}

#[test]
fn summary_counts_reasons_and_only_real_ends_as_complete() {
    let mut summary = small().summary();
    assert_eq!((summary.samples, summary.complete), (16, 15));
    let expect = [("end_of_stack", 11), ("kernel_thread", 4), ("no_cfi", 1)];
    assert_eq!(summary.stop_reasons, BTreeMap::from(expect.map(|(name, count)| (name.to_owned(), count))));

    let mut writer = Writer::new();
    writer.call(Thread { stop: "", ..MAIN }, &["f"], 2);
    writer.call(Thread { stop: "[made up]", ..MAIN }, &["f"], 3);
    summary = StackProfile::from_pprof(&writer.profile).summary();
    assert_eq!(summary.complete, 0);
    assert_eq!(summary.stop_reasons, BTreeMap::from([("not_recorded".into(), 2), ("[made up]".into(), 3)]));
}

#[test]
fn one_process_is_told_from_the_others() {
    let profile = small();
    assert_eq!(profile.only_pid(200).summary().samples, 4);
    assert_eq!(profile.only_pid(100).summary().complete, 11);
    assert_eq!(profile.only_pid(300).functions(), []);
    assert_eq!(folded(&profile.only_pid(200)), "other;vfs_read 4\n");
}

#[test]
fn folded_stacks_put_cut_ones_under_their_reason() {
    let expect = "\
app;[no_cfi];sort;libx.so+0x1234 1
app;main;read;vfs_read 2
app;main;sort 3
app;main;sort;sort;sort;less 6
other;vfs_read 4
";
    assert_eq!(folded(&small()), expect);
}

#[test]
fn a_process_is_called_as_its_main_thread() {
    let mut writer = Writer::new();
    writer.call(Thread { tid: 101, name: "busy-worker", ..MAIN }, &["f"], 50);
    writer.call(MAIN, &["f"], 1);
    writer.call(Thread { pid: 7, tid: 8, name: "w1", ..MAIN }, &["f"], 1);
    writer.call(Thread { pid: 7, tid: 9, name: "w2", ..MAIN }, &["f"], 2);
    assert_eq!(folded(&StackProfile::from_pprof(&writer.profile)), "app;f 51\nw2;f 3\n");
}

#[test]
fn same_name_without_file_in_two_images_is_two_functions() {
    let mut writer = Writer::new();
    let ours = writer.location("/lib/libc.so.6", 1, &["memcpy"]);
    let kernel = writer.location(KALLSYMS, 2, &["memcpy"]);
    writer.sample(MAIN, &[ours], 1);
    writer.sample(MAIN, &[kernel, ours], 2);
    let rows = StackProfile::from_pprof(&writer.profile).functions();
    let images: Vec<_> = rows.iter().map(|row| (row.image.as_deref(), row.own, row.total)).collect();
    assert_eq!(images, [(Some(KALLSYMS), 2, 2), (Some("libc.so.6"), 1, 3)]);
}

#[test]
fn an_address_in_words_is_not_a_name() {
    let mut writer = Writer::new();
    let described =
        [("/lib/libc.so.6", "libc.so.6+0x1234"), ("", "0x1234"), ("/lib/libc.so.6", "libc.so.6!0x1234")];
    let real = [
        ("/lib/libc.so.6", "libc.so.6+0x1235"),
        ("/lib/libc.so.6", "other+0x999"),
        ("/lib/libc.so.6", "f0x1234"),
        ("/lib/x.so", "g@g.c:1"),
    ];
    let locations =
        described.iter().chain(&real).map(|(image, name)| writer.location(image, 0x1234, &[name]));
    let locations: Vec<u64> = locations.collect();
    writer.sample(MAIN, &locations, 1);
    let profile = StackProfile::from_pprof(&writer.profile);
    let kinds =
        profile.stacks[0].frames.iter().rev().map(|frame| profile.symbols.function(frame.function).kind);
    let kinds: Vec<bool> = kinds.map(|kind| kind == super::symbol::Kind::Unresolved).collect();
    assert_eq!(kinds, [true, true, true, false, false, false, false]);
    check_function(&profile, "libc.so.6+0x1234", (1, 1, None));
    check_function(&profile, "[unknown]+0x1234", (0, 1, None));
}

#[test]
fn addresses_of_one_function_without_a_name_are_one_node() {
    const LIBC: &str = "/lib/libc.so.6";
    let mut writer = Writer::new();
    let main = writer.location("/usr/bin/app", 0x10, &["main@app.rs:5"]);
    let walk: Vec<u64> =
        [0x1200, 0x1234, 0x12ff].map(|at| writer.location(LIBC, at, &["libc.so.6+0x1200"])).into();
    writer.sample(MAIN, &[walk[1], walk[0], main], 1);
    writer.sample(MAIN, &[walk[2], walk[1], walk[2], main], 2);
    let profile = StackProfile::from_pprof(&writer.profile);
    let name = "libc.so.6+0x1200";
    assert_eq!(folded(&profile), format!("app;main;{name};{name} 1\napp;main;{name};{name};{name} 2\n"));
    check_function(&profile, name, (3, 3, None));
    let kinds: Vec<_> = profile.symbols.functions().filter(|function| function.name == name).collect();
    let [function] = kinds[..] else { panic!("one function: {kinds:?}") };
    assert_eq!(
        (function.kind, function.image.as_deref()),
        (super::symbol::Kind::Unresolved, Some("libc.so.6"))
    );
    assert_eq!(call_tree::CallTree::new(&profile).nodes.len(), 5, "the process, main, and one node a level");
}

#[test]
fn table_fits_and_cuts_in_the_middle() {
    let expect = "
 self%  self  total%  total  function        file:line
 37.5%     6   37.5%      6  less            cmp.rs:9
 37.5%     6   37.5%      6  vfs_read        [kernel.kallsyms]
 18.8%     3   62.5%     10  sort            sort.rs:40
  6.2%     1    6.2%      1  libx.so+0x1234  libx.so
";
    assert_eq!(table(&small(), 4, 100), expect[1..]);

    let profile = StackProfile::from_pprof(&realistic(500, 1));
    for width in 48..160 {
        let text = table(&profile, 30, width);
        assert_eq!(text.lines().count(), 31);
        let longest = text.lines().map(|line| line.chars().count()).max();
        assert!(longest <= Some(width), "{longest:?} > {width}:\n{text}");
    }
    for width in [0, 1, 20] {
        assert!(table(&profile, 5, width).lines().all(|line| line.chars().count() < 60));
    }
}

#[test]
fn tree_collapses_chains_marks_inlined_frames_and_keeps_cut_stacks_apart() {
    let expect = "\
total%   self%
100.0%          all
 75.0%          ├─ app
 68.8%          │  ├─ main
 56.2%   18.8%  │  │  ├─ sort
 37.5%   37.5%  │  │  │  └─ sort › sort › less [inlined]
 12.5%   12.5%  │  │  └─ read › vfs_read
  6.2%    6.2%  │  └─ [no_cfi] › sort › libx.so+0x1234
 25.0%   25.0%  └─ other › vfs_read
";
    assert_eq!(tree(&small(), 0.0, 20, 100), expect);
    let expect = "\
total%   self%
100.0%          all
 75.0%          ├─ app › main …
 25.0%   25.0%  └─ other › vfs_read
";
    assert_eq!(tree(&small(), 10.0, 1, 100), expect);
}

#[test]
fn tree_fits_its_width_and_shows_the_end_of_a_long_chain() {
    let mut writer = Writer::new();
    let names: Vec<String> =
        (0..3000).rev().map(|depth| format!("crate::module::function_{depth}")).collect();
    writer.call(MAIN, &names.iter().map(String::as_str).collect::<Vec<_>>(), 1);
    let text = tree(&StackProfile::from_pprof(&writer.profile), 0.5, 10, 100);
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    assert!(text.trim_end().ends_with("2998 more › crate::module::function_2999"), "{text}");

    let profile = StackProfile::from_pprof(&realistic(3000, 2));
    for width in [60, 80, 120] {
        let text = tree(&profile, 1.0, 6, width);
        assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
    }
}

/// What the page embeds, read back.
fn embedded(page: &str) -> serde_json::Value {
    let (_, rest) = page
        .split_once("<script type=\"application/json\" id=\"profile\">")
        .expect("the page has its profile");
    serde_json::from_str(rest.split_once("</script>").expect("scripts end").0).expect("the profile is JSON")
}

fn column(graph: &serde_json::Value, table: &str, column: &str) -> Vec<u64> {
    let values = graph[table][column].as_array().expect("a column");
    values.iter().map(|value| value.as_u64().expect("a number")).collect()
}

/// Checks a page's nodes: parents first, sums that agree with the summary; returns the total by name.
fn node_totals(graph: &serde_json::Value) -> BTreeMap<String, u64> {
    let parents = column(graph, "nodes", "parent");
    let functions = column(graph, "nodes", "function");
    let mut totals = column(graph, "nodes", "own");
    for node in (1..totals.len()).rev() {
        let parent = parents[node] as usize;
        assert!(parent < node);
        totals[parent] += totals[node];
    }
    assert_eq!(totals[0], graph["samples"].as_u64().expect("the page has it"));
    let names = column(graph, "functions", "name");
    let mut by_name = BTreeMap::new();
    for (function, total) in functions.iter().zip(totals) {
        let name = graph["strings"][names[*function as usize] as usize].as_str().expect("the page has it");
        *by_name.entry(name.to_owned()).or_default() += total;
    }
    by_name
}

#[test]
fn page_holds_the_same_numbers() {
    let graph = embedded(&html(&small(), "a title"));
    assert_eq!(graph["title"], "a title");
    assert_eq!((graph["samples"].as_u64(), graph["complete"].as_u64()), (Some(16), Some(15)));
    assert_eq!(graph["stops"][0]["reason"], "end_of_stack");
    let totals = node_totals(&graph);
    assert_eq!((totals["all"], totals["app"], totals["[no_cfi]"], totals["less"]), (16, 12, 1, 6));
    assert_eq!(totals["sort"], 9 + 6 + 6 + 1, "each node of a recursion is drawn");
    let strings = graph["strings"].as_array().expect("a list");
    let name = strings.iter().position(|text| text == "sort").expect("a name") as u64;
    let names = column(&graph, "functions", "name");
    let sort = names.iter().position(|string| *string == name).expect("a function");
    let counts = ["own", "total", "line"].map(|key| column(&graph, "functions", key)[sort]);
    assert_eq!(counts, [3, 10, 40]);
}

#[test]
fn page_asks_for_nothing_outside_itself() {
    let page = html(&small(), "t");
    assert!(page.contains("default-src 'none'"));
    for reach in ["http:", "https:", "src=\"", "@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML"] {
        assert!(!page.contains(reach), "{reach}");
    }
    assert!(!page.contains("{{"));
}

#[test]
fn a_page_over_its_limit_sums_up_the_smallest_nodes() {
    let profile = StackProfile::from_pprof(&realistic(3000, 3));
    let whole = embedded(&super::html::page(&profile, "", usize::MAX));
    let limited = embedded(&super::html::page(&profile, "", 50));
    let nodes = column(&limited, "nodes", "own").len();
    assert!((50..=100).contains(&nodes), "{nodes}");
    let (whole, limited) = (node_totals(&whole), node_totals(&limited));
    assert_eq!((whole["checkout"], whole["main"]), (limited["checkout"], limited["main"]));
    assert!(limited["[smaller calls]"] > 0);
}

/// Names that would break out of where they are put, each as a process, a stop reason and a function.
fn hostile_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "</script><script>document.title = 'broken out'</script>",
        "<!--<script>",
        "<img src=x onerror=\"document.title = 'broken out'\">",
        "a;b",
        "new\nline\r\ttab",
        "\"quotes\" 'and' \\backslash",
        "\u{1b}[31mred\u{202e}desrever",
        "{{profile}}&amp;",
        "nul\0byte",
        "constructor",
        "__proto__",
    ]
    .map(str::to_owned)
    .into();
    names.push("x".repeat(10_000));
    names
}

fn hostile() -> StackProfile {
    let mut writer = Writer::new();
    for (pid, name) in (1..).zip(&hostile_names()) {
        writer.call(Thread { pid, tid: pid, name, stop: name }, &[name], 1);
    }
    StackProfile::from_pprof(&writer.profile)
}

#[test]
fn hostile_names_stay_text() {
    let profile = hostile();
    let hostile = hostile_names();
    let page = html(&profile, &hostile[0]);
    let ends = [super::html::PAGE, &page].map(|text| text.to_lowercase().matches("</script").count());
    assert_eq!(ends[0], ends[1], "a name ended the script");
    let totals = node_totals(&embedded(&page));
    for name in &hostile {
        assert_eq!(totals[name], 2, "{name:?}, as a process and as a function");
    }

    let folded = folded(&profile);
    assert_eq!(folded.lines().count(), hostile.len());
    assert!(folded.lines().all(|line| line.matches(';').count() == 2), "{folded}");
    assert!(folded.contains(";a:b 1\n") && folded.contains(";new line  tab 1\n"));
    for text in [table(&profile, 20, 80), tree(&profile, 0.0, 9, 80)] {
        assert!(!text.contains(['\u{1b}', '\u{202e}', '\r', '\t']));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}

#[test]
fn bad_indices_are_unknown_and_nothing_else() {
    let mut writer = Writer::new();
    let good = writer.location("/bin/app", 1, &["good@g.c:1"]);
    writer.sample(MAIN, &[999, good], 1);
    let mut profile = writer.profile;
    let line = |function_id, line| Line { function_id, line, column: 0 };
    profile.location.push(Location { id: 50, mapping_id: 77, address: 0x99, ..Location::default() });
    profile.location.push(Location { id: 51, line: vec![line(88, -4)], ..Location::default() });
    profile.location.push(Location { id: 52, ..Location::default() });
    profile.sample.push(Sample {
        location_id: vec![50, 51, 52],
        value: vec![],
        label: vec![Label { key: -1, str: i64::MAX, num: i64::MIN, num_unit: 3 }],
    });
    profile.sample.push(Sample { location_id: vec![good], value: vec![-5], label: vec![] });
    let stacks = StackProfile::from_pprof(&profile);
    assert_eq!(stacks.summary().samples, 2);
    let expect = "app;[not_recorded];[unknown];[unknown];[unknown]+0x99 1\napp;good;[unknown] 1\n";
    assert_eq!(folded(&stacks), expect);
}

#[test]
fn counts_at_the_limit_do_not_overflow() {
    let mut writer = Writer::new();
    for function in ["a", "b", "a", "c"] {
        writer.call(MAIN, &["leaf", function, function], i64::MAX);
    }
    let profile = StackProfile::from_pprof(&writer.profile);
    assert_eq!(profile.summary().samples, u64::MAX);
    let _ = (table(&profile, 9, 80), tree(&profile, 0.0, 9, 80), folded(&profile), html(&profile, ""));
}

#[test]
fn a_stack_without_bound_is_cut_and_says_so() {
    let mut writer = Writer::new();
    let frames: Vec<String> = (0..5000).map(|depth| format!("f{depth}")).collect();
    let frames: Vec<&str> = frames.iter().map(String::as_str).collect();
    let location = writer.location("/bin/app", 1, &frames);
    writer.sample(MAIN, &vec![location; 100_000], 1);
    let profile = StackProfile::from_pprof(&writer.profile);
    assert_eq!(profile.summary().stop_reasons, BTreeMap::from([("frame_limit".to_owned(), 1)]));
    assert_eq!(profile.summary().complete, 0);
    let (_, stack) = folded(&profile)
        .split_once(";[frame_limit];")
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .expect("it ends so");
    assert!(stack.ends_with(";f1;f0 1\n"), "the innermost frames are kept");
}

#[test]
fn an_empty_profile_is_shown_as_empty() {
    let profile = StackProfile::from_pprof(&Profile::default());
    assert_eq!(profile.functions(), []);
    assert_eq!(profile.summary().samples, 0);
    assert_eq!(folded(&profile), "");
    assert_eq!(table(&profile, 10, 80).lines().count(), 1);
    assert_eq!(tree(&profile, 1.0, 10, 80).lines().count(), 2);
    assert_eq!(embedded(&html(&profile, ""))["samples"], 0);
}

/// Random indices everywhere: whatever comes in, every view comes out.
#[test]
fn random_profiles_never_panic() {
    for seed in 0..100 {
        let mut random = Random::new(seed * 7919 + 13);
        let mut profile = realistic(20, seed);
        let strings = profile.string_table.len();
        let mut index = |limit: usize| random.below(limit + 3) as i64 - 1;
        for function in &mut profile.function {
            (function.name, function.filename) = (index(strings), index(strings));
        }
        for location in &mut profile.location {
            (location.mapping_id, location.address) = (index(6) as u64, index(1 << 20) as u64);
            for line in &mut location.line {
                (line.function_id, line.line) = (index(20) as u64, index(1 << 20) << 30);
            }
        }
        for sample in &mut profile.sample {
            sample.value = vec![index(4); index(2).max(0) as usize];
            for label in &mut sample.label {
                (label.key, label.str, label.num) = (index(strings), index(strings), index(1 << 20));
            }
            for id in &mut sample.location_id {
                *id = index(60) as u64;
            }
        }
        let stacks = StackProfile::from_pprof(&profile);
        let summary = stacks.summary();
        assert_eq!(summary.stop_reasons.values().sum::<u64>(), summary.samples);
        assert_eq!(
            stacks.functions().iter().map(|row| row.own).sum::<u64>(),
            summary.samples - empty(&stacks)
        );
        node_totals(&embedded(&html(&stacks, "t")));
        let _ = (table(&stacks, 50, 80), tree(&stacks, 0.0, 50, 80));
        let folded = folded(&stacks);
        let counts = folded.lines().map(|line| line.rsplit(' ').next().expect("a line ends with one"));
        let sum: u64 = counts.map(|count| count.parse::<u64>().expect("a number")).sum();
        assert_eq!(sum, summary.samples);
    }
}

/// Samples of stacks without a frame.
fn empty(profile: &StackProfile) -> u64 {
    profile.stacks.iter().filter(|stack| stack.frames.is_empty()).map(|stack| stack.count).sum()
}

/// Pages to open in a browser: `WINDLASS_PAGES=FOLDER cargo test -p windlass pages_to_look_at`.
#[test]
fn pages_to_look_at() {
    let temporary = tempfile::tempdir().expect("a folder of its own");
    let asked_for = std::env::var_os("WINDLASS_PAGES").map(std::path::PathBuf::from);
    let folder = asked_for.as_deref().unwrap_or(temporary.path());
    let profile = StackProfile::from_pprof(&realistic(4000, 11));
    let stacks = if asked_for.is_some() { 60_000 } else { 600 };
    let big = StackProfile::from_pprof(&realistic(stacks, 5));
    for (name, content) in [
        ("page.html", html(&profile, "checkout-7f9c, 30 s at 19 Hz")),
        ("big.html", html(&big, &format!("{stacks} stacks"))),
        ("empty.html", html(&StackProfile::default(), "nothing")),
        ("hostile.html", html(&hostile(), &hostile_names()[0])),
        ("page.txt", table(&profile, 20, 120) + "\n" + &tree(&profile, 2.0, 6, 120)),
    ] {
        std::fs::write(folder.join(name), content).expect("a folder of its own");
    }
    for page in ["page.html", "big.html", "empty.html", "hostile.html"] {
        let text = std::fs::read_to_string(folder.join(page)).expect("a folder of its own");
        assert!(text.trim_end().ends_with("</html>"), "{page} is whole");
    }
}

#[test]
fn one_pid_on_two_hosts_is_two_processes() {
    let names = |hosts: [&str; 2]| {
        let mut writer = Writer::new();
        let location = writer.location("/bin/app", 1, &["work@app.c:1"]);
        for (host, name) in hosts.into_iter().zip(["app", "db"]) {
            writer.sample(Thread { name, ..MAIN }, &[location], 1);
            writer.on_host(host);
        }
        let profile = StackProfile::from_pprof(&writer.profile);
        let mut lines: Vec<_> = folded(&profile).lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(names(["alpha", "beta"]), ["app on alpha;work 1", "db on beta;work 1"]);
    // One process of one host, that has changed its name.
    assert_eq!(names(["alpha", "alpha"]), ["db;work 2"]);
}
