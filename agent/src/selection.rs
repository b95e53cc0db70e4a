//! Which processes does the agent look at?
//!
//! All of them, or one and its descendants. Whether a process descends from the selected one is told
//! from fork events, and for those that nobody announced, once, from the parents in `/proc`. A parent
//! that ended leaves its children to init, and `/proc` then says nothing: that is why forks are noted.

use std::collections::HashSet;

/// Longest chain of parents followed; deeper ones are cyclic answers from processes that come and go.
const MAX_PARENTS: usize = 64;
/// Most outsiders remembered before the memory is cleared: the default of `kernel.pid_max`.
const MAX_OUTSIDERS: usize = 32_768;

/// The processes of interest.
#[derive(Clone, Debug)]
pub enum Selection {
    /// Every process.
    All,
    /// One and those that it started.
    Descendants {
        /// Those known to belong to it, itself included.
        members: HashSet<u32>,
        /// Those known not to.
        outsiders: HashSet<u32>,
    },
}

impl Selection {
    /// All, or `root` and its descendants.
    pub fn new(root: Option<u32>) -> Self {
        match root {
            None => Self::All,
            Some(root) => Self::Descendants { members: HashSet::from([root]), outsiders: HashSet::new() },
        }
    }

    /// Whether this is a choice of some.
    pub fn is_narrow(&self) -> bool {
        matches!(self, Self::Descendants { .. })
    }

    /// Whether a process belongs to it.
    pub fn includes(&mut self, tgid: u32) -> bool {
        self.includes_by(tgid, parent)
    }

    fn includes_by(&mut self, tgid: u32, parent: impl Fn(u32) -> Option<u32>) -> bool {
        let Self::Descendants { members, outsiders } = self else { return true };
        if members.contains(&tgid) {
            return true;
        }
        if outsiders.contains(&tgid) {
            return false;
        }
        let mut ancestor = tgid;
        for _ in 0..MAX_PARENTS {
            match parent(ancestor) {
                Some(above) if members.contains(&above) => {
                    members.insert(tgid);
                    return true;
                }
                Some(above) if above > 1 => ancestor = above,
                _ => break,
            }
        }
        if outsiders.len() >= MAX_OUTSIDERS {
            outsiders.clear();
        }
        outsiders.insert(tgid);
        false
    }

    /// A process was forked.
    pub fn forked(&mut self, tgid: u32, from: u32) {
        let from_member = self.includes(from);
        if let Self::Descendants { members, outsiders } = self {
            // The number may have been another process's.
            outsiders.remove(&tgid);
            if from_member {
                members.insert(tgid);
            }
        }
    }

    /// A process is gone, and its number free.
    pub fn forget(&mut self, tgid: u32) {
        if let Self::Descendants { members, outsiders } = self {
            members.remove(&tgid);
            outsiders.remove(&tgid);
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

    #[test]
    fn descendants_by_parents_and_by_forks() {
        // 10 -> 20 -> 30; 40 is init's.
        let parents = |tgid| match tgid {
            30 => Some(20),
            20 => Some(10),
            10 | 40 => Some(1),
            _ => None,
        };
        let mut selection = Selection::new(Some(20));
        for (tgid, expect) in [(20, true), (30, true), (10, false), (40, false), (99, false)] {
            assert_eq!(selection.includes_by(tgid, parents), expect, "{tgid}");
        }
        // What was an outsider's number is now a child's, whose parent soon ends.
        selection.forked(40, 30);
        assert!(selection.includes_by(40, parents));
        selection.forget(40);
        assert!(!selection.includes_by(40, parents));
        assert!(Selection::new(None).includes_by(7, parents));
    }

    #[test]
    fn cyclic_parents_end() {
        assert!(!Selection::new(Some(5)).includes_by(7, |tgid| Some(tgid ^ 1)));
    }

    #[test]
    fn own_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(parent(child.id()), Some(std::process::id()));
        assert!(Selection::new(Some(std::process::id())).includes(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
