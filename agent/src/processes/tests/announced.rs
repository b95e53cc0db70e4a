//! What events alone tell of mappings, and what they do not.

use super::*;

/// What the kernel says when `tgid` maps what it has, in the order in which it was mapped.
fn announced(tgid: u32, mappings: &[ExecutableMapping], time_ns: u64) -> Vec<Event> {
    let event = |mapping: &ExecutableMapping| {
        let path = &*mapping.module.path;
        let build_id = mapping.module.id.filter(|_| path != "[vdso]").map(|id| id.build_id());
        let backing = crate::proc_maps::backing(path.as_bytes());
        let image = MappedImage { build_id, file_offset: mapping.module.file_offset, backing };
        Event::Mapped {
            tgid,
            start: mapping.start,
            length: mapping.end - mapping.start,
            of_file: build_id.is_some(),
            image: Some(Box::new(image)),
            time_ns,
        }
    };
    mappings.iter().map(event).collect()
}

#[test]
fn images_that_are_known_are_walked_without_a_look_into_proc() {
    let (child, now) = (Idle::start(), Instant::now());
    let (mut told, mut processes) = (Told::default(), processes(child.id(), now));
    processes.scan_all(&mut told);
    let mappings = processes.known[&child.id()].mappings.clone();
    // A process that there is not runs the same program.
    let tgid = u32::MAX - 1;
    processes.note(&Event::Forked { tgid, parent: child.id(), time_ns: monotonic_ns() }, &mut told, now);
    processes.note(&Event::Exec { tgid, time_ns: monotonic_ns() }, &mut told, now);
    assert!(!told.processes.contains_key(&tgid), "nothing of before the exec holds");
    let events = announced(tgid, &mappings, 0).len();
    for number in 0..events {
        let event = announced(tgid, &mappings, monotonic_ns()).swap_remove(number);
        processes.note(&event, &mut told, now);
    }
    processes.scan_due(&mut told, now);
    assert_eq!(told.processes[&tgid], told.processes[&child.id()]);
    assert_eq!(
        told.set.iter().filter(|set| **set == tgid).count(),
        2,
        "as a fork, and once for all mappings"
    );
    let generation = told.generation;
    assert!(processes.mappings_of(&sample(tgid, generation, monotonic_ns())).is_some());
    processes.scan_due(&mut told, now + 100 * MS);
    assert_eq!(processes.next_due(now), None, "nothing is left to read");

    // A sample that went by less asks for nothing; one that went by all of it does.
    let lacking =
        |generation| Event::Sample(Sample { stop: StopReason::NoMapping, ..sample(tgid, generation, 1) });
    processes.note(&lacking(0), &mut told, now);
    assert_eq!(processes.next_due(now), None);
    processes.note(&lacking(generation), &mut told, now);
    assert_eq!(processes.next_due(now), Some(Duration::ZERO));
    processes.scan_due(&mut told, now);

    // The same again is nothing new; another image in its place is.
    processes.note(&announced(tgid, &mappings, monotonic_ns())[0], &mut told, now);
    processes.scan_due(&mut told, now);
    let (generation, placed) = (told.generation, told.processes[&tgid].clone());
    let other = ExecutableMapping {
        content: mappings[1].content.clone(),
        module: mappings[1].module.clone(),
        ..mappings[0]
    };
    let event = announced(tgid, &[other], monotonic_ns()).swap_remove(0);
    processes.note(&event, &mut told, now);
    let of_before = sample(tgid, generation, monotonic_ns());
    assert!(processes.mappings_of(&of_before).is_none(), "it was walked by what is gone");
    processes.scan_due(&mut told, now);
    assert!(processes.mappings_of(&of_before).is_none());
    assert!(processes.mappings_of(&sample(tgid, told.generation, monotonic_ns())).is_some());
    let start_of = |placed: &PlacedMapping| (placed.start, placed.mapping.bias);
    assert_eq!(told.processes[&tgid].len(), placed.len());
    assert_ne!(start_of(&told.processes[&tgid][0]), start_of(&placed[0]));
    assert_eq!(
        told.processes[&tgid][1..].iter().map(start_of).collect::<Vec<_>>(),
        placed[1..].iter().map(start_of).collect::<Vec<_>>()
    );

    // Of an image that is not known only that it is another one can be told.
    let mut event = event;
    if let Event::Mapped { image: Some(image), time_ns, .. } = &mut event {
        (image.build_id, *time_ns) = (Some("abcd".parse().unwrap()), monotonic_ns());
    }
    processes.note(&event, &mut told, now);
    assert!(!told.processes.contains_key(&tgid));
}

#[test]
fn a_part_of_an_image_that_is_protected_otherwise_leaves_the_rest_as_it_was() {
    const PAGE: u64 = 4096;
    let (child, now) = (Idle::start(), Instant::now());
    let (mut told, mut processes) = (Told::default(), processes(child.id(), now));
    let tgid = child.id();
    processes.scan_all(&mut told);
    let mappings = processes.known[&tgid].mappings.clone();
    let is_wide = |mapping: &&ExecutableMapping| {
        matches!(mapping.content, Content::Image { .. }) && mapping.end - mapping.start >= 3 * PAGE
    };
    let whole = mappings.iter().find(is_wide).expect("libc has more code than that");
    let generation = told.generation;

    let mut part = whole.clone();
    (part.start, part.end) = (whole.start + PAGE, whole.start + 2 * PAGE);
    part.module.file_offset += PAGE;
    processes.note(&announced(tgid, &[part], monotonic_ns())[0], &mut told, now);
    processes.scan_due(&mut told, now);
    let parts: Vec<_> = (processes.known[&tgid].mappings.iter())
        .filter(|mapping| mapping.module.path == whole.module.path)
        .map(|part| {
            let offset = part.module.file_offset - whole.module.file_offset;
            let image = (part.module.start - whole.module.start, part.module.limit - whole.module.start);
            assert_eq!(image, (offset, offset + (part.end - part.start)));
            (part.start - whole.start, part.end - whole.start, offset)
        })
        .collect();
    let bytes = whole.end - whole.start;
    assert_eq!(parts, [(0, PAGE, 0), (PAGE, 2 * PAGE, PAGE), (2 * PAGE, bytes, 2 * PAGE)]);
    assert_eq!(told.processes[&tgid].len(), mappings.len() + 2);
    // Addresses mean what they meant.
    assert!(processes.mappings_of(&sample(tgid, generation, monotonic_ns())).is_some());
    // As before, it is one mapping again.
    processes.note(&announced(tgid, std::slice::from_ref(whole), monotonic_ns())[0], &mut told, now);
    assert!(crate::process::are_same(&processes.known[&tgid].mappings, &mappings));
    assert_eq!(processes.next_due(now), None, "nothing is to be read for it");
}

#[test]
fn what_events_do_not_tell_is_read() {
    let (child, now) = (Idle::start(), Instant::now());
    let (mut told, mut processes) = (Told::default(), processes(child.id(), now));
    let tgid = child.id();
    processes.scan_all(&mut told);
    let mappings = processes.known[&tgid].mappings.clone();
    let placed = told.processes[&tgid].clone();
    processes.note(&Event::Exec { tgid, time_ns: monotonic_ns() }, &mut told, now);
    let mut events = announced(tgid, &mappings, monotonic_ns());
    if let Event::Mapped { image: Some(image), .. } = &mut events[0] {
        image.build_id = Some("abcd".parse().unwrap());
    }
    events.iter().for_each(|event| processes.note(event, &mut told, now));
    processes.scan_due(&mut told, now);
    assert_ne!(told.processes.get(&tgid), Some(&placed));
    processes.scan_due(&mut told, now + 10 * MS);
    assert_eq!(told.processes[&tgid], placed);
    // An exec that is older than this reading was known to it.
    processes.note(&Event::Exec { tgid, time_ns: 1 }, &mut told, now);
    assert_eq!(told.processes[&tgid], placed);
}

#[test]
fn a_child_that_ran_another_program_before_its_parent_was_read_has_nothing_of_it() {
    let (child, now) = (Idle::start(), Instant::now());
    let (tgid, forked) = (child.id(), u32::MAX - 1);
    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    processes.scan_all(&mut told);
    let time_ns = monotonic_ns();
    // The parent has what it had, as is seen behind the child's exec, which is told of later.
    processes.scan_all(&mut told);
    assert!(processes.known[&tgid].whole_ns > time_ns + 1 && processes.known[&tgid].read_ns < time_ns);
    processes.note(&Event::Forked { tgid: forked, parent: tgid, time_ns }, &mut told, now);
    assert_eq!(told.processes[&forked], told.processes[&tgid]);
    processes.note(&Event::Exec { tgid: forked, time_ns: time_ns + 1 }, &mut told, now);
    assert!(processes.known[&forked].mappings.is_empty() && !told.processes.contains_key(&forked));
}

#[test]
fn after_a_loss_no_sample_has_mappings_until_its_process_is_read() {
    let (child, now) = (Idle::start(), Instant::now());
    let tgid = child.id();
    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    processes.scan_all(&mut told);
    let taken = |told: &Told| sample(tgid, told.generation, monotonic_ns());
    assert!(processes.mappings_of(&taken(&told)).is_some());
    processes.note(&Event::Lost { until_ns: 1 }, &mut told, now);
    assert!(processes.mappings_of(&taken(&told)).is_some(), "it was read since");

    processes.note(&Event::Lost { until_ns: monotonic_ns() }, &mut told, now);
    let suspect = taken(&told);
    assert!(processes.mappings_of(&suspect).is_none());
    // Nor has a child, nor does what a process maps beside the rest make it trusted.
    let (forked, mapped) = (u32::MAX - 1, processes.known[&tgid].mappings.clone());
    processes.note(&Event::Forked { tgid: forked, parent: tgid, time_ns: monotonic_ns() }, &mut told, now);
    assert!(processes.mappings_of(&sample(forked, told.generation, monotonic_ns())).is_none());
    let beside = ExecutableMapping { start: 0x1000, end: 0x2000, ..mapped[0].clone() };
    processes.note(&announced(tgid, &[beside], monotonic_ns())[0], &mut told, now);
    assert!(processes.mappings_of(&taken(&told)).is_none());
    // An exec does.
    processes.note(&Event::Exec { tgid: forked, time_ns: monotonic_ns() }, &mut told, now);
    let events = announced(forked, &mapped, monotonic_ns());
    events.iter().for_each(|event| processes.note(event, &mut told, now));
    processes.set_announced(&mut told);
    let generation = processes.known[&forked].stated.unwrap().last;
    assert!(processes.mappings_of(&sample(forked, generation, monotonic_ns())).is_some());

    // Its sample has it read at once, whatever the pause after the reading of all.
    processes.scan_due(&mut told, now);
    let generation = told.generation;
    processes.note(&Event::Lost { until_ns: monotonic_ns() }, &mut told, now + 100 * MS);
    processes.note(&Event::Sample(suspect.clone()), &mut told, now + 100 * MS);
    processes.scan_due(&mut told, now + 100 * MS);
    assert_eq!(told.generation, generation, "what is the same is not set again");
    assert!(processes.mappings_of(&taken(&told)).is_some());
    assert!(processes.mappings_of(&suspect).is_none(), "of what it mapped then nobody knows");
}
