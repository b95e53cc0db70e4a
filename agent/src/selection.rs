//! Which processes does the agent look at?
//!
//! All of them, or one and its descendants; of those, what the rules of a [`Choice`] leave. Whether a process
//! descends from the selected one is told from fork events, and for those that nobody announced, once, from the
//! parents in `/proc`. A parent that ended leaves its children to init, and `/proc` then says nothing:
//! that is why forks are noted. What rules say of a process is remembered until it runs another program, and is
//! found out again now and then, for processes change their user and are moved between control groups. A fork
//! is as its parent.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::choice::{Choice, Traits};

/// Longest chain of parents followed; deeper ones are cyclic answers from processes that come and go.
const MAX_PARENTS: usize = 64;
/// Most outsiders remembered before the memory is cleared: the default of `kernel.pid_max`.
const MAX_OUTSIDERS: usize = 32_768;
/// How long what rules say of a process counts: at four small files each, a host of a thousand processes pays
/// a thousandth of a core.
const REVIEW_AFTER: Duration = Duration::from_secs(60);

/// The processes of interest.
#[derive(Clone, Debug)]
pub struct Selection {
    /// `None` for every process.
    descent: Option<Descent>,
    choice: Choice,
    /// What the rules say of processes.
    chosen: HashMap<u32, bool>,
    last_review: Option<Instant>,
}

/// One process and those that it started.
#[derive(Clone, Debug)]
struct Descent {
    /// Those known to belong to it, itself included.
    members: HashSet<u32>,
    /// Those known not to.
    outsiders: HashSet<u32>,
}

impl Selection {
    /// All, or `root` and its descendants; of them, those that `choice` takes.
    pub fn new(root: Option<u32>, choice: Choice) -> Self {
        let descent = root.map(|root| Descent { members: HashSet::from([root]), outsiders: HashSet::new() });
        Self { descent, choice, chosen: HashMap::new(), last_review: None }
    }

    /// Whether this is one process and its descendants.
    pub fn is_narrow(&self) -> bool {
        self.descent.is_some()
    }

    /// Whether a process belongs to it.
    pub fn includes(&mut self, tgid: u32) -> bool {
        self.descends(tgid) && self.is_chosen(tgid, Traits::read)
    }

    fn descends(&mut self, tgid: u32) -> bool {
        self.descent.as_mut().is_none_or(|descent| descent.includes(tgid, parent))
    }

    fn is_chosen(&mut self, tgid: u32, read: impl FnOnce(u32) -> Traits) -> bool {
        self.choice.is_everything()
            || *self.chosen.entry(tgid).or_insert_with(|| self.choice.takes(&read(tgid)))
    }

    /// A process was forked.
    pub fn forked(&mut self, tgid: u32, from: u32) {
        if let Some(descent) = &mut self.descent {
            descent.forked(tgid, from);
        }
        match self.chosen.get(&from) {
            Some(chosen) => self.chosen.insert(tgid, *chosen),
            // The number may have been another process's.
            None => self.chosen.remove(&tgid),
        };
    }

    /// A process runs another program.
    pub fn exec(&mut self, tgid: u32) {
        self.chosen.remove(&tgid);
    }

    /// Events were lost: any number may be another process's by now, or run another program.
    pub fn lost(&mut self) {
        if let Some(descent) = &mut self.descent {
            descent.outsiders.clear();
        }
        self.chosen.clear();
    }

    /// A process is gone, and its number free.
    pub fn forget(&mut self, tgid: u32) {
        if let Some(descent) = &mut self.descent {
            descent.members.remove(&tgid);
            descent.outsiders.remove(&tgid);
        }
        self.chosen.remove(&tgid);
    }

    /// Forgets what rules said, if that was long ago. Whether it did: then others may belong to the selection now.
    pub fn review(&mut self, now: Instant) -> bool {
        let last = *self.last_review.get_or_insert(now);
        let is_due = !self.choice.is_everything() && now.saturating_duration_since(last) >= REVIEW_AFTER;
        if is_due {
            self.last_review = Some(now);
            self.chosen.clear();
        }
        is_due
    }
}

impl Descent {
    fn includes(&mut self, tgid: u32, parent: impl Fn(u32) -> Option<u32>) -> bool {
        if self.members.contains(&tgid) {
            return true;
        }
        if self.outsiders.contains(&tgid) {
            return false;
        }
        let mut ancestor = tgid;
        for _ in 0..MAX_PARENTS {
            match parent(ancestor) {
                Some(above) if self.members.contains(&above) => {
                    self.members.insert(tgid);
                    return true;
                }
                Some(above) if above > 1 => ancestor = above,
                _ => break,
            }
        }
        if self.outsiders.len() >= MAX_OUTSIDERS {
            self.outsiders.clear();
        }
        self.outsiders.insert(tgid);
        false
    }

    fn forked(&mut self, tgid: u32, from: u32) {
        let from_member = self.includes(from, parent);
        // The number may have been another process's.
        self.outsiders.remove(&tgid);
        if from_member {
            self.members.insert(tgid);
        }
    }
}

/// The parent of a process: the second field behind the name in `/proc/PID/stat` (proc_pid_stat(5)).
fn parent(tgid: u32) -> Option<u32> {
    let stat = std::fs::read(format!("/proc/{tgid}/stat")).ok()?;
    // The name is in parentheses and may hold any others.
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descendants_of(root: u32) -> Selection {
        Selection::new(Some(root), Choice::default())
    }

    #[test]
    fn what_rules_say_lasts_until_something_changes() {
        let mut selection =
            Selection::new(None, Choice { include: vec!["uid=0".parse().unwrap()], exclude: vec![] });
        let status = |uid: u32| format!("Name:\tx\nUid:\t5\t{uid}\t5\t5\n");
        let root = |_| Traits::of_status(&status(0));
        let other = |_| Traits::of_status(&status(9));
        let never = |tgid: u32| -> Traits { panic!("{tgid} is read again") };
        assert!(selection.is_chosen(7, root));
        selection.forked(8, 7);
        assert!(selection.is_chosen(8, never) && selection.is_chosen(7, never));
        // Another program may run as another user.
        selection.exec(8);
        assert!(!selection.is_chosen(8, other));
        // A number that comes again is another process's.
        selection.forked(7, 99);
        assert!(!selection.is_chosen(7, other));
        selection.forget(7);
        assert!(selection.is_chosen(7, root));
        let start = Instant::now();
        assert!(!selection.review(start) && !selection.review(start + REVIEW_AFTER / 2));
        assert!(selection.is_chosen(7, never));
        assert!(selection.review(start + REVIEW_AFTER));
        assert!(!selection.is_chosen(7, other));
        assert!(!Selection::new(None, Choice::default()).review(start + 3 * REVIEW_AFTER));
    }

    #[test]
    fn descendants_by_parents_and_by_forks() {
        // 10 -> 20 -> 30; 40 is init's.
        let parents = |tgid| match tgid {
            30 => Some(20),
            20 => Some(10),
            10 | 40 => Some(1),
            _ => None,
        };
        let mut selection = descendants_of(20);
        let includes = |selection: &mut Selection, tgid| {
            selection.descent.as_mut().is_none_or(|descent| descent.includes(tgid, parents))
        };
        for (tgid, expect) in [(20, true), (30, true), (10, false), (40, false), (99, false)] {
            assert_eq!(includes(&mut selection, tgid), expect, "{tgid}");
        }
        // What was an outsider's number is now a child's, whose parent soon ends.
        selection.forked(40, 30);
        assert!(includes(&mut selection, 40));
        selection.forget(40);
        assert!(!includes(&mut selection, 40));
        assert!(includes(&mut Selection::new(None, Choice::default()), 7));
    }

    #[test]
    fn cyclic_parents_end() {
        let mut descent = descendants_of(5).descent.unwrap();
        assert!(!descent.includes(7, |tgid| Some(tgid ^ 1)));
    }

    #[test]
    fn own_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(parent(child.id()), Some(std::process::id()));
        assert!(descendants_of(std::process::id()).includes(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
