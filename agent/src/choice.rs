//! Which processes count, by what can be told of them?
//!
//! A process counts if one of the rules that include it holds, or there is none of these, and no rule holds that
//! excludes it. Rules that exclude are there for what must not leave the host, so one that cannot be decided
//! (the process has ended, or its executable is hidden) excludes.

use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::cgroup;

/// A rule: `cgroup=GLOB`, `command=GLOB`, `uid=N` or `uid=N-M`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The path of the control group, as in `/proc/PID/cgroup`.
    Cgroup(Glob),
    /// The executable's path, if there is a slash in it; else its file name, or the name of the first thread.
    Command(Glob),
    /// The effective user.
    User(RangeInclusive<u32>),
}

/// A text that is no [`Rule`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no rule, expected cgroup=GLOB, command=GLOB, uid=N or uid=N-M")]
pub struct RuleError(String);

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let error = || RuleError(text.to_owned());
        let number = |text: &str| text.parse().map_err(|_| error());
        match text.split_once('=').ok_or_else(error)? {
            (_, "") => Err(error()),
            ("cgroup", glob) => Ok(Self::Cgroup(Glob(glob.to_owned()))),
            ("command", glob) => Ok(Self::Command(Glob(glob.to_owned()))),
            ("uid", range) => {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let range = number(first)?..=number(last)?;
                if range.is_empty() { Err(error()) } else { Ok(Self::User(range)) }
            }
            _ => Err(error()),
        }
    }
}

/// A pattern for a whole text: `*` is any characters, slashes too, `?` is any one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    /// Whether `text` is one of those that the pattern means.
    fn is_match(&self, text: &str) -> bool {
        let (pattern, text): (Vec<char>, Vec<char>) = (self.0.chars().collect(), text.chars().collect());
        let (mut at, mut read) = (0, 0);
        // The last star, and what it has taken so far: it takes one more when the rest does not fit.
        let mut star = None;
        while read < text.len() {
            match pattern.get(at) {
                Some('*') => {
                    star = Some((at, read));
                    at += 1;
                }
                Some(character) if *character == '?' || *character == text[read] => {
                    at += 1;
                    read += 1;
                }
                _ => match star {
                    None => return false,
                    Some((behind, taken)) => {
                        star = Some((behind, taken + 1));
                        (at, read) = (behind + 1, taken + 1);
                    }
                },
            }
        }
        pattern[at..].iter().all(|character| *character == '*')
    }
}

/// What is told of a process; `None` where it cannot be told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traits {
    cgroup: Option<String>,
    uid: Option<u32>,
    /// Name of the first thread.
    comm: Option<String>,
    /// Path of the executable; empty if there is none, as of kernel threads.
    executable: Option<String>,
}

impl Traits {
    /// From `/proc`.
    pub(crate) fn read(tgid: u32) -> Self {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{tgid}/{name}")).ok();
        let comm = read("comm").map(|comm| comm.trim_end_matches('\n').to_owned());
        let executable = match std::fs::read_link(format!("/proc/{tgid}/exe")) {
            Ok(path) => Some(path.to_string_lossy().trim_end_matches(" (deleted)").to_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                comm.as_ref().map(|_| String::new())
            }
            Err(_) => None,
        };
        Self {
            cgroup: read("cgroup")
                .filter(|groups| !groups.is_empty())
                .map(|groups| cgroup::parse(&groups).path),
            uid: read("status").as_deref().and_then(effective_user),
            comm,
            executable,
        }
    }
}

#[cfg(test)]
impl Traits {
    /// Those that `/proc/PID/status` has.
    pub(crate) fn of_status(status: &str) -> Self {
        Self { uid: effective_user(status), ..Self::default() }
    }
}

/// The second number of `Uid:`, behind the real one (proc_pid_status(5)).
fn effective_user(status: &str) -> Option<u32> {
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_ascii_whitespace().nth(1)?.parse().ok()
}

impl Rule {
    /// Whether it holds, if that can be told.
    fn holds(&self, traits: &Traits) -> Option<bool> {
        match self {
            Self::Cgroup(glob) => traits.cgroup.as_deref().map(|path| glob.is_match(path)),
            Self::User(range) => traits.uid.map(|uid| range.contains(&uid)),
            Self::Command(glob) if glob.0.contains('/') => {
                traits.executable.as_deref().map(|path| glob.is_match(path))
            }
            Self::Command(glob) => {
                let file_name = traits.executable.as_deref().and_then(|path| path.rsplit('/').next());
                let comm = traits.comm.as_deref()?;
                Some(glob.is_match(comm) || file_name.is_some_and(|name| glob.is_match(name)))
            }
        }
    }
}

/// The rules together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Of which one must hold, if there are any.
    pub include: Vec<Rule>,
    /// Of which none may hold.
    pub exclude: Vec<Rule>,
}

impl Choice {
    /// Whether every process counts.
    pub fn is_everything(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// Whether a process counts.
    pub(crate) fn takes(&self, traits: &Traits) -> bool {
        let included = |rule: &Rule| rule.holds(traits) == Some(true);
        let spared = |rule: &Rule| rule.holds(traits) == Some(false);
        (self.include.is_empty() || self.include.iter().any(included)) && self.exclude.iter().all(spared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn globs() {
        for (pattern, text, expect) in [
            ("nginx", "nginx", true),
            ("nginx", "nginx2", false),
            ("nginx*", "nginx", true),
            ("*/pod?/*", "/kubepods/besteffort/pod7/c", true),
            ("*/pod?/*", "/kubepods/besteffort/pod77/c", false),
            ("/system.slice/*.service", "/system.slice/a/b.service", true),
            ("a*b*c", "aXbXbc", true),
            ("a*b*c", "aXbXb", false),
            ("*", "", true),
            ("?", "", false),
            ("?", "ä", true),
            ("[a]", "a", false),
        ] {
            assert_eq!(Glob(pattern.to_owned()).is_match(text), expect, "{pattern} {text}");
        }
    }

    /// What a glob means, by the definition.
    fn matches(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern.split_first(), text.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) if matches(rest, text) => true,
            (Some((b'*', _)), Some((_, behind))) => matches(pattern, behind),
            (Some((want, rest)), Some((have, behind))) if *want == b'?' || want == have => {
                matches(rest, behind)
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn globs_mean_what_they_are_defined_to(pattern in "[ab*?]{0,8}", text in "[ab]{0,8}") {
            let expect = matches(pattern.as_bytes(), text.as_bytes());
            prop_assert_eq!(Glob(pattern).is_match(&text), expect);
        }
    }

    #[test]
    fn rules_as_text() {
        assert_eq!("uid=7".parse(), Ok(Rule::User(7..=7)));
        assert_eq!("uid=1000-1999".parse(), Ok(Rule::User(1000..=1999)));
        assert_eq!("cgroup=/a=b".parse(), Ok(Rule::Cgroup(Glob("/a=b".to_owned()))));
        for wrong in ["nginx", "uid=", "uid=root", "uid=9-1", "uid=-1", "command=", "pid=7", ""] {
            assert!(wrong.parse::<Rule>().unwrap_err().to_string().contains("expected"), "{wrong}");
        }
    }

    #[test]
    fn one_that_includes_and_none_that_excludes() {
        let nginx = Traits {
            cgroup: Some("/system.slice/nginx.service".to_owned()),
            uid: Some(33),
            comm: Some("nginx: worker".to_owned()),
            executable: Some("/usr/sbin/nginx".to_owned()),
        };
        let kernel = Traits {
            cgroup: Some("/".to_owned()),
            uid: Some(0),
            comm: Some("kswapd0".to_owned()),
            executable: Some(String::new()),
        };
        let gone = Traits::default();
        for (include, exclude, expect) in [
            (&[] as &[&str], &[] as &[&str], [true, true, true]),
            (&["command=nginx"], &[], [true, false, false]),
            (&["command=nginx: *"], &[], [true, false, false]),
            (&["command=/usr/*"], &[], [true, false, false]),
            (&["uid=1-40", "command=kswapd?"], &[], [true, true, false]),
            (&["cgroup=/system.slice/*"], &["uid=33"], [false, false, false]),
            (&[], &["command=/usr/*"], [false, true, false]),
            (&[], &["cgroup=/user.slice/*"], [true, true, false]),
            (&[], &["uid=0"], [true, false, false]),
        ] {
            let choice = Choice { include: rules(include), exclude: rules(exclude) };
            let takes = [&nginx, &kernel, &gone].map(|traits| choice.takes(traits));
            assert_eq!(takes, expect, "{include:?} {exclude:?}");
        }
    }

    #[test]
    fn traits_of_a_real_process() {
        let own = Traits::read(std::process::id());
        // SAFETY: the call cannot fail and touches no memory.
        assert_eq!(own.uid, Some(unsafe { libc::geteuid() }));
        assert_eq!(own.executable, Some(std::env::current_exe().unwrap().to_string_lossy().into_owned()));
        assert!(own.cgroup.is_some_and(|path| path.starts_with('/')));
        let name = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(own.comm.as_deref(), Some(name.trim_end()));
        // Above the highest that kernel.pid_max may be.
        let none = Traits::read(4_194_305);
        assert!(
            none.cgroup.is_none() && none.uid.is_none() && none.comm.is_none() && none.executable.is_none()
        );
    }
}
